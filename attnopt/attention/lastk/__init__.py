"""Last-k attention and mixtures of candidate masks."""

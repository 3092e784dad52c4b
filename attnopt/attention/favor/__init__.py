"""FAVOR+ (the Performer) and its family: attention through positive features."""

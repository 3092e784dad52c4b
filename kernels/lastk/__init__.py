"""Last-k masks with learnable weights: attention over a band of recent tokens, and sinks."""

from attnopt.kernels.lastk.op import lastk_attention, lastk_decode, sliding_window_attention

__all__ = ["lastk_attention", "lastk_decode", "sliding_window_attention"]

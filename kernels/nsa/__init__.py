"""Native Sparse Attention: compressed, selected and sliding, under one softmax or under gates."""

from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.op import (
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

__all__ = [
    "compressed_attention",
    "mean_compress",
    "nsa_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

"""How the Triton kernels cut a call: blocks of tokens, and segments of blocks for programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FEATURES = 256
FP32_OPERANDS = (torch.float32, torch.float16)
# What fits the shared memory of a processor, 227 KiB on sm_90: head dimension, numbers of a state.
LARGEST = {True: (128, 128 * 128), False: (512, 256 * 128)}  # with operands of four bytes, of two
PROCESSORS = 132  # assumed where the device does not say
# Tokens of a segment per feature: its state, M x D in fp32, is written and read some three times.
TOKENS_PER_FEATURE = 8
segments_override: int | None = None  # tests set it


@dataclass(frozen=True)
class Plan:
    """The cut of one call.

    A query block t sees blocks t - lag + 1 .. t exactly (where there is a window); of block
    t - lag its first `split` rows see the keys exactly and the others through features; earlier
    ones are in the state. Without a window lag and split are 0.

    Attributes:
        block: tokens of a block.
        tile: rows of a tile, a power of two >= block and >= 16.
        blocks: number of blocks from a row's first real token to the end, at most.
        lag: see above.
        split: see above; equal to `block` where all rows of a block have the same window.
        segments: programs along the sequence.
        run: blocks of a segment.
        features: M rounded up to a power of two >= 16.
        cols: D rounded up likewise.
        reload: whether W is too large to stay with a program.
    """

    block: int
    tile: int
    blocks: int
    lag: int
    split: int
    segments: int
    run: int
    features: int
    cols: int
    reload: bool

    @property
    def absorbed(self) -> int:
        """Blocks that enter the state at most: those `lag` before the last one."""
        return max(self.blocks - self.lag, 0)


def power_of_two(number: int) -> int:
    """The next power of two, at least 16: what a tile of a matrix product needs."""
    return max(16, 1 << (number - 1).bit_length())


def fits(q: Tensor, num_features: int) -> bool:
    """Whether the Triton kernels hold a state of M features for inputs like `q` `[B, H, N, D]`."""
    features, cols = power_of_two(num_features), power_of_two(q.shape[3])
    largest, numbers = LARGEST[q.dtype in FP32_OPERANDS]
    return num_features <= MAX_FEATURES and cols <= largest and features * cols <= numbers


def make_plan(
    q: Tensor, k: Tensor, num_features: int, *, window: int, window_block: int, causal: bool
) -> Plan:
    """Cut a call with up to `MAX_FEATURES` features; sizes and the kind of device decide."""
    B, H, _, D = q.shape
    Nk = k.shape[2]
    features, cols = power_of_two(num_features), power_of_two(D)
    block = window_block if window else _chunk(features, cols, q.dtype)
    blocks = -(-Nk // block)
    lag = split = 0
    if window:
        lag, split = (window - 1) // block, (window - 1) % block  # divmod takes no SymInt
        lag, split = (lag + 1, split) if split else (lag, block)
    segments = _segments(q, B * H, Nk, num_features)
    run = -(-blocks // segments)
    segments = -(-blocks // run)
    wide = q.dtype in FP32_OPERANDS  # operands of four bytes, and three TF32 passes
    reload = features * cols > (32 * 32 if wide else 128 * 64)
    return Plan(
        block, power_of_two(block), blocks, lag, split, segments, run, features, cols, reload
    )


def _chunk(features: int, cols: int, dtype: torch.dtype) -> int:
    """Tokens of a block without a window, by registers."""
    if dtype in FP32_OPERANDS:
        return 32 if features * cols <= 32 * 32 else 16
    return 32 if features * cols <= 128 * 64 else 16


def _segments(q: Tensor, heads: int, Nk: int, num_features: int) -> int:
    """Programs along the sequence: enough to fill the device twice, each worth its state."""
    if segments_override is not None:
        return segments_override
    processors = PROCESSORS
    if q.device.type == "cuda":
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    wanted = -(-2 * processors // heads)
    worth = Nk // max(256, TOKENS_PER_FEATURE * num_features)
    return max(1, min(wanted, worth))


def saved_shapes(
    q: Tensor, k: Tensor, projection: Tensor, *, feature_map: str, window: int,
    window_block: int, causal: bool,
) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the forward pass keeps: each segment's first state, and the references."""
    B, H, _, D = q.shape
    M = projection.shape[1]
    p = make_plan(q, k, M, window=window, window_block=window_block, causal=causal)
    entries = p.absorbed + 1 if causal else 1
    return (
        (B, H, p.segments, M, D), (B, H, p.segments, M), (B, H, p.segments, M),
        (B, H, entries, M),
    )

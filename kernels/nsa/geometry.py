"""Which blocks a query sees: the geometry that every implementation of NSA shares.

Positions count from a row's first real token, `start`. Compressed block c covers positions
`[c d, c d + l)`, selection block j covers `[j b, (j + 1) b)`. A query at position p has *near*
tokens, those from block `near(p)` on, which are never selected but always seen:

    near(p) = floor(max(0, p - Wn + 1) / b),    or floor(p / b) + 1 without a near window

So Wn tokens are near at least, and `Wn = (n - 1) b + 1` makes it the last n blocks exactly.

Letters: B batch, Nq queries, Nk keys (the queries are the last Nq), l compression block, d stride,
b selection block, Wn near window, P compressed blocks, nb selection blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnopt.kernels.rows import first_real_token


def compressed_count(tokens: int, block: int, stride: int) -> int:
    """Number of compressed blocks, P, that lie wholly within so many tokens."""
    return 0 if tokens < block else (tokens - block) // stride + 1


def selection_count(tokens: int, select_block: int) -> int:
    """Number of selection blocks, nb, the last of which may be cut short."""
    return -(-tokens // select_block)


def near_window_of(local_blocks: int, select_block: int) -> int:
    """The near window Wn that is the last so many blocks, the query's own among them."""
    return (local_blocks - 1) * select_block + 1 if local_blocks else 0


def row_starts(key_mask: Tensor | None, like: Tensor) -> Tensor:
    """First real token of each row, `[B]` int32, on the device of `like` `[B, ...]`."""
    if key_mask is None:
        return torch.zeros(like.shape[0], dtype=torch.int32, device=like.device)
    return first_real_token(key_mask).int()


def query_positions(start: Tensor, queries: int, offset: int) -> Tensor:
    """Position p of each query, `[B, Nq]` int64; negative in padding before the text."""
    rows = torch.arange(offset, offset + queries, device=start.device)
    return rows - start[:, None].long()


def near_block(position: Tensor, select_block: int, near_window: int) -> Tensor:
    """First near block of queries at these positions, same shape; at least 0."""
    if near_window == 0:
        return position.div(select_block, rounding_mode="floor").add(1).clamp_min(0)
    return (position - near_window + 1).clamp_min(0) // select_block


def real_tokens(key_mask: Tensor, start: Tensor, block: int, stride: int, count: int) -> Tensor:
    """Number of real tokens in each block of a row, `[B, count]` int64."""
    total = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))  # before each column
    first = torch.arange(count, device=start.device) * stride + start[:, None].long()
    length = key_mask.shape[1]
    return total.gather(1, (first + block).clamp_max(length)) - total.gather(
        1, first.clamp_max(length)
    )


def first_overlap(j: Tensor, block: int, stride: int, select_block: int) -> Tensor:
    """The first compressed block that shares a token with selection block j; may be negative."""
    return (j * select_block - block).div(stride, rounding_mode="floor") + 1


def overlap_count(block: int, stride: int, select_block: int) -> int:
    """Most compressed blocks that share a token with one selection block."""
    shifts = range(0, stride, math.gcd(select_block, stride))  # of j b against the stride
    return max((r + select_block - 1) // stride - (r - block) // stride for r in shifts)


def overlap(c: Tensor, j: Tensor, block: int, stride: int, select_block: int) -> Tensor:
    """Tokens that compressed blocks c share with selection blocks j, broadcast; 0 for c < 0."""
    first = torch.maximum(c * stride, j * select_block)
    end = torch.minimum(c * stride + block, (j + 1) * select_block)
    return (end - first).clamp_min(0).masked_fill(c < 0, 0)

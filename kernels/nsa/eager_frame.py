"""What the eager paths of NSA share: how work is cut, and rows laid out so that blocks align.

A padded row counts its blocks from its first real token, so rows of a batch have their blocks at
different columns. A `Frame` moves each row to the right by less than a block, until its text begins
at the start of a block. There, column c of every row lies in block c // b, and only the number of
the text's first block still differs between rows. Without left padding nothing moves.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, X = B Hkv sequences, Nq queries,
Nk keys (the queries are the last Nq), D head dim, b selection block, nb blocks of a frame,
M = Nq + the longest move (rows of a frame), S slots.

All eager paths of NSA keep scores and their log-sum-exp in powers of two: log2(e) is folded into
the scale of the queries. On CPU `exp` takes ten times as long, and up to eighty, for arguments that
underflow, of which masks and peaked softmaxes make many; `exp2` does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.nsa.geometry import near_block

SEGMENT_BYTES = 2 << 20  # of scores at a time: they stay in the cache, measured on CPU
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
CHUNK = 128  # queries that share one dense tile of scores


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def pieces(
    sequences: int, rows: int, group: int, itemsize: int, width: Callable[[int, int], int]
) -> Iterator[tuple[slice, slice, int]]:
    """Cut dense scores into pieces of at most `SEGMENT_BYTES`, of few rows and sequences at least.

    Args:
        sequences: X.
        rows: queries of a sequence.
        group: G, heads that share keys.
        itemsize: bytes of a score.
        width: number of keys that queries `[first, end)` may see.

    Yields:
        Sequences, queries, and the width of their scores.
    """
    budget = SEGMENT_BYTES // (group * itemsize)
    first = 0
    while first < rows:
        end = min(rows, first + CHUNK)
        keys = width(first, end)
        fitting = max(16, budget // max(keys, 1))
        if first + fitting < end:
            end = first + fitting
            keys = width(first, end)
        step = max(1, budget // max((end - first) * keys, 1))
        for x in range(0, sequences, step):
            yield slice(x, min(x + step, sequences)), slice(first, end), keys
        first = end


def by_group(x: Tensor, heads: int) -> Tensor:
    """`[B, H, N, ...]` as `[X, G, N, ...]`."""
    return x.reshape(x.shape[0] * heads, x.shape[1] // heads, *x.shape[2:])


def take(x: Tensor, at: tuple[slice, slice]) -> Tensor:
    """Sequences and rows of `[X, G, N, D]`, the heads one after another: `[x, G C, D]`."""
    return x[at[0], :, at[1]].flatten(1, 2)


def to_powers(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """A natural log-sum-exp in base 2, +inf for rows that see nothing: 0 probabilities there."""
    return (lse.to(dtype) * LOG2_E).masked_fill_(lse == -torch.inf, torch.inf)


def powers(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scores `[..., n]` into `2^{s - top}` in place; returns top and the sums `[..., 1]`."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)  # rows that see nothing
    scores.sub_(top).exp2_()
    return top, scores.sum(-1, keepdim=True)


class Frame:
    """Rows moved so that blocks begin at multiples of the block size; M rows of queries."""

    def __init__(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, start: Tensor, select_block: int
    ) -> None:
        self.B, self.H, self.Nq, self.D = q.shape
        self.Hkv, self.Nk = k.shape[1:3]
        self.X, self.G, self.b = self.B * self.Hkv, self.H // self.Hkv, select_block
        self.dtype, self.device = wide_dtype(q), q.device
        if key_mask is not None and bool(key_mask.all()):
            key_mask = None
        self.start = start.long()
        self.shift, extra = torch.zeros_like(self.start), 0
        if key_mask is not None:
            self.shift = (-self.start) % select_block
            extra = int(self.shift.max())
        self.moved = extra > 0
        self.offset = self.Nk - self.Nq  # column of the first query
        self.M, self.N = self.Nq + extra, self.Nk + extra
        self.nb = -(-self.N // select_block)
        self.first = (self.start + self.shift) // select_block  # block in which the text begins
        self.hidden: Tensor | None = None  # [B, nb b] columns that hold no real token
        if key_mask is not None:
            real = key_mask.unsqueeze(1)
            real = self._move(real, self.N) if self.moved else real
            self.hidden = F.pad(~real[:, 0], (0, self.nb * self.b - self.N), value=True)

    def _move(self, x: Tensor, size: int) -> Tensor:
        """Move `[B, h, n, ...]` by `shift` `[B]` into `[B, h, size, ...]`, zeros elsewhere."""
        source = torch.arange(size, device=x.device) - self.shift[:, None]  # [B, size]
        outside = ((source < 0) | (source >= x.shape[2]))[:, None]
        source = source.clamp(0, x.shape[2] - 1)[:, None]
        while source.dim() < x.dim():
            source, outside = source.unsqueeze(-1), outside.unsqueeze(-1)
        shape = (*x.shape[:2], size, *x.shape[3:])
        return x.gather(2, source.expand(shape)).masked_fill_(outside, 0)

    def queries(self, x: Tensor) -> Tensor:
        """`[B, H, Nq, ...]` as `[X, G, M, ...]` in the dtype of the computation."""
        x = x.to(self.dtype)
        return by_group(self._move(x, self.M) if self.moved else x.contiguous(), self.Hkv)

    def log_sums(self, lse: Tensor) -> Tensor:
        """A natural `[B, H, Nq]` as `[X, G, M]` in base 2, +inf in rows that see nothing."""
        lse = to_powers(lse, self.dtype)
        if not self.moved:
            return by_group(lse, self.Hkv)
        lse = self._move(lse, self.M)
        r = torch.arange(self.M, device=self.device) - self.shift[:, None]
        lse.masked_fill_(((r < 0) | (r >= self.Nq))[:, None], torch.inf)
        return by_group(lse, self.Hkv)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, Hkv, Nk, D]` as `[X, nb b, D]`, zeros where there is no token."""
        size = self.nb * self.b
        if self.moved:
            return self._move(x.to(self.dtype), size).flatten(0, 1)
        if size == self.Nk:
            return x.to(self.dtype).contiguous().view(self.X, size, self.D)
        out = x.new_zeros(self.B, self.Hkv, size, self.D, dtype=self.dtype)
        out[:, :, : self.Nk] = x
        return out.flatten(0, 1)

    def restore(self, x: Tensor, like: Tensor) -> Tensor:
        """Inverse of `queries` and `keys`, in the shape, dtype and layout of `like`."""
        x = x.reshape(*like.shape[:2], -1, *like.shape[3:])
        out = torch.empty_like(like)
        if not self.moved:
            return out.copy_(x[:, :, : like.shape[2]])
        source = (torch.arange(like.shape[2], device=x.device) + self.shift[:, None])[:, None]
        while source.dim() < x.dim():
            source = source.unsqueeze(-1)
        return out.copy_(x.gather(2, source.expand(like.shape)))

    def near(self, near_window: int) -> Tensor:
        """First near block of each row in the frame's count, `[B, M]` int64."""
        column = torch.arange(self.offset, self.N, device=self.device)
        position = column - (self.start + self.shift)[:, None]
        return near_block(position, self.b, near_window) + self.first[:, None]

    def slots(self, chosen: Tensor) -> Tensor:
        """Chosen blocks in the frame's count, `[X, M, S]` int64, -1 for none."""
        chosen = chosen.long()
        if self.moved or self.hidden is not None:
            chosen = torch.where(chosen < 0, -1, chosen + self.first[:, None, None, None])
        if self.moved:
            chosen = self._move(chosen + 1, self.M) - 1
        return chosen.flatten(0, 1)

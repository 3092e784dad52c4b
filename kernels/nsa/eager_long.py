"""Attention to near and chosen blocks for long texts: chosen blocks one by one, linear time.

A pair is a query and a block it chose. Pairs are sorted by block, stably, and the run of a block is
cut into tiles of T pairs, the last one filled up with a row that is nobody's. A tile's queries are
gathered, meet the b keys of one block in a `bmm`, and leave a partial sum with its max and total:

    top_s = max_j s_ij,  total_s = sum_j e^{s_ij - top_s},  part_s = sum_j e^{s_ij - top_s} v_j
    lse_i = log(e^{near lse_i} + sum_s e^{top_s} total_s)
    o_i = e^{near lse_i - lse_i} near_i + sum_s e^{top_s - lse_i} part_s

The last sum is a weighted `embedding_bag`: slot s of query i says where its partial sum lies.
Backward goes through the same tiles; dq is the sum of a query's slots, dk and dv that of a block's
tiles. A block that every query chose is merely many tiles. Nothing is accumulated atomically.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv (they share pairs), X = B Hkv
sequences, M rows of a frame, D head dim, b selection block, nb blocks, S slots, n tiles of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.nsa.eager_frame import LN_2, LOG2_E, SEGMENT_BYTES, Frame, powers
from attnopt.kernels.nsa.eager_near import Near, near_backward, near_forward

PART_BYTES = 32 << 20  # of partial sums at a time, but one sequence's at least


@dataclass(frozen=True)
class Group:
    """Sequences `x` whose partial sums lie in one buffer, that of tiles `first:end`."""

    x: slice
    first: int
    end: int


class Pairs:
    """The tiles of a call: which block each reads, which rows, and where each slot's sum lies."""

    def __init__(self, frame: Frame, slots: Tensor) -> None:
        self.frame, f = frame, frame
        self.S, X, M = slots.shape[2], f.X, f.M
        self.T = T = 64 if f.G <= 2 else 32
        blocks = X * f.nb
        base = torch.arange(X, device=f.device)[:, None, None] * f.nb
        owner = torch.where(slots < 0, blocks, slots + base).int().flatten()
        owner, order = owner.sort(stable=True)
        owner = owner.long()
        counts = torch.bincount(owner, minlength=blocks + 1)[:blocks]
        before = counts.cumsum(0) - counts
        tiles = (counts + (T - 1)) // T
        ends = tiles.cumsum(0)
        self.first_tile = ends - tiles  # [X nb]
        starts = F.pad(ends.view(X, f.nb)[:, -1], (1, 0)).tolist()
        self.starts, self.total = starts, starts[-1]
        self.block = torch.repeat_interleave(tiles, output_size=self.total)  # [n]
        rank = torch.arange(self.total, device=f.device) - self.first_tile[self.block]
        within = rank[:, None] * T + torch.arange(T, device=f.device)
        pair = (before[self.block][:, None] + within).clamp_max_(order.numel() - 1)
        spare = X * M  # a row of zeros
        self.rows = torch.where(
            within < counts[self.block][:, None], order[pair] // max(self.S, 1), spare
        )
        place = torch.arange(order.numel(), device=f.device)
        place += F.pad(self.first_tile * T - before, (0, 1))[owner]
        place.masked_fill_(owner == blocks, self.total * T)  # behind the last tile
        self.places = torch.empty_like(place).scatter_(0, order, place).view(X, M, self.S)

    def groups(self) -> Iterator[Group]:
        """Sequences whose partial sums fit `PART_BYTES`, one at least."""
        f = self.frame
        most = PART_BYTES // (self.T * f.G * f.D * f.dtype.itemsize)
        x = 0
        while x < f.X:
            end = x + 1
            while end < f.X and self.starts[end + 1] - self.starts[x] <= most:
                end += 1
            yield Group(slice(x, end), self.starts[x], self.starts[end])
            x = end

    def runs(self, group: Group) -> Iterator[slice]:
        """Tiles whose scores fit `SEGMENT_BYTES`."""
        f = self.frame
        step = max(1, SEGMENT_BYTES // (self.T * f.G * f.b * f.dtype.itemsize))
        for first in range(group.first, group.end, step):
            yield slice(first, min(first + step, group.end))

    def place(self, group: Group) -> Tensor:
        """Where the slots of a group lie in its buffer `[x, M, S]`, its last row if nowhere."""
        last = (group.end - group.first) * self.T
        return (self.places[group.x] - group.first * self.T).clamp_max_(last)

    def gather(self, rows: Tensor, run: slice) -> Tensor:
        """Rows `[X M + 1, G E]` of a run's tiles, `[n, T G, E]`."""
        taken = rows.index_select(0, self.rows[run].flatten())
        return taken.view(run.stop - run.start, self.T * self.frame.G, -1)

    def bias(self, run: slice, causal: bool) -> Tensor | None:
        """0 for keys that a run's rows may see, else -inf: `[n, T G or 1, b]`; None if all are 0.

        Args:
            run: tiles.
            causal: whether a query may have chosen its own block.
        """
        f, own = self.frame, self.block[run]
        unseen = None
        if f.hidden is not None:
            table = f.hidden.view(f.B, f.nb, f.b)
            unseen = table[own // (f.nb * f.Hkv), own % f.nb].unsqueeze(1)
        if causal:
            key = (own % f.nb * f.b)[:, None] + torch.arange(f.b, device=f.device)
            query = self.rows[run] % f.M + f.offset
            future = (key[:, None] > query[..., None]).repeat_interleave(f.G, 1)
            unseen = future if unseen is None else unseen | future
        if unseen is None:
            return None
        zero = torch.zeros_like(unseen, dtype=f.dtype)
        return zero.masked_fill_(unseen, -torch.inf)

    def add_to_blocks(self, total: Tensor, tiles: Tensor, run: slice) -> None:
        """Add a run's tiles `[n, b, D]` to the blocks `[X nb, b D]` that they belong to."""
        first, last = self.block[run][[0, -1]].tolist()
        begin = (self.first_tile[first : last + 1] - run.start).clamp_min_(0)
        every = torch.arange(tiles.shape[0], device=tiles.device)
        total[first : last + 1] += F.embedding_bag(every, tiles.flatten(1), begin, mode="sum")


def _rows(x: Tensor) -> Tensor:
    """`[X, G, M, E]` as rows `[X M + 1, G E]`, the last one of zeros."""
    X, G, M, E = x.shape
    out = x.new_empty(X * M + 1, G * E)
    out[:-1].view(X, M, G, E).copy_(x.transpose(1, 2))
    out[-1] = 0
    return out


def _tiles(x: Tensor, frame: Frame) -> Tensor:
    """Keys `[X, nb b, D]` as blocks `[X nb, b, D]`."""
    return x.view(frame.X * frame.nb, frame.b, frame.D)


def log_sum(x: Tensor) -> Tensor:
    """Log-sum-exp of `[..., n]` in base 2, overwriting it."""
    top, total = powers(x)
    return total.log2_().add_(top).squeeze(-1)


def _scores(pairs: Pairs, rows: Tensor, columns: Tensor, run: slice, causal: bool) -> Tensor:
    """Scores in base 2 `[n, T G, b]` of a run's `rows` and its keys, `columns` `[n, D, b]`."""
    bias = pairs.bias(run, causal)
    if bias is None:
        return torch.bmm(rows, columns)
    return torch.baddbmm(bias, rows, columns)


def long_forward(frame: Frame, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, near_window: int,
                 scale: float) -> tuple[Tensor, Tensor]:
    """Output `[X, G, M, D]` and log-sum-exp `[X, G, M]` of a frame's rows."""
    f, causal = frame, near_window == 0
    q, k, v = f.queries(q) * (scale * LOG2_E), f.keys(k), f.keys(v)
    if near_window:
        out, lse = near_forward(Near(f, k, near_window), q, v)
    else:
        out, lse = torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
    pairs = Pairs(f, f.slots(chosen))
    if pairs.total == 0:
        return out, lse.mul_(LN_2)
    rows, values = _rows(q), _tiles(v, f).flatten(1)
    columns = _tiles(k, f).transpose(1, 2).flatten(1)  # [X nb, D b]
    head = torch.arange(f.G, device=f.device)[:, None]
    for group in pairs.groups():
        size = (group.end - group.first) * pairs.T + 1
        part, stats = rows.new_empty(size, f.G * f.D), rows.new_empty(2, size, f.G)
        part[-1], stats[0, -1], stats[1, -1] = 0, -torch.inf, 0
        for run in pairs.runs(group):
            block = pairs.block[run]
            keys = columns.index_select(0, block).view(-1, f.D, f.b)
            scores = _scores(pairs, pairs.gather(rows, run), keys, run, causal)
            top, total = powers(scores)
            at = slice((run.start - group.first) * pairs.T, (run.stop - group.first) * pairs.T)
            target = part[at].view(-1, pairs.T * f.G, f.D)
            torch.bmm(scores, values.index_select(0, block).view(-1, f.b, f.D), out=target)
            stats[0, at], stats[1, at] = top.view(-1, f.G), total.view(-1, f.G)
        place = pairs.place(group)
        top, total = stats[:, place].transpose(3, 4).transpose(2, 3).unbind(0)  # [x, G, M, S]
        merged = log_sum(torch.cat([top + total.log2(), lse[group.x].unsqueeze(-1)], -1))
        weights = top - merged.masked_fill(merged == -torch.inf, torch.inf).unsqueeze(-1)
        weights = weights.masked_fill_(total == 0, -torch.inf).exp2_()
        far = F.embedding_bag(
            (place.unsqueeze(1) * f.G + head[:, None]).flatten(0, 2), part.view(-1, f.D),
            per_sample_weights=weights.flatten(0, 2), mode="sum",
        )  # fmt: skip
        kept = lse[group.x] - merged.masked_fill(merged == -torch.inf, torch.inf)
        own = out[group.x].mul_(kept.exp2_().unsqueeze(-1))
        own += far.view_as(own)
        lse[group.x] = merged
    return out, lse.mul_(LN_2)


def long_backward(frame: Frame, grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor,
                  v: Tensor, chosen: Tensor, near_window: int, scale: float
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[X, G, M, D]` of queries and `[X, nb b, D]` of keys and values.

    Args:
        frame: how the rows lie.
        grad: of the output, as are `lse`, `delta` in the rows of the frame, `[X, G, M, ...]`.
        lse: in base 2, +inf in rows that see nothing.
        delta: `rowsum(grad * out)` less the gradient of lse.
        q: `[B, H, Nq, D]`.
        k: `[B, Hkv, Nk, D]`.
        v: `[B, Hkv, Nk, D]`.
        chosen: `[B, Hkv, Nq, S]`.
        near_window: Wn.
        scale: of the scores.
    """
    f, causal = frame, near_window == 0
    q, k, v = f.queries(q) * (scale * LOG2_E), f.keys(k), f.keys(v)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    if near_window:
        dq = near_backward(Near(f, k, near_window), grad, lse, delta, q, v, dk, dv)
    else:
        dq = torch.zeros_like(q)
    pairs = Pairs(f, f.slots(chosen))
    if pairs.total == 0:
        return dq.mul_(scale), dk.mul_(LN_2), dv
    rows, dos, stats = _rows(q), _rows(grad), _rows(torch.stack([lse, delta], -1).neg_())
    keys = _tiles(k, f).flatten(1)
    key_columns, value_columns = (_tiles(x, f).transpose(1, 2).flatten(1) for x in (k, v))
    dk_blocks, dv_blocks = (x.view(f.X * f.nb, -1) for x in (dk, dv))
    for group in pairs.groups():
        part = rows.new_empty((group.end - group.first) * pairs.T + 1, f.G * f.D)
        part[-1] = 0
        for run in pairs.runs(group):
            block = pairs.block[run]
            taken, do = pairs.gather(rows, run), pairs.gather(dos, run)
            less = pairs.gather(stats, run)
            columns = key_columns.index_select(0, block).view(-1, f.D, f.b)
            probs = _scores(pairs, taken, columns, run, causal).add_(less[..., :1]).exp2_()
            columns = value_columns.index_select(0, block).view(-1, f.D, f.b)
            dscores = torch.bmm(do, columns).add_(less[..., 1:]).mul_(probs)
            at = slice((run.start - group.first) * pairs.T, (run.stop - group.first) * pairs.T)
            target = part[at].view(-1, pairs.T * f.G, f.D)
            torch.bmm(dscores, keys.index_select(0, block).view(-1, f.b, f.D), out=target)
            pairs.add_to_blocks(dv_blocks, torch.bmm(probs.transpose(1, 2), do), run)
            pairs.add_to_blocks(dk_blocks, torch.bmm(dscores.transpose(1, 2), taken), run)
        far = F.embedding_bag(pairs.place(group).flatten(0, 1), part, mode="sum")
        dq[group.x] += far.view(-1, f.M, f.G, f.D).transpose(1, 2)
    return dq.mul_(scale), dk.mul_(LN_2), dv

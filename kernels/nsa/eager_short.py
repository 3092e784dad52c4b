"""Attention to near and chosen blocks for short texts: dense scores, masked, query by query.

    o_i = sum_j P_ij v_j,    P_ij = e^{s_ij - lse_i} where j <= i, block(j) near or chosen, else 0

Queries are cut into chunks; a chunk's scores are one `bmm` with all keys up to its end. Which
blocks a query sees is a small table of 0 and -inf `[C, nb]`, added to the scores block by block.
Quadratic time, linear memory. Backward recomputes the probabilities from lse.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, X = B Hkv sequences, M rows of a
frame, D head dim, b selection block, nb blocks, S slots, C queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.kernels.nsa.eager_frame import LN_2, LOG2_E, Frame, pieces, powers, take


class Rows:
    """Packed operands of one call, and the scores of a piece of it."""

    def __init__(self, frame: Frame, q: Tensor, k: Tensor, chosen: Tensor, near_window: int,
                 scale: float) -> None:
        self.frame = frame
        self.q = frame.queries(q).mul(scale * LOG2_E)
        self.k = frame.keys(k)
        self.columns = self.k.transpose(1, 2).contiguous()  # [X, D, nb b]
        self.slots = frame.slots(chosen)
        self.sequence = torch.arange(frame.X, device=q.device) // frame.Hkv
        self.near = frame.near(near_window)
        self.column = torch.arange(frame.nb * frame.b, device=q.device)

    def width(self, first: int, end: int) -> int:
        """Columns of queries `[first, end)`: whole blocks up to the last one's own."""
        f = self.frame
        return -(-(end + f.offset) // f.b) * f.b

    def pieces(self) -> Iterator[tuple[slice, slice, int]]:
        """Sequences, queries and width of each piece of the scores."""
        f = self.frame
        return pieces(f.X, f.M, f.G, f.dtype.itemsize, self.width)

    def seen(self, xs: slice, own: slice, blocks: int) -> Tensor:
        """0 for blocks that a query sees, else -inf: `[x, C, blocks]`."""
        batch = self.sequence[xs]
        near = self.near[batch, own].unsqueeze(-1)  # [x, C, 1]
        column = torch.arange(blocks + 1, device=near.device)
        table = near.new_full((*near.shape[:2], blocks + 1), -torch.inf, dtype=self.frame.dtype)
        table.masked_fill_(column >= near, 0)
        slots = self.slots[xs, own]
        table.scatter_(2, torch.where(slots < 0, blocks, slots.clamp_max(blocks)), 0)
        return table[..., :blocks]

    def scores(self, at: tuple[slice, slice], rows: Tensor, width: int, less: Tensor | None = None
               ) -> Tensor:
        """Scores in base 2 `[x, G C, width]`, minus `less` `[x, G C, 1]`; -inf where unseen."""
        (xs, own), f = at, self.frame
        scores = torch.bmm(rows, self.columns[xs, :, :width])
        x, C = scores.shape[0], own.stop - own.start
        table = self.seen(xs, own, width // f.b).unsqueeze(1)  # [x, 1, C, blocks]
        if less is not None:
            table = table - less.view(x, f.G, C, 1)
        scores.view(x, f.G, C, -1, f.b).add_(table.unsqueeze(-1))
        first = own.start + f.offset
        future = self.column[first:width] > self.column[first : first + C, None]
        scores.view(x, f.G, C, width)[..., first:].masked_fill_(future, -torch.inf)
        if f.hidden is not None:
            hidden = f.hidden[self.sequence[xs], :width]
            scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
        return scores


def short_forward(frame: Frame, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, near_window: int,
                  scale: float) -> tuple[Tensor, Tensor]:
    """Output `[X, G, M, D]` and log-sum-exp `[X, G, M]` of a frame's rows."""
    p, v = Rows(frame, q, k, chosen, near_window, scale), frame.keys(v)
    out, lse = torch.empty_like(p.q), p.q.new_empty(*p.q.shape[:3], 1)
    for xs, own, width in p.pieces():
        scores = p.scores((xs, own), take(p.q, (xs, own)), width)
        top, total = powers(scores)
        acc = torch.bmm(scores, v[xs, :width]).div_(total.masked_fill(total == 0, 1))
        out[xs, :, own] = acc.unflatten(1, (frame.G, -1))
        lse[xs, :, own] = total.log2_().add_(top).unflatten(1, (frame.G, -1))
    return out, lse.mul_(LN_2).squeeze(-1)


def short_backward(frame: Frame, grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor,
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
    p = Rows(frame, q, k, chosen, near_window, scale)
    values = frame.keys(v).transpose(1, 2).contiguous()  # [X, D, nb b]
    lse, delta = lse.unsqueeze(-1), delta.unsqueeze(-1)
    dq, dk, dv = torch.empty_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.k)
    for xs, own, width in p.pieces():
        at = xs, own
        rows, do = take(p.q, at), take(grad, at)
        probs = p.scores(at, rows, width, take(lse, at)).exp2_()
        dscores = torch.bmm(do, values[xs, :, :width]).sub_(take(delta, at)).mul_(probs)
        dq[xs, :, own] = torch.bmm(dscores, p.k[xs, :width]).mul_(scale).unflatten(
            1, (frame.G, -1)
        )
        dv[xs, :width].baddbmm_(probs.transpose(1, 2), do)
        dk[xs, :width].baddbmm_(dscores.transpose(1, 2), rows)
    return dq, dk.mul_(LN_2), dv

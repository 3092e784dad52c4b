"""Attention to compressed blocks in plain PyTorch: dense, but only over blocks that are visible.

    s_ic = scale q_i.k_c + bias_c,    P = e^{s - lse},    o_i = sum_c P_ic v_c

A query at position p sees compressed block c iff `p >= c d + l - 1 + delay`, so the visible blocks
are a prefix. Queries are cut into chunks; a chunk's scores are one `bmm` with the prefix that its
last query sees. Blocks in `chosen` are left out by a scatter of -inf; a slot that holds none
points to one more column, behind the prefix. Backward recomputes the probabilities from lse:

    dS = P (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, X = B Hkv sequences, Nq queries,
P compressed blocks, D head dim, l block, d stride, S slots of `chosen`, C queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.kernels.nsa.eager_frame import (
    LN_2,
    LOG2_E,
    by_group,
    pieces,
    powers,
    take,
    to_powers,
    wide_dtype,
)
from attnopt.kernels.nsa.geometry import query_positions


class Prefixes:
    """Packed operands of one call, and the scores of a piece of it."""

    def __init__(self, q: Tensor, k_cmp: Tensor, bias: Tensor, chosen: Tensor | None,
                 start: Tensor, *, offset: int, block: int, stride: int, delay: int, scale: float
                 ) -> None:
        self.B, self.Hkv, self.P, self.D = k_cmp.shape
        self.X, self.G, self.Nq = self.B * self.Hkv, q.shape[1] // self.Hkv, q.shape[2]
        self.dtype = wide_dtype(q)
        self.q = by_group(q.to(self.dtype) * (scale * LOG2_E), self.Hkv).contiguous()
        self.k = self.pack(k_cmp)
        self.columns = self.k.transpose(1, 2).contiguous()  # [X, D, P + 1]
        self.bias = torch.full((self.B, self.P + 1), -torch.inf, dtype=self.dtype, device=q.device)
        self.bias[:, : self.P] = bias.to(self.dtype) * LOG2_E
        self.bias = self.spread(self.bias).unsqueeze(1)  # [X, 1, P + 1]
        self.chosen = None
        if chosen is not None and chosen.shape[3]:
            self.chosen = chosen.flatten(0, 1)  # [X, Nq, S]
        self.offset, self.stride, self.reach = offset, stride, block - 1 + delay
        position = query_positions(start, self.Nq, offset)
        self.visible = self.spread(self._count(position))  # [X, Nq] blocks each query sees
        self.earliest, self.latest = map(int, start.aminmax()) if self.B else (0, 0)

    def spread(self, x: Tensor) -> Tensor:
        """`[B, ...]` for each sequence, `[X, ...]`."""
        return x if self.Hkv == 1 else x.repeat_interleave(self.Hkv, 0)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, Hkv, P, D]` as `[X, P + 1, D]`, the last row of zeros."""
        out = x.new_zeros(self.B, self.Hkv, self.P + 1, self.D, dtype=self.dtype)
        out[:, :, : self.P] = x
        return out.flatten(0, 1)

    def unpack(self, x: Tensor) -> Tensor:
        """Inverse of `pack`."""
        return x.unflatten(0, (self.B, self.Hkv))[:, :, : self.P]

    def _count(self, position: Tensor) -> Tensor:
        steps = (position - self.reach).div(self.stride, rounding_mode="floor")
        return (steps + 1).clamp(0, self.P)

    def _bound(self, row: int, start: int) -> int:
        """Blocks that query `row` sees in a text that begins at `start`."""
        steps = (row + self.offset - start - self.reach) // self.stride
        return min(max(steps + 1, 0), self.P)

    def width(self, first: int, end: int) -> int:
        """Columns of queries `[first, end)`: blocks that some query sees, and one more."""
        return self._bound(end - 1, self.earliest) + 1

    def pieces(self) -> Iterator[tuple[slice, slice, int]]:
        """Sequences, queries and width of each piece of the scores."""
        return pieces(self.X, self.Nq, self.G, self.dtype.itemsize, self.width)

    def scores(self, at: tuple[slice, slice], rows: Tensor, width: int) -> Tensor:
        """Scores in base 2 `[x, G C, width]` of `rows` `[x, G C, D]`, -inf where unseen."""
        xs, own = at
        scores = torch.baddbmm(self.bias[xs, :, :width], rows, self.columns[xs, :, :width])
        shaped = scores.view(rows.shape[0], self.G, -1, width)
        full = self._bound(own.start, self.latest)  # visible to every query of the piece
        column = torch.arange(full, width, device=rows.device)
        shaped[..., full:].masked_fill_(
            (column >= self.visible[xs, own].unsqueeze(-1)).unsqueeze(1), -torch.inf
        )
        if self.chosen is not None:
            index = self.chosen[xs, own].long()
            index = torch.where(index < 0, width - 1, index.clamp_max(width - 1)).unsqueeze(1)
            shaped.scatter_(3, index.expand(-1, self.G, -1, -1), -torch.inf)
        return scores


def compressed_forward(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, bias: Tensor, chosen: Tensor,
                       start: Tensor, *, offset: int, block: int, stride: int, delay: int,
                       scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the visible compressed blocks that are not chosen.

    Args:
        q: `[B, H, Nq, D]`.
        k_cmp: `[B, Hkv, P, D]`.
        v_cmp: `[B, Hkv, P, D]`.
        bias: added to the scores, `[B, P]`; -inf hides a block.
        chosen: blocks to leave out, int32 `[B, Hkv, Nq, S]`, -1 for none.
        start: first real token of each row, int32 `[B]`.
        offset: Nk - Nq.
        block: l.
        stride: d.
        delay: how many tokens later than its last one a block is seen.
        scale: of the scores.

    Returns:
        Output in the dtype and layout of `q`, and the log-sum-exp of each row `[B, H, Nq]`.
    """
    p = Prefixes(q, k_cmp, bias, chosen, start, offset=offset, block=block, stride=stride,
                 delay=delay, scale=scale)  # fmt: skip
    v = p.pack(v_cmp)
    out, lse = torch.empty_like(p.q), p.q.new_empty(*p.q.shape[:3], 1)
    for xs, own, width in p.pieces():
        if width == 1:  # too early to see any
            out[xs, :, own], lse[xs, :, own] = 0, -torch.inf
            continue
        scores = p.scores((xs, own), take(p.q, (xs, own)), width)
        top, total = powers(scores)
        acc = torch.bmm(scores, v[xs, :width]).div_(total.masked_fill(total == 0, 1))
        out[xs, :, own] = acc.unflatten(1, (p.G, -1))
        lse[xs, :, own] = total.log2_().add_(top).unflatten(1, (p.G, -1))
    result = torch.empty_like(q)
    return result.copy_(out.view(q.shape)), lse.mul_(LN_2).view(q.shape[:3])


def compressed_backward(grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k_cmp: Tensor,
                        v_cmp: Tensor, bias: Tensor, chosen: Tensor, start: Tensor, *, offset: int,
                        block: int, stride: int, delay: int, scale: float
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k_cmp and v_cmp.

    Args:
        grad: of the output, `[B, H, Nq, D]`.
        lse: of the forward pass, `[B, H, Nq]`.
        delta: `rowsum(grad * out)` less the gradient of lse, `[B, H, Nq]`.
        q: as in the forward pass, and so all that follow.
        k_cmp: keys.
        v_cmp: values.
        bias: of the blocks.
        chosen: blocks left out.
        start: of each row.
        offset: Nk - Nq.
        block: l.
        stride: d.
        delay: of the blocks.
        scale: of the scores.

    Returns:
        Gradients in the shape, dtype and layout of their tensors.
    """
    p = Prefixes(q, k_cmp, bias, chosen, start, offset=offset, block=block, stride=stride,
                 delay=delay, scale=scale)  # fmt: skip
    values = p.pack(v_cmp).transpose(1, 2).contiguous()  # [X, D, P + 1]
    grad = by_group(grad.to(p.dtype), p.Hkv)
    lse = by_group(to_powers(lse, p.dtype), p.Hkv).unsqueeze(-1)
    delta = by_group(delta.to(p.dtype), p.Hkv).unsqueeze(-1)
    dq, dk, dv = torch.empty_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.k)
    for xs, own, width in p.pieces():
        if width == 1:
            dq[xs, :, own] = 0
            continue
        at = xs, own
        rows, do = take(p.q, at), take(grad, at)
        probs = p.scores(at, rows, width).sub_(take(lse, at)).exp2_()
        dscores = torch.bmm(do, values[xs, :, :width]).sub_(take(delta, at)).mul_(probs)
        dq[xs, :, own] = torch.bmm(dscores, p.k[xs, :width]).mul_(scale).unflatten(1, (p.G, -1))
        dv[xs, :width].baddbmm_(probs.transpose(1, 2), do)
        dk[xs, :width].baddbmm_(dscores.transpose(1, 2), rows)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k_cmp, v_cmp))
    grad_q.copy_(dq.view(q.shape))
    grad_k.copy_(p.unpack(dk.mul_(LN_2)))
    grad_v.copy_(p.unpack(dv))
    return grad_q, grad_k, grad_v

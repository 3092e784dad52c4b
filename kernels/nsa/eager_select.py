"""Which blocks a query attends to token by token, in plain PyTorch.

    importance_ij = sum over the group's heads of sum_c |[c d, c d + l) and [j b, j b + b)| / d P_ic

with P the softmax over the compressed blocks c that query i sees, or, with one head and
l = d = b, the score of block j itself, which ranks alike and needs no softmax. The overlaps are
a few shifted, strided views of P, one for each number of tokens that c and j can share.
The best `count` are a set, so that only a tie across its edge needs care: rows that have one are
sorted stably, which prefers the lower block.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, X = B Hkv sequences, Nq queries,
P compressed blocks, D head dim, l block, d stride, b selection block, nb selection blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.nsa.eager_compressed import Prefixes
from attnopt.kernels.nsa.eager_frame import by_group, powers, take, to_powers
from attnopt.kernels.nsa.geometry import (
    first_overlap,
    near_block,
    overlap,
    overlap_count,
    query_positions,
)


class Overlaps:
    """Sums over compressed blocks of their share of each selection block."""

    def __init__(self, block: int, stride: int, select_block: int, device: torch.device) -> None:
        self.block, self.stride, self.b = block, stride, select_block
        self.most = overlap_count(block, stride, select_block)
        self.device = device

    def sums(self, probs: Tensor, blocks: int) -> Tensor:
        """Importance `[..., blocks]` from the summed probabilities `[..., n]` of the first n."""
        n = probs.shape[-1]
        j = torch.arange(blocks, device=self.device)
        first = first_overlap(j, self.block, self.stride, self.b)
        total = probs.new_zeros(*probs.shape[:-1], blocks)
        if self.b % self.stride == 0:
            step, front = self.b // self.stride, -int((-self.block) // self.stride + 1)
            back = max(0, (blocks - 1) * step + self.most - front - n)
            probs = F.pad(probs, (front, back))
            shared = self._weights(first + step * front, j + front)[:, 0].tolist()
            for o, weight in enumerate(shared):
                if weight:
                    view = probs[..., o : o + (blocks - 1) * step + 1 : step]
                    total.add_(view, alpha=weight)
            return total
        weights = self._weights(first, j)
        for o in range(self.most):
            c = first + o
            inside = weights[o].masked_fill(c >= n, 0).to(probs.dtype)
            total.addcmul_(probs.index_select(-1, c.clamp(0, n - 1)), inside)
        return total

    def _weights(self, first: Tensor, j: Tensor) -> Tensor:
        """Shared tokens over d, `[most, blocks]` float64."""
        c = first + torch.arange(self.most, device=self.device)[:, None]
        return overlap(c, j, self.block, self.stride, self.b).double() / self.stride


def best(importance: Tensor, count: int) -> Tensor:
    """The `count` most important blocks of `[..., n]`, ties to the lower; -1 last, int32."""
    n = importance.shape[-1]
    size = min(count, n)
    values, index = importance.topk(min(count + 1, n), -1)
    if n > count:
        edge = values[..., count]
        tied = (values[..., count - 1] == edge) & (edge > -torch.inf)
        if bool(tied.any()):
            rows = importance[tied].sort(dim=-1, descending=True, stable=True).indices
            index[tied] = rows[:, : count + 1]
    index = index[..., :size].masked_fill(values[..., :size] == -torch.inf, n).int()
    index = index.sort(-1).values
    return F.pad(index.masked_fill_(index == n, -1), (0, count - size), value=-1)


def select(q: Tensor, k_cmp: Tensor, bias: Tensor, real: Tensor, start: Tensor, *, offset: int,
           count: int, sinks: int, block: int, stride: int, select_block: int, near_window: int,
           delay: int, scale: float, lse: Tensor | None = None) -> Tensor:
    """Choose the far blocks of every query.

    Args:
        q: `[B, H, Nq, D]`.
        k_cmp: `[B, Hkv, P, D]`.
        bias: `[B, P]`; -inf hides a compressed block, other values are not used.
        real: which selection blocks hold a real token, bool `[B, nb]`.
        start: first real token of each row, int32 `[B]`.
        offset: Nk - Nq.
        count: most blocks to choose.
        sinks: blocks chosen before all others.
        block: l.
        stride: d.
        select_block: b.
        near_window: Wn; near blocks are no candidates.
        delay: how many tokens later than its last one a compressed block is seen.
        scale: of the scores.
        lse: log-sum-exp over the visible compressed blocks, `[B, H, Nq]`, where it is known.

    Returns:
        Chosen blocks, int32 `[B, Hkv, Nq, count]`, ascending, -1 last.
    """
    B, Hkv, Nq = *k_cmp.shape[:2], q.shape[2]
    chosen = torch.full((B * Hkv, Nq, count), -1, dtype=torch.int32, device=q.device)
    if count == 0:
        return chosen.view(B, Hkv, Nq, count)
    hidden = torch.zeros_like(bias).masked_fill_(bias == -torch.inf, -torch.inf)
    p = Prefixes(q, k_cmp, hidden, None, start, offset=offset, block=block, stride=stride,
                 delay=delay, scale=scale)  # fmt: skip
    position = query_positions(start, Nq, offset)
    near = near_block(position, select_block, near_window).masked_fill_(position < 0, 0)
    most = near.amax(0).cummax(0).values.tolist()  # candidates end here, for all rows
    near, real = p.spread(near), p.spread(real)
    plain = p.G == 1 and block == stride == select_block
    if lse is not None and not plain:
        lse = by_group(to_powers(lse, p.dtype), Hkv).unsqueeze(-1)
    overlaps = Overlaps(block, stride, select_block, q.device)
    for xs, own, width in p.pieces():
        blocks = min(most[own.stop - 1], real.shape[1])
        if blocks == 0:
            continue
        scores = p.scores((xs, own), take(p.q, (xs, own)), width)
        if plain:
            importance = F.pad(scores, (0, max(0, blocks - width)), value=-torch.inf)[..., :blocks]
        else:
            if lse is None:
                _, total = powers(scores)
                scores.div_(total.masked_fill_(total == 0, 1))
            else:
                scores.sub_(take(lse, (xs, own))).exp2_()
            probs = scores.view(scores.shape[0], p.G, -1, width).sum(1) if p.G > 1 else scores
            importance = overlaps.sums(probs, blocks)
        column = torch.arange(blocks, device=q.device)
        if not bool((candidates := real[xs, :blocks]).all()):
            importance = importance.masked_fill(~candidates.unsqueeze(1), -torch.inf)
        early = min(sinks, blocks)
        first = importance[..., :early]
        importance[..., :early] = first.masked_fill(first > -torch.inf, torch.inf)
        importance.masked_fill_(column >= near[xs, own].unsqueeze(-1), -torch.inf)
        chosen[xs, own] = best(importance, count)
    return chosen.view(B, Hkv, Nq, count)

"""Last-k attention in plain PyTorch: linear time and memory, with a hand-written backward.

    o_i = sum_j e^{s_ij + b_ij} v_j / sum_j e^{s_ij + b_ij},      s_ij = scale q_i.k_j

Queries are cut into blocks of C tokens. A block reads a *window* of L = (r + 1) C keys: its own and
the r blocks before it, r = ceil((W - 1) / C). Keys and values lie in one flat buffer of blocks, so
that all windows are one overlapping strided view and a whole segment is a single `bmm`. The window
of a sequence's first blocks reaches into its neighbor in the buffer; the mask hides it.
Sinks are a second, dense tile of T keys for every query; the band skips the tokens they own.

Forward saves the log-sum-exp of each row; backward recomputes the probabilities from it:

    P = e^{s + b - lse},  dS = P (dO V^T - delta),  delta = rowsum(dO O)
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO,  db[n] = sum_i dS[i, i - n]

Within a segment scores, bias and log-sum-exp are in powers of two, log2(e) folded into scale and
bias: on CPU `exp` is up to ten times slower where a mask or a peaked row makes it underflow, `exp2`
is not. Arguments, results and gradients are those of natural logarithms.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, N tokens, D head dim, W offsets,
T sinks, X = B Hkv sequences, n blocks of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.lastk.sinks import add_at_sinks, gather_sinks, sink_positions

SEGMENT_BYTES = 2 << 20  # of scores at a time: they stay in the cache, measured on CPU
WIDE = 4  # blocks of halo from which a text's first, shorter windows are worth one segment each
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


@dataclass(frozen=True)
class Segment:
    """Blocks `t0:t1` of sequences `x0:x1`; a contiguous run `blocks` of the flat buffer.

    The first `skip` blocks of every window lie before the sequence: nothing is computed there.
    """

    x0: int
    x1: int
    t0: int
    t1: int
    blocks: slice
    skip: int


@dataclass(frozen=True)
class Tiling:
    """How a problem is cut: `N` tokens of the buffer, the last `Nq` of which are queries."""

    X: int
    G: int
    D: int
    W: int
    C: int  # queries per block
    r: int  # blocks of halo
    nb: int  # blocks per sequence
    N: int
    Nq: int
    itemsize: int

    @property
    def L(self) -> int:
        """Keys in a window."""
        return (self.r + 1) * self.C

    @classmethod
    def plan(cls, q: Tensor, k: Tensor, W: int, itemsize: int) -> Tiling:
        B, H, Nq, D = q.shape
        Hkv, Nk = k.shape[1:3]
        N = min(Nk, Nq + W - 1)  # keys that some query's band reaches
        # measured on CPU: small blocks waste little of a narrow band, large ones feed the matmul
        C = 16 if W <= 17 else 32 if W <= 64 else 64 if W <= 256 else 128
        C = min(C, N)
        r = min(-(-(W - 1) // C), -(-N // C) - 1)
        return cls(B * Hkv, H // Hkv, D, W, C, r, -(-N // C), N, Nq, itemsize)

    def segments(self) -> Iterator[Segment]:
        """Runs of blocks whose scores fit `SEGMENT_BYTES`: whole sequences, or parts of one."""
        per_block = self.G * self.C * self.L * self.itemsize
        blocks = max(1, SEGMENT_BYTES // per_block)
        if self.r >= WIDE:
            blocks = 1
        elif blocks >= self.nb:
            step = blocks // self.nb
            for x in range(0, self.X, step):
                end = min(x + step, self.X)
                yield Segment(x, end, 0, self.nb, slice(x * self.nb, end * self.nb), 0)
            return
        for x in range(self.X):
            for t in range(0, self.nb, blocks):
                end = min(t + blocks, self.nb)
                run = slice(x * self.nb + t, x * self.nb + end)
                yield Segment(x, x + 1, t, end, run, max(0, self.r + 1 - end))

    def pack_queries(self, x: Tensor, dtype: torch.dtype, value: float = 0.0) -> Tensor:
        """`[B, H, Nq, D]` to blocks `[X nb, G C, D]`; rows before the first query hold `value`.

        The result may share memory with `x`.
        """
        front, back = self.N - self.Nq, self.nb * self.C - self.N
        x = x.to(dtype)
        if front or back:
            x = F.pad(x, (0, 0, front, back), value=value)
        x = x.reshape(self.X, self.G, self.nb, self.C, -1).transpose(1, 2)
        return x.reshape(self.X * self.nb, self.G * self.C, -1)

    def unpack_queries(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `pack_queries`, to a tensor of `shape` `[B, H, Nq, ...]`."""
        x = x.view(self.X, self.nb, self.G, self.C, -1).transpose(1, 2)
        x = x.reshape(self.X, self.G, self.nb * self.C, -1)
        return x[:, :, self.N - self.Nq : self.N].reshape(shape)

    def pack_keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, Hkv, Nk, D]` to the flat buffer `[(r + X nb) C, D]`, a halo of zeros in front."""
        x = x[:, :, x.shape[2] - self.N :]
        buffer = x.new_zeros((self.r + self.X * self.nb) * self.C, self.D, dtype=dtype)
        body = buffer[self.r * self.C :].view(*x.shape[:2], self.nb * self.C, self.D)
        body[:, :, : self.N] = x
        return buffer

    def windows(self, buffer: Tensor, s: Segment) -> Tensor:
        """The windows `[n, L, D]` of a segment's blocks: a view of the buffer, nothing copied."""
        n, row = s.blocks.stop - s.blocks.start, self.D
        size = (n, self.L - s.skip * self.C, row)
        start = (s.blocks.start + s.skip) * self.C * row
        return buffer.as_strided(size, (self.C * row, row, 1), start)

    def scatter_windows(self, buffer: Tensor, s: Segment, weights: Tensor, rows: Tensor) -> None:
        """Add `weights^T rows` of every window, `[n, G C, L]^T [n, G C, D]`, to the buffer."""
        if weights.shape[0] == 1:  # a single window does not overlap
            self.windows(buffer, s).baddbmm_(weights.transpose(1, 2), rows)
            return
        blocks = buffer.view(-1, self.C, self.D)
        for i in range(self.r + 1 - s.skip):
            part = weights[:, :, i * self.C : (i + 1) * self.C].transpose(1, 2)
            shift = s.skip + i
            blocks[s.blocks.start + shift : s.blocks.stop + shift].baddbmm_(part, rows)

    def unpack_keys(self, buffer: Tensor, like: Tensor) -> Tensor:
        """Inverse of `pack_keys`: a gradient of the shape, dtype and layout of `like`."""
        out = torch.empty_like(like)
        skipped = like.shape[2] - self.N
        body = buffer[self.r * self.C :].view(*like.shape[:2], self.nb * self.C, self.D)
        out[:, :, :skipped] = 0
        out[:, :, skipped:] = body[:, :, : self.N]
        return out

    def offsets(self, device: torch.device) -> Tensor:
        """`n = i - j` of every pair in a block and its window, `[C, L]`."""
        row = torch.arange(self.C, device=device)[:, None] + self.r * self.C
        return row - torch.arange(self.L, device=device)

    def band_bias(self, log_weights: Tensor) -> Tensor:
        """`b[h, c, l]` `[Hkv, G, C, L]` of a block and its window, -inf outside the band."""
        n = self.offsets(log_weights.device)
        outside = (n < 0) | (n >= self.W)
        bias = log_weights[:, n.clamp(0, self.W - 1)].masked_fill(outside, float("-inf"))
        return bias.view(-1, self.G, self.C, self.L)

    def key_bias(self, visible: Tensor | None, B: int, dtype: torch.dtype, device: torch.device
                 ) -> Tensor:
        """0 for a window's keys that exist and are `visible` `[B, Nk]`, else -inf: `[B, nb, L]`."""
        j = torch.arange(self.nb, device=device)[:, None] * self.C - self.r * self.C
        j = j + torch.arange(self.L, device=device)  # position in the sequence, [nb, L]
        hidden = ((j < 0) | (j >= self.N)).expand(B, -1, -1)
        if visible is not None:
            visible = visible[:, visible.shape[1] - self.N :]
            hidden = hidden | ~visible[:, j.clamp(0, self.N - 1)]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
            hidden, float("-inf")
        )


class Problem:
    """Packed operands of one call, and the scores of a segment: what both passes share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor,
                 sink_log_weights: Tensor, key_mask: Tensor | None, scale: float) -> None:
        self.B, self.Hkv = k.shape[:2]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scale = scale * LOG2_E  # scores are in base 2
        T = sink_log_weights.shape[1]
        self.tiling = t = Tiling.plan(q, k, log_weights.shape[1], self.dtype.itemsize)
        self.q = t.pack_queries(q, self.dtype)
        self.k, self.v = t.pack_keys(k, self.dtype), t.pack_keys(v, self.dtype)
        self.bias = t.band_bias(log_weights.to(self.dtype) * LOG2_E)
        visible = key_mask
        self.sinks = None
        if T:
            self.sinks = sink_positions(key_mask, T, k)
            visible = self.sinks.hide_from_band(key_mask)
            self.sink_k = gather_sinks(k, self.sinks).to(self.dtype).flatten(0, 1)  # [X, T, D]
            self.sink_v = gather_sinks(v, self.sinks).to(self.dtype).flatten(0, 1)
            self.sink_bias = (sink_log_weights.to(self.dtype) * LOG2_E).view(self.Hkv, t.G, T)
        self.key_bias = t.key_bias(visible, self.B, self.dtype, q.device)
        self.first = k.shape[2] - t.N  # position of the buffer's first token

    def scores(self, s: Segment) -> Tensor:
        """`s + b` in base 2 of a segment's blocks and windows `[n, G C, L]`, no skipped keys."""
        t = self.tiling
        sequences = torch.arange(s.x0, s.x1, device=self.q.device)
        windows = t.windows(self.k, s).transpose(1, 2)
        L = windows.shape[2]
        hidden = self.key_bias[sequences // self.Hkv, s.t0 : s.t1, None, None, -L:]
        head = s.x0 % self.Hkv
        if head + s.x1 - s.x0 <= self.Hkv:  # of one text: a view
            bias = self.bias[head : head + s.x1 - s.x0, ..., -L:]
        else:
            bias = self.bias[sequences % self.Hkv, ..., -L:]
        scores = (hidden + bias.unsqueeze(1)).reshape(-1, t.G * t.C, L)
        return scores.baddbmm_(self.q[s.blocks], windows, alpha=self.scale)

    def sink_rows(self, x: Tensor, s: Segment) -> Tensor:
        """A segment's rows `[n, G C, ...]` by sequence, `[x, nb G C, ...]`, to meet its sinks."""
        return x.view(s.x1 - s.x0, -1, x.shape[-1])

    def sink_scores(self, s: Segment) -> Tensor:
        """`s + b` in base 2 of a segment's rows and the sinks, `[x, nb G C, T]`."""
        assert self.sinks is not None
        t, T = self.tiling, self.sink_k.shape[1]
        keys = self.sink_k[s.x0 : s.x1].transpose(1, 2)
        scores = (self.sink_rows(self.q[s.blocks], s) @ keys) * self.scale
        sequences = torch.arange(s.x0, s.x1, device=self.q.device)
        i = torch.arange(s.t0 * t.C, s.t1 * t.C, device=self.q.device) + self.first
        position = self.sinks.position[sequences // self.Hkv]  # [x, T]
        hidden = ~self.sinks.visible[sequences // self.Hkv][:, None] | (
            i[None, :, None] < position[:, None]
        )
        hidden = hidden.view(-1, s.t1 - s.t0, 1, t.C, T)
        shaped = scores.view(-1, s.t1 - s.t0, t.G, t.C, T)
        shaped += self.sink_bias[sequences % self.Hkv][:, None, :, None]
        shaped.masked_fill_(hidden, float("-inf"))
        return scores


def few_queries_forward(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor,
                        sink_log_weights: Tensor, key_mask: Tensor | None, scale: float
                        ) -> tuple[Tensor, Tensor]:
    """The same for a few queries after many keys (decoding): one dense tile over sinks and band."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    T, W = sink_log_weights.shape[1], log_weights.shape[1]
    N = min(Nk, Nq + W - 1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    i = torch.arange(Nk - Nq, Nk, device=q.device)[:, None]
    n = i - torch.arange(Nk - N, Nk, device=q.device)
    bias = log_weights.to(dtype)[:, n.clamp(0, W - 1)]  # [H, Nq, N]
    bias = bias.masked_fill((n < 0) | (n >= W), float("-inf"))
    keys, values, visible = k[:, :, Nk - N :], v[:, :, Nk - N :], key_mask
    if T:
        sinks = sink_positions(key_mask, T, k)
        visible = sinks.hide_from_band(key_mask)
        seen = sinks.visible[:, None] & (sinks.position[:, None] <= i)  # [B, Nq, T]
        sink_bias = sink_log_weights.to(dtype)[:, None].masked_fill(~seen[:, None], float("-inf"))
        keys = torch.cat([gather_sinks(k, sinks), keys], 2)
        values = torch.cat([gather_sinks(v, sinks), values], 2)
    if visible is not None:  # [B, H, Nq, N]
        bias = bias.masked_fill(~visible[:, None, None, Nk - N :], float("-inf"))
    if T:
        bias = torch.cat([sink_bias, bias], 3)
    rows = q.to(dtype).reshape(B, Hkv, -1, D)  # the G heads of a group, one after another
    scores = (rows @ keys.to(dtype).transpose(2, 3)).view(B, H, Nq, -1)
    scores = torch.add(bias, scores, alpha=scale)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == float("-inf"), float("inf")).unsqueeze(-1)).exp()
    out = torch.empty_like(q)
    out.copy_((probs.view(B, Hkv, -1, T + N) @ values.to(dtype)).view(q.shape))
    return out, lse


def lastk_forward(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor, sink_log_weights: Tensor,
                  key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Nq, D]` in the dtype of `q` and the log-sum-exp `[B, H, Nq]` of each row."""
    if q.shape[2] < k.shape[2] and q.shape[2] <= 16:
        return few_queries_forward(q, k, v, log_weights, sink_log_weights, key_mask, scale)
    p = Problem(q, k, v, log_weights, sink_log_weights, key_mask, scale)
    t = p.tiling
    out, lse = torch.empty_like(p.q), p.q.new_empty(p.q.shape[0], p.q.shape[1], 1)
    for s in t.segments():
        scores = p.scores(s)
        top = scores.amax(-1, keepdim=True)
        if p.sinks is not None:
            sink_scores = p.sink_scores(s)
            top = torch.maximum(top, sink_scores.amax(-1, keepdim=True).view_as(top))
        top.masked_fill_(top == float("-inf"), 0)  # rows that see no key
        scores.sub_(top).exp2_()
        total = scores.sum(-1, keepdim=True)
        acc = torch.bmm(scores, t.windows(p.v, s))
        if p.sinks is not None:
            sink_scores.sub_(p.sink_rows(top, s)).exp2_()
            total += sink_scores.sum(-1, keepdim=True).view_as(total)
            acc += (sink_scores @ p.sink_v[s.x0 : s.x1]).view_as(acc)
        lse[s.blocks] = (top + total.log2()).mul_(LN_2)  # -inf where nothing is seen
        torch.div(acc, total.masked_fill(total == 0, 1), out=out[s.blocks])
    result = torch.empty_like(q)
    result.copy_(t.unpack_queries(out, q.shape))
    return result, t.unpack_queries(lse, q.shape[:3])


def lastk_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor,
                   sink_log_weights: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
                   scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_weights `[H, W]` and sink_log_weights `[H, T]`."""
    p = Problem(q, k, v, log_weights, sink_log_weights, key_mask, scale)
    t = p.tiling
    grad = grad.to(p.dtype)
    delta = t.pack_queries((grad * out).sum(-1, keepdim=True), p.dtype)
    unseeing = lse == float("-inf")  # rows that see no key: P = 0
    lse = (lse * LOG2_E).masked_fill_(unseeing, float("inf"))
    lse = t.pack_queries(lse.unsqueeze(-1), p.dtype, value=float("inf"))
    grad = t.pack_queries(grad, p.dtype)
    dq = torch.empty_like(p.q)
    dk, dv = torch.zeros_like(p.k), torch.zeros_like(p.v)
    dbias = torch.zeros_like(p.bias)
    if p.sinks is not None:
        dsink_k, dsink_v = torch.zeros_like(p.sink_k), torch.zeros_like(p.sink_v)
        dsink_bias = torch.zeros_like(p.sink_bias)
    for s in t.segments():
        do, rows = grad[s.blocks], p.q[s.blocks]
        probs = p.scores(s).sub_(lse[s.blocks]).exp2_()
        dscores = torch.bmm(do, t.windows(p.v, s).transpose(1, 2)).sub_(delta[s.blocks])
        dscores.mul_(probs)
        torch.bmm(dscores, t.windows(p.k, s), out=dq[s.blocks])
        t.scatter_windows(dv, s, probs, do)
        t.scatter_windows(dk, s, dscores, rows)
        L = dscores.shape[2]
        by_head = dscores.view(s.x1 - s.x0, -1, t.G, t.C, L)
        by_head = by_head.sum(1) if by_head.shape[1] > 1 else by_head[:, 0]
        for x in range(s.x0, s.x1):
            dbias[x % p.Hkv, ..., -L:] += by_head[x - s.x0]
        if p.sinks is not None:
            own = slice(s.x0, s.x1)
            do, rows = p.sink_rows(do, s), p.sink_rows(rows, s)
            probs = p.sink_scores(s).sub_(p.sink_rows(lse[s.blocks], s)).exp2_()
            dscores = (do @ p.sink_v[own].transpose(1, 2)).sub_(p.sink_rows(delta[s.blocks], s))
            dscores.mul_(probs)
            dq[s.blocks] += (dscores @ p.sink_k[own]).view_as(dq[s.blocks])
            dsink_v[own] += probs.transpose(1, 2) @ do
            dsink_k[own] += dscores.transpose(1, 2) @ rows
            by_head = dscores.view(s.x1 - s.x0, -1, t.G, t.C, dscores.shape[-1]).sum((1, 3))
            for y in range(s.x0, s.x1):
                dsink_bias[y % p.Hkv] += by_head[y - s.x0]
    grad_q = torch.empty_like(q)
    grad_q.copy_(t.unpack_queries(dq.mul_(scale), q.shape))
    grad_k, grad_v = t.unpack_keys(dk.mul_(scale), k), t.unpack_keys(dv, v)
    dsinks = torch.zeros_like(sink_log_weights)
    if p.sinks is not None:
        add_at_sinks(grad_k, dsink_k.mul_(scale).view(p.B, p.Hkv, -1, t.D), p.sinks)
        add_at_sinks(grad_v, dsink_v.view(p.B, p.Hkv, -1, t.D), p.sinks)
        dsinks = dsink_bias.view(-1, dsinks.shape[1]).to(sink_log_weights.dtype)
    n = torch.arange(t.W, device=q.device)
    row = torch.arange(t.C, device=q.device)[:, None] + t.r * t.C
    column = row - n  # diagonal n of dS, [C, W]; below 0 where the sequence is shorter than W
    diagonal = dbias.view(-1, t.C, t.L).gather(
        2, column.clamp(min=0).expand(dbias.shape[0] * t.G, -1, -1)
    )
    dlog_weights = diagonal.masked_fill(column < 0, 0).sum(1).to(log_weights.dtype)
    return grad_q, grad_k, grad_v, dlog_weights, dsinks

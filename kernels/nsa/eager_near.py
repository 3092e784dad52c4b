"""The near blocks of selected attention in linear time: chunks of queries, windows of whole blocks.

    near(p) b <= j <= p,    near(p) = floor(max(0, p - Wn + 1) / b)

Queries are cut into chunks of C tokens, a multiple of b. A chunk reads a window of L = (r + 1) C
keys, its own and r chunks before, which is an overlapping strided view of one flat buffer: the
tiling of the band of `lastk`. In a frame of rows all windows have one mask, `[C, L]`.

Letters: G query heads of a key head, X sequences, M rows of a frame, D head dim, b selection block,
Wn near window, n chunks of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.kernels.lastk.eager import Segment, Tiling
from attnopt.kernels.nsa.eager_frame import Frame, powers


class Near:
    """Packed keys of one call, and the scores of a segment."""

    def __init__(self, frame: Frame, k: Tensor, near_window: int) -> None:
        f, self.frame = frame, frame
        halo = -(-(near_window - 1) // f.b) * f.b
        self.base = max(0, f.offset // f.b * f.b - halo)  # first column that some row reads
        tokens = f.N - self.base
        C = -(-min(max(32, halo // 3), 256) // f.b) * f.b  # few chunks of halo: little is wasted
        chunks = -(-tokens // C)
        r = min(-(-halo // C), chunks - 1)
        self.tiling = Tiling(
            f.X, f.G, f.D, near_window, C, r, chunks, tokens, f.M, f.dtype.itemsize
        )
        self.k = self.pack(k)
        i = torch.arange(C, device=f.device)[:, None] + r * C
        key = torch.arange((r + 1) * C, device=f.device)
        first = (i - near_window + 1).div(f.b, rounding_mode="floor")
        unseen = (key.div(f.b, rounding_mode="floor") < first) | (key > i)
        self.tile = torch.zeros_like(unseen, dtype=f.dtype).masked_fill_(unseen, -torch.inf)
        visible = None if f.hidden is None else ~f.hidden[:, : f.N]
        self.key_bias = self.tiling.key_bias(visible, f.B, f.dtype, f.device)

    def pack(self, x: Tensor) -> Tensor:
        """Keys of a frame `[X, nb b, D]` as the flat buffer of the tiling."""
        return self.tiling.pack_keys(x[None, :, : self.frame.N], self.frame.dtype)

    def add_back(self, total: Tensor, buffer: Tensor) -> None:
        """Add a buffer of gradients to `[X, nb b, D]`."""
        t = self.tiling
        body = buffer[t.r * t.C :].view(t.X, t.nb * t.C, t.D)
        total[:, self.base : self.frame.N].add_(body[:, : t.N])

    def rows(self, x: Tensor, value: float = 0.0) -> Tensor:
        """`[X, G, M, D]` as the chunks of the tiling."""
        return self.tiling.pack_queries(x, self.frame.dtype, value)

    def scores(self, s: Segment, rows: Tensor) -> Tensor:
        """Scores `[n, G C, L]` of a segment's rows, without the keys before the text."""
        t = self.tiling
        windows = t.windows(self.k, s).transpose(1, 2)
        L = windows.shape[2]
        batch = torch.arange(s.x0, s.x1, device=rows.device) // self.frame.Hkv
        hidden = self.key_bias[batch, s.t0 : s.t1, -L:].reshape(-1, 1, L)
        scores = torch.baddbmm(hidden, rows, windows)
        scores.view(-1, t.G, t.C, L).add_(self.tile[:, -L:])
        return scores


def near_forward(near: Near, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[X, G, M, D]` and base-2 log-sum-exp `[X, G, M]` over the near tokens.

    Args:
        near: the packed keys.
        q: queries with the scale and log2(e) `[X, G, M, D]`.
        v: values `[X, nb b, D]`.
    """
    t = near.tiling
    rows, values = near.rows(q), near.pack(v)
    out, lse = torch.empty_like(rows), rows.new_empty(*rows.shape[:2], 1)
    for s in t.segments():
        scores = near.scores(s, rows[s.blocks])
        top, total = powers(scores)
        acc = torch.bmm(scores, t.windows(values, s))
        torch.div(acc, total.masked_fill(total == 0, 1), out=out[s.blocks])
        lse[s.blocks] = total.log2_().add_(top)
    return t.unpack_queries(out, q.shape), t.unpack_queries(lse, q.shape[:3])


def near_backward(near: Near, grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, v: Tensor,
                  dk: Tensor, dv: Tensor) -> Tensor:
    """Gradient `[X, G, M, D]` of the queries but for the scale; adds to those of keys and values.

    Args:
        near: the packed keys.
        grad: of the output, `[X, G, M, D]`.
        lse: of all that a query sees, in base 2, `[X, G, M]`; +inf in rows that see nothing.
        delta: `rowsum(grad * out)` less the gradient of lse, `[X, G, M]`.
        q: queries with the scale and log2(e) `[X, G, M, D]`.
        v: values `[X, nb b, D]`.
        dk: added to, `[X, nb b, D]`.
        dv: added to, `[X, nb b, D]`.
    """
    t = near.tiling
    values, do, rows = near.pack(v), near.rows(grad), near.rows(q)
    lse = near.rows(lse.unsqueeze(-1), torch.inf)
    delta = near.rows(delta.unsqueeze(-1))
    dq, buffers = torch.empty_like(rows), (torch.zeros_like(near.k), torch.zeros_like(near.k))
    for s in t.segments():
        probs = near.scores(s, rows[s.blocks]).sub_(lse[s.blocks]).exp2_()
        dscores = torch.bmm(do[s.blocks], t.windows(values, s).transpose(1, 2))
        dscores.sub_(delta[s.blocks]).mul_(probs)
        torch.bmm(dscores, t.windows(near.k, s), out=dq[s.blocks])
        t.scatter_windows(buffers[0], s, dscores, rows[s.blocks])
        t.scatter_windows(buffers[1], s, probs, do[s.blocks])
    near.add_back(dk, buffers[0])
    near.add_back(dv, buffers[1])
    return t.unpack_queries(dq, q.shape)

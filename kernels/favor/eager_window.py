"""The exact window of the eager FAVOR+ path, and the shift that aligns the blocks of padded rows.

The C queries of a chunk read L = delay + C keys, from the first key of the chunk `delay` tokens
back on. A tile `[C, L]` says which: query i reads key l if `floor(i / b) b <= l <= delay + i`.

Letters: X sequences, n chunks of C queries, L keys of a chunk's window, b window block, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.kernels.rows import first_real_token


class Window:
    """Scores, values and gradients inside the window of a run of chunks."""

    def __init__(self, C: int, delay: int, block: int, scale: float, like: Tensor) -> None:
        self.C, self.delay, self.scale = C, delay, scale
        i = torch.arange(C, device=like.device)[:, None]
        key = torch.arange(C + delay, device=like.device)
        exact = (key >= i // block * block) & (key <= delay + i)
        self.tile = torch.zeros_like(exact, dtype=like.dtype).masked_fill(~exact, -torch.inf)

    def parts(self, first: int, n: int) -> Iterator[tuple[int, slice, slice]]:
        """Each chunk of a run, what of its window lies in the text, and the same within the run.

        Args:
            first: position of the run's first key, negative where windows begin before the text.
            n: chunks of the run.

        Yields:
            t, a slice of its window `[L]` and one of the run's keys `[n C + delay]`.
        """
        L = self.C + self.delay
        for t in range(n):
            skip = max(0, -(first + t * self.C))
            yield t, slice(skip, L), slice(t * self.C + skip, t * self.C + L)

    def scores(self, q: Tensor, k: Tensor, hidden: Tensor | None, first: int) -> Tensor:
        """Scores `[X, n, C, L]`, -inf where a key is not exact or `hidden` `[X, n C + delay]`."""
        X, n, C, _ = q.shape
        L = C + self.delay
        scores = q.new_empty(X, n, C, L)
        for t, seen, rows in self.parts(first, n):
            scores[:, t, :, : seen.start] = -torch.inf
            keys, target = k[:, rows].transpose(1, 2), scores[:, t, :, seen]
            torch.baddbmm(self.tile[:, seen], q[:, t], keys, alpha=self.scale, out=target)
        if hidden is not None:
            windows = hidden.contiguous().as_strided((X, n, 1, L), (hidden.shape[1], C, 0, 1))
            scores.masked_fill_(windows, -torch.inf)
        return scores

    def add_values(self, total: Tensor, weights: Tensor, v: Tensor, first: int) -> None:
        """Add `weights v`, `[X, n, C, L] [X, n C + delay, E]`, to `total` `[X, n, C, E]`."""
        for t, seen, rows in self.parts(first, total.shape[1]):
            total[:, t].baddbmm_(weights[:, t, :, seen], v[:, rows])

    def backward(self, h: Tensor, q: Tensor, weights: Tensor, k: Tensor, v: Tensor,
                 grads: tuple[Tensor, Tensor, Tensor], first: int) -> None:
        """Add the window's part to the gradients of queries, keys and values.

        Args:
            h: gradient of the weighted sums, `[X, n, C, E]`.
            q: `[X, n, C, D]`.
            weights: e^{s - c} `[X, n, C, L]`.
            k: `[X, n C + delay, D]`.
            v: `[X, n C + delay, E]`.
            grads: of q `[X, n, C, D]`, of k and v `[X, n C + delay, D]`.
            first: position of the run's first key.
        """
        dq, dk, dv = grads
        D = q.shape[-1]
        for t, seen, rows in self.parts(first, h.shape[1]):
            p = weights[:, t, :, seen]
            dv[:, rows].baddbmm_(p.transpose(1, 2), h[:, t, :, :D])
            dscores = torch.bmm(h[:, t], v[:, rows].transpose(1, 2)).mul_(p)
            dq[:, t].baddbmm_(dscores, k[:, rows], alpha=self.scale)
            dk[:, rows].baddbmm_(dscores.transpose(1, 2), q[:, t], alpha=self.scale)


def block_shift(key_mask: Tensor, block: int) -> Tensor:
    """How far each row must move, `[B]`, for its first real token to begin a block."""
    return (-first_real_token(key_mask)) % block


def shift_rows(x: Tensor, shift: Tensor, extra: int) -> Tensor:
    """Move `[B, h, N, ...]` by `shift` `[B]` tokens into `[B, h, N + extra, ...]` of zeros."""
    N = x.shape[2]
    source = torch.arange(N + extra, device=x.device) - shift[:, None]  # [B, N + extra]
    outside = ((source < 0) | (source >= N))[:, None]
    source = source.clamp(0, N - 1)[:, None]
    while source.dim() < x.dim():
        source, outside = source.unsqueeze(-1), outside.unsqueeze(-1)
    size = (x.shape[0], x.shape[1], N + extra, *x.shape[3:])
    return x.gather(2, source.expand(size)).masked_fill_(outside, 0)


def unshift_rows(x: Tensor, shift: Tensor, like: Tensor) -> Tensor:
    """Inverse of `shift_rows`, in the shape, dtype and layout of `like`."""
    source = (torch.arange(like.shape[2], device=x.device) + shift[:, None])[:, None]
    while source.dim() < x.dim():
        source = source.unsqueeze(-1)
    out = torch.empty_like(like)
    return out.copy_(x.gather(2, source.expand(like.shape)))

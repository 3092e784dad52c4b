"""FAVOR+ and its family in plain PyTorch: linear time, with a hand-written backward.

The text is cut into chunks of C tokens, and chunks are taken in runs, so that what a run needs at a
time stays in the cache. A query chunk stands `delay` tokens (window - 1, or none) behind its key
chunk: the queries of chunk t see every key chunk before t through features, of chunk t itself what
`far` allows (a causal triangle, or whole window blocks), and the window of `delay + C` keys from
chunk t's first key on exactly. With one factor per row, g, that brings both parts to one scale:

    S, z       sums of pk v and pk before the chunk, at references r that grow along the text
    A          pq pk^T inside the chunk                        p = e^{s - c} inside the window
    num, tot   g (pq [S, z] + A [v, 1]) + p [v, 1]             o = num / tot

Values carry a column of ones, so that [S, z] is one matrix of E = D + 1 columns. Backward keeps the
state at the start of each run and `tot`; it walks the runs back with the gradient U of [S, z]. With
h = [do, -do.o] / tot, A and dA = h [v, 1]^T in the chunk and h scaled by g for the far part:

    dlq = pq (h [S, z]^T + dA pk)     dlk = pk ([v, 1] U^T + dA^T pq)     dv = pk U + A^T h
    dS  = pq^T h + (decay) U          ds  = p (h [v, 1]^T)                and dv += p^T h

Letters: B batch, H query heads, Hkv key/value heads, X = B H sequences, Nq queries, Nk keys, D head
dim, E = D + 1, M features, W window, b window block, n chunks of a run, L = delay + C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.favor.eager_problem import Keys, Problem, Queries, Run, flat, kept_shapes
from attnopt.kernels.favor.eager_problem import saved_shapes as saved_shapes
from attnopt.kernels.favor.eager_step import favor_step, is_step

__all__ = ["favor_backward", "favor_forward", "saved_shapes"]


def favor_forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor, *, feature_map: str,
    window: int, window_block: int, causal: bool, stabilizer: str, scale: float,
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, next state and what backward keeps (see `saved_shapes`).

    Args:
        q: `[B, H, Nq, D]`.
        k: `[B, Hkv, Nk, D]`.
        v: like `k`.
        projection: `[H, M, D]`, for `taylor` `[H, 0, D]`.
        log_gate: `[H]`.
        key_mask: `[B, Nk]` bool, or None.
        kv: the initial state's sums `[B, H, M, D]`.
        z: `[B, H, M]`.
        log_scale: `[B, H, M]`.
        feature_map: as in `favor_attention`, like the other options.
        window: W, 0 for none.
        window_block: b.
        causal: whether queries see no later keys.
        stabilizer: "running" or "static".
        scale: factor of q.k.

    Returns:
        out `[B, H, Nq, D]`, lse `[B, H, Nq]` (without a window relative to the query's own
        normalizer), kv, z and log_scale of the next state, and four tensors for backward.
    """
    inputs = q, k, v, projection, log_gate, key_mask, kv, z, log_scale
    if is_step(q, k, window):
        step = favor_step(
            *inputs, feature_map=feature_map, window=window, window_block=window_block,
            stabilizer=stabilizer, scale=scale,
        )
        return *step, *(kv.new_empty(0) for _ in range(4))
    return forward_in_chunks(
        *inputs, feature_map=feature_map, window=window, window_block=window_block,
        causal=causal, stabilizer=stabilizer, scale=scale,
    )


def forward_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor, *, feature_map: str,
    window: int, window_block: int, causal: bool, stabilizer: str, scale: float,
) -> tuple[Tensor, ...]:
    """`favor_forward` for any sizes."""
    p = Problem(
        q, k, v, projection, log_gate, key_mask, feature_map=feature_map, window=window,
        window_block=window_block, causal=causal, stabilizer=stabilizer, scale=scale,
    )
    shapes = kept_shapes(
        q, k, projection, feature_map=feature_map, window=window, window_block=window_block,
        causal=causal,
    )
    seg_s, seg_z, seg_r = (q.new_zeros(shape, dtype=p.dtype) for shape in shapes[:3])
    out = torch.empty_like(p.q)
    lse, total = (q.new_empty(*p.q.shape[:3], 1, dtype=p.dtype) for _ in range(2))
    sums, last, _ = p.initial(kv, z, log_scale)
    for i, run in enumerate(p.plan.runs):
        seg_s[i], seg_r[i] = sums.view(seg_s[i].shape), last.view(seg_r[i].shape)
        keys = p.keys(run, sums, last)
        if run.queries:
            queries = p.queries(run, keys)
            rows = weighted_sums(p, run, keys, queries)
            start, tot = p.query_start(run), rows[..., -1:]
            p.write(total, tot, start)
            p.write(lse, tot.log().add_(queries.exponent), start)
            place = p.place(out, start, rows.shape[1])
            result = torch.mul(rows[..., :-1], reciprocal(tot), out=place)
            if result is not place:
                p.write(out, result, start)
        sums, last = keys.sums, keys.last
    seg_r[-1] = last.view(z.shape)
    next_scale, factor = p.final(last)
    sums = (sums * factor).view(seg_s.shape[1:])
    if window == 0:
        lse -= (p.features.center + p.features.headroom * p.features.is_log).view(p.B, p.H, 1, 1)
    return (
        p.restored(out, q), p.restored(lse.squeeze(-1), total[:, :, : q.shape[2], 0]),
        sums[..., :-1].clone(), sums[..., -1].clone(), next_scale.view(z.shape),
        seg_s, seg_z, seg_r, p.restored(total.squeeze(-1), total[:, :, : q.shape[2], 0]),
    )


def weighted_sums(p: Problem, run: Run, keys: Keys, queries: Queries) -> Tensor:
    """`num` and `tot` of a run's queries, `[X, n C, E]`."""
    n, C = run.t1 - run.t0, p.plan.C
    sums = torch.bmm(flat(queries.pq), flat(keys.before))
    if queries.pairs is not None:
        sums.baddbmm_(flat(queries.pairs), p.chunked(keys.v, n))
    sums = sums.view(p.X, n * C, -1)
    if p.window is not None:
        assert queries.factor is not None and queries.weights is not None
        sums.mul_(queries.factor)
        p.window.add_values(sums.view(p.X, n, C, -1), queries.weights, keys.v, run.t0 * C)
    return sums


def reciprocal(total: Tensor) -> Tensor:
    """`1 / total`, and 0 for the rows that see nothing."""
    return torch.where(total == 0, 0, 1 / total)


def favor_backward(
    grad: Tensor, grad_kv: Tensor, grad_z: Tensor, q: Tensor, k: Tensor, v: Tensor,
    projection: Tensor, log_gate: Tensor, key_mask: Tensor | None, kv: Tensor, z: Tensor,
    log_scale: Tensor, out: Tensor, lse: Tensor, log_scale1: Tensor, seg_kv: Tensor,
    seg_z: Tensor, seg_r: Tensor, block_r: Tensor, *, feature_map: str, window: int,
    window_block: int, causal: bool, stabilizer: str, scale: float, projection_grad: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, projection `[H, M, D]`, log_gate `[H]` and the initial kv and z.

    Args:
        grad: gradient of `out`.
        grad_kv: gradient of the returned kv.
        grad_z: gradient of the returned z.
        q: as in `favor_forward`, like all up to `log_scale`.
        k: see there.
        v: see there.
        projection: see there.
        log_gate: see there.
        key_mask: see there.
        kv: see there.
        z: see there.
        log_scale: see there.
        out: what `favor_forward` returned, like all that follow.
        lse: see there.
        log_scale1: see there.
        seg_kv: see `saved_shapes`.
        seg_z: see there.
        seg_r: see there.
        block_r: see there.
        feature_map: as in `favor_forward`, like the other options.
        window: see there.
        window_block: see there.
        causal: see there.
        stabilizer: see there.
        scale: see there.
        projection_grad: whether the projection's gradient is wanted; zeros otherwise.

    Returns:
        Gradients in the dtype and layout of q, k and v, the others in fp32 (fp64).
    """
    if is_step(q, k, window):  # nothing was kept
        out, _, _, _, chunked_scale, seg_kv, _, seg_r, block_r = forward_in_chunks(
            q, k, v, projection, log_gate, key_mask, kv, z, log_scale, feature_map=feature_map,
            window=window, window_block=window_block, causal=causal, stabilizer=stabilizer,
            scale=scale,
        )
        factor = (chunked_scale - log_scale1).exp()
        grad_kv, grad_z = grad_kv * factor.unsqueeze(-1), grad_z * factor
    p = Problem(
        q, k, v, projection, log_gate, key_mask, feature_map=feature_map, window=window,
        window_block=window_block, causal=causal, stabilizer=stabilizer, scale=scale,
        learns=projection_grad,
    )
    dq = torch.empty_like(p.q)
    # windows overlap, so that their gradients add up; without one each run writes its own keys
    make = torch.empty if p.window is None else torch.zeros
    dk, dv = (make(p.k.shape, dtype=p.dtype, device=q.device) for _ in range(2))
    dgate = q.new_zeros(p.X, dtype=torch.float64)
    upstream = p.aligned(grad), p.aligned(out), p.aligned(block_r.unsqueeze(-1))
    # gradient of [S, z] after the run at hand, at the reference that the run ends with
    carry = torch.cat([grad_kv, grad_z.unsqueeze(-1)], -1).to(p.dtype).flatten(0, 1)
    carry *= p.final(seg_r[-1].flatten(0, 1))[1]
    for i in reversed(range(len(p.plan.runs))):
        run = p.plan.runs[i]
        keys = p.keys(run, seg_kv[i].flatten(0, 1), seg_r[i].flatten(0, 1), backward=True)
        step = RunBackward(p, run, keys, upstream)
        carry = step.keys_and_queries(carry, dq, dk)
        if p.window is not None or run.keys:
            p.write(dk, step.dk, run.t0 * p.plan.C, add=p.window is not None)
            p.write(dv, step.dv, run.t0 * p.plan.C, add=p.window is not None)
        if run.queries:
            p.write(dq, step.dq, p.query_start(run))
            dgate += step.dgate
    carry = (carry * p.initial(kv, z, log_scale)[2]).view(*z.shape, -1)
    return (
        p.restored(dq, q), p.restored(dk, k), p.restored(dv, v),
        p.features.projection_gradient(p.B), dgate.view(p.B, p.H).sum(0).to(p.dtype),
        carry[..., :-1].clone(), carry[..., -1].clone(),
    )


class RunBackward:
    """Gradients of one run: of its rows of q, k and v, and of the state that it begins with."""

    def __init__(self, p: Problem, run: Run, keys: Keys, upstream: tuple[Tensor, ...]) -> None:
        self.p, self.run, self.keys = p, run, keys
        self.n = run.t1 - run.t0
        self.dq: Any = None  # tensors, from the first write on
        self.dk: Any = None
        self.dv: Any = None
        self.dgate: Tensor | float = 0.0
        if p.window is not None:
            self.dk, self.dv = torch.zeros_like(keys.x), torch.zeros_like(keys.x)
        if run.queries:
            self.queries = p.queries(run, keys, backward=True)
            self.h = self.row_gradients(*upstream)

    def row_gradients(self, grad: Tensor, out: Tensor, total: Tensor) -> Tensor:
        """`h = [do, -do.o] / tot` of the run's rows, `[X, n C, E]`; 0 where tot is 0."""
        p, start, rows = self.p, self.p.query_start(self.run), self.n * self.p.plan.C
        grad = p.pack(grad, start, rows)
        h = grad.new_empty(*grad.shape[:2], grad.shape[2] + 1)
        do = torch.mul(grad, reciprocal(p.pack(total, start, rows)), out=h[..., :-1])
        torch.sum(do * p.pack(out, start, rows), -1, out=h[..., -1]).neg_()
        return h

    def keys_and_queries(self, carry: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        """Set dq, dk, dv of the run; take the gradient of [S, z] after it to that before it.

        Rows are written to the full gradients `dq` and `dk` at once where a view of these fits.
        """
        p, rows = self.p, self.n * self.p.plan.C
        if p.window is None and self.run.queries:
            self.dq = p.place(dq, p.query_start(self.run), rows)
        if p.window is None and self.run.keys:
            self.dk = p.place(dk, self.run.t0 * p.plan.C, rows)
        run = self.run
        added = dpairs = None
        if run.queries:
            far = self.h
            if self.queries.factor is not None:
                far = far * self.queries.factor
            added, dpairs = self.far_queries(far)
        if not run.keys:
            if added is not None:
                carry = carry + added.view_as(carry)
        else:
            carry = self.far_keys(carry, added, dpairs, far if run.queries else None)
        if p.window is not None and run.queries:
            self.near()
        return carry

    def far_queries(self, far: Tensor) -> tuple[Tensor, Tensor | None]:
        """Set dq of the far part; gradients of the states `[X, chunks, M, E]` and of A."""
        p, keys, queries = self.p, self.keys, self.queries
        h = far.view(p.X * keys.chunks, -1, far.shape[-1])
        pq = flat(queries.pq)
        dlogits = torch.bmm(h, flat(keys.before).transpose(1, 2))
        dpairs = None
        if queries.pairs is not None:
            assert p.far is not None and keys.pk is not None
            values = p.chunked(keys.v, self.n)
            dpairs = torch.bmm(h, values.transpose(1, 2)).view_as(queries.pairs).mul_(p.far)
            dpairs = flat(dpairs)
            dlogits.baddbmm_(dpairs, flat(keys.pk))
        if p.features.is_log:
            dlogits.mul_(pq)
        dlogits = dlogits.view(p.X, -1, dlogits.shape[-1])
        if p.window is not None:
            weighted = dlogits if p.features.is_log else dlogits * pq.view_as(dlogits)
            self.dgate = weighted.sum(-1).sum(-1, dtype=torch.float64)
        self.dq = p.features.backward(
            queries.x, queries.phi, dlogits, normalized=p.features.normalize_queries, out=self.dq
        )
        added = torch.bmm(pq.transpose(1, 2), h)
        return added.view(p.X, keys.chunks, *added.shape[1:]), dpairs

    def far_keys(self, carry: Tensor, added: Tensor | None, dpairs: Tensor | None,
                 far: Tensor | None) -> Tensor:
        """Add the far part to dk and dv; gradient of [S, z] before the run."""
        p, keys, n = self.p, self.keys, self.n
        assert keys.pk is not None
        before_decay = p.far is not None  # queries see the state at the chunk's own reference
        states, carry = scan_back(added, carry, keys.decay, keys.pk.shape[:2], before_decay)
        values, pk = p.chunked(keys.v, n), flat(keys.pk)
        dlogits = torch.bmm(values, flat(states).transpose(1, 2))
        dv = torch.bmm(pk, flat(states)[..., :-1])
        if dpairs is not None:
            assert far is not None and self.queries.pairs is not None
            dlogits.baddbmm_(dpairs.transpose(1, 2), flat(self.queries.pq))
            rows = far.view(p.X * n, -1, far.shape[-1])[..., :-1]
            dv.baddbmm_(flat(self.queries.pairs).transpose(1, 2), rows)
        if p.features.is_log:
            dlogits.mul_(pk)
        elif keys.hidden is not None:
            dlogits.masked_fill_(flat(keys.hidden), 0)
        C = p.plan.C
        phi = None if keys.phi is None else keys.phi.view(p.X, n * C, -1)
        dlogits = dlogits.view(p.X, n * C, -1)
        dk = p.features.backward(
            keys.x[:, : n * C], phi, dlogits, normalized=True,
            out=self.dk if p.window is None else None,
        )
        dv = dv.view(p.X, n * C, -1)
        if p.window is None:
            self.dk, self.dv = dk, dv
        else:
            self.dk[:, : n * C], self.dv[:, : n * C] = dk, dv
        return carry

    def near(self) -> None:
        """Add the window's part to dq, dk and dv."""
        p, queries = self.p, self.queries
        assert p.window is not None and queries.weights is not None
        h, x, dq = (y.view(p.X, self.n, p.plan.C, -1) for y in (self.h, queries.x, self.dq))
        p.window.backward(
            h, x, queries.weights, self.keys.x, self.keys.v, (dq, self.dk, self.dv),
            self.run.t0 * p.plan.C,
        )


def scan_back(added: Tensor | None, carry: Tensor, decay: Tensor | None, shape: torch.Size,
              before_decay: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk, and of the one before the first.

    `g_{t-1} = added_t + decay_t g_t`, or `decay_t (added_t + g_t)` with `before_decay`.

    Args:
        added: what the queries of each chunk add, `[X, n, M, E]`, or None.
        carry: gradient of the last state, `[X, M, E]`.
        decay: `[X, n, M]`, or None for ones.
        shape: `(X, n)`.
        before_decay: whether queries saw the state after its decay.

    Returns:
        `[X, n, M, E]` and `[X, M, E]`.
    """
    X, n = shape
    states = carry.new_empty(X, n, *carry.shape[1:])
    states[:, n - 1] = carry
    if added is not None and before_decay and decay is not None:
        added.mul_(decay.unsqueeze(-1))
    for t in range(n - 1, -1, -1):
        target = states[:, t - 1] if t else torch.empty_like(carry)
        if added is None and decay is None:
            target.copy_(states[:, t])
        elif added is None:
            assert decay is not None
            torch.mul(states[:, t], decay[:, t, :, None], out=target)
        elif decay is None:
            torch.add(added[:, t], states[:, t], out=target)
        else:
            torch.addcmul(added[:, t], states[:, t], decay[:, t, :, None], out=target)
    return states, target

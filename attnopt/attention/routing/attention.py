"""Routing attention as an operator: a band of recent tokens, and earlier ones of one's cluster.

    o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij},    s_ij = scale q_i.k_j,  over the real j <= i with
    i - j < W, or the cluster of key j the same as that of query i

The band is last-k attention with weights of 1. What lies further back is sorted by cluster and,
within one, by time: then what a query sees is a contiguous run of keys, and neighboring queries
see much the same one. A tile of queries meets the union of its runs, and the two parts are joined
by their log-sum-exps. Backward recomputes both from the joint one, as in `kernels/lastk/eager.py`.

Which keys a query sees never depends on later tokens. How tiles are cut does, so that earlier
outputs may change in rounding.

Letters: B batch, H query heads, Hkv key/value heads, X = B H, Nq queries, Nk keys, D head
dimension, W window, C queries of a tile, L keys of its union.

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
section 4.1; here every token of a cluster is seen instead of the top w, whose choice would depend
on later tokens, and local and routed attention share one softmax instead of the heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.checks import check_key_mask, check_qkv, check_scale
from attnopt.kernels.dispatch import harmonize_autocast, operator_body
from attnopt.kernels.lastk.op import choose_backend  # and registers the operators of the band

TILE = 128  # C
_NOWHERE = 2**20  # cluster of padding


class Routes(NamedTuple):
    """Queries and keys in the order of clusters, and what of the keys each query sees."""

    queries: Tensor  # [X, Nq], index of the n-th query in this order
    keys: Tensor  # [X, Nk]
    first: Tensor  # [X, Nq], of the n-th query's run of keys in this order
    last: Tensor  # [X, Nq], one past its end

    def tiles(self) -> list[tuple[slice, int]]:
        """Tiles of queries and the keys L that each has to meet; tiles without any left out."""
        edges = range(0, self.first.shape[1], TILE)
        # runs begin and end in the order of the queries
        begin = self.first[:, ::TILE]
        end = torch.stack([part[:, -1] for part in self.last.split(TILE, 1)], 1)
        lengths = (end - begin).amax(0).tolist()
        return [(slice(a, a + TILE), n) for a, n in zip(edges, lengths, strict=True) if n]


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_clusters: Tensor,
    key_clusters: Tensor,
    *,
    window: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to the last W tokens, and to earlier ones whose cluster is that of the query.

    Time grows with N W and, for clusters of equal size, N^2 over their number; with all tokens in
    one cluster it is that of dense attention. Memory is linear in N.

    Args:
        q: `[B, H, Nq, D]`, the last Nq of the Nk positions.
        k: `[B, Hkv, Nk, D]`.
        v: like `k`.
        query_clusters: int64 `[B, H, Nq]`, 0 or more.
        key_clusters: int64 `[B, Hkv, Nk]`.
        window: W, at least 1.
        key_mask: `[B, Nk]` bool, True for real tokens.
        scale: factor of the scores, `1/sqrt(D)` by default.
        backend: of the band: "auto", "triton" or "eager".

    Returns:
        `[B, H, Nq, D]` in the dtype of `q`; gradients flow to q, k and v.

    Raises:
        ValueError: inputs that do not fit; the message says which.
    """
    q, k, v = harmonize_autocast(q, k, v)
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    for name, clusters, like in (("query", query_clusters, q), ("key", key_clusters, k)):
        if clusters.dtype != torch.int64 or clusters.shape != like.shape[:3]:
            raise ValueError(
                f"{name}_clusters must be int64 {list(like.shape[:3])}; got {clusters.dtype} "
                f"{list(clusters.shape)}"
            )
    scale, backend = check_scale(scale, q.shape[3]), choose_backend(backend, q)
    window = min(window, k.shape[2])
    out, _ = torch.ops.attnopt.routing_forward(
        q, k, v, query_clusters, key_clusters, key_mask, window, scale, backend
    )
    return out


def find_routes(
    query_clusters: Tensor, key_clusters: Tensor, key_mask: Tensor | None, window: int
) -> Routes:
    """Sort queries and keys by cluster and time; arguments as in `routing_attention`."""
    heads, queries = query_clusters.shape[1:]
    keys = key_clusters.shape[2]
    if key_mask is not None:
        key_clusters = key_clusters.masked_fill(~key_mask[:, None], _NOWHERE)
        query_clusters = query_clusters.masked_fill(~key_mask[:, None, keys - queries :], _NOWHERE)
    key_clusters = key_clusters.repeat_interleave(heads // key_clusters.shape[1], dim=1)
    step = keys + 1  # from one cluster to the next, in which token j is number j + 1
    number = torch.arange(1, step, device=key_clusters.device)
    sorted_keys = (key_clusters * step + number).flatten(0, 1).sort(1).values
    sorted_queries = query_clusters * step + number[keys - queries :]
    sorted_queries = sorted_queries.flatten(0, 1).sort(1).values
    cluster, number = sorted_queries // step, sorted_queries % step
    begin = cluster * step
    far = (number - window).clamp_min(0)  # the last token before the window
    far = far.masked_fill(cluster == _NOWHERE, 0)
    return Routes(
        queries=number - 1 - (keys - queries),
        keys=sorted_keys % step - 1,
        first=torch.searchsorted(sorted_keys, begin, right=True),
        last=torch.searchsorted(sorted_keys, begin + far, right=True),
    )


class _Far:
    """Sorted operands of the routed part, and the scores of a tile: what both passes share."""

    def __init__(self, routes: Routes, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.routes, self.heads, self.scale = routes, q.shape[1], scale
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = self.sort(q, routes.queries)  # [X, Nq, D]
        self.k, self.v = self.sort(k, routes.keys), self.sort(v, routes.keys)  # [X, Nk, D]

    def sort(self, x: Tensor, order: Tensor) -> Tensor:
        """`[B, H or Hkv, N, ...]` to `[X, N, ...]` in the given order."""
        x = x.to(self.dtype).repeat_interleave(self.heads // x.shape[1], dim=1).flatten(0, 1)
        return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))

    def restore(self, x: Tensor, order: Tensor, like: Tensor) -> Tensor:
        """Undo `sort`, adding up the heads of a group."""
        index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)
        x = torch.empty_like(x).scatter_(1, index, x)
        return x.view(*like.shape[:2], -1, *x.shape[1:]).sum(2)

    def tile(self, rows: slice, length: int) -> tuple[Tensor, Tensor]:
        """Scores `[X, C, L]` of a tile, -inf where unseen, and its keys in `[X Nk]`: `[X, L]`."""
        first, last = self.routes.first[:, rows], self.routes.last[:, rows]
        index = first[:, :1] + torch.arange(length, device=first.device)  # [X, L]
        hidden = (index[:, None] < first[..., None]) | (index[:, None] >= last[..., None])
        index = index.clamp_max(self.k.shape[1] - 1)  # beyond all runs: hidden
        index = index + torch.arange(index.shape[0], device=index.device)[:, None] * self.k.shape[1]
        keys = self.k.flatten(0, 1)[index]
        scores = self.scale * self.q[:, rows] @ keys.mT
        return scores.masked_fill_(hidden, -torch.inf), index


def _band(q: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Log-weights of a plain window `[H, W]`, and of no sinks `[H, 0]`."""
    zeros = torch.zeros(q.shape[1], window, dtype=torch.float32, device=q.device)
    return zeros, zeros[:, :0]


@torch.library.custom_op("attnopt::routing_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_clusters: Tensor,
    key_clusters: Tensor,
    key_mask: Tensor | None,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with operator_body(q):
        near, near_lse = torch.ops.attnopt.lastk_forward(
            q, k, v, *_band(q, window), key_mask, scale, backend
        )
        routes = find_routes(query_clusters, key_clusters, key_mask, window)
        far = _Far(routes, q, k, v, scale)
        out, lse = torch.zeros_like(far.q), torch.full_like(far.q[..., 0], -torch.inf)
        for rows, length in routes.tiles():
            scores, index = far.tile(rows, length)
            lse[:, rows] = tile_lse = scores.logsumexp(-1)
            probs = (scores - _finite(tile_lse)[..., None]).exp_()
            out[:, rows] = probs @ far.v.flatten(0, 1)[index]
        far_lse = far.restore(lse, routes.queries, q)
        lse = torch.logaddexp(near_lse, far_lse)
        shares = ((part - _finite(lse)).exp()[..., None] for part in (near_lse, far_lse))
        parts = (near.to(far.dtype), far.restore(out, routes.queries, q))
        joint = sum(share * part for share, part in zip(shares, parts, strict=True))
        result = torch.empty_like(q)
        return result.copy_(joint), lse


@torch.library.custom_op("attnopt::routing_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_clusters: Tensor,
    key_clusters: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with operator_body(q):
        # With the joint log-sum-exp and output the band's backward gives its share of the whole.
        near = torch.ops.attnopt.lastk_backward(
            grad, q, k, v, *_band(q, window), key_mask, out, lse, scale, backend
        )[:3]
        routes = find_routes(query_clusters, key_clusters, key_mask, window)
        far = _Far(routes, q, k, v, scale)
        do = far.sort(grad, routes.queries)
        delta = (do * far.sort(out, routes.queries)).sum(-1, keepdim=True)
        lse = _finite(far.sort(lse, routes.queries))[..., None]
        dq, dk, dv = (torch.zeros_like(x) for x in (far.q, far.k, far.v))
        for rows, length in routes.tiles():
            scores, index = far.tile(rows, length)
            probs = (scores - lse[:, rows]).exp_()
            dscores = probs * (do[:, rows] @ far.v.flatten(0, 1)[index].mT - delta[:, rows]) * scale
            dq[:, rows] = dscores @ far.k.flatten(0, 1)[index]
            # An index may come twice only beyond all runs, with zeros: the order does not matter.
            for grads, weights, x in ((dk, dscores, far.q), (dv, probs, do)):
                parts = weights.mT @ x[:, rows]
                grads.flatten(0, 1).index_add_(0, index.flatten(), parts.flatten(0, 1))
        sums = [(dq, routes.queries, q), (dk, routes.keys, k), (dv, routes.keys, v)]
        grad_q, grad_k, grad_v = (
            torch.empty_like(like).copy_(part + far.restore(x, order, like))
            for part, (x, order, like) in zip(near, sums, strict=True)
        )
        return grad_q, grad_k, grad_v


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp, with 0 for queries that see nothing."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


@_forward.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.window, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Any, _grad_lse: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    options = ctx.window, ctx.scale, ctx.backend
    grads = torch.ops.attnopt.routing_backward(grad, *ctx.saved_tensors, *options)
    return (*grads, *(None,) * 6)


torch.library.register_autograd("attnopt::routing_forward", _differentiate, setup_context=_save)

"""Native Sparse Attention: the public functions that combine its branches.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim, P compressed
blocks, S selected blocks, l, d, b sizes of blocks, W window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.checks import check_key_mask, check_qkv, check_scale, is_dense
from attnopt.kernels.dispatch import harmonize_autocast
from attnopt.kernels.lastk.op import sliding_window_attention
from attnopt.kernels.nsa.arguments import (
    COMBINES,
    Pattern,
    check_branches,
    check_compressed,
    check_gates,
    check_size,
    choose_backend,
    choose_regime,
    gates_pattern,
    merged_pattern,
)
from attnopt.kernels.nsa.branches import (
    compressed_attention,
    select_blocks,
    selected_attention,
)
from attnopt.kernels.nsa.calls import make_call
from attnopt.kernels.nsa.decode import nsa_decode_step
from attnopt.kernels.nsa.reference import nsa_reference
from attnopt.kernels.packing import Layout, lay_out_inputs

__all__ = [
    "compressed_attention",
    "nsa_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

_SEPARATE = ("k_select", "v_select", "k_window", "v_window")


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    gates: Tensor | None = None,
    combine: str = "merged",
    compress_block: int | None = None,
    compress_stride: int | None = None,
    select_block: int,
    num_selected: int,
    window: int,
    sink_blocks: int | None = None,
    local_blocks: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    k_select: Tensor | None = None,
    v_select: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    regime: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Attend to compressed blocks, to the best blocks token by token, and to recent tokens.

    `combine="gates"`, the paper's: three softmaxes, `o = g_0 o_cmp + g_1 o_select + g_2 o_window`.
    `combine="merged"`: one softmax in which every token counts once, exactly if it is recent or in
    a selected block, else through its block's compressed key and value with `log b` added to the
    score. Its window reaches back to a block's start and so covers W to W + b - 1 tokens.
    The heads of a group share their selection. No gradient flows through it.

    Args:
        q: `[B, H, Nq, D]`, fp16, bf16, fp32 or fp64 (fp64 not with Triton), any strides.
        k: `[B, Hkv, Nk, D]`, Hkv dividing H, Nk >= Nq: the queries are the last Nq tokens.
        v: like `k`.
        k_cmp: compressed keys `[B, Hkv, P, D]` of all Nk tokens, as `mean_compress` makes them:
            P = max(0, (Nk - l) // d + 1).
        v_cmp: compressed values, likewise.
        gates: `[B, H, Nq, 3]` (compressed, selected, window) with "gates", None with "merged".
        combine: "merged" or "gates".
        compress_block: l tokens of a compressed block; by default `select_block`.
        compress_stride: d tokens from one to the next; by default `select_block`.
        select_block: b tokens of a selection block; with "merged" l = d = b.
        num_selected: S selected blocks of a query, counting the forced ones.
        window: W recent tokens, the query's own among them.
        sink_blocks: first blocks that are always selected; by default 1, with "merged" 0.
        local_blocks: last blocks that are always selected, the query's own among them; by default
            2; not with "merged".
        key_mask: `[B, Nk]` bool, True for real tokens; blocks count from each row's first.
        cu_seqlens: int32 or int64 `[S + 1]`, where packed documents begin and end: 0 first,
            strictly increasing, N last. They never see each other. With B = 1, Nq = Nk and no mask.
            `k_cmp` and `v_cmp` hold the blocks of all documents end to end, as `mean_compress` with
            `cu_seqlens` makes them.
        max_seqlen: length of the longest document, or more: rows of this length then hold one
            document each and nothing is read from the device. None groups documents by length.
        scale: factor of the scores, `1/sqrt(D)` by default.
        k_select: keys of the selected branch, by default `k`; not with "merged".
        v_select: values, likewise.
        k_window: keys of the window, by default `k`; not with "merged".
        v_window: values, likewise.
        regime: of the selected branch. "short" masks tiles of queries (quadratic time), "long"
            gathers the queries of each block; "auto" chooses by Nk.
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses.

    Returns:
        `[B, H, Nq, D]` in the dtype of `q` (under autocast, in its dtype). A row that sees no token
        is zero. Gradients flow to every tensor but the mask; second derivatives only with
        backend="reference".

    Raises:
        ValueError: a shape, dtype, device, size or backend that does not fit; the message says
            which.

    Source: Yuan et al. 2025, "Native Sparse Attention", equations 5 to 12; merging is ours.
    """
    q, k, v, k_cmp, v_cmp, *own = harmonize_autocast(
        q, k, v, k_cmp, v_cmp, k_select, v_select, k_window, v_window
    )
    separate: dict[str, Any] = dict(zip(_SEPARATE, own, strict=True))
    if cu_seqlens is not None:
        layout = lay_out_inputs(q, k, v, cu_seqlens, max_seqlen, key_mask)
        return _attend_documents(
            layout, (q, k, v), (k_cmp, v_cmp), {"gates": gates, **separate}, combine=combine,
            compress_block=compress_block, compress_stride=compress_stride,
            select_block=select_block, num_selected=num_selected, window=window,
            sink_blocks=sink_blocks, local_blocks=local_blocks, scale=scale, regime=regime,
            backend=backend,
        )
    pattern = _check(
        q, k, v, k_cmp, v_cmp, gates, key_mask, separate, combine, compress_block,
        compress_stride, select_block, num_selected, window, sink_blocks, local_blocks,
    )
    scale = check_scale(scale, q.shape[3])
    backend = choose_backend(backend, q, pattern.far)
    tokens, merged = k.shape[2], combine == "merged"
    regime = choose_regime(regime, tokens, backend)
    if backend == "reference":
        return nsa_reference(q, k, v, k_cmp, v_cmp, gates=gates, key_mask=key_mask, scale=scale,
                             **_sizes(pattern), **separate)
    ks, vs, kw, vw = (y if x is None else x for x, y in zip(own, (k, v, k, v), strict=True))
    call = make_call(pattern, tokens, key_mask, k, scale, regime, backend)
    if merged:
        chosen = call.select(q, k_cmp)
        compressed, lse = call.compressed(q, k_cmp, v_cmp, left_out=chosen)
    else:
        compressed, lse = call.compressed(q, k_cmp, v_cmp)
        chosen = call.select(q, k_cmp, lse)
    selected, selected_lse = call.selected(q, ks, vs, chosen)
    recent, weights = None, gates
    if merged:
        weights = _shares(lse, selected_lse)
    else:
        recent = sliding_window_attention(
            q, kw, vw, window, key_mask=key_mask, scale=scale, backend=backend
        )
    return torch.ops.attnopt.nsa_combine(compressed, selected, recent, weights, backend)


def nsa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    gates: Tensor | None = None,
    combine: str = "merged",
    compress_block: int | None = None,
    compress_stride: int | None = None,
    select_block: int,
    num_selected: int,
    window: int,
    sink_blocks: int | None = None,
    local_blocks: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    k_select: Tensor | None = None,
    v_select: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from the newest token alone: one step of decoding, without gradients.

    Of the cache it reads the compressed keys and values, the chosen blocks and the window.

    Args:
        q: `[B, H, 1, D]`, the newest token.
        k: `[B, Hkv, Nk, D]`, the newest token last.
        v: like `k`.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        v_cmp: compressed values, likewise.
        gates: `[B, H, 1, 3]` with "gates".
        combine: this and the sizes as in `nsa_attention`.
        compress_block: l.
        compress_stride: d.
        select_block: b.
        num_selected: S.
        window: W.
        sink_blocks: forced first blocks.
        local_blocks: forced last blocks.
        key_mask: `[B, Nk]` bool, True for real tokens.
        scale: factor of the scores.
        k_select: keys of the selected branch, by default `k`.
        v_select: values, likewise.
        k_window: keys of the window, by default `k`.
        v_window: values, likewise.
        backend: "auto" and "eager" gather what the step needs; "triton" and "reference" run
            `nsa_attention` on one query, which reads more.

    Returns:
        `[B, H, 1, D]` in the dtype of `q`.

    Raises:
        ValueError: as `nsa_attention`, and for more than one query.
    """
    if isinstance(q, Tensor) and q.dim() == 4 and q.shape[2] != 1:
        raise ValueError(f"nsa_decode takes one query token; got {q.shape[2]}")
    sizes: dict[str, Any] = {
        "compress_block": compress_block, "compress_stride": compress_stride,
        "select_block": select_block, "num_selected": num_selected, "window": window,
        "sink_blocks": sink_blocks, "local_blocks": local_blocks,
    }
    q, k, v, k_cmp, v_cmp, *own = harmonize_autocast(
        q, k, v, k_cmp, v_cmp, k_select, v_select, k_window, v_window
    )
    separate: dict[str, Any] = dict(zip(_SEPARATE, own, strict=True))
    with torch.no_grad():
        if backend not in ("auto", "eager"):
            return nsa_attention(q, k, v, k_cmp, v_cmp, gates=gates, combine=combine,
                                 key_mask=key_mask, scale=scale, backend=backend, **sizes,
                                 **separate)
        pattern = _check(q, k, v, k_cmp, v_cmp, gates, key_mask, separate, combine,
                         *sizes.values())
        return nsa_decode_step(q, k, v, k_cmp, v_cmp, key_mask, gates, *own,
                               scale=check_scale(scale, q.shape[3]), **_sizes(pattern))


def _attend_documents(
    layout: Layout, tokens: Sequence[Tensor], compressed: Sequence[Tensor],
    optional: Mapping[str, Tensor | None], **options: Any,
) -> Tensor:
    """`nsa_attention` of packed documents: rows of tokens beside rows of their blocks."""
    block, stride = (
        check_size(name, options["select_block"] if options[name] is None else options[name])
        for name in ("compress_block", "compress_stride")
    )
    first = compressed[0]
    count = first.shape[2] if is_dense(first) and first.dim() == 4 else None
    blocks = layout.blocks(block, stride, count)

    def attend(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, *others: Any,
               key_mask: Tensor | None) -> Tensor:
        named: dict[str, Any] = dict(zip(optional, others, strict=True))
        return nsa_attention(q, k, v, k_cmp, v_cmp, key_mask=key_mask, **named, **options)

    return layout.attend(
        attend, *map(layout.pack, tokens), *map(blocks.pack, compressed),
        *map(layout.pack, optional.values()),
    )


def _check(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor | None,
           key_mask: Tensor | None, separate: dict[str, Tensor | None], combine: str,
           compress_block: int | None, compress_stride: int | None, select_block: int,
           num_selected: int, window: int, sink_blocks: int | None, local_blocks: int | None,
           ) -> Pattern:
    """Check everything but scale, regime and backend; return the pattern that the sizes make."""
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    if combine not in COMBINES:
        raise ValueError(f"combine must be one of {', '.join(COMBINES)}; got {combine!r}")
    make = merged_pattern if combine == "merged" else gates_pattern
    block = select_block if compress_block is None else compress_block
    stride = select_block if compress_stride is None else compress_stride
    pattern = make(block, stride, select_block, num_selected, window, sink_blocks, local_blocks)
    check_compressed(q, {"k_cmp": k_cmp, "v_cmp": v_cmp}, k.shape[2], block, stride, k.shape[1])
    check_gates(gates, q, combine)
    check_branches(separate, k, combine)
    return pattern


def _sizes(p: Pattern) -> dict[str, Any]:
    """The public arguments that make this pattern, all of them filled in."""
    merged = p.combine == "merged"
    local = 0 if merged or not p.near_window else (p.near_window - 1) // p.select_block + 1
    return {
        "combine": p.combine, "compress_block": p.block, "compress_stride": p.stride,
        "select_block": p.select_block, "num_selected": p.far + local, "window": p.window,
        "sink_blocks": p.sinks, "local_blocks": None if merged else local,
    }


def _shares(*parts: Tensor) -> Tensor:
    """Weights of the parts of one softmax, by their log-sum-exps `[B, H, Nq]`; 0 for none."""
    lse = torch.stack(parts, -1)
    top = lse.detach().amax(-1, keepdim=True)
    weights = (lse - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)

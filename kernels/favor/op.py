"""FAVOR+ attention: the public functions, and the operators behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.checks import check_key_mask, check_qkv
from attnopt.kernels.dispatch import harmonize_autocast, operator_body, resolve_backend
from attnopt.kernels.favor.arguments import (
    FEATURE_MAPS,
    TRITON_FEATURE_MAPS,
    Options,
    check_features,
    check_options,
    check_state,
    count_features,
)
from attnopt.kernels.favor.plan import fits
from attnopt.kernels.favor.reference import favor_reference
from attnopt.kernels.favor.state import EMPTY, FavorState, cut_ring, join_ring
from attnopt.kernels.interpreter import prepare_interpreter
from attnopt.kernels.packing import lay_out_inputs
from attnopt.kernels.rows import first_real_token

__all__ = ["FEATURE_MAPS", "FavorState", "empty_state", "favor_attention", "favor_decode"]


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    feature_map: str = "favor",
    window: int = 0,
    window_block: int = 32,
    log_gate: Tensor | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    stabilizer: str = "running",
    initial_state: FavorState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Attend in linear time through positive features, and exactly to the nearest tokens.

    `o_i = sum_j u_ij v_j / sum_j u_ij` over the visible keys. With x' = sqrt(scale) x,

        far keys    u_ij = c_h phi(q'_i).phi(k'_j),  c_h = e^{log_gate[h]} (over M for "favor")
        near keys   u_ij = e^{scale q_i.k_j}

        "favor"     phi_m(x) = e^{w_m.x - |x|^2/2}: far keys estimate e^{scale q.k} without bias
        "hedgehog"  phi(x) = softmax(W x), where W holds rows w and -w
        "exp"       phi_m(x) = e^{w_m.x}
        "relu"      phi_m(x) = max(w_m.x, 0) + 1e-3
        "taylor"    phi(x).phi(y) = 1 + x.y + (x.y)^2/2, without projection

    A query at position p of its row, counted from the first real token, sees the blocks of
    `window_block` tokens from floor(max(0, p - window + 1) / window_block) on exactly, between
    `window` and `window + window_block - 1` keys; earlier ones are far. Without a window all are.

    Args:
        q: `[B, H, Nq, D]`, fp16, bf16, fp32 or fp64 (fp64 not with Triton), any strides.
        k: `[B, Hkv, Nk, D]`, Hkv dividing H, Nk >= Nq: the queries are the last Nq tokens.
        v: like `k`.
        projection: W, `[M, D]` or `[H, M, D]`, floating point; None for "taylor". Triton rounds
            it to the dtype of `q`.
        feature_map: the name of phi.
        window: exact tokens, 0 for none; with `window >= Nk` this is full causal attention.
        window_block: tokens per block, 1 to 128.
        log_gate: `[H]`, how much the far keys weigh; only with a window (without, it cancels).
        causal: whether a query sees only keys up to its own position.
        key_mask: `[B, Nk]` bool, True for real tokens.
        cu_seqlens: int32 or int64 `[S + 1]`, where packed documents begin and end: 0 first,
            strictly increasing, N last. They never see each other. With B = 1, Nq = Nk, without
            mask and state.
        max_seqlen: length of the longest document, or more: rows of this length then hold one
            document each and nothing is read from the device. None groups documents by length.
        scale: factor of the scores, positive, `1/sqrt(D)` by default.
        stabilizer: "running" keeps a running maximum per feature, precise for any norm; the
            maximum over a block sees later keys of that block, which cancels but for rounding.
            "static" scales by |w_m|^2/2 instead: bit for bit causal, precise while |x'| stays
            below about 10.
        initial_state: what an earlier call returned; its tokens come before these.
        return_state: also return the state after these tokens.
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses. "relu", "taylor",
            more than 256 features, and states of more than 128 x 128 numbers (bf16: 256 x 128)
            have no Triton kernel.

    Returns:
        `[B, H, Nq, D]` in the dtype of `q` (under autocast, in its dtype), and with
        `return_state` a pair of that and a `FavorState`. A row that sees no key is zero, and with
        a window so is padding before the first real token, whatever the state.
        Gradients flow to q, k, v, projection, log_gate and the state's sums and tokens; second
        derivatives only with backend="reference".

    Raises:
        ValueError: an argument that does not fit; the message says which and what was expected.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", equations 4 to 7;
    hedgehog: Zhang et al. 2024, section 4; taylor: Arora et al. 2024 ("Based"), section 3.1.
    """
    q, k, v = harmonize_autocast(q, k, v)
    if cu_seqlens is not None:
        if initial_state is not None or return_state:
            raise ValueError("packed documents (cu_seqlens) neither take nor return a state")
        layout = lay_out_inputs(q, k, v, cu_seqlens, max_seqlen, key_mask)
        attend = partial(
            favor_attention, projection=projection, feature_map=feature_map, window=window,
            window_block=window_block, log_gate=log_gate, causal=causal, scale=scale,
            stabilizer=stabilizer, backend=backend,
        )
        return layout.attend(attend, *map(layout.pack, (q, k, v)), masked=not causal)
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    options = check_options(q, feature_map, window, window_block, causal, scale, stabilizer)
    projection, log_gate = check_features(q, projection, log_gate, options)
    num_features = count_features(projection, q, feature_map)
    backend = _choose_backend(backend, q, feature_map, num_features)
    state = initial_state
    if state is not None:
        check_state(state, q, k, num_features, window)
        k, v, key_mask = join_ring(state, k, v, key_mask)
    run = _reference if backend == "reference" else _fused
    out, sums = run(q, k, v, projection, log_gate, key_mask, state, options, backend)
    if window and state is not None and key_mask is not None:  # not even the state is seen
        position = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=k.device)
        before = position < first_real_token(key_mask)[:, None]  # [B, Nq]
        out = out.masked_fill(before[:, None, :, None], 0.0)
    if not return_state:
        return out
    ring = cut_ring(k, v, key_mask, window, window_block) if window else (None, None, None)
    return out, FavorState(*sums, *ring)


def favor_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    state: FavorState,
    **options: Any,
) -> tuple[Tensor, FavorState]:
    """Attend from one new token: one step of decoding, in constant memory, without gradients.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, Hkv, 1, D]`.
        v: like `k`.
        projection: as in `favor_attention`.
        state: the past, from `favor_attention(..., return_state=True)`, an earlier step or
            `empty_state`.
        **options: `feature_map`, `window`, `window_block`, `log_gate`, `key_mask` `[B, 1]`,
            `scale`, `stabilizer` and `backend`, as in `favor_attention`.

    Returns:
        `[B, H, 1, D]` in the dtype of `q`, and the next state.

    Raises:
        ValueError: as `favor_attention`, and for more than one token.
    """
    for name, x in (("q", q), ("k", k)):
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] != 1:
            raise ValueError(f"favor_decode takes one token; got {x.shape[2]} in {name}")
    with torch.no_grad():
        return favor_attention(
            q, k, v, projection, initial_state=state, return_state=True, **options
        )


def empty_state(
    q: Tensor,
    k: Tensor,
    projection: Tensor | None,
    *,
    feature_map: str = "favor",
    window: int = 0,
) -> FavorState:
    """Make the state before the first token.

    Args:
        q: queries of any length `[B, H, N, D]`, for sizes, dtype and device.
        k: keys of any length `[B, Hkv, N, D]`.
        projection: as in `favor_attention`.
        feature_map: the name of phi.
        window: exact tokens; above 0 the state has a ring.

    Returns:
        A state of zeros, with an empty ring where there is a window.

    Raises:
        ValueError: an unknown feature map, or a projection that does not fit.
    """
    q, k = harmonize_autocast(q, k)
    options = check_options(q, feature_map, window, 1, True, None, "running")
    check_features(q, projection, None, options)
    sums = _empty_sums(q, count_features(projection, q, feature_map))
    if not window:
        return FavorState(*sums)
    none = k[:, :, :0]
    return FavorState(*sums, none, none, none.new_ones(k.shape[0], 0, dtype=torch.bool))


def _empty_sums(q: Tensor, num_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """kv, z and log_scale before the first token."""
    B, H, _, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    z = q.new_zeros(B, H, num_features, dtype=dtype)
    return z.new_zeros(*z.shape, D), z, torch.full_like(z, EMPTY)


def _choose_backend(backend: str, q: Tensor, feature_map: str, num_features: int) -> str:
    """The backend that runs: what has no Triton kernel is eager under "auto", else refused."""
    lacks = None
    if feature_map not in TRITON_FEATURE_MAPS:
        lacks = f"feature_map={feature_map!r}"
    elif not fits(q, num_features):
        lacks = f"{num_features} features of heads of {q.shape[3]} in {q.dtype}"
    if lacks and backend == "auto":
        backend = "eager"
    if lacks and backend == "triton":
        raise ValueError(f"{lacks} has no Triton kernel; use backend='eager'")
    return resolve_backend(backend, q)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, state: FavorState | None, options: Options, backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    pair: Any = favor_reference(
        q, k, v, None if options.feature_map == "taylor" else projection,
        feature_map=options.feature_map, window=options.window,
        window_block=options.window_block, log_gate=log_gate if options.window else None,
        causal=options.causal, key_mask=key_mask, scale=options.scale,
        initial_state=None if state is None else state[:3], return_state=True,
    )
    return pair


def _fused(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, state: FavorState | None, options: Options, backend: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    if state is None:
        initial = _empty_sums(q, count_features(projection, q, options.feature_map))
    else:
        initial = state[:3]
    out, _, *sums = torch.ops.attnopt.favor_forward(
        q, k, v, projection, log_gate, key_mask, *initial, *options, backend,
    )[:5]
    return out, tuple(sums)


@torch.library.custom_op("attnopt::favor_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor,
    feature_map: str, window: int, window_block: int, causal: bool, stabilizer: str,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with operator_body(q):
        forward, _ = _implementation(backend, q.device)
        return forward(
            q, k, v, projection, log_gate, key_mask, kv, z, log_scale,
            feature_map=feature_map, window=window, window_block=window_block, causal=causal,
            stabilizer=stabilizer, scale=scale,
        )


@torch.library.custom_op("attnopt::favor_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_kv: Tensor, grad_z: Tensor,
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor,
    out: Tensor, lse: Tensor, log_scale1: Tensor,
    seg_kv: Tensor, seg_z: Tensor, seg_r: Tensor, block_r: Tensor,
    feature_map: str, window: int, window_block: int, causal: bool, stabilizer: str,
    scale: float, backend: str, projection_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with operator_body(q):
        _, backward = _implementation(backend, q.device)
        dq, dk, dv, *others = backward(
            grad, grad_kv, grad_z, q, k, v, projection, log_gate, key_mask, kv, z, log_scale,
            out, lse, log_scale1, seg_kv, seg_z, seg_r, block_r,
            feature_map=feature_map, window=window, window_block=window_block, causal=causal,
            stabilizer=stabilizer, scale=scale, projection_grad=projection_grad,
        )
        return (_in_layout(dq, q), _in_layout(dk, k), _in_layout(dv, v), *others)


def _in_layout(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the strides of `empty_like(like)`, which are what the fake kernel promises."""
    wanted = torch.empty_like(like)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)


def _implementation(backend: str, device: torch.device) -> tuple[Callable, Callable]:
    """Forward and backward of a backend; Triton is imported only where it is used."""
    if backend == "triton":
        if device.type == "cpu":
            prepare_interpreter()
        from attnopt.kernels.favor.triton_backward import favor_backward
        from attnopt.kernels.favor.triton_forward import favor_forward

        return favor_forward, favor_backward
    from attnopt.kernels.favor import eager

    return eager.favor_forward, eager.favor_backward


def _planner(backend: str) -> ModuleType:
    from attnopt.kernels.favor import eager, plan

    return plan if backend == "triton" else eager


@_forward.register_fake
def _(q, k, v, projection, log_gate, key_mask, kv, z, log_scale, feature_map, window,
      window_block, causal, stabilizer, scale, backend):
    dtype = kv.dtype
    saved = _planner(backend).saved_shapes(
        q, k, projection, feature_map=feature_map, window=window, window_block=window_block,
        causal=causal,
    )
    return (
        torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype),
        torch.empty_like(kv), torch.empty_like(z), torch.empty_like(log_scale),
        *(q.new_empty(shape, dtype=dtype) for shape in saved),
    )


@_backward.register_fake
def _(grad, grad_kv, grad_z, q, k, v, projection, log_gate, key_mask, kv, z, *rest):
    return (
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(v),
        projection.new_empty(projection.shape, dtype=kv.dtype),
        log_gate.new_empty(log_gate.shape, dtype=kv.dtype),
        torch.empty_like(kv), torch.empty_like(z),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.feature_map, ctx.window, ctx.window_block, ctx.causal = inputs[:13]
    ctx.stabilizer, ctx.scale, ctx.backend = inputs[13:]
    out, lse, _, _, *scales = output  # log_scale1 and what the implementation keeps
    ctx.save_for_backward(*tensors, out, lse, *scales)
    ctx.mark_non_differentiable(lse, *scales)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _lse, grad_kv, grad_z, *_):
    if grad is None and grad_kv is None and grad_z is None:
        return (None,) * 16
    saved = ctx.saved_tensors  # once: checkpointing recomputes them at the first look
    q, _, _, projection, log_gate, _, kv, z = saved[:8]
    grads = torch.ops.attnopt.favor_backward(
        torch.zeros_like(q) if grad is None else grad,
        torch.zeros_like(kv) if grad_kv is None else grad_kv,
        torch.zeros_like(z) if grad_z is None else grad_z,
        *saved, ctx.feature_map, ctx.window, ctx.window_block, ctx.causal,
        ctx.stabilizer, ctx.scale, ctx.backend, ctx.needs_input_grad[3],
    )
    dq, dk, dv, dprojection, dlog_gate, dkv, dz = grads
    return (
        dq, dk, dv, dprojection.to(projection.dtype), dlog_gate.to(log_gate.dtype), None,
        dkv, dz, *(None,) * 8,
    )


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "favor_attention has no double backward (gradients of gradients); "
        "use backend='reference' where second derivatives are needed"
    )


torch.library.register_autograd("attnopt::favor_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("attnopt::favor_backward", _refuse_double_backward)

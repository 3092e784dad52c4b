"""Last-k attention: the public functions, their checks, and the operators behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attnopt.kernels.checks import (
    check_causal,
    check_head_weights,
    check_key_mask,
    check_qkv,
    check_scale,
)
from attnopt.kernels.dispatch import harmonize_autocast, operator_body, resolve_backend
from attnopt.kernels.interpreter import prepare_interpreter
from attnopt.kernels.lastk import eager
from attnopt.kernels.lastk.both_ways import check_direction, look_ahead
from attnopt.kernels.lastk.reference import lastk_reference
from attnopt.kernels.packing import lay_out_inputs

MAX_DIM = 256  # head dimension that the Triton kernels hold in registers and shared memory


def lastk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    *,
    sink_log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attend to the last W tokens, each offset with a learnable weight, and to the first T.

    `o_i = sum_j m_ij e^{s_ij} v_j / sum_j m_ij e^{s_ij}` with `s = scale q.k` and
    `log m_ij = log_weights[h, i - j]` for `0 <= i - j < W`. The first T real tokens of a row are
    sinks: visible to every later token, weighed by `sink_log_weights` alone, wherever they lie.
    With `causal=False` W is 2R + 1, `log m_ij = log_weights[h, i - j + R]` for `|i - j| <= R` (from
    R tokens ahead, over the token itself, to R back), and the sinks are visible to every token.

    Args:
        q: `[B, H, Nq, D]`, fp16, bf16, fp32 or fp64 (fp64 not with Triton), any strides.
        k: `[B, Hkv, Nk, D]`, Hkv dividing H, Nk >= Nq: the queries are the last Nq tokens.
        v: like `k`.
        log_weights: `[W]` or `[H, W]`, floating point; -inf hides an offset. All 0: a sliding
            window; with W >= Nk, or R >= N - 1, full attention.
        sink_log_weights: `[T]` or `[H, T]`, or None for no sinks.
        key_mask: `[B, Nk]` bool, True for real tokens.
        cu_seqlens: int32 or int64 `[S + 1]`, where packed documents begin and end: 0 first,
            strictly increasing, N last. They never see each other. With B = 1, Nq = Nk and no mask.
        max_seqlen: length of the longest document, or more: rows of this length then hold one
            document each and nothing is read from the device. None groups documents by length.
        scale: factor of the scores, `1/sqrt(D)` by default.
        causal: False for both directions, with Nq = Nk.
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses. A head dimension
            above 256 has no Triton kernel.

    Returns:
        `[B, H, Nq, D]` in the dtype of `q` (under autocast, in its dtype). A row that sees no key
        is zero, and with `causal=False` so is that of a masked token. Gradients flow to q, k, v and
        both weights; second derivatives only with backend="reference".

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit; the message says which.

    Source: the candidate masks of a study on GPT-2 (`m = sum_c sigmoid(alpha_c) M_c`); sinks after
    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2.
    """
    check_causal(causal)
    q, k, v = harmonize_autocast(q, k, v)
    if cu_seqlens is not None:
        layout = lay_out_inputs(q, k, v, cu_seqlens, max_seqlen, key_mask)
        attend = partial(
            lastk_attention, log_weights=log_weights, sink_log_weights=sink_log_weights,
            scale=scale, causal=causal, backend=backend,
        )
        return layout.attend(attend, *map(layout.pack, (q, k, v)), masked=not causal)
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_head_weights("log_weights", log_weights, q, minimum=1)
    if sink_log_weights is not None:
        check_head_weights("sink_log_weights", sink_log_weights, q, minimum=0)
    scale = check_scale(scale, q.shape[3])
    check_direction(causal, q, k, log_weights)
    backend = choose_backend(backend, q)
    if backend == "reference":
        return lastk_reference(
            q, k, v, log_weights, sink_log_weights=sink_log_weights, key_mask=key_mask,
            scale=scale, causal=causal,
        )
    heads = q.shape[1]
    if sink_log_weights is None:
        sink_log_weights = log_weights.new_empty(0)
    real = key_mask
    if not causal:
        k, v, log_weights, key_mask = look_ahead(
            k, v, log_weights, sink_log_weights.shape[-1], key_mask
        )
    log_weights = log_weights.expand(heads, -1)
    sink_log_weights = sink_log_weights.expand(heads, -1)
    out, _ = torch.ops.attnopt.lastk_forward(
        q, k, v, log_weights, sink_log_weights, key_mask, scale, backend
    )
    return out if causal or real is None else out.masked_fill(~real[:, None, :, None], 0)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Attend to the last `window` tokens, the token itself among them.

    With `causal=False` as many to either side: `2 window - 1` tokens, itself in the middle.

    Args:
        q: `[B, H, Nq, D]`.
        k: `[B, Hkv, Nk, D]`; the queries are the last Nq tokens.
        v: like `k`.
        window: tokens that a query sees, at least 1.
        key_mask: `[B, Nk]` bool, True for real tokens.
        cu_seqlens: packed documents, as in `lastk_attention`.
        max_seqlen: length of the longest, likewise.
        scale: factor of the scores, `1/sqrt(D)` by default.
        causal: False for both directions, with Nq = Nk.
        backend: as in `lastk_attention`.

    Returns:
        `[B, H, Nq, D]` in the dtype of `q`.

    Raises:
        ValueError: as `lastk_attention`, and for a window below 1.

    Source: Beltagy et al. 2020, "Longformer", section 3.1.
    """
    check_causal(causal)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be an integer of at least 1; got {window!r}")
    if isinstance(k, Tensor) and k.dim() == 4:
        window = min(window, k.shape[2])
    device = q.device if isinstance(q, Tensor) else None
    log_weights = torch.zeros(window if causal else 2 * window - 1, device=device)
    return lastk_attention(
        q, k, v, log_weights, key_mask=key_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        scale=scale, causal=causal, backend=backend,
    )


def lastk_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    *,
    sink_log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from the newest token alone: one step of decoding, without gradients.

    Args:
        q: `[B, H, 1, D]`, the newest token.
        k: `[B, Hkv, Nk, D]`, what the cache holds in order of time, the newest token last. With
            sinks, the first T real entries must be the sinks; between them and the last W entries
            any tokens may be missing, so a cache of T + W entries is enough.
        v: like `k`.
        log_weights: `[W]` or `[H, W]`.
        sink_log_weights: `[T]` or `[H, T]`, or None.
        key_mask: `[B, Nk]` bool, True for real tokens.
        scale: factor of the scores, `1/sqrt(D)` by default.
        backend: as in `lastk_attention`.

    Returns:
        `[B, H, 1, D]` in the dtype of `q`.

    Raises:
        ValueError: as `lastk_attention`, and for more than one query.
    """
    if isinstance(q, Tensor) and q.dim() == 4 and q.shape[2] != 1:
        raise ValueError(f"lastk_decode takes one query token; got {q.shape[2]}")
    with torch.no_grad():
        return lastk_attention(
            q, k, v, log_weights, sink_log_weights=sink_log_weights, key_mask=key_mask,
            scale=scale, backend=backend,
        )


def choose_backend(backend: str, q: Tensor) -> str:
    """As `resolve_backend`, but "auto" is eager for a head dimension too large for the kernels.

    Args:
        backend: "auto", "triton", "eager" or "reference".
        q: `[B, H, Nq, D]`.

    Returns:
        "triton", "eager" or "reference".

    Raises:
        ValueError: backend="triton" with a larger head dimension, or where Triton cannot run.
    """
    chosen = resolve_backend(backend, q)
    if chosen != "triton" or q.shape[3] <= MAX_DIM:
        return chosen
    if backend == "auto":
        return "eager"
    raise ValueError(
        f"backend='triton' takes head_dim up to {MAX_DIM}; got {q.shape[3]} (backend='eager' "
        "takes more)"
    )


@torch.library.custom_op("attnopt::lastk_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    sink_log_weights: Tensor,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with operator_body(q):
        forward, _ = _implementation(backend, q.device)
        return forward(
            q, k, v, log_weights, sink_log_weights, key_mask, scale
        )


@torch.library.custom_op("attnopt::lastk_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    sink_log_weights: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with operator_body(q):
        _, backward = _implementation(backend, q.device)
        return backward(
            grad, q, k, v, log_weights, sink_log_weights, key_mask, out, lse, scale
        )


def _implementation(backend: str, device: torch.device) -> tuple[Callable, Callable]:
    """Forward and backward of a backend; Triton is imported only where it is used."""
    if backend == "triton":
        if device.type == "cpu":
            prepare_interpreter()
        from attnopt.kernels.lastk.triton_backward import lastk_backward
        from attnopt.kernels.lastk.triton_forward import lastk_forward

        return lastk_forward, lastk_backward
    return eager.lastk_forward, eager.lastk_backward


@_forward.register_fake
def _(q, k, v, log_weights, sink_log_weights, key_mask, scale, backend):
    lse = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse)


@_backward.register_fake
def _(grad, q, k, v, log_weights, sink_log_weights, key_mask, out, lse, scale, backend):
    def dense(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return (
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(v),
        dense(log_weights), dense(sink_log_weights),
    )


def _save(ctx, inputs, output):
    *tensors, key_mask, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, key_mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _grad_lse):
    if grad is None:
        return (None,) * 8
    grads = torch.ops.attnopt.lastk_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend)
    return (*grads, None, None, None)


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "lastk_attention has no double backward (gradients of gradients); "
        "use backend='reference' where second derivatives are needed"
    )


torch.library.register_autograd("attnopt::lastk_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("attnopt::lastk_backward", _refuse_double_backward)

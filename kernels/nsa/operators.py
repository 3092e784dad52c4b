"""The operators behind NSA, registered with torch.library: forward, backward, shapes, autograd.

Two branches are differentiable, each with its output and its log-sum-exp: the compressed one and
the selected one. Their weights in the sum, gates or shares of one softmax, are plain PyTorch, so
that the gradients of both results arrive here: with `P = e^{score - lse}`

    dS = P (dO.v - delta),    delta = rowsum(dO O) - dlse

`nsa_combine` is the sum itself.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from attnopt.kernels.dispatch import operator_body
from attnopt.kernels.interpreter import prepare_interpreter


def _module(part: str, backend: str, device: torch.device) -> ModuleType:
    """One part of a backend, imported only where it is used."""
    backend = "triton" if backend == "triton" else "eager"
    if backend == "triton" and device.type == "cpu":
        prepare_interpreter()
    return import_module(f"attnopt.kernels.nsa.{backend}_{part}")


@torch.library.custom_op("attnopt::nsa_select", mutates_args=())
def _select(
    q: Tensor, k_cmp: Tensor, bias: Tensor, real: Tensor, start: Tensor, lse: Tensor | None,
    offset: int, count: int, sinks: int, block: int, stride: int, select_block: int,
    near_window: int, delay: int, scale: float, backend: str,
) -> Tensor:
    with operator_body(q):
        return _module("select", backend, q.device).select(
            q, k_cmp, bias, real, start, offset=offset, count=count, sinks=sinks, block=block,
            stride=stride, select_block=select_block, near_window=near_window, delay=delay,
            scale=scale, lse=lse,
        )


@_select.register_fake
def _(q, k_cmp, bias, real, start, lse, offset, count, *rest):
    return q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], count, dtype=torch.int32)


@torch.library.custom_op("attnopt::nsa_compressed_forward", mutates_args=())
def _compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, bias: Tensor, chosen: Tensor, start: Tensor,
    offset: int, block: int, stride: int, delay: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:
    with operator_body(q):
        return _module("compressed", backend, q.device).compressed_forward(
            q, k_cmp, v_cmp, bias, chosen, start, offset=offset, block=block, stride=stride,
            delay=delay, scale=scale,
        )


@torch.library.custom_op("attnopt::nsa_compressed_backward", mutates_args=())
def _compressed_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, bias: Tensor,
    chosen: Tensor, start: Tensor, out: Tensor, lse: Tensor,
    offset: int, block: int, stride: int, delay: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with operator_body(q):
        delta = _module("combine", backend, q.device).row_delta(grad, out, grad_lse)
        return _module("compressed", backend, q.device).compressed_backward(
            grad, lse, delta, q, k_cmp, v_cmp, bias, chosen, start, offset=offset, block=block,
            stride=stride, delay=delay, scale=scale,
        )


@torch.library.custom_op("attnopt::nsa_selected_forward", mutates_args=())
def _selected_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Tensor, chosen: Tensor,
    select_block: int, near_window: int, scale: float, regime: str, backend: str,
) -> tuple[Tensor, Tensor]:
    with operator_body(q):
        return _module("selected", backend, q.device).selected_forward(
            q, k, v, key_mask, start, chosen, select_block=select_block, near_window=near_window,
            scale=scale, regime=regime,
        )


@torch.library.custom_op("attnopt::nsa_selected_backward", mutates_args=())
def _selected_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, start: Tensor, chosen: Tensor, out: Tensor, lse: Tensor,
    select_block: int, near_window: int, scale: float, regime: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with operator_body(q):
        delta = _module("combine", backend, q.device).row_delta(grad, out, grad_lse)
        return _module("selected", backend, q.device).selected_backward(
            grad, lse, delta, q, k, v, key_mask, start, chosen, select_block=select_block,
            near_window=near_window, scale=scale, regime=regime,
        )


@torch.library.custom_op("attnopt::nsa_combine", mutates_args=())
def _combine(
    first: Tensor, second: Tensor, third: Tensor | None, weights: Tensor, backend: str
) -> Tensor:
    outs = [first, second] if third is None else [first, second, third]
    with operator_body(first):
        return _module("combine", backend, first.device).combine_forward(outs, weights)


@torch.library.custom_op("attnopt::nsa_combine_backward", mutates_args=())
def _combine_backward(
    grad: Tensor, first: Tensor, second: Tensor, third: Tensor | None, weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = [first, second] if third is None else [first, second, third]
    with operator_body(first):
        module = _module("combine", backend, first.device)
        douts, dweights = module.combine_backward(grad, outs, weights)
    none = [] if third is not None else [first.new_empty(0)]
    return (*douts, *none, dweights)


@_combine.register_fake
def _(first, second, third, weights, backend):
    return torch.empty_like(first)


@_combine_backward.register_fake
def _(grad, first, second, third, weights, backend):
    none = first.new_empty(0) if third is None else torch.empty_like(third)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    return torch.empty_like(first), torch.empty_like(second), none, dweights


def _save_combined(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_combined(ctx, grad):
    saved = ctx.saved_tensors  # once: checkpointing recomputes them at the first look
    *grads, dweights = torch.ops.attnopt.nsa_combine_backward(grad, *saved, ctx.backend)
    if saved[2] is None:
        grads[2] = None
    return (*grads, dweights, None)


def _fake_forward(q, *_):
    lse = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse)


def _fake_backward(grad, grad_lse, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    tensors = inputs[:6]
    ctx.options = inputs[6:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate_with(backward):
    """Autograd formula of a branch whose first three inputs have gradients."""

    def differentiate(ctx, grad, grad_lse):
        rest = (None,) * (3 + len(ctx.options))
        if grad is None and grad_lse is None:
            return (None, None, None, *rest)
        saved = ctx.saved_tensors  # once: checkpointing recomputes them at the first look
        if grad is None:
            grad = torch.zeros_like(saved[6])  # the output
        return (*backward(grad, grad_lse, *saved, *ctx.options), *rest)

    return differentiate


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "nsa_attention and its branches have no double backward (gradients of gradients); "
        "use backend='reference' where second derivatives are needed"
    )


for _name in ("compressed", "selected"):
    _forward, _backward = f"attnopt::nsa_{_name}_forward", f"attnopt::nsa_{_name}_backward"
    _call = getattr(torch.ops.attnopt, f"nsa_{_name}_backward")
    torch.library.register_fake(_forward, _fake_forward)
    torch.library.register_fake(_backward, _fake_backward)
    torch.library.register_autograd(_forward, _differentiate_with(_call), setup_context=_save)
    torch.library.register_autograd(_backward, _refuse_double_backward)
torch.library.register_autograd(
    "attnopt::nsa_combine", _differentiate_combined, setup_context=_save_combined
)
torch.library.register_autograd("attnopt::nsa_combine_backward", _refuse_double_backward)

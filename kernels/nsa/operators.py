"""The operators behind NSA, registered with torch.library: forward, backward, shapes, autograd.

Two branches are differentiable, each with its output and its log-sum-exp: the compressed one and
the selected one. Whatever combines them is plain PyTorch, so that the gradients of both results
arrive here: with `P = e^{score - lse}`

    dS = P (dO.v - delta),    delta = rowsum(dO O) - dlse
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attnopt.kernels.interpreter import repair_bfloat16


def _modules(backend: str, device: torch.device) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Compressed, selection and selected branch of a backend, imported only where used."""
    if backend == "triton":
        if device.type == "cpu":
            repair_bfloat16()
        from attnopt.kernels.nsa import triton_compressed, triton_select, triton_selected

        return triton_compressed, triton_select, triton_selected
    from attnopt.kernels.nsa import eager_compressed, eager_select, eager_selected

    return eager_compressed, eager_select, eager_selected


@torch.library.custom_op("attnopt::nsa_select", mutates_args=())
def _select(
    q: Tensor, k_cmp: Tensor, bias: Tensor, real: Tensor, start: Tensor, offset: int, count: int,
    sinks: int, block: int, stride: int, select_block: int, near_window: int, delay: int,
    scale: float, backend: str,
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return _modules(backend, q.device)[1].select(
            q, k_cmp, bias, real, start, offset=offset, count=count, sinks=sinks, block=block,
            stride=stride, select_block=select_block, near_window=near_window, delay=delay,
            scale=scale,
        )


@_select.register_fake
def _(q, k_cmp, bias, real, start, offset, count, *rest):
    return q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], count, dtype=torch.int32)


@torch.library.custom_op("attnopt::nsa_compressed_forward", mutates_args=())
def _compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, bias: Tensor, chosen: Tensor, start: Tensor,
    offset: int, block: int, stride: int, delay: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _modules(backend, q.device)[0].compressed_forward(
            q, k_cmp, v_cmp, bias, chosen, start, offset=offset, block=block, stride=stride,
            delay=delay, scale=scale,
        )


@torch.library.custom_op("attnopt::nsa_compressed_backward", mutates_args=())
def _compressed_backward(
    grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
    bias: Tensor, chosen: Tensor, start: Tensor,
    offset: int, block: int, stride: int, delay: int, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _modules(backend, q.device)[0].compressed_backward(
            grad, lse, delta, q, k_cmp, v_cmp, bias, chosen, start, offset=offset, block=block,
            stride=stride, delay=delay, scale=scale,
        )


@torch.library.custom_op("attnopt::nsa_selected_forward", mutates_args=())
def _selected_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Tensor, chosen: Tensor,
    select_block: int, near_window: int, scale: float, regime: str, backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _modules(backend, q.device)[2].selected_forward(
            q, k, v, key_mask, start, chosen, select_block=select_block, near_window=near_window,
            scale=scale, regime=regime,
        )


@torch.library.custom_op("attnopt::nsa_selected_backward", mutates_args=())
def _selected_backward(
    grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, start: Tensor, chosen: Tensor,
    select_block: int, near_window: int, scale: float, regime: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _modules(backend, q.device)[2].selected_backward(
            grad, lse, delta, q, k, v, key_mask, start, chosen, select_block=select_block,
            near_window=near_window, scale=scale, regime=regime,
        )


def _fake_forward(q, *_):
    lse = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse)


def _fake_backward(grad, lse, delta, q, k, v, *_):
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
        *inputs, out, lse = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(out)
        delta = (grad.to(lse.dtype) * out).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        return (*backward(grad, lse, delta, *inputs, *ctx.options), *rest)

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

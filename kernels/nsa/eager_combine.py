"""The sum of branches, and what their backward passes need of it, in plain PyTorch.

    o = sum_n w_n o_n,    dO_n = w_n dO,    dw_n = dO.o_n,    delta = dO_n.o_n - dlse_n
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine_forward(outs: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum `[B, H, Nq, D]` of two or three `outs`, in their dtype.

    Args:
        outs: outputs of the branches, `[B, H, Nq, D]` each.
        weights: `[B, H, Nq, len(outs)]`.
    """
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    total = outs[0].to(wide) * weights[..., 0, None]
    for n, out in enumerate(outs[1:], 1):
        total.addcmul_(out.to(wide), weights[..., n, None].to(wide))
    return torch.empty_like(outs[0]).copy_(total)


def combine_backward(grad: Tensor, outs: list[Tensor], weights: Tensor
                     ) -> tuple[list[Tensor], Tensor]:
    """Gradients of the outputs and of the weights."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    dweights = [(grad * out).sum(-1) for out in outs]
    douts = [
        torch.empty_like(out).copy_(grad * weights[..., n, None]) for n, out in enumerate(outs)
    ]
    return douts, torch.stack(dweights, -1).to(weights.dtype)


def row_delta(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`rowsum(grad out) - grad_lse`, `[B, H, Nq]` in fp32 (fp64)."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    delta = (grad.to(wide) * out).sum(-1)
    return delta if grad_lse is None else delta - grad_lse

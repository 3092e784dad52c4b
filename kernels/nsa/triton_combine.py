"""The sum of branches, and what their backward passes need of it, in Triton.

    o = sum_n w_n o_n,    dO_n = w_n dO,    dw_n = dO.o_n,    delta = dO_n.o_n - dlse_n

Each is one pass over the outputs, BLOCK rows of one head per program. The weights are gates, or the
shares of the branches in one softmax. Letters: B batch, H heads, N queries, D head dim.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import load_rows, row_dot, store_rows

BLOCK = 32


@triton.jit
def load_weight(weights_ptr, strides, head, rows, valid, n: tl.constexpr):
    """Weight n of rows of one head, fp32; `strides` are those of `[B, H, N, n]`."""
    pointers = weights_ptr + head + rows.to(tl.int64) * strides[2] + n * strides[3]
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def head_offset(strides, b, h):
    """Where head h of batch row b begins."""
    return b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def combine_forward_kernel(
    first_ptr, second_ptr, third_ptr, weights_ptr, out_ptr,
    first_strides, second_strides, third_strides, weights_strides, out_strides,
    H, N, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, THREE: tl.constexpr,
):
    """Weighted sum of two or three outputs."""
    tiles = tl.cdiv(N, BLOCK)
    row0, head = tl.program_id(0) % tiles * BLOCK, tl.program_id(0) // tiles
    b, h = head // H, head % H
    rows = row0 + tl.arange(0, BLOCK)
    valid = rows < N
    weight = head_offset(weights_strides, b, h)
    # [BLOCK, COLS]
    x = load_rows(first_ptr + head_offset(first_strides, b, h),
                  (first_strides[2], first_strides[3]), row0, valid, BLOCK, COLS, DIM)
    w = load_weight(weights_ptr, weights_strides, weight, rows, valid, 0)
    total = w[:, None] * x.to(tl.float32)
    x = load_rows(second_ptr + head_offset(second_strides, b, h),
                  (second_strides[2], second_strides[3]), row0, valid, BLOCK, COLS, DIM)
    w = load_weight(weights_ptr, weights_strides, weight, rows, valid, 1)
    total += w[:, None] * x.to(tl.float32)
    if THREE:
        x = load_rows(third_ptr + head_offset(third_strides, b, h),
                      (third_strides[2], third_strides[3]), row0, valid, BLOCK, COLS, DIM)
        w = load_weight(weights_ptr, weights_strides, weight, rows, valid, 2)
        total += w[:, None] * x.to(tl.float32)
    store_rows(out_ptr + head_offset(out_strides, b, h), (out_strides[2], out_strides[3]), row0,
               valid, total, BLOCK, COLS, DIM)


@triton.jit
def combine_backward_kernel(
    grad_ptr, out_ptr, weights_ptr, dout_ptr, dweights_ptr,
    grad_strides, out_strides, weights_strides, dout_strides, dweights_strides,
    H, N, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of one output and of its weight; the pointers to weights are at that weight."""
    tiles = tl.cdiv(N, BLOCK)
    row0, head = tl.program_id(0) % tiles * BLOCK, tl.program_id(0) // tiles
    b, h = head // H, head % H
    rows = row0 + tl.arange(0, BLOCK)
    valid = rows < N
    # [BLOCK, COLS]
    grad = load_rows(grad_ptr + head_offset(grad_strides, b, h),
                     (grad_strides[2], grad_strides[3]), row0, valid, BLOCK, COLS, DIM)
    out = load_rows(out_ptr + head_offset(out_strides, b, h), (out_strides[2], out_strides[3]),
                    row0, valid, BLOCK, COLS, DIM)
    w = load_weight(weights_ptr, weights_strides, head_offset(weights_strides, b, h), rows, valid,
                    0)
    store_rows(dout_ptr + head_offset(dout_strides, b, h), (dout_strides[2], dout_strides[3]),
               row0, valid, w[:, None] * grad.to(tl.float32), BLOCK, COLS, DIM)
    dweights_ptr += head_offset(dweights_strides, b, h) + rows.to(tl.int64) * dweights_strides[2]
    tl.store(dweights_ptr, row_dot(grad, out).to(dweights_ptr.dtype.element_ty), mask=valid)


@triton.jit
def delta_kernel(
    grad_ptr, out_ptr, grad_lse_ptr, delta_ptr,
    grad_strides, out_strides, grad_lse_strides,
    H, N, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, HAS_LSE: tl.constexpr,
):
    """`delta` of BLOCK rows, contiguous `[B, H, N]`."""
    tiles = tl.cdiv(N, BLOCK)
    row0, head = tl.program_id(0) % tiles * BLOCK, tl.program_id(0) // tiles
    b, h = head // H, head % H
    rows = row0 + tl.arange(0, BLOCK)
    valid = rows < N
    # [BLOCK, COLS]
    grad = load_rows(grad_ptr + head_offset(grad_strides, b, h),
                     (grad_strides[2], grad_strides[3]), row0, valid, BLOCK, COLS, DIM)
    out = load_rows(out_ptr + head_offset(out_strides, b, h), (out_strides[2], out_strides[3]),
                    row0, valid, BLOCK, COLS, DIM)
    delta = row_dot(grad, out)
    if HAS_LSE:
        pointers = grad_lse_ptr + head_offset(grad_lse_strides, b, h)
        pointers += rows.to(tl.int64) * grad_lse_strides[2]
        delta -= tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * N + rows, delta, mask=valid)


def combine_forward(outs: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum `[B, H, Nq, D]` of two or three `outs`; see `eager_combine.py`."""
    total = torch.empty_like(outs[0])
    first, second, third = outs if len(outs) == 3 else (*outs, outs[0])
    _launch(
        combine_forward_kernel, total, first_ptr=first, second_ptr=second, third_ptr=third,
        weights_ptr=weights, out_ptr=total, first_strides=first.stride(),
        second_strides=second.stride(), third_strides=third.stride(),
        weights_strides=weights.stride(), out_strides=total.stride(), THREE=len(outs) == 3,
    )
    return total


def combine_backward(grad: Tensor, outs: list[Tensor], weights: Tensor
                     ) -> tuple[list[Tensor], Tensor]:
    """Gradients of the outputs and of the weights."""
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    douts = [torch.empty_like(out) for out in outs]
    for n, (out, dout) in enumerate(zip(outs, douts, strict=True)):
        w, dw = weights[..., n], dweights[..., n]
        _launch(
            combine_backward_kernel, grad, grad_ptr=grad, out_ptr=out, weights_ptr=w,
            dout_ptr=dout, dweights_ptr=dw, grad_strides=grad.stride(), out_strides=out.stride(),
            weights_strides=(*w.stride(), 0), dout_strides=dout.stride(),
            dweights_strides=dw.stride(),
        )
    return douts, dweights


def row_delta(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """`rowsum(grad out) - grad_lse`, `[B, H, Nq]` fp32."""
    delta = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    given = delta if grad_lse is None else grad_lse
    _launch(
        delta_kernel, grad, grad_ptr=grad, out_ptr=out, grad_lse_ptr=given, delta_ptr=delta,
        grad_strides=grad.stride(), out_strides=out.stride(), grad_lse_strides=given.stride(),
        HAS_LSE=grad_lse is not None,
    )
    return delta


def _launch(kernel: Any, like: Tensor, **own: Any) -> None:
    """Launch a kernel over the rows of `like` `[B, H, N, D]`."""
    B, H, N, D = like.shape
    kernel[(triton.cdiv(N, BLOCK) * B * H,)](
        H=H, N=N, DIM=D, COLS=max(16, triton.next_power_of_2(D)), BLOCK=BLOCK, num_warps=4, **own
    )

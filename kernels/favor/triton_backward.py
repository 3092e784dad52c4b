"""FAVOR+ attention backward in Triton, without atomics: queries forward, keys in reverse.

With L the log-sum-exp of a row, pq = 2^{lq + r - L} and pk = 2^{lk - r} (so that pq pk is a share
of a probability), delta = rowsum(dO O):

    dlq = pq (dO S^T - delta z + D pk)      D = dO V^T - delta on the pairs within a block
    dlk = pk (V T^T - u + D^T pq)           T = sum_later pq dO,  u = sum_later pq delta
    dV  = pk T + (pq pk)^T dO               dq = dlq W,  dk = dlk W,  dW = dlq^T q' + dlk^T k'

and the softmax gradient of the pairs in the window. Four launches:

    favor_query_kernel    walks a segment as forward does: dq, delta, partial dW and dgate
    favor_adjoint_kernel  sums T and u over the queries that meet a segment's keys last
    favor_suffix_kernel   turns these into T and u behind each segment
    favor_key_kernel      walks a segment of keys backwards: dk, dv and partial dW

The first is in triton_queries.py, the third in triton_scan.py, the others in triton_keys.py.

T and u are relative to the reference r of the block of keys they meet next, which only falls on the
way back: T shrinks by 2^{r' - r} and never overflows. Letters as in triton_forward.py.
"""

import torch
import triton
from torch import Tensor

from attnopt.kernels.favor.plan import make_plan
from attnopt.kernels.favor.triton_forward import base2_gate, pick, shared_arguments, warps
from attnopt.kernels.favor.triton_keys import favor_adjoint_kernel, favor_key_kernel
from attnopt.kernels.favor.triton_queries import favor_query_kernel
from attnopt.kernels.favor.triton_scan import ROWS, favor_suffix_kernel


def favor_backward(
    grad: Tensor, grad_kv: Tensor, grad_z: Tensor,
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor,
    out: Tensor, lse: Tensor, log_scale1: Tensor,
    seg_kv: Tensor, seg_z: Tensor, seg_r: Tensor, block_r: Tensor, *,
    feature_map: str, window: int, window_block: int, causal: bool, stabilizer: str, scale: float,
    projection_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, projection `[H, M, D]`, log_gate `[H]` and the initial kv and z."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    M = projection.shape[1]
    plan = make_plan(q, k, M, window=window, window_block=window_block, causal=causal)
    fp32 = {"dtype": torch.float32, "device": q.device}
    # with a window no program visits what lies before a row's first real token
    new = torch.zeros_like if window and key_mask is not None else torch.empty_like
    dq, dk, dv = new(q), new(k), new(v)
    if H != Hkv:  # a program per query head: their sum comes after
        dk, dv = (new(x.new_empty(B, H, Nk, D, dtype=torch.float32)) for x in (k, v))
    delta = new(lse)
    parts = torch.empty(2 if projection_grad else 0, B, H, plan.segments, M, D, **fp32)
    dw_q, dw_k = parts if projection_grad else (lse, lse)  # never read
    dgate = torch.empty(B, H, plan.segments, **fp32)
    shared = shared_arguments(q, k, v, projection, key_mask, plan, feature_map, window, causal,
                              stabilizer, scale)
    shared |= {
        "gate_ptr": base2_gate(log_gate, M, feature_map), "do_ptr": grad, "lse_ptr": lse,
        "delta_ptr": delta, "block_r_ptr": block_r, "do_strides": grad.stride(),
        "dk_strides": dk.stride(), "dv_strides": dv.stride(), "LEARNED": projection_grad,
    }
    grid = (plan.segments * B * H,)
    favor_query_kernel[grid](
        **pick(favor_query_kernel, shared), seg_kv_ptr=seg_kv, seg_z_ptr=seg_z, seg_r_ptr=seg_r,
        out_ptr=out, dq_ptr=dq, dw_ptr=dw_q, dgate_ptr=dgate,
        out_strides=out.stride(), dq_strides=dq.stride(), **warps(plan, 2),
    )
    own_t, own_u = torch.empty_like(seg_kv), torch.empty_like(seg_z)
    favor_adjoint_kernel[grid](**pick(favor_adjoint_kernel, shared), t_ptr=own_t, u_ptr=own_u,
                               **warps(plan))
    behind_t, behind_u = torch.empty_like(seg_kv), torch.empty_like(seg_z)
    dkv, dz = torch.empty_like(kv), torch.empty_like(z)
    favor_suffix_kernel[(triton.cdiv(M, ROWS) * B * H,)](
        **pick(favor_suffix_kernel, shared),
        grad_kv_ptr=grad_kv.contiguous(), grad_z_ptr=grad_z.contiguous(),
        log_scale0_ptr=log_scale.contiguous(), own_t_ptr=own_t, own_u_ptr=own_u,
        t_ptr=behind_t, u_ptr=behind_u, dkv_ptr=dkv, dz_ptr=dz, ROWS=ROWS,
    )
    favor_key_kernel[grid](
        **pick(favor_key_kernel, shared), t_ptr=behind_t, u_ptr=behind_u,
        dk_ptr=dk, dv_ptr=dv, dw_ptr=dw_k, **warps(plan, 2),
    )
    if H != Hkv:
        dk, dv = (sum_groups(dx, x) for dx, x in ((dk, k), (dv, v)))
    dw = parts.sum((0, 1, 3)) if projection_grad else projection.new_zeros(H, M, D, **fp32)
    return dq, dk, dv, dw, dgate.sum((0, 2)), dkv, dz


def sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum `[B, H, N, D]` over the query heads of each key/value head, in the layout of `like`."""
    total = torch.empty_like(like)
    total.copy_(gradient.unflatten(1, (like.shape[1], -1)).sum(2))
    return total

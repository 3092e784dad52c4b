"""Last-k attention forward in Triton.

    o_i = sum_j e^{s_ij + b_ij} v_j / sum_j e^{s_ij + b_ij},    s_ij = scale q_i.k_j
    b_ij = log_weights[h, i - j]                                in the band, 0 <= i - j < W
    b_ij = sink_log_weights[h, j - start]                       for the T sinks of a row

One program computes BLOCK_Q queries of one head. It folds the sinks, BLOCK_T at a time, and then
the band, from ceil((W - 1) / BLOCK_K) tiles before its first query to its last one, into an online
softmax. Of a halo tile only the rows that some query of the tile reaches are loaded, so a narrow
band moves hardly more than q, k, v and o once. Saved for backward: the log-sum-exp of each row.

Letters: B batch, H query heads, G query heads per key/value head, Nq queries, Nk keys (the queries
are the last Nq), D head dim, W offsets, T sinks; i, j positions of a query and a key, n = i - j.
Limits: W, T and the lengths are run-time numbers; D up to 256, where registers end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import (
    LN2,
    LOG2E,
    first_token,
    input_precision,
    is_real,
    load_rows,
    mask_arguments,
    online_softmax_update,
    store_rows,
)

BLOCK_T = 16  # sinks per tile


@triton.jit
def band_bias(bias_ptr, n, real, W):
    """`log2(e) b` at offsets `n`, -inf outside the band and where the key is not `real`."""
    visible = (n >= 0) & (n < W) & real
    return tl.load(bias_ptr + n, mask=visible, other=float("-inf"))


@triton.jit
def sink_bias(sink_ptr, t, visible, T):
    """`log2(e) b` of sinks `t`, -inf where the sink is not `visible`."""
    return tl.load(sink_ptr + t, mask=visible & (t < T), other=float("-inf"))


@triton.jit
def first_band_tile(i0, W, BLOCK: tl.constexpr):
    """Position of the first key tile that the band of queries `i0 ...` reaches, `i0 - x BLOCK`."""
    j0 = i0 - tl.cdiv(W - 1, BLOCK) * BLOCK
    return tl.where(j0 < 0, j0 + (-j0) // BLOCK * BLOCK, j0)


@triton.jit
def lastk_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, sink_ptr, mask_ptr, start_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, lse_strides,
    H, G, Nq, Nk, W, T, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_Q queries of one head."""
    tiles = tl.cdiv(Nq, BLOCK_Q)  # a flat grid: its other axes end at 65,535
    row0 = tl.program_id(0) % tiles * BLOCK_Q
    head = tl.program_id(0) // tiles
    b, h = head // H, head % H
    q_ptr += b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += b.to(tl.int64) * k_strides[0] + (h // G).to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + (h // G).to(tl.int64) * v_strides[1]
    out_ptr += b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1]
    bias_ptr += h * W
    rows = row0 + tl.arange(0, BLOCK_Q)
    i0 = row0 + Nk - Nq
    i = rows + Nk - Nq
    start = first_token(start_ptr, b, HAS_MASK)

    # [BLOCK_Q, COLS]
    q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, rows < Nq, BLOCK_Q, COLS, DIM)
    acc = tl.zeros([BLOCK_Q, COLS], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        j = start + t
        real = is_real(mask_ptr, mask_strides, b, j, (t < T) & (j < Nk), HAS_MASK)
        # [BLOCK_T, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), start + t0, real, BLOCK_T, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), start + t0, real, BLOCK_T, COLS, DIM)
        visible = real[None, :] & (j[None, :] <= i[:, None])
        bias = sink_bias(sink_ptr + h * T, t[None, :], visible, T)
        # [BLOCK_Q, BLOCK_T]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        acc, top, total = online_softmax_update(acc, top, total, scores, v, PRECISION)

    for j0 in range(first_band_tile(i0, W, BLOCK_K), tl.minimum(i0 + BLOCK_Q, Nk), BLOCK_K):
        j0 = i0 * 0 + j0  # a tensor in the interpreter too
        j = j0 + tl.arange(0, BLOCK_K)
        inside = (j >= start + T) & (j > i0 - W) & (j >= 0) & (j < Nk)
        # [BLOCK_K, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
        real = is_real(mask_ptr, mask_strides, b, j, inside, HAS_MASK)
        bias = band_bias(bias_ptr, i[:, None] - j[None, :], real[None, :], W)
        # [BLOCK_Q, BLOCK_K]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        acc, top, total = online_softmax_update(acc, top, total, scores, v, PRECISION)

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = acc / total[:, None]
    lse = tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf"))
    store_rows(out_ptr, (out_strides[2], out_strides[3]), row0, rows < Nq, out,
               BLOCK_Q, COLS, DIM)
    lse_ptr += b.to(tl.int64) * lse_strides[0] + h.to(tl.int64) * lse_strides[1]
    tl.store(lse_ptr + rows * lse_strides[2], lse, mask=rows < Nq)


def base2_weights(weights: Tensor) -> Tensor:
    """`log2(e) weights` `[H, W]`, contiguous fp32, as the kernels read them."""
    return (weights.to(torch.float32) * LOG2E.value).contiguous()


def forward_tile(dtype: torch.dtype, cols: int) -> dict[str, int]:
    """Tile sizes; all compile without spills on sm_80 and sm_90 up to 128 columns.

    TF32 in three passes keeps each fp32 operand twice in registers, hence the smaller tiles.
    """
    if dtype == torch.float32:
        rows = 64 if cols <= 64 else 16
        return {"BLOCK_Q": rows, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    rows = 64 if cols <= 128 else 32
    return {"BLOCK_Q": rows, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def lastk_forward(q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor, sink_log_weights: Tensor,
                  key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Nq, D]` in the dtype of `q` and the log-sum-exp `[B, H, Nq]` of each row."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    out = torch.empty_like(q)
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    bias = base2_weights(log_weights[:, :Nk])
    sinks = base2_weights(sink_log_weights[:, :Nk])
    mask, start, mask_strides = mask_arguments(key_mask, k)
    cols = max(16, triton.next_power_of_2(D))
    tile = forward_tile(q.dtype, cols)
    lastk_forward_kernel[(triton.cdiv(Nq, tile["BLOCK_Q"]) * B * H,)](
        q_ptr=q, k_ptr=k, v_ptr=v, bias_ptr=bias, sink_ptr=sinks, mask_ptr=mask, start_ptr=start,
        out_ptr=out, lse_ptr=lse,
        q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(),
        mask_strides=mask_strides, out_strides=out.stride(), lse_strides=lse.stride(),
        H=H, G=H // Hkv, Nq=Nq, Nk=Nk, W=bias.shape[1], T=sinks.shape[1], scale=scale,
        DIM=D, COLS=cols, BLOCK_T=BLOCK_T, HAS_MASK=key_mask is not None,
        PRECISION=input_precision(q.dtype), **tile,
    )
    return out, lse

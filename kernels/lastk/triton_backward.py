"""Last-k attention backward in Triton, in one launch without atomics.

    P = e^{s + b - lse},  dS = P (dO V^T - delta),  delta = rowsum(dO O)
    dK = scale dS^T Q,  dV = P^T dO,  dQ = scale dS K,  db[n] = sum_i dS[i, i - n]

Program `tile` of one key/value head owns BLOCK keys and BLOCK queries. It walks the queries that
see its keys, of all G heads, for dK and dV; then the keys that its queries see for dQ and for the
diagonal sums of dS, one head at a time. What the second walk reads again is still in the cache.

Diagonals: the key tile x tiles before the queries holds offsets n = x BLOCK + r - c for row r and
column c. Rotating row r by r (u = r - c mod BLOCK) lines them up: columns u <= r belong to
offsets x BLOCK + u, the others to (x - 1) BLOCK + u. So offsets [x BLOCK, (x + 1) BLOCK) are
complete once tile x + 1 is through: `carry` hands them on.

Sinks get partial gradients per query tile, and log-weights per tile and head; the launcher sums
them in fp32. Letters as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import (
    first_token,
    input_precision,
    is_real,
    load_lse,
    load_rows,
    mask_arguments,
    row_dot,
    score_gradient,
    score_gradient_transposed,
    store_rows,
)
from attnopt.kernels.lastk.sinks import add_at_sinks, sink_positions
from attnopt.kernels.lastk.triton_forward import (
    BLOCK_T,
    band_bias,
    base2_weights,
    sink_bias,
)


@triton.jit
def diagonal_sums(dscores, BLOCK: tl.constexpr):
    """Sums of dS `[BLOCK, BLOCK]` along n = r - c: `(n = u, n = u - BLOCK)` for u in 0..BLOCK-1."""
    r = tl.arange(0, BLOCK)[:, None]
    u = tl.arange(0, BLOCK)[None, :]
    rotated = tl.gather(dscores, (r - u) & (BLOCK - 1), 1)
    return tl.sum(tl.where(u <= r, rotated, 0.0), 0), tl.sum(tl.where(u > r, rotated, 0.0), 0)


@triton.jit
def lastk_backward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, sink_ptr, mask_ptr, start_ptr, out_ptr, do_ptr, lse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbias_ptr, dsink_k_ptr, dsink_v_ptr, dsink_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides, lse_strides,
    dq_strides, dk_strides, dv_strides,
    H, G, Nq, Nk, W, T, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Gradients of BLOCK keys and values, and of BLOCK queries of each head of a group."""
    tiles = tl.cdiv(Nk, BLOCK)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, hkv = head // (H // G), head % (H // G)
    k_ptr += b.to(tl.int64) * k_strides[0] + hkv.to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + hkv.to(tl.int64) * v_strides[1]
    start = first_token(start_ptr, b, HAS_MASK)
    if tile * BLOCK < Nk:
        key_tile_gradients(
            q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, out_ptr, do_ptr, lse_ptr, dk_ptr, dv_ptr,
            q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides, lse_strides,
            dk_strides, dv_strides, b, hkv, tile * BLOCK, start + T,
            G, Nq, Nk, W, scale, DIM, COLS, BLOCK, HAS_MASK, PRECISION,
        )
    if tile * BLOCK < Nq:
        for g in range(0, G):
            h = hkv * G + g
            part = ((b * H + h).to(tl.int64) * tiles + tile)
            query_tile_gradients(
                q_ptr + b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1],
                k_ptr, v_ptr, bias_ptr + h * W, sink_ptr + h * T, mask_ptr,
                out_ptr + b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1],
                do_ptr + b.to(tl.int64) * do_strides[0] + h.to(tl.int64) * do_strides[1],
                lse_ptr + b.to(tl.int64) * lse_strides[0] + h.to(tl.int64) * lse_strides[1],
                dq_ptr + b.to(tl.int64) * dq_strides[0] + h.to(tl.int64) * dq_strides[1],
                dbias_ptr + part * W, dsink_k_ptr + part * T * DIM, dsink_v_ptr + part * T * DIM,
                dsink_ptr + part * T,
                q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides,
                lse_strides, dq_strides, b, tile * BLOCK, start,
                Nq, Nk, W, T, scale, DIM, COLS, BLOCK, BLOCK_T, HAS_MASK, PRECISION,
            )


@triton.jit
def key_tile_gradients(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, out_ptr, do_ptr, lse_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides, lse_strides,
    dk_strides, dv_strides, b, hkv, j0, band_start,
    G, Nq, Nk, W, scale, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """dK and dV of keys `j0 ...`: walk the queries that see them, in every head of the group."""
    j = j0 + tl.arange(0, BLOCK)
    real = is_real(mask_ptr, mask_strides, b, j, (j < Nk) & (j >= band_start), HAS_MASK)
    # [BLOCK, COLS]
    k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, j < Nk, BLOCK, COLS, DIM)
    v = load_rows(v_ptr, (v_strides[2], v_strides[3]), j0, j < Nk, BLOCK, COLS, DIM)
    dk = tl.zeros([BLOCK, COLS], tl.float32)
    dv = tl.zeros([BLOCK, COLS], tl.float32)
    first = j0 + tl.maximum(Nk - Nq - j0, 0) // BLOCK * BLOCK
    for g in range(0, G):
        h = (hkv * G + g).to(tl.int64)
        q_head = q_ptr + b.to(tl.int64) * q_strides[0] + h * q_strides[1]
        out_head = out_ptr + b.to(tl.int64) * out_strides[0] + h * out_strides[1]
        do_head = do_ptr + b.to(tl.int64) * do_strides[0] + h * do_strides[1]
        lse_head = lse_ptr + b.to(tl.int64) * lse_strides[0] + h * lse_strides[1]
        for i0 in range(first, tl.minimum(j0 + BLOCK + W - 1, Nk), BLOCK):
            row0 = j0 * 0 + i0 - (Nk - Nq)
            rows = row0 + tl.arange(0, BLOCK)
            i = rows + Nk - Nq
            valid = (rows >= 0) & (rows < Nq) & (i < j0 + BLOCK + W - 1)
            q = load_rows(q_head, (q_strides[2], q_strides[3]), row0, valid, BLOCK, COLS, DIM)
            out = load_rows(out_head, (out_strides[2], out_strides[3]), row0, valid,
                            BLOCK, COLS, DIM)
            do = load_rows(do_head, (do_strides[2], do_strides[3]), row0, valid, BLOCK, COLS, DIM)
            lse = load_lse(lse_head, lse_strides, rows, valid)
            bias = band_bias(bias_ptr + h * W, i[None, :] - j[:, None], real[:, None], W)
            # [BLOCK keys, BLOCK queries]
            probs, dscores = score_gradient_transposed(
                q, k, v, do, bias, lse, row_dot(do, out), scale, PRECISION
            )
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr += b.to(tl.int64) * dk_strides[0] + hkv.to(tl.int64) * dk_strides[1]
    dv_ptr += b.to(tl.int64) * dv_strides[0] + hkv.to(tl.int64) * dv_strides[1]
    store_rows(dk_ptr, (dk_strides[2], dk_strides[3]), j0, j < Nk, dk * scale, BLOCK, COLS, DIM)
    store_rows(dv_ptr, (dv_strides[2], dv_strides[3]), j0, j < Nk, dv, BLOCK, COLS, DIM)


@triton.jit
def query_tile_gradients(
    q_ptr, k_ptr, v_ptr, bias_ptr, sink_ptr, mask_ptr, out_ptr, do_ptr, lse_ptr,
    dq_ptr, dbias_ptr, dsink_k_ptr, dsink_v_ptr, dsink_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides, lse_strides,
    dq_strides, b, row0, start,
    Nq, Nk, W, T, scale, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """dQ of queries `row0 ...` of one head, and their parts of the gradients of sinks and bias."""
    rows = row0 + tl.arange(0, BLOCK)
    i0 = row0 + Nk - Nq
    i = rows + Nk - Nq
    # [BLOCK, COLS]
    q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, rows < Nq, BLOCK, COLS, DIM)
    out = load_rows(out_ptr, (out_strides[2], out_strides[3]), row0, rows < Nq, BLOCK, COLS, DIM)
    do = load_rows(do_ptr, (do_strides[2], do_strides[3]), row0, rows < Nq, BLOCK, COLS, DIM)
    lse = load_lse(lse_ptr, lse_strides, rows, rows < Nq)
    delta = row_dot(do, out)
    dq = tl.zeros([BLOCK, COLS], tl.float32)

    for t0 in range(0, T, BLOCK_T):
        t0 = row0 * 0 + t0
        t = t0 + tl.arange(0, BLOCK_T)
        j = start + t
        real = is_real(mask_ptr, mask_strides, b, j, (t < T) & (j < Nk), HAS_MASK)
        # [BLOCK_T, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), start + t0, real, BLOCK_T, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), start + t0, real, BLOCK_T, COLS, DIM)
        bias = sink_bias(sink_ptr, t[None, :], real[None, :] & (j[None, :] <= i[:, None]), T)
        # [BLOCK, BLOCK_T]
        probs, dscores = score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        dsink_k = tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision=PRECISION)
        dsink_v = tl.dot(tl.trans(probs.to(do.dtype)), do, input_precision=PRECISION)
        store_rows(dsink_k_ptr, (DIM, 1), t0, t < T, dsink_k * scale, BLOCK_T, COLS, DIM)
        store_rows(dsink_v_ptr, (DIM, 1), t0, t < T, dsink_v, BLOCK_T, COLS, DIM)
        tl.store(dsink_ptr + t, tl.sum(dscores, 0), mask=t < T)

    u = tl.arange(0, BLOCK)
    carry = tl.zeros([BLOCK], tl.float32)
    last = tl.cdiv(W - 1, BLOCK)  # the furthest tile of the band
    reached = tl.minimum(last, (i0 + BLOCK - 1) // BLOCK) + 1  # tiles that exist
    for x in range(0, reached):
        j0 = i0 - x * BLOCK
        j = j0 + tl.arange(0, BLOCK)
        inside = (j >= start + T) & (j > i0 - W) & (j >= 0) & (j < Nk)
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, inside, BLOCK, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), j0, inside, BLOCK, COLS, DIM)
        real = is_real(mask_ptr, mask_strides, b, j, inside, HAS_MASK)
        bias = band_bias(bias_ptr, i[:, None] - j[None, :], real[None, :], W)
        # [BLOCK queries, BLOCK keys]
        _, dscores = score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        here, nearer = diagonal_sums(dscores, BLOCK)
        n = (x - 1) * BLOCK + u
        tl.store(dbias_ptr + n, carry + nearer, mask=(n >= 0) & (n < W))
        carry = here
    for x in range(reached, last + 2):  # what is still carried, then offsets nobody reaches
        n = (x - 1) * BLOCK + u
        tl.store(dbias_ptr + n, carry, mask=n < W)
        carry = carry * 0.0
    store_rows(dq_ptr, (dq_strides[2], dq_strides[3]), row0, rows < Nq, dq * scale,
               BLOCK, COLS, DIM)


def backward_tile(dtype: torch.dtype, cols: int, dim: int) -> dict[str, int]:
    """Tile sizes: 16-bit ones compile without spills on sm_80 to sm_100, larger ones do not.

    Rows that do not begin at multiples of 16 elements are read piecemeal, with more addresses.
    """
    if dtype == torch.float32:
        return {"BLOCK": 16, "num_warps": 4 if cols <= 64 else 8, "num_stages": 1}
    large = cols <= 128 and dim % 16 == 0
    return {"BLOCK": 32 if large else 16, "num_warps": 4, "num_stages": 1}


def lastk_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor,
                   sink_log_weights: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
                   scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_weights `[H, W]` and sink_log_weights `[H, T]`."""
    B, H, Nq, D = q.shape
    Hkv, Nk = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    bias = base2_weights(log_weights[:, :Nk])
    sinks = base2_weights(sink_log_weights[:, :Nk])
    mask, start, mask_strides = mask_arguments(key_mask, k)
    cols = max(16, triton.next_power_of_2(D))
    tile = backward_tile(q.dtype, cols, D)
    tiles = triton.cdiv(Nk, tile["BLOCK"])  # Nk >= Nq
    query_tiles = triton.cdiv(Nq, tile["BLOCK"])
    W, T = bias.shape[1], sinks.shape[1]
    parts = {"dtype": torch.float32, "device": q.device}
    dbias = torch.empty(B, H, tiles, W, **parts)
    dsink = torch.empty(B, H, tiles, T, **parts)
    dsink_k = torch.empty(B, H, tiles, T, D, **parts)
    dsink_v = torch.empty(B, H, tiles, T, D, **parts)
    lastk_backward_kernel[(tiles * B * Hkv,)](
        q_ptr=q, k_ptr=k, v_ptr=v, bias_ptr=bias, sink_ptr=sinks, mask_ptr=mask, start_ptr=start,
        out_ptr=out, do_ptr=grad, lse_ptr=lse, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
        dbias_ptr=dbias, dsink_k_ptr=dsink_k, dsink_v_ptr=dsink_v, dsink_ptr=dsink,
        q_strides=q.stride(), k_strides=k.stride(), v_strides=v.stride(),
        mask_strides=mask_strides, out_strides=out.stride(), do_strides=grad.stride(),
        lse_strides=lse.stride(), dq_strides=dq.stride(), dk_strides=dk.stride(),
        dv_strides=dv.stride(),
        H=H, G=H // Hkv, Nq=Nq, Nk=Nk, W=W, T=T, scale=scale,
        DIM=D, COLS=cols, BLOCK_T=BLOCK_T, HAS_MASK=key_mask is not None,
        PRECISION=input_precision(q.dtype), **tile,
    )
    dlog_weights = torch.zeros_like(log_weights, memory_format=torch.contiguous_format)
    dlog_weights[:, :W] = dbias[:, :, :query_tiles].sum((0, 2))
    dsink_log_weights = torch.zeros_like(
        sink_log_weights, memory_format=torch.contiguous_format
    )
    if T:
        positions = sink_positions(key_mask, T, k)
        for total, sink_parts in ((dk, dsink_k), (dv, dsink_v)):
            by_group = sink_parts[:, :, :query_tiles].sum(2)
            add_at_sinks(total, by_group.view(B, Hkv, H // Hkv, T, D).sum(2), positions)
        dsink_log_weights[:, :T] = dsink[:, :, :query_tiles].sum((0, 2))
    return dq, dk, dv, dlog_weights, dsink_log_weights

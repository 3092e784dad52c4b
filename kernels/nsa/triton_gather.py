"""Selected attention, key-major, in Triton: a block of keys gathers the queries that selected it.

    o_is = sum_{j in block s of i} e^{s_ij} v_j / sum_j e^{s_ij}

is the partial result of slot s of query i, stored with its log-sum-exp; `triton_query.py` folds the
S of them together. A query-major kernel would read S b keys for every query; here a block is read
once per segment of at most SEGMENT queries (see `work_list.py`), whatever the group size. A block
too large for the registers counts as several pieces, each with slots of its own.

Backward, in the same order: partial dQ of each slot, in place of the partial output, and dK, dV of
each segment, which `triton_key.py` adds up. Five matmuls, no atomics.

Letters: D head dim, S slots, b tokens of a block, `size` of each of its `pieces`, x = batch row *
Hkv + key/value head; a pair is query * S + slot; rows of a tile are BLOCK_Q / GROUP pairs of GROUP
heads.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import (
    LOG2E,
    is_real,
    load_rows,
    row_mask,
    score_gradient_transposed,
    store_rows,
)
from attnopt.kernels.nsa.triton_groups import load_group, load_statistics


@triton.jit
def segment(work_ptr, index, total, b, pieces, size):
    """First position and number of keys of a segment, and its range of pairs; none if left over."""
    piece = tl.load(work_ptr + index)
    begin = tl.load(work_ptr + total + index)
    end = tl.load(work_ptr + 2 * total + index)
    first = piece % pieces * size
    keys = tl.where(begin < end, tl.minimum(size, b - first), 0)
    return piece // pieces * b + first, keys, begin, end


@triton.jit
def segment_keys(k_ptr, v_ptr, mask_ptr, start_ptr, work_ptr, k_strides, v_strides, mask_strides,
                 index, x, Hkv, Nk, b, pieces, size, total, DIM: tl.constexpr, COLS: tl.constexpr,
                 BLOCK_K: tl.constexpr, HAS_MASK: tl.constexpr):
    """Keys and values of a segment `[BLOCK_K, COLS]`, their positions, and its range of pairs."""
    batch, kv = x // Hkv, x % Hkv
    k_ptr += batch.to(tl.int64) * k_strides[0] + kv.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv.to(tl.int64) * v_strides[1]
    start = tl.load(start_ptr + batch)
    pos0, keys, begin, end = segment(work_ptr, index, total, b, pieces, size)
    t = tl.arange(0, BLOCK_K)
    pos = pos0 + t
    inside = (t < keys) & (start + pos < Nk)
    real = is_real(mask_ptr, mask_strides, batch, start + pos, inside, HAS_MASK)
    j0 = start + pos0
    k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
    v = load_rows(v_ptr, (v_strides[2], v_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
    return k, v, pos, real, start, begin, end


@triton.jit
def gathered_bias(p, pos, real, valid):
    """0 where a gathered row `[Q]` sees a key `[K]`, -inf elsewhere: `[K, Q]`."""
    seen = valid[None, :] & real[:, None] & (pos[:, None] <= p[None, :])
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def gather_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, start_ptr, order_ptr, work_ptr, part_ptr, part_lse_ptr,
    q_strides, k_strides, v_strides, mask_strides,
    x0, Hkv, G, Nq, Nk, S, b, pieces, size, segments, total, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Partial outputs and log-sum-exps (base 2) of one segment of a block's queries."""
    index = tl.program_id(0) % total
    own, group = index // segments, tl.program_id(0) // total * GROUP
    x = x0 + own
    batch, kv = x // Hkv, x % Hkv
    q_ptr += batch.to(tl.int64) * q_strides[0]
    # [BLOCK_K, COLS] and [BLOCK_K]
    k, v, pos, real, start, begin, end = segment_keys(
        k_ptr, v_ptr, mask_ptr, start_ptr, work_ptr, k_strides, v_strides, mask_strides,
        index, x, Hkv, Nk, b, pieces, size, total, DIM, COLS, BLOCK_K, HAS_MASK,
    )
    order_ptr += own.to(tl.int64) * Nq * S
    for i0 in range(begin, end, BLOCK_Q // GROUP):
        i = begin * 0 + i0 + tl.arange(0, BLOCK_Q) // GROUP
        valid = i < end
        pair = tl.load(order_ptr + i, mask=valid, other=0)
        tokens, head = pair // S, group + tl.arange(0, BLOCK_Q) % GROUP
        # [BLOCK_Q, COLS]
        q = load_group(q_ptr, q_strides, tokens, kv * G + head, valid, COLS, DIM)
        bias = tl.trans(gathered_bias(tokens + Nk - Nq - start, pos, real, valid))
        # [BLOCK_Q, BLOCK_K]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        top = tl.max(scores, 1)
        probs = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        weight = tl.sum(probs, 1)
        seen = weight > 0
        weight = tl.where(seen, weight, 1.0)
        out = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION) / weight[:, None]
        lse = tl.where(seen, top + tl.log2(weight), float("-inf"))
        rows = (own * G + head).to(tl.int64) * Nq * S + pair
        pointers = part_ptr + rows[:, None] * DIM + tl.arange(0, COLS)[None, :]
        tl.store(pointers, out.to(part_ptr.dtype.element_ty), mask=row_mask(valid, COLS, DIM))
        tl.store(part_lse_ptr + rows, lse, mask=valid)


@triton.jit
def gather_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, start_ptr, order_ptr, work_ptr,
    part_ptr, dk_part_ptr, dv_part_ptr,
    q_strides, k_strides, v_strides, do_strides, lse_strides, mask_strides,
    x0, Hkv, G, Nq, Nk, S, b, pieces, size, segments, total, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Partial dQ of one segment of a block's queries, and the segment's dK and dV."""
    index = tl.program_id(0)
    own = index // segments
    x = x0 + own
    batch, kv = x // Hkv, x % Hkv
    q_ptr += batch.to(tl.int64) * q_strides[0]
    do_ptr += batch.to(tl.int64) * do_strides[0]
    lse_ptr += batch.to(tl.int64) * lse_strides[0]
    delta_ptr += batch.to(tl.int64) * lse_strides[0]
    # [BLOCK_K, COLS] and [BLOCK_K]
    k, v, pos, real, start, begin, end = segment_keys(
        k_ptr, v_ptr, mask_ptr, start_ptr, work_ptr, k_strides, v_strides, mask_strides,
        index, x, Hkv, Nk, b, pieces, size, total, DIM, COLS, BLOCK_K, HAS_MASK,
    )
    dk = tl.zeros([BLOCK_K, COLS], tl.float32)
    dv = tl.zeros([BLOCK_K, COLS], tl.float32)
    order_ptr += own.to(tl.int64) * Nq * S
    for group in range(0, G, GROUP):
        head = G * 0 + group + tl.arange(0, BLOCK_Q) % GROUP
        for i0 in range(begin, end, BLOCK_Q // GROUP):
            i = begin * 0 + i0 + tl.arange(0, BLOCK_Q) // GROUP
            valid = i < end
            pair = tl.load(order_ptr + i, mask=valid, other=0)
            tokens = pair // S
            # [BLOCK_Q, COLS]
            q = load_group(q_ptr, q_strides, tokens, kv * G + head, valid, COLS, DIM)
            do = load_group(do_ptr, do_strides, tokens, kv * G + head, valid, COLS, DIM)
            lse, delta = load_statistics(lse_ptr, delta_ptr, lse_strides, tokens, kv * G + head,
                                         valid)
            # [BLOCK_K, BLOCK_Q]
            bias = gathered_bias(tokens + Nk - Nq - start, pos, real, valid)
            probs, ds = score_gradient_transposed(q, k, v, do, bias, lse, delta, scale, PRECISION)
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            dq = tl.dot(tl.trans(ds.to(k.dtype)), k, input_precision=PRECISION) * scale
            rows = (own * G + head).to(tl.int64) * Nq * S + pair
            pointers = part_ptr + rows[:, None] * DIM + tl.arange(0, COLS)[None, :]
            tl.store(pointers, dq.to(part_ptr.dtype.element_ty), mask=row_mask(valid, COLS, DIM))
    t = tl.arange(0, BLOCK_K)
    stored = (t < size) & (begin + 0 * t < end)  # nobody reads what is left over
    base = index.to(tl.int64) * size * DIM
    store_rows(dk_part_ptr + base, (DIM, 1), index * 0, stored, dk * scale, BLOCK_K, COLS, DIM)
    store_rows(dv_part_ptr + base, (DIM, 1), index * 0, stored, dv, BLOCK_K, COLS, DIM)

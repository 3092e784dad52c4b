"""Gradients of keys and values of the selected branch, key-major, in Triton.

    P = e^{s - lse},    dS = P (dO V^T - delta),    dK = scale dS^T Q,    dV = P^T dO

One program computes BLOCK_K keys of one head. It walks over the queries that may see them: in
regime "short" all later ones, of which the rows' bit words tell who does, in regime "long" those
to which the keys are near. There it adds what `triton_gather.py` summed up for segments of the
queries that selected the keys' blocks.

Letters: as in `triton_query.py`.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import (
    is_real,
    load_rows,
    row_mask,
    score_gradient_transposed,
    store_rows,
)
from attnopt.kernels.nsa.triton_groups import (
    is_selected,
    load_group,
    load_statistics,
    load_words,
    near_position,
)


@triton.jit
def key_bias(p, near, pos, real, bits_ptr, words, rows, valid, b, HAS_BITS: tl.constexpr):
    """0 where a key `[K]` is seen by a row `[Q]`, -inf elsewhere: `[K, Q]`."""
    seen = pos[:, None] >= near[None, :]
    if HAS_BITS:
        first_word = tl.maximum(tl.min(pos), 0) // b // 32
        word0, word1 = load_words(bits_ptr, first_word, words, rows, valid)
        seen = seen | is_selected(word0[None, :], word1[None, :], first_word, pos[:, None], b)
    seen = seen & real[:, None] & (pos[:, None] <= p[None, :])
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def add_segments(dk, dv, dk_part_ptr, dv_part_ptr, first_ptr, pos, inside, b, pieces, size,
                 COLS: tl.constexpr, DIM: tl.constexpr):
    """Add the segments' gradients of every key, in the order of the segments."""
    pos = tl.maximum(pos, 0)
    piece = pos // b * pieces + pos % b // size
    first = tl.load(first_ptr + piece, mask=inside, other=0)
    count = tl.load(first_ptr + piece + 1, mask=inside, other=0) - first
    for n in range(0, tl.max(count, 0)):
        known = inside & (n < count)
        rows = ((first + n).to(tl.int64) * size + pos % b % size) * DIM
        pointers = rows[:, None] + tl.arange(0, COLS)[None, :]
        mask = row_mask(known, COLS, DIM)
        dk += tl.load(dk_part_ptr + pointers, mask=mask, other=0.0)
        dv += tl.load(dv_part_ptr + pointers, mask=mask, other=0.0)
    return dk, dv


@triton.jit
def selected_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, start_ptr, bits_ptr,
    dk_part_ptr, dv_part_ptr, first_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, do_strides, lse_strides, mask_strides, dk_strides,
    dv_strides,
    x0, Hkv, G, Nq, Nk, b, Wn, words, blocks, pieces, size, segments, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BITS: tl.constexpr, HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dK` and `dV` of BLOCK_K columns of one key/value head; 0 in padding."""
    tiles = tl.cdiv(Nk, BLOCK_K)
    j0 = tl.program_id(0) % tiles * BLOCK_K
    x = x0 + tl.program_id(0) // tiles
    batch, kv = x // Hkv, x % Hkv
    q_ptr += batch.to(tl.int64) * q_strides[0]
    do_ptr += batch.to(tl.int64) * do_strides[0]
    lse_ptr += batch.to(tl.int64) * lse_strides[0]
    delta_ptr += batch.to(tl.int64) * lse_strides[0]
    k_ptr += batch.to(tl.int64) * k_strides[0] + kv.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv.to(tl.int64) * v_strides[1]
    dk_ptr += batch.to(tl.int64) * dk_strides[0] + kv.to(tl.int64) * dk_strides[1]
    dv_ptr += batch.to(tl.int64) * dv_strides[0] + kv.to(tl.int64) * dv_strides[1]
    bits_ptr += x.to(tl.int64) * Nq * words
    start = tl.load(start_ptr + batch)
    j = j0 + tl.arange(0, BLOCK_K)
    pos = j - start
    inside = (j < Nk) & (pos >= 0)
    real = is_real(mask_ptr, mask_strides, batch, j, inside, HAS_MASK)

    # [BLOCK_K, COLS]
    k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
    v = load_rows(v_ptr, (v_strides[2], v_strides[3]), j0, inside, BLOCK_K, COLS, DIM)
    dk = tl.zeros([BLOCK_K, COLS], tl.float32)
    dv = tl.zeros([BLOCK_K, COLS], tl.float32)

    offset = Nk - Nq
    begin = tl.maximum(j0 - offset, 0)
    end = Nq
    if not HAS_BITS:  # near(p) b > p - Wn + 1 - b
        reach = j0 + BLOCK_K + Wn + b - 2 - offset
        end = tl.where(Wn > 0, tl.minimum(reach, Nq), begin)
    for head0 in range(0, G, GROUP):
        for token0 in range(begin, end, BLOCK_Q // GROUP):
            token0 = begin * 0 + token0
            tokens = token0 + tl.arange(0, BLOCK_Q) // GROUP
            heads = kv * G + head0 + tl.arange(0, BLOCK_Q) % GROUP
            valid = tokens < end
            p = tokens + offset - start
            near = near_position(p, b, Wn)
            # [BLOCK_K, BLOCK_Q]
            bias = key_bias(p, near, pos, real, bits_ptr, words, tokens, valid, b, HAS_BITS)
            bias = tl.where(valid[None, :], bias, float("-inf"))
            wanted = True
            if HAS_BITS:
                wanted = tl.max(tl.max(bias, 1), 0) == 0.0
            if wanted:
                # [BLOCK_Q, COLS]
                q = load_group(q_ptr, q_strides, tokens, heads, valid, COLS, DIM)
                do = load_group(do_ptr, do_strides, tokens, heads, valid, COLS, DIM)
                lse, delta = load_statistics(lse_ptr, delta_ptr, lse_strides, tokens, heads, valid)
                probs, ds = score_gradient_transposed(q, k, v, do, bias, lse, delta, scale,
                                                      PRECISION)
                dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    if HAS_PARTS:
        own = (x - x0).to(tl.int64)
        base = own * segments * size * DIM
        first_ptr += own * (blocks * pieces + 1)
        dk, dv = add_segments(dk, dv, dk_part_ptr + base, dv_part_ptr + base, first_ptr, pos,
                              inside, b, pieces, size, COLS, DIM)
    store_rows(dk_ptr, (dk_strides[2], dk_strides[3]), j0, j < Nk, dk, BLOCK_K, COLS, DIM)
    store_rows(dv_ptr, (dv_strides[2], dv_strides[3]), j0, j < Nk, dv, BLOCK_K, COLS, DIM)

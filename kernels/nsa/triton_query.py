"""Selected attention, query-major, in Triton: a tile of queries walks over the keys it sees.

    o_i = sum_j e^{s_ij} v_j / sum_j e^{s_ij},    j near, or in a selected block

Regime "short": the walk starts at the first key; a bit word per row says which blocks are selected,
and key tiles that no row of the tile sees are skipped.
Regime "long": the walk covers the near keys alone. What the queries found in their selected blocks
comes as one partial result per (query, slot) from `triton_gather.py` and is folded in.

One program computes BLOCK_Q rows, that is BLOCK_Q / GROUP tokens of GROUP heads (see
`triton_groups.py`). Saved for backward: the log-sum-exp of each row.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, Nq queries, Nk keys, D head dim,
S selected blocks, b tokens of one, Wn near window; x = batch row * Hkv + key/value head.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import (
    LN2,
    LOG2E,
    is_real,
    load_rows,
    online_softmax_update,
    row_mask,
    score_gradient,
)
from attnopt.kernels.nsa.triton_groups import (
    is_selected,
    load_group,
    load_statistics,
    load_words,
    near_position,
    store_group,
)


@triton.jit
def query_tile(x0, Nq, Hkv, G, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr):
    """What this program computes: (x, batch row, key head, first token, first head)."""
    tiles = tl.cdiv(Nq, BLOCK_Q // GROUP)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    x = x0 + rest // (G // GROUP)
    kv = x % Hkv
    return x, x // Hkv, kv, tile * (BLOCK_Q // GROUP), kv * G + rest % (G // GROUP) * GROUP


@triton.jit
def walk(token0, TOKENS, Nq, offset, start, b, Wn, HAS_BITS: tl.constexpr):
    """First and end position of the keys that a tile of queries walks over."""
    first = token0 + offset - start
    end = tl.minimum(token0 + TOKENS, Nq) + offset - start
    if HAS_BITS:
        begin = first * 0
    else:
        begin = tl.where(Wn > 0, tl.maximum(first - Wn + 1, 0) // b * b, end)
    return begin, end


@triton.jit
def tile_bias(p, near, pos, real, bits_ptr, words, rows, valid, b, HAS_BITS: tl.constexpr):
    """0 where a row `[Q]` sees a key `[K]`, -inf elsewhere: `[Q, K]`."""
    seen = pos[None, :] >= near[:, None]
    if HAS_BITS:
        first_word = tl.min(pos) // b // 32
        word0, word1 = load_words(bits_ptr, first_word, words, rows, valid)
        seen = seen | is_selected(word0[:, None], word1[:, None], first_word, pos[None, :], b)
    seen = seen & real[None, :] & (pos[None, :] <= p[:, None])
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def fold_partials(acc, top, total, part_ptr, part_lse_ptr, chosen_ptr, tokens, first, valid,
                  S, COLS: tl.constexpr, DIM: tl.constexpr):
    """Fold the partial results of the S selected blocks of each row into a running softmax.

    `first` `[Q]` is the index of the row's first partial result.
    """
    for s in range(0, S):
        s = S * 0 + s  # a tensor in the interpreter too
        block = tl.load(chosen_ptr + tokens.to(tl.int64) * S + s, mask=valid, other=-1)
        known = valid & (block >= 0)
        lse = tl.load(part_lse_ptr + first + s, mask=known, other=float("-inf"))
        pointers = part_ptr + (first + s)[:, None] * DIM + tl.arange(0, COLS)[None, :]
        part = tl.load(pointers, mask=row_mask(known, COLS, DIM), other=0.0).to(tl.float32)
        new_top = tl.maximum(top, lse)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp2(top - pivot), tl.exp2(lse - pivot)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
    return acc, top, total


@triton.jit
def selected_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, start_ptr, bits_ptr, chosen_ptr, part_ptr, part_lse_ptr,
    out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, lse_strides,
    x0, Hkv, G, Nq, Nk, S, b, Wn, words, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BITS: tl.constexpr, HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_Q rows."""
    x, batch, kv, token0, head0 = query_tile(x0, Nq, Hkv, G, BLOCK_Q, GROUP)
    q_ptr += batch.to(tl.int64) * q_strides[0]
    k_ptr += batch.to(tl.int64) * k_strides[0] + kv.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv.to(tl.int64) * v_strides[1]
    out_ptr += batch.to(tl.int64) * out_strides[0]
    lse_ptr += batch.to(tl.int64) * lse_strides[0]
    bits_ptr += x.to(tl.int64) * Nq * words
    chosen_ptr += x.to(tl.int64) * Nq * S
    start = tl.load(start_ptr + batch)
    tokens = token0 + tl.arange(0, BLOCK_Q) // GROUP
    heads = head0 + tl.arange(0, BLOCK_Q) % GROUP
    valid = tokens < Nq
    p = tokens + Nk - Nq - start
    near = near_position(p, b, Wn)

    # [BLOCK_Q, COLS]
    q = load_group(q_ptr, q_strides, tokens, heads, valid, COLS, DIM)
    acc = tl.zeros([BLOCK_Q, COLS], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if HAS_PARTS:
        first = ((x - x0) * G + heads - kv * G).to(tl.int64) * Nq * S + tokens.to(tl.int64) * S
        acc, top, total = fold_partials(acc, top, total, part_ptr, part_lse_ptr, chosen_ptr,
                                        tokens, first, valid, S, COLS, DIM)

    begin, end = walk(token0, BLOCK_Q // GROUP, Nq, Nk - Nq, start, b, Wn, HAS_BITS)
    for pos0 in range(begin, end, BLOCK_K):
        pos0 = token0 * 0 + pos0  # a tensor in the interpreter too
        pos = pos0 + tl.arange(0, BLOCK_K)
        inside = pos < end
        real = is_real(mask_ptr, mask_strides, batch, start + pos, inside, HAS_MASK)
        # [BLOCK_Q, BLOCK_K]
        bias = tile_bias(p, near, pos, real, bits_ptr, words, tokens, valid, b, HAS_BITS)
        wanted = True
        if HAS_BITS:
            wanted = tl.max(tl.max(bias, 1), 0) == 0.0
        if wanted:
            # [BLOCK_K, COLS]
            k = load_rows(k_ptr, (k_strides[2], k_strides[3]), start + pos0, inside,
                          BLOCK_K, COLS, DIM)
            v = load_rows(v_ptr, (v_strides[2], v_strides[3]), start + pos0, inside,
                          BLOCK_K, COLS, DIM)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
            acc, top, total = online_softmax_update(acc, top, total, scores, v, PRECISION)

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf"))
    store_group(out_ptr, out_strides, tokens, heads, valid, acc / total[:, None], COLS, DIM)
    rows = heads.to(tl.int64) * lse_strides[1] + tokens.to(tl.int64) * lse_strides[2]
    tl.store(lse_ptr + rows, lse, mask=valid)


@triton.jit
def sum_partials(acc, part_ptr, chosen_ptr, tokens, first, valid, S, COLS: tl.constexpr,
                 DIM: tl.constexpr):
    """Add the partial gradients of the S selected blocks of each row."""
    for s in range(0, S):
        s = S * 0 + s
        block = tl.load(chosen_ptr + tokens.to(tl.int64) * S + s, mask=valid, other=-1)
        pointers = part_ptr + (first + s)[:, None] * DIM + tl.arange(0, COLS)[None, :]
        known = row_mask(valid & (block >= 0), COLS, DIM)
        acc += tl.load(pointers, mask=known, other=0.0).to(tl.float32)
    return acc


@triton.jit
def selected_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr, start_ptr, bits_ptr, chosen_ptr,
    part_ptr, dq_ptr,
    q_strides, k_strides, v_strides, do_strides, lse_strides, mask_strides, dq_strides,
    x0, Hkv, G, Nq, Nk, S, b, Wn, words, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BITS: tl.constexpr, HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dQ = scale dS K` of BLOCK_Q rows."""
    x, batch, kv, token0, head0 = query_tile(x0, Nq, Hkv, G, BLOCK_Q, GROUP)
    q_ptr += batch.to(tl.int64) * q_strides[0]
    k_ptr += batch.to(tl.int64) * k_strides[0] + kv.to(tl.int64) * k_strides[1]
    v_ptr += batch.to(tl.int64) * v_strides[0] + kv.to(tl.int64) * v_strides[1]
    do_ptr += batch.to(tl.int64) * do_strides[0]
    dq_ptr += batch.to(tl.int64) * dq_strides[0]
    lse_ptr += batch.to(tl.int64) * lse_strides[0]
    delta_ptr += batch.to(tl.int64) * lse_strides[0]
    bits_ptr += x.to(tl.int64) * Nq * words
    chosen_ptr += x.to(tl.int64) * Nq * S
    start = tl.load(start_ptr + batch)
    tokens = token0 + tl.arange(0, BLOCK_Q) // GROUP
    heads = head0 + tl.arange(0, BLOCK_Q) % GROUP
    valid = tokens < Nq
    p = tokens + Nk - Nq - start
    near = near_position(p, b, Wn)

    # [BLOCK_Q, COLS]
    q = load_group(q_ptr, q_strides, tokens, heads, valid, COLS, DIM)
    do = load_group(do_ptr, do_strides, tokens, heads, valid, COLS, DIM)
    lse, delta = load_statistics(lse_ptr, delta_ptr, lse_strides, tokens, heads, valid)
    acc = tl.zeros([BLOCK_Q, COLS], tl.float32)

    begin, end = walk(token0, BLOCK_Q // GROUP, Nq, Nk - Nq, start, b, Wn, HAS_BITS)
    for pos0 in range(begin, end, BLOCK_K):
        pos0 = token0 * 0 + pos0
        pos = pos0 + tl.arange(0, BLOCK_K)
        inside = pos < end
        real = is_real(mask_ptr, mask_strides, batch, start + pos, inside, HAS_MASK)
        # [BLOCK_Q, BLOCK_K]
        bias = tile_bias(p, near, pos, real, bits_ptr, words, tokens, valid, b, HAS_BITS)
        wanted = True
        if HAS_BITS:
            wanted = tl.max(tl.max(bias, 1), 0) == 0.0
        if wanted:
            # [BLOCK_K, COLS]
            k = load_rows(k_ptr, (k_strides[2], k_strides[3]), start + pos0, inside,
                          BLOCK_K, COLS, DIM)
            v = load_rows(v_ptr, (v_strides[2], v_strides[3]), start + pos0, inside,
                          BLOCK_K, COLS, DIM)
            _, ds = score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION)
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    acc *= scale
    if HAS_PARTS:
        first = ((x - x0) * G + heads - kv * G).to(tl.int64) * Nq * S + tokens.to(tl.int64) * S
        acc = sum_partials(acc, part_ptr, chosen_ptr, tokens, first, valid, S, COLS, DIM)
    store_group(dq_ptr, dq_strides, tokens, heads, valid, acc, COLS, DIM)

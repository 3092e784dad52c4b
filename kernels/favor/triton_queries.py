"""FAVOR+ attention backward in Triton: gradients of the queries; see triton_backward.py."""

import triton
import triton.language as tl

from attnopt.kernels.common import (
    first_token,
    is_real,
    load_lse,
    row_dot,
    score_gradient,
    store_rows,
)
from attnopt.kernels.favor.triton_features import (
    fold_state,
    load_projection,
    load_state,
    load_tile,
    query_logits,
    query_shares,
    split_pairs,
    through_norm,
    window_pairs,
)
from attnopt.kernels.favor.triton_forward import next_keys


@triton.jit
def window_query_gradient(
    q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_strides, v_strides, mask_strides,
    b, start, t, Nk, lag, split, block, scale, DIM: tl.constexpr, COLS: tl.constexpr,
    TILE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of query block t through the keys that it sees exactly."""
    o = tl.arange(0, TILE)
    dq = tl.zeros([TILE, COLS], tl.float32)
    for x in range(tl.maximum(t - lag, 0), t + 1):
        x = t * 0 + x
        column = start + x * block
        inside = (o < block) & (column + o < Nk)
        real = is_real(mask_ptr, mask_strides, b, column + o, inside, HAS_MASK)
        # [TILE, COLS]
        k = load_tile(k_ptr, (k_strides[2], k_strides[3]), column, real, TILE, COLS, DIM)
        v = load_tile(v_ptr, (v_strides[2], v_strides[3]), column, real, TILE, COLS, DIM)
        visible = window_pairs(t, x, o, lag, split, block) & real[None, :]
        bias = tl.where(visible, 0.0, float("-inf"))
        _, dscores = score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq * scale


@triton.jit
def favor_query_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, gate_ptr, mask_ptr, start_ptr, seg_kv_ptr, seg_z_ptr, seg_r_ptr,
    out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dw_ptr, dgate_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, do_strides, dq_strides,
    H, G, Nq, Nk, M, segments, run, blocks, lag, split, block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, STATIC: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr,
    SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, LEARNED: tl.constexpr, RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, delta and partial dW, dgate of one segment of one head."""
    segment, head = tl.program_id(0) % segments, tl.program_id(0) // segments
    b, h = head // H, head % H
    q_ptr += b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += b.to(tl.int64) * k_strides[0] + (h // G).to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + (h // G).to(tl.int64) * v_strides[1]
    out_ptr += b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1]
    do_ptr += b.to(tl.int64) * do_strides[0] + h.to(tl.int64) * do_strides[1]
    dq_ptr += b.to(tl.int64) * dq_strides[0] + h.to(tl.int64) * dq_strides[1]
    lse_ptr += head.to(tl.int64) * Nq
    delta_ptr += head.to(tl.int64) * Nq
    start = first_token(start_ptr, b, HAS_MASK & NEAR)
    w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
    gate = tl.load(gate_ptr + h)
    place = tl.program_id(0).to(tl.int64) * M
    state, z, r = load_state(seg_kv_ptr, seg_z_ptr, seg_r_ptr, place, M, DIM, COLS, F)
    o = tl.arange(0, TILE)
    dgate = 0.0
    if LEARNED:
        dw = tl.zeros([F, COLS], tl.float32)

    for t in range(segment * run, tl.minimum((segment + 1) * run, blocks)):
        t = segment * 0 + t
        row0 = start + t * block - (Nk - Nq)
        valid = (o < block) & (row0 + o < Nq) & (row0 + o >= 0)
        # [TILE, COLS]
        q = load_tile(q_ptr, (q_strides[2], q_strides[3]), row0, valid, TILE, COLS, DIM)
        do = load_tile(do_ptr, (do_strides[2], do_strides[3]), row0, valid, TILE, COLS, DIM)
        out = load_tile(out_ptr, (out_strides[2], out_strides[3]), row0, valid, TILE, COLS, DIM)
        lse = load_lse(lse_ptr, (0, 0, 1), row0 + o, valid)
        delta = row_dot(do, out)
        tl.store(delta_ptr + row0 + o, delta, mask=valid)
        dq = tl.zeros([TILE, COLS], tl.float32)
        if NEAR:
            dq = window_query_gradient(
                q, do, lse, delta, k_ptr, v_ptr, mask_ptr, k_strides, v_strides, mask_strides,
                b, start, t, Nk, lag, split, block, scale, DIM, COLS, TILE, HAS_MASK, PRECISION,
            )
        if RELOAD:
            w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
        if SPLIT:
            real, features, v, r, decay = next_keys(
                r, k_ptr, v_ptr, w, mask_ptr, k_strides, v_strides, mask_strides, b, start, t, Nk,
                M, lag, split, block, scale, DIM, COLS, TILE, FEATURES, STATIC, HAS_MASK, PRECISION,
            )
            state, z = state * decay[:, None], z * decay
        logits = query_logits(q, w, gate, scale, M, FEATURES, NEAR, PRECISION)
        # [TILE, F]
        dlogits = tl.dot(do, tl.trans(state.to(do.dtype)), input_precision=PRECISION)
        dlogits -= delta[:, None] * z[None, :]
        if SPLIT:
            # [TILE queries, TILE keys]
            dpairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            dpairs = tl.where(split_pairs(o, split, NEAR) & real[None, :], dpairs, 0.0)
            dlogits = tl.dot(dpairs.to(do.dtype), tl.trans(features.to(do.dtype)), dlogits,
                             input_precision=PRECISION)
        dlogits *= query_shares(logits, r, lse)
        if NEAR:
            far = tl.sum(dlogits, 1)
            dgate += tl.sum(far)
            if FEATURES == "favor":
                dq -= q.to(tl.float32) * (far * scale)[:, None]
            dlogits = through_norm(dlogits, logits, gate, FEATURES, 1)
        dlogits = (dlogits * tl.sqrt(scale)).to(q.dtype)
        dq = tl.dot(dlogits, w, dq, input_precision=PRECISION)
        store_rows(dq_ptr, (dq_strides[2], dq_strides[3]), row0, valid, dq, TILE, COLS, DIM)
        if LEARNED:
            dw = tl.dot(tl.trans(dlogits), q, dw, input_precision=PRECISION)
        if CAUSAL:
            if SPLIT:
                decay = tl.full([F], 1.0, tl.float32)
            else:
                _, features, v, r, decay = next_keys(
                    r, k_ptr, v_ptr, w, mask_ptr, k_strides, v_strides, mask_strides, b, start, t,
                    Nk, M, lag, split, block, scale, DIM, COLS, TILE, FEATURES, STATIC, HAS_MASK,
                    PRECISION,
                )
            state, z = fold_state(state, z, decay, features, v, PRECISION)

    tl.store(dgate_ptr + tl.program_id(0), dgate)
    if LEARNED:
        m = tl.arange(0, F)
        store_rows(dw_ptr + place * DIM, (DIM, 1), segment * 0, m < M, dw, F, COLS, DIM)

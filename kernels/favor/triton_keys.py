"""FAVOR+ attention backward in Triton: gradients of the keys; see triton_backward.py."""

import triton
import triton.language as tl

from attnopt.kernels.common import (
    first_token,
    is_real,
    load_lse,
    score_gradient_transposed,
    store_rows,
)
from attnopt.kernels.favor.triton_features import (
    entry_of,
    key_features,
    key_logits,
    load_projection,
    load_state,
    load_tile,
    query_logits,
    query_shares,
    split_pairs,
    through_norm,
    window_pairs,
)


@triton.jit
def load_query_block(
    t, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides, start, Nq, Nk, block,
    DIM: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):
    """q, dO `[TILE, COLS]`, log-sum-exp and delta `[TILE]` of query block t."""
    o = tl.arange(0, TILE)
    row0 = start + t * block - (Nk - Nq)
    valid = (o < block) & (row0 + o < Nq) & (row0 + o >= 0)
    q = load_tile(q_ptr, (q_strides[2], q_strides[3]), row0, valid, TILE, COLS, DIM)
    do = load_tile(do_ptr, (do_strides[2], do_strides[3]), row0, valid, TILE, COLS, DIM)
    lse = load_lse(lse_ptr, (0, 0, 1), row0 + o, valid)
    delta = tl.load(delta_ptr + row0 + o, mask=valid, other=0.0)
    return q, do, lse, delta


@triton.jit
def fold_adjoint(adjoint, u, q, do, lse, delta, w, r, gate, scale, M, FEATURES: tl.constexpr,
                 NEAR: tl.constexpr, PRECISION: tl.constexpr):
    """Add the queries of a block to T `[F, COLS]` and u `[F]`, relative to r."""
    logits = query_logits(q, w, gate, scale, M, FEATURES, NEAR, PRECISION)
    queries = tl.trans(query_shares(logits, r, lse).to(do.dtype))  # [F, TILE]
    adjoint = tl.dot(queries, do, adjoint, input_precision=PRECISION)
    u += tl.sum(queries.to(tl.float32) * delta[None, :], 1)
    return adjoint, u


@triton.jit
def favor_adjoint_kernel(
    q_ptr, w_ptr, gate_ptr, start_ptr, block_r_ptr, do_ptr, lse_ptr, delta_ptr, t_ptr, u_ptr,
    q_strides, do_strides,
    H, Nq, Nk, M, segments, run, blocks, lag, block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, HAS_MASK: tl.constexpr,
    RELOAD: tl.constexpr, PRECISION: tl.constexpr,
):
    """T and u of the queries in blocks lag after one segment, relative to its first reference.

    They see all that entered the state before the segment, but not its keys.
    """
    segment, head = tl.program_id(0) % segments, tl.program_id(0) // segments
    b, h = head // H, head % H
    q_ptr += b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    do_ptr += b.to(tl.int64) * do_strides[0] + h.to(tl.int64) * do_strides[1]
    lse_ptr += head.to(tl.int64) * Nq
    delta_ptr += head.to(tl.int64) * Nq
    start = first_token(start_ptr, b, HAS_MASK & NEAR)
    m = tl.arange(0, F)
    w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
    gate = tl.load(gate_ptr + h)
    first = segment * run
    entries = entry_of(blocks, blocks, lag, CAUSAL) + 1
    entry = head.to(tl.int64) * entries + entry_of(first + lag, blocks, lag, CAUSAL)
    r = tl.load(block_r_ptr + entry * M + m, mask=m < M, other=0.0)
    adjoint = tl.zeros([F, COLS], tl.float32)
    u = tl.zeros([F], tl.float32)
    begin = tl.where(segment == 0, 0, first + lag)  # the first lag blocks meet the initial state
    for t in range(begin, tl.minimum(first + lag + run, blocks)):
        t = segment * 0 + t
        if RELOAD:
            w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
        q, do, lse, delta = load_query_block(
            t, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides, start, Nq, Nk, block,
            DIM, COLS, TILE,
        )
        adjoint, u = fold_adjoint(adjoint, u, q, do, lse, delta, w, r, gate, scale, M, FEATURES,
                                  NEAR, PRECISION)
    place = tl.program_id(0).to(tl.int64) * M
    store_rows(t_ptr + place * DIM, (DIM, 1), segment * 0, m < M, adjoint, F, COLS, DIM)
    tl.store(u_ptr + place + m, u, mask=m < M)


@triton.jit
def window_key_gradient(
    k, v, real, j, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides,
    start, Nq, Nk, blocks, lag, split, block, scale, DIM: tl.constexpr, COLS: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk and dv of key block j through the queries that see it exactly, in blocks j .. j + lag."""
    o = tl.arange(0, TILE)
    dk = tl.zeros([TILE, COLS], tl.float32)
    dv = tl.zeros([TILE, COLS], tl.float32)
    for t in range(j, tl.minimum(j + lag + 1, blocks)):
        t = j * 0 + t
        q, do, lse, delta = load_query_block(
            t, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides, start, Nq, Nk, block,
            DIM, COLS, TILE,
        )
        visible = tl.trans(window_pairs(t, j, o, lag, split, block)) & real[:, None]
        bias = tl.where(visible, 0.0, float("-inf"))
        # [TILE keys, TILE queries]
        probs, dscores = score_gradient_transposed(q, k, v, do, bias, lse, delta, scale, PRECISION)
        dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk * scale, dv


@triton.jit
def favor_key_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, gate_ptr, mask_ptr, start_ptr, block_r_ptr, do_ptr, lse_ptr,
    delta_ptr, t_ptr, u_ptr, dk_ptr, dv_ptr, dw_ptr,
    q_strides, k_strides, v_strides, mask_strides, do_strides, dk_strides, dv_strides,
    H, G, Nq, Nk, M, segments, run, blocks, lag, split, block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr, SPLIT: tl.constexpr,
    HAS_MASK: tl.constexpr, LEARNED: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk, dv and partial dW of one segment of keys, for one query head."""
    segment, head = tl.program_id(0) % segments, tl.program_id(0) // segments
    b, h = head // H, head % H
    q_ptr += b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += b.to(tl.int64) * k_strides[0] + (h // G).to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + (h // G).to(tl.int64) * v_strides[1]
    do_ptr += b.to(tl.int64) * do_strides[0] + h.to(tl.int64) * do_strides[1]
    dk_ptr += b.to(tl.int64) * dk_strides[0] + h.to(tl.int64) * dk_strides[1]
    dv_ptr += b.to(tl.int64) * dv_strides[0] + h.to(tl.int64) * dv_strides[1]
    lse_ptr += head.to(tl.int64) * Nq
    delta_ptr += head.to(tl.int64) * Nq
    block_r_ptr += head.to(tl.int64) * (entry_of(blocks, blocks, lag, CAUSAL) + 1) * M
    start = first_token(start_ptr, b, HAS_MASK & NEAR)
    w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
    gate = tl.load(gate_ptr + h)
    o, m = tl.arange(0, TILE), tl.arange(0, F)
    end = tl.minimum((segment + 1) * run, blocks)
    r_place = block_r_ptr + entry_of(end + lag, blocks, lag, CAUSAL) * M + m
    place = tl.program_id(0).to(tl.int64) * M
    adjoint, u, r = load_state(t_ptr, u_ptr, u_ptr, place, M, DIM, COLS, F)
    r = tl.load(r_place, mask=m < M, other=0.0)
    if LEARNED:
        dw = tl.zeros([F, COLS], tl.float32)

    for back in range(0, end - segment * run):
        j = end - 1 - back
        column = start + j * block
        inside = (o < block) & (column + o < Nk)
        real = is_real(mask_ptr, mask_strides, b, column + o, inside, HAS_MASK)
        # [TILE, COLS]
        k = load_tile(k_ptr, (k_strides[2], k_strides[3]), column, inside, TILE, COLS, DIM)
        v = load_tile(v_ptr, (v_strides[2], v_strides[3]), column, inside, TILE, COLS, DIM)
        dk = tl.zeros([TILE, COLS], tl.float32)
        dv = tl.zeros([TILE, COLS], tl.float32)
        if NEAR:
            dk, dv = window_key_gradient(
                k, v, real, j, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides,
                start, Nq, Nk, blocks, lag, split, block, scale, DIM, COLS, TILE, PRECISION,
            )
            real = real & (tl.minimum(Nk - column - lag * block, block) + 0 * o >= split)
        if RELOAD:
            w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
        keys = key_logits(k, w, scale, M, FEATURES, PRECISION)
        features = key_features(keys, r, real)
        # [F, TILE]
        dlogits = tl.dot(adjoint.to(v.dtype), tl.trans(v), input_precision=PRECISION) - u[:, None]
        dv = tl.dot(tl.trans(features.to(v.dtype)), adjoint.to(v.dtype), dv,
                    input_precision=PRECISION)
        if CAUSAL:
            before = tl.load(block_r_ptr + entry_of(j + lag, blocks, lag, CAUSAL) * M + m,
                             mask=m < M, other=0.0)
            decay = tl.exp2(before - r)
            q, do, lse, delta = load_query_block(
                j + lag, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides, do_strides, start, Nq, Nk,
                block, DIM, COLS, TILE,
            )
            queries = query_logits(q, w, gate, scale, M, FEATURES, NEAR, PRECISION)
            if SPLIT:
                queries = query_shares(queries, r, lse).to(do.dtype)  # [TILE, F]
                visible = split_pairs(o, split, NEAR) & real[None, :]
                # [TILE queries, TILE keys]
                pairs = tl.dot(queries, features.to(do.dtype), input_precision=PRECISION)
                pairs = tl.where(visible, pairs, 0.0).to(do.dtype)
                dpairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                dpairs = tl.where(visible, dpairs, 0.0).to(do.dtype)
                dv = tl.dot(tl.trans(pairs), do, dv, input_precision=PRECISION)
                dlogits = tl.dot(tl.trans(queries), dpairs, dlogits, input_precision=PRECISION)
                adjoint = tl.dot(tl.trans(queries), do, adjoint, input_precision=PRECISION)
                u += tl.sum(queries.to(tl.float32) * delta[:, None], 0)
                adjoint, u = adjoint * decay[:, None], u * decay
            else:
                queries = tl.trans(query_shares(queries, before, lse).to(do.dtype))  # [F, TILE]
                adjoint = tl.dot(queries, do, adjoint * decay[:, None], input_precision=PRECISION)
                u = u * decay + tl.sum(queries.to(tl.float32) * delta[None, :], 1)
            r = before
        dlogits *= features
        if FEATURES == "favor":
            dk -= k.to(tl.float32) * (tl.sum(dlogits, 0) * scale)[:, None]
        dlogits = through_norm(dlogits, keys, 0.0, FEATURES, 0)
        dlogits = (dlogits * tl.sqrt(scale)).to(k.dtype)
        dk = tl.dot(tl.trans(dlogits), w, dk, input_precision=PRECISION)
        if LEARNED:
            dw = tl.dot(dlogits, k, dw, input_precision=PRECISION)
        store_rows(dk_ptr, (dk_strides[2], dk_strides[3]), column, inside, dk, TILE, COLS, DIM)
        store_rows(dv_ptr, (dv_strides[2], dv_strides[3]), column, inside, dv, TILE, COLS, DIM)

    if LEARNED:
        store_rows(dw_ptr + place * DIM, (DIM, 1), segment * 0, m < M, dw, F, COLS, DIM)

"""FAVOR+ attention backward in Triton, without atomics: queries forward, keys in reverse.

With L the log-sum-exp of a row, pq = 2^{lq + r - L} and pk = 2^{lk - r} (so that pq pk is a share
of a probability), delta = rowsum(dO O):

    dlq = pq (dO S^T - delta z + D pk)      D = dO V^T - delta on the pairs within a block
    dlk = pk (V T^T - u + D^T pq)           T = sum_later pq dO,  u = sum_later pq delta
    dV  = pk T + (pq pk)^T dO               dq = dlq W,  dk = dlk W,  dW = dlq^T q' + dlk^T k'

and the softmax gradient of the pairs in the window. Four launches:

    favor_query_kernel    walks a segment as forward does: dq, delta, and dW, dgate of its queries
    favor_adjoint_kernel  sums T and u over the queries whose blocks meet a segment of keys last
    favor_suffix_kernel   (triton_scan.py) turns these into T and u behind each segment
    favor_key_kernel      walks a segment of keys backwards: dk, dv, and dW of its keys

T and u are relative to the reference r of the block of keys they meet next, which only falls on the
way back: T shrinks by 2^{r' - r} and never overflows. Letters as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import (
    first_token,
    is_real,
    load_lse,
    row_dot,
    score_gradient,
    score_gradient_transposed,
    store_rows,
)
from attnopt.kernels.favor.plan import make_plan
from attnopt.kernels.favor.triton_features import (
    advance_reference,
    entry_of,
    fold_state,
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
from attnopt.kernels.favor.triton_forward import (
    absorbed_keys,
    base2_gate,
    pick,
    shared_arguments,
    warps,
)
from attnopt.kernels.favor.triton_scan import ROWS, favor_suffix_kernel


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
    SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
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
    start = first_token(start_ptr, b, HAS_MASK & CAUSAL)
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
        new_r = r
        if CAUSAL:
            real, column = absorbed_keys(mask_ptr, mask_strides, b, start, t, Nk, lag, split,
                                         block, TILE, HAS_MASK)
            # [TILE, COLS]
            k = load_tile(k_ptr, (k_strides[2], k_strides[3]), column, real, TILE, COLS, DIM)
            v = load_tile(v_ptr, (v_strides[2], v_strides[3]), column, real, TILE, COLS, DIM)
            keys = key_logits(k, w, scale, M, FEATURES, PRECISION)  # [F, TILE]
            new_r = advance_reference(r, keys, real, STATIC)
            features = key_features(keys, new_r, real)
        decay = tl.exp2(r - new_r)
        if SPLIT:
            state, z, r = state * decay[:, None], z * decay, new_r
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
                state, z = fold_state(state, z, 1.0 + 0.0 * decay, features, v, PRECISION)
            else:
                state, z = fold_state(state, z, decay, features, v, PRECISION)
            r = new_r

    tl.store(dgate_ptr + tl.program_id(0), dgate)
    if LEARNED:
        m = tl.arange(0, F)
        store_rows(dw_ptr + place * DIM, (DIM, 1), segment * 0, m < M, dw, F, COLS, DIM)


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
    PRECISION: tl.constexpr,
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
    start = first_token(start_ptr, b, HAS_MASK & CAUSAL)
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
    HAS_MASK: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
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
    start = first_token(start_ptr, b, HAS_MASK & CAUSAL)
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
    # no program visits what lies before a row's first real token
    new = torch.empty_like if key_mask is None else torch.zeros_like
    dq, dk, dv = new(q), new(k), new(v)
    if H != Hkv:  # a program per query head: their sum comes after
        dk, dv = (new(x.new_empty(B, H, Nk, D, dtype=torch.float32)) for x in (k, v))
    delta = new(lse)
    parts = torch.empty(2 if projection_grad else 0, B, H, plan.segments, M, D, **fp32)
    dw_q, dw_k = parts if projection_grad else (lse, lse)  # never read
    dgate = torch.empty(B, H, plan.segments, **fp32)
    shared = shared_arguments(q, k, v, projection, key_mask, plan, feature_map, stabilizer, scale)
    shared |= {
        "gate_ptr": base2_gate(log_gate, M, feature_map), "do_ptr": grad, "lse_ptr": lse,
        "delta_ptr": delta, "block_r_ptr": block_r, "do_strides": grad.stride(),
        "dk_strides": dk.stride(), "dv_strides": dv.stride(), "CAUSAL": causal,
        "NEAR": window > 0, "SPLIT": causal and plan.split < plan.block,
        "LEARNED": projection_grad,
    }
    launch = {"num_warps": warps(plan), "num_stages": 1}
    grid = (plan.segments * B * H,)
    favor_query_kernel[grid](
        **pick(favor_query_kernel, shared), seg_kv_ptr=seg_kv, seg_z_ptr=seg_z, seg_r_ptr=seg_r,
        out_ptr=out, dq_ptr=dq, dw_ptr=dw_q, dgate_ptr=dgate,
        out_strides=out.stride(), dq_strides=dq.stride(), **launch,
    )
    own_t, own_u = torch.empty_like(seg_kv), torch.empty_like(seg_z)
    favor_adjoint_kernel[grid](**pick(favor_adjoint_kernel, shared), t_ptr=own_t, u_ptr=own_u,
                               **launch)
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
        dk_ptr=dk, dv_ptr=dv, dw_ptr=dw_k, **launch,
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

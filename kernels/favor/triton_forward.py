"""FAVOR+ attention forward in Triton: states of segments, their prefixes, outputs.

    o_i = (sum_near e^{s_ij} v_j + pq_i S) / (sum_near e^{s_ij} + pq_i.z)
    S = sum_far 2^{lk_j - r} v_j,  z = sum_far 2^{lk_j - r},  pq_i = 2^{lq_i + r}

Features are made from q, k and W where they are used and never stored. The sequence is cut into
blocks and runs of blocks, the segments (plan.py), one program each:

    favor_states_kernel     sums the keys that enter the state during a segment
    favor_prefix_kernel     (triton_scan.py) turns these into the state before each segment
    favor_output_kernel     walks a segment block by block: output, then the next block enters S

With a window, block t - lag enters the state after query block t; the blocks in between are
attended to exactly, in the online softmax whose running top the features share. Without one,
block t itself enters r before its queries, and a causal product of features stands for its pairs.
Saved for backward: log-sum-exp of each row, the state before each segment, r after each block.

Letters: B batch, H query heads, G query heads per key/value head, Nq queries, Nk keys, D head dim,
M features, C tokens of a block, S state `[M, D]`, z `[M]`. Limits: M <= 256, D <= 128 in practice.
"""

import math

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
    mask_arguments,
    online_softmax_update,
    store_rows,
)
from attnopt.kernels.favor.plan import Plan, make_plan
from attnopt.kernels.favor.triton_features import (
    EMPTY,
    advance_reference,
    base2_to_natural,
    entry_of,
    fold_state,
    key_features,
    key_logits,
    load_projection,
    load_state,
    load_tile,
    query_logits,
    split_pairs,
    static_reference,
    window_pairs,
)
from attnopt.kernels.favor.triton_scan import ROWS, favor_prefix_kernel


@triton.jit
def absorbed_keys(mask_ptr, mask_strides, b, start, t, Nk, lag, split, block,
                  TILE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which keys of block t - lag enter the state after query block t, and their first column.

    The last block enters only once no later token can see it exactly.
    """
    o = tl.arange(0, TILE)
    column = start + (t - lag) * block
    ended = tl.minimum(Nk - start - t * block, block)  # tokens of query block t
    inside = (o < block) & (column + o < Nk) & (t + 0 * o >= lag) & (ended + 0 * o >= split)
    return is_real(mask_ptr, mask_strides, b, column + o, inside, HAS_MASK), column


@triton.jit
def next_keys(
    r, k_ptr, v_ptr, w, mask_ptr, k_strides, v_strides, mask_strides, b, start, t, Nk, M,
    lag, split, block, scale, DIM: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, STATIC: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """The block that enters the state with query block t: which keys are real, features `[F, C]`
    and values `[C, COLS]`, the reference after it, and what scales the state to that."""
    real, column = absorbed_keys(mask_ptr, mask_strides, b, start, t, Nk, lag, split, block,
                                 TILE, HAS_MASK)
    # [TILE, COLS]
    k = load_tile(k_ptr, (k_strides[2], k_strides[3]), column, real, TILE, COLS, DIM)
    v = load_tile(v_ptr, (v_strides[2], v_strides[3]), column, real, TILE, COLS, DIM)
    keys = key_logits(k, w, scale, M, FEATURES, PRECISION)  # [F, TILE]
    new_r = advance_reference(r, keys, real, STATIC)
    return real, key_features(keys, new_r, real), v, new_r, tl.exp2(r - new_r)


@triton.jit
def favor_states_kernel(
    k_ptr, v_ptr, w_ptr, mask_ptr, start_ptr, kv_ptr, z_ptr, r_ptr,
    k_strides, v_strides, mask_strides,
    H, G, Nk, M, segments, run, blocks, lag, split, block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, STATIC: tl.constexpr, NEAR: tl.constexpr, HAS_MASK: tl.constexpr,
    RELOAD: tl.constexpr, PRECISION: tl.constexpr,
):
    """State of the keys that enter during one segment of one head."""
    segment, head = tl.program_id(0) % segments, tl.program_id(0) // segments
    b, h = head // H, head % H
    k_ptr += b.to(tl.int64) * k_strides[0] + (h // G).to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + (h // G).to(tl.int64) * v_strides[1]
    start = first_token(start_ptr, b, HAS_MASK & NEAR)
    w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
    state = tl.zeros([F, COLS], tl.float32)
    z = tl.zeros([F], tl.float32)
    r = tl.full([F], EMPTY, tl.float32)
    if STATIC:
        r = static_reference(w, scale, FEATURES)
    for t in range(segment * run, tl.minimum((segment + 1) * run, blocks)):
        t = segment * 0 + t  # a tensor in the interpreter too
        if RELOAD:
            w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
        _, features, v, r, decay = next_keys(
            r, k_ptr, v_ptr, w, mask_ptr, k_strides, v_strides, mask_strides, b, start, t, Nk, M,
            lag, split, block, scale, DIM, COLS, TILE, FEATURES, STATIC, HAS_MASK, PRECISION,
        )
        state, z = fold_state(state, z, decay, features, v, PRECISION)
    m = tl.arange(0, F)
    place = tl.program_id(0).to(tl.int64) * M
    store_rows(kv_ptr + place * DIM, (DIM, 1), segment * 0, m < M, state, F, COLS, DIM)
    tl.store(z_ptr + place + m, z, mask=m < M)
    tl.store(r_ptr + place + m, r, mask=m < M)


@triton.jit
def attend_window(
    acc, top, total, q, k_ptr, v_ptr, mask_ptr, k_strides, v_strides, mask_strides,
    b, start, t, Nk, lag, split, block, scale, DIM: tl.constexpr, COLS: tl.constexpr,
    TILE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Fold the exact keys of query block t, in blocks t - lag .. t, into an online softmax."""
    o = tl.arange(0, TILE)
    for x in range(tl.maximum(t - lag, 0), t + 1):
        x = t * 0 + x
        column = start + x * block
        inside = (o < block) & (column + o < Nk)
        real = is_real(mask_ptr, mask_strides, b, column + o, inside, HAS_MASK)
        # [TILE, COLS]
        k = load_tile(k_ptr, (k_strides[2], k_strides[3]), column, real, TILE, COLS, DIM)
        v = load_tile(v_ptr, (v_strides[2], v_strides[3]), column, real, TILE, COLS, DIM)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        visible = window_pairs(t, x, o, lag, split, block) & real[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        acc, top, total = online_softmax_update(acc, top, total, scores, v, PRECISION)
    return acc, top, total


@triton.jit
def favor_output_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, gate_ptr, mask_ptr, start_ptr, seg_kv_ptr, seg_z_ptr, seg_r_ptr,
    out_ptr, lse_ptr, block_r_ptr, kv_ptr, z_ptr, log_scale_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides,
    H, G, Nq, Nk, M, segments, run, blocks, lag, split, block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, STATIC: tl.constexpr, CAUSAL: tl.constexpr, NEAR: tl.constexpr,
    SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, RELOAD: tl.constexpr, PRECISION: tl.constexpr,
):
    """Outputs of one segment of one head, from the state before it; the last writes the final one.

    SPLIT: some rows of query block t see block t - lag through features (all of them without a
    window, where lag is 0), so that it enters the reference, but not yet the state, before t.
    RELOAD: W comes from the cache for every block, for it does not fit beside the rest.
    """
    segment, head = tl.program_id(0) % segments, tl.program_id(0) // segments
    b, h = head // H, head % H
    q_ptr += b.to(tl.int64) * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += b.to(tl.int64) * k_strides[0] + (h // G).to(tl.int64) * k_strides[1]
    v_ptr += b.to(tl.int64) * v_strides[0] + (h // G).to(tl.int64) * v_strides[1]
    out_ptr += b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1]
    lse_ptr += head.to(tl.int64) * Nq
    entries = entry_of(blocks, blocks, lag, CAUSAL) + 1
    block_r_ptr += head.to(tl.int64) * entries * M
    start = first_token(start_ptr, b, HAS_MASK & NEAR)
    w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
    gate = tl.load(gate_ptr + h)
    place = tl.program_id(0).to(tl.int64) * M
    state, z, r = load_state(seg_kv_ptr, seg_z_ptr, seg_r_ptr, place, M, DIM, COLS, F)
    o = tl.arange(0, TILE)
    m = tl.arange(0, F)
    if segment == 0:
        tl.store(block_r_ptr + m, r, mask=m < M)

    for t in range(segment * run, tl.minimum((segment + 1) * run, blocks)):
        t = segment * 0 + t  # a tensor in the interpreter too
        row0 = start + t * block - (Nk - Nq)
        valid = (o < block) & (row0 + o < Nq) & (row0 + o >= 0)
        # [TILE, COLS]
        q = load_tile(q_ptr, (q_strides[2], q_strides[3]), row0, valid, TILE, COLS, DIM)
        acc = tl.zeros([TILE, COLS], tl.float32)
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        if NEAR:
            acc, top, total = attend_window(
                acc, top, total, q, k_ptr, v_ptr, mask_ptr, k_strides, v_strides, mask_strides,
                b, start, t, Nk, lag, split, block, scale, DIM, COLS, TILE, HAS_MASK, PRECISION,
            )
        if RELOAD:
            w = load_projection(w_ptr + h * M * DIM, M, DIM, COLS, F)
        if SPLIT:
            _, features, v, r, decay = next_keys(
                r, k_ptr, v_ptr, w, mask_ptr, k_strides, v_strides, mask_strides, b, start, t, Nk,
                M, lag, split, block, scale, DIM, COLS, TILE, FEATURES, STATIC, HAS_MASK, PRECISION,
            )
            state, z = state * decay[:, None], z * decay
        logits = query_logits(q, w, gate, scale, M, FEATURES, NEAR, PRECISION) + r[None, :]
        if NEAR:  # features that no key has had must not set the row's scale
            known = (z > 0)[None, :] & (o >= 0)[:, None]
            if SPLIT:
                known = known | ((tl.sum(features, 1) > 0)[None, :] & (o >= split)[:, None])
            logits = tl.where(known, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        queries = tl.exp2(logits - pivot[:, None]).to(w.dtype)  # [TILE, F]
        rest = tl.exp2(top - pivot)
        acc = tl.dot(queries, state.to(w.dtype), acc * rest[:, None], input_precision=PRECISION)
        total = total * rest + tl.sum(queries.to(tl.float32) * z[None, :], 1)
        if SPLIT:
            # [TILE queries, TILE keys]
            pairs = tl.dot(queries, features.to(w.dtype), input_precision=PRECISION)
            pairs = tl.where(split_pairs(o, split, NEAR), pairs, 0.0).to(w.dtype)
            acc = tl.dot(pairs, v, acc, input_precision=PRECISION)
            total += tl.sum(pairs.to(tl.float32), 1)
        seen = total > 0
        total = tl.where(seen, total, 1.0)
        store_rows(out_ptr, (out_strides[2], out_strides[3]), row0, valid, acc / total[:, None],
                   TILE, COLS, DIM)
        lse = tl.where(seen, (new_top + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse_ptr + row0 + o, lse, mask=valid)
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
            entry = block_r_ptr + entry_of(t + 1, blocks, lag, CAUSAL) * M
            tl.store(entry + m, r, mask=(m < M) & (t + 0 * m >= lag))

    if segment == segments - 1:
        log_scale, factor = base2_to_natural(r)
        final = head.to(tl.int64) * M
        store_rows(kv_ptr + final * DIM, (DIM, 1), segment * 0, m < M, state * factor[:, None],
                   F, COLS, DIM)
        tl.store(z_ptr + final + m, z * factor, mask=m < M)
        tl.store(log_scale_ptr + final + m, log_scale, mask=m < M)


def warps(plan: Plan, tiles: int = 1) -> dict[str, int]:
    """Warps of a program that keeps a state, and `tiles` - 1 more like it, in registers."""
    few = tiles * plan.features * plan.cols <= 64 * 64
    return {"num_warps": 4 if few else 8, "num_stages": 1}


def base2_gate(log_gate: Tensor, num_features: int, feature_map: str) -> Tensor:
    """`log2 c_h` `[H]` fp32: the gate, and for favor the mean over features."""
    mean = num_features if feature_map == "favor" else 1
    gate = log_gate.to(torch.float32) * LOG2E.value
    return (gate - math.log2(mean)).contiguous()


def shared_arguments(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, key_mask: Tensor | None,
                     plan: Plan, feature_map: str, window: int, causal: bool, stabilizer: str,
                     scale: float) -> dict[str, object]:
    """What most kernels take, by name; each launch picks its own."""
    mask, start, mask_strides = mask_arguments(key_mask, k)
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "w_ptr": projection.to(q.dtype).contiguous(),
        "mask_ptr": mask, "start_ptr": start, "mask_strides": mask_strides,
        "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
        "H": q.shape[1], "G": q.shape[1] // k.shape[1], "Nq": q.shape[2], "Nk": k.shape[2],
        "M": projection.shape[1], "segments": plan.segments, "run": plan.run,
        "blocks": plan.blocks, "lag": plan.lag, "split": plan.split, "block": plan.block,
        "scale": scale, "DIM": q.shape[3], "COLS": plan.cols, "F": plan.features,
        "TILE": plan.tile, "FEATURES": feature_map, "STATIC": stabilizer == "static",
        "CAUSAL": causal, "NEAR": window > 0, "SPLIT": causal and plan.split < plan.block,
        "HAS_MASK": key_mask is not None, "RELOAD": plan.reload,
        "PRECISION": input_precision(q.dtype),
    }


def pick(kernel: object, arguments: dict[str, object]) -> dict[str, object]:
    """The arguments that a kernel names."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def favor_forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor, *,
    feature_map: str, window: int, window_block: int, causal: bool, stabilizer: str, scale: float,
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp `[B, H, Nq]`, final state, and what backward needs (see `plan.py`)."""
    B, H, Nq, D = q.shape
    M = projection.shape[1]
    plan = make_plan(q, k, M, window=window, window_block=window_block, causal=causal)
    shared = shared_arguments(q, k, v, projection, key_mask, plan, feature_map, window, causal,
                              stabilizer, scale)
    fp32 = {"dtype": torch.float32, "device": q.device}
    launch = warps(plan)
    seg_kv = torch.empty(B, H, plan.segments, M, D, **fp32)
    seg_z = torch.empty(B, H, plan.segments, M, **fp32)
    seg_r = torch.empty_like(seg_z)
    own_kv, own_z, own_r = kv, z, log_scale  # never read
    if plan.segments > 1 or not causal:
        own_kv, own_z, own_r = map(torch.empty_like, (seg_kv, seg_z, seg_r))
        favor_states_kernel[(plan.segments * B * H,)](
            **pick(favor_states_kernel, shared), kv_ptr=own_kv, z_ptr=own_z, r_ptr=own_r, **launch,
        )
    favor_prefix_kernel[(triton.cdiv(M, ROWS) * B * H,)](
        **pick(favor_prefix_kernel, shared),
        kv0_ptr=kv.contiguous(), z0_ptr=z.contiguous(), log_scale0_ptr=log_scale.contiguous(),
        kv_ptr=own_kv, z_ptr=own_z, r_ptr=own_r,
        seg_kv_ptr=seg_kv, seg_z_ptr=seg_z, seg_r_ptr=seg_r,
        ROWS=ROWS, num_warps=4,
    )
    out, lse = torch.empty_like(q), torch.empty(B, H, Nq, **fp32)
    if window and key_mask is not None:  # nobody visits what lies before the first real token
        out.zero_()
        lse.fill_(float("-inf"))
    block_r = torch.empty(B, H, plan.absorbed + 1 if causal else 1, M, **fp32)
    kv1, z1 = torch.empty(B, H, M, D, **fp32), torch.empty(B, H, M, **fp32)
    log_scale1 = torch.empty_like(z1)
    favor_output_kernel[(plan.segments * B * H,)](
        **pick(favor_output_kernel, shared),
        gate_ptr=base2_gate(log_gate, M, feature_map),
        seg_kv_ptr=seg_kv, seg_z_ptr=seg_z, seg_r_ptr=seg_r, out_ptr=out, lse_ptr=lse,
        block_r_ptr=block_r, kv_ptr=kv1, z_ptr=z1, log_scale_ptr=log_scale1,
        out_strides=out.stride(), **launch,
    )
    return out, lse, kv1, z1, log_scale1, seg_kv, seg_z, seg_r, block_r

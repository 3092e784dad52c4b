"""Sums over segments: from the state of each to the state before it, and back for gradients.

One program per head and tile of features; each is a short loop over segments. Letters as in
triton_forward.py.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import load_rows, store_rows
from attnopt.kernels.favor.triton_features import (
    base2_to_natural,
    entry_of,
    load_projection,
    natural_to_base2,
    static_reference,
)

ROWS = 16  # features of a program


@triton.jit
def favor_prefix_kernel(
    w_ptr, kv0_ptr, z0_ptr, log_scale0_ptr, kv_ptr, z_ptr, r_ptr, seg_kv_ptr, seg_z_ptr, seg_r_ptr,
    H, M, segments, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    STATIC: tl.constexpr, CAUSAL: tl.constexpr,
):
    """The state before each segment, the initial one included; without CAUSAL all of them.

    In: initial `kv0, z0, log_scale0` per head, and `kv, z, r` of each segment. Out: `seg_*`.
    """
    tiles = tl.cdiv(M, ROWS)
    head, m0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    m = m0 + tl.arange(0, ROWS)
    real = m < M
    place = head.to(tl.int64) * M
    log_scale = tl.load(log_scale0_ptr + place + m, mask=real, other=0.0)
    r, factor = natural_to_base2(log_scale)
    state = load_rows(kv0_ptr + place * DIM, (DIM, 1), m0, real, ROWS, COLS, DIM) * factor[:, None]
    z = tl.load(z0_ptr + place + m, mask=real, other=0.0) * factor
    if STATIC:
        w = load_projection(w_ptr + ((head % H) * M + m0) * DIM, M - m0, DIM, COLS, ROWS)
        fixed = tl.maximum(r, static_reference(w, scale, FEATURES))
        state, z, r = state * tl.exp2(r - fixed)[:, None], z * tl.exp2(r - fixed), fixed
    for segment in range(0, segments):
        place = (head.to(tl.int64) * segments + segment) * M
        if CAUSAL:
            store_rows(seg_kv_ptr + place * DIM, (DIM, 1), m0, real, state, ROWS, COLS, DIM)
            tl.store(seg_z_ptr + place + m, z, mask=real)
            tl.store(seg_r_ptr + place + m, r, mask=real)
        if (segment < segments - 1) | (not CAUSAL):
            own_r = tl.load(r_ptr + place + m, mask=real, other=0.0)
            own_z = tl.load(z_ptr + place + m, mask=real, other=0.0)
            own = load_rows(kv_ptr + place * DIM, (DIM, 1), m0, real, ROWS, COLS, DIM)
            new_r = tl.maximum(r, own_r)
            before, here = tl.exp2(r - new_r), tl.exp2(own_r - new_r)
            state = state * before[:, None] + own * here[:, None]
            z, r = z * before + own_z * here, new_r
    if not CAUSAL:
        for segment in range(0, segments):
            place = (head.to(tl.int64) * segments + segment) * M
            store_rows(seg_kv_ptr + place * DIM, (DIM, 1), m0, real, state, ROWS, COLS, DIM)
            tl.store(seg_z_ptr + place + m, z, mask=real)
            tl.store(seg_r_ptr + place + m, r, mask=real)


@triton.jit
def favor_suffix_kernel(
    grad_kv_ptr, grad_z_ptr, log_scale0_ptr, block_r_ptr, own_t_ptr, own_u_ptr,
    t_ptr, u_ptr, dkv_ptr, dz_ptr,
    M, segments, run, blocks, lag,
    DIM: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
):
    """T and u behind each segment, from those of the queries lag after it; and dkv, dz.

    Behind the last one stand the gradients of the final state; before the first, T and u are
    those of the initial one. Without CAUSAL every segment gets the sum of all.
    """
    tiles = tl.cdiv(M, ROWS)
    head, m0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    m = m0 + tl.arange(0, ROWS)
    real = m < M
    place = head.to(tl.int64) * M
    block_r_ptr += head.to(tl.int64) * (entry_of(blocks, blocks, lag, CAUSAL) + 1) * M + m
    last = entry_of(head * 0 + blocks, blocks, lag, CAUSAL)
    r = tl.load(block_r_ptr + last * M, mask=real, other=0.0)
    _, factor = base2_to_natural(r)
    grad = load_rows(grad_kv_ptr + place * DIM, (DIM, 1), m0, real, ROWS, COLS, DIM)
    adjoint = grad * factor[:, None]
    u = -tl.load(grad_z_ptr + place + m, mask=real, other=0.0) * factor
    for back in range(0, segments):
        segment = head * 0 + segments - 1 - back
        at = (head.to(tl.int64) * segments + segment) * M
        if CAUSAL:
            store_rows(t_ptr + at * DIM, (DIM, 1), m0, real, adjoint, ROWS, COLS, DIM)
            tl.store(u_ptr + at + m, u, mask=real)
        before = tl.load(block_r_ptr + entry_of(segment * run + lag, blocks, lag, CAUSAL) * M,
                         mask=real, other=0.0)
        decay = tl.exp2(before - r)
        own = load_rows(own_t_ptr + at * DIM, (DIM, 1), m0, real, ROWS, COLS, DIM)
        adjoint = adjoint * decay[:, None] + own
        u = u * decay + tl.load(own_u_ptr + at + m, mask=real, other=0.0)
        r = before
    if not CAUSAL:
        for segment in range(0, segments):
            at = (head.to(tl.int64) * segments + segment) * M
            store_rows(t_ptr + at * DIM, (DIM, 1), m0, real, adjoint, ROWS, COLS, DIM)
            tl.store(u_ptr + at + m, u, mask=real)
    log_scale0 = tl.load(log_scale0_ptr + place + m, mask=real, other=0.0)
    r0, factor0 = natural_to_base2(log_scale0)
    factor0 *= tl.exp2(r0 - r)
    store_rows(dkv_ptr + place * DIM, (DIM, 1), m0, real, adjoint * factor0[:, None],
               ROWS, COLS, DIM)
    tl.store(dz_ptr + place + m, -u * factor0, mask=real)

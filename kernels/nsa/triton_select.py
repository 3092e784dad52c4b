"""Choice of the blocks that a query attends to token by token, in Triton; it has no gradient.

    importance[r, j] = scale q_r.k_cmp[j]                     one head per group and l = d = b
    importance[r, j] = sum_h sum_c w[c, j] P[r, h, c]         else, over the G heads of a group
    w[c, j] = |[c d, c d + l) and [j b, (j + 1) b)| / d,    P the softmax over visible blocks c

Candidates are the blocks before the query's near tokens that hold a real token. The first `sinks`
come first, then the most important ones, ties to the lower index, `count` in all.

`select_lse_kernel` computes the softmax's denominator where importance is a probability.
`select_kernel` walks the candidates of BLOCK_Q queries, 2^LOG_J at a time, and keeps the best in
registers: nothing of size Nq x Nk / b is stored. A candidate is one 64-bit key, the bits of
its importance in an order that integers keep, above its index counted down, so keys never tie. The
running list descends and a new chunk ascends: the larger of the two, lane by lane, are the best of
both and form a bitonic sequence, which log2 passes sort. Chunks without a better key skip that.

Letters: B batch, H query heads, G query heads per key/value head, Nq queries, P compressed blocks,
D head dim; l, d, b = `block`, `stride`, `select_block`; r query, c compressed block, j candidate.
Limits: D up to 256, `count` up to 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import LOG2E, input_precision, load_rows
from attnopt.kernels.nsa.geometry import overlap_count
from attnopt.kernels.nsa.triton_compressed import load_bias, seen_blocks

EMPTY = tl.constexpr(-(2**63) + 1)  # a key below those of all candidates
LAST = tl.constexpr(2**31 - 1)  # above all indices; j ^ LAST counts them down


@triton.jit
def bitonic_pass(x, step: tl.constexpr, size: tl.constexpr, ROWS: tl.constexpr,
                 LANES: tl.constexpr):
    """Order lanes `step` apart: descending in every even run of `size` lanes, else ascending."""
    pairs = tl.reshape(x, [ROWS, LANES // (2 * step), 2, step])
    other = tl.sum(pairs, 2, keep_dims=True) - pairs  # integers wrap around: this is exact
    run = tl.arange(0, LANES // (2 * step))[None, :, None, None] * (2 * step) // size
    right = tl.arange(0, 2)[None, None, :, None]
    larger = (run & 1) == right
    ordered = tl.where(larger, tl.maximum(pairs, other), tl.minimum(pairs, other))
    return tl.reshape(ordered, [ROWS, LANES])


@triton.jit
def bitonic_merge(x, LOG_SIZE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Sort bitonic runs of `2^LOG_SIZE` lanes: the first of each two descends, the second not."""
    for i in tl.static_range(LOG_SIZE):
        x = bitonic_pass(x, 1 << (LOG_SIZE - 1 - i), 1 << LOG_SIZE, ROWS, LANES)
    return x


@triton.jit
def sort_descending(x, ROWS: tl.constexpr, LOG_LANES: tl.constexpr):
    """Sort each row of integers `[ROWS, 2^LOG_LANES]`, the largest first."""
    for i in tl.static_range(LOG_LANES):
        x = bitonic_merge(x, i + 1, ROWS, 1 << LOG_LANES)
    return x


@triton.jit
def rank_keys(importance, j):
    """Keys that order candidates `j` by importance, then by the lower index; int64, distinct."""
    importance = tl.where(importance == 0, 0.0, importance)  # -0.0 is 0.0
    bits = importance.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats descend as integers
    return (bits.to(tl.int64) << 32) | (j ^ LAST).to(tl.int64)[None, :]


@triton.jit
def keep_best(best, keys, ROWS: tl.constexpr, LOG_LANES: tl.constexpr):
    """The largest of the descending `best` and of any `keys`, `[ROWS, 2^LOG_LANES]`, descending."""
    keys = ~sort_descending(~keys, ROWS, LOG_LANES)  # ascending
    return bitonic_merge(tl.maximum(best, keys), LOG_LANES, ROWS, 1 << LOG_LANES)


@triton.jit
def block_shares(
    q, lse, seen, j, k_ptr, bias_ptr, k_strides, bias_strides,
    P, block, stride, select_block, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):
    """One head's probabilities of selection blocks `j`: those of compressed blocks, shared out."""
    lift = tl.cdiv(block, stride)  # division rounds towards zero: keep it away from negatives
    first = (j * select_block - block + lift * stride) // stride - lift + 1
    shares = tl.zeros([q.shape[0], j.shape[0]], tl.float32)
    for n in range(0, OVERLAPS):
        c = first + n
        bias = load_bias(bias_ptr, bias_strides, c, P)
        real = bias > float("-inf")
        pointers = k_ptr + (c.to(tl.int64) * k_strides[2])[:, None]
        pointers += tl.arange(0, COLS)[None, :] * k_strides[3]
        mask = real[:, None]
        if DIM != COLS:
            mask = mask & (tl.arange(0, COLS) < DIM)[None, :]
        # [BLOCK_J, COLS]
        k = tl.load(pointers, mask=mask, other=0.0)
        left = tl.maximum(c * stride, j * select_block)
        right = tl.minimum(c * stride + block, (j + 1) * select_block)
        weight = tl.maximum(right - left, 0).to(tl.float32) / stride
        # [BLOCK_Q, BLOCK_J]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        visible = real[None, :] & (c[None, :] < seen[:, None])
        shares += tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0) * weight[None, :]
    return shares


@triton.jit
def select_lse_kernel(
    q_ptr, k_ptr, bias_ptr, start_ptr, lse_ptr,
    q_strides, k_strides, bias_strides,
    H, G, Nq, P, offset, block, stride, delay, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp over visible compressed blocks, +inf for none, of BLOCK_Q queries."""
    tiles = tl.cdiv(Nq, BLOCK_Q)  # a flat grid: its other axes end at 65,535
    row0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q  # the longest loops first
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h // G * k_strides[1]
    bias_ptr += b * bias_strides[0]
    rows = row0 + tl.arange(0, BLOCK_Q)
    first = offset - tl.load(start_ptr + b)  # position of query 0
    seen = seen_blocks(rows + first, P, block, stride, delay)
    end = seen_blocks(tl.minimum(row0 + BLOCK_Q, Nq) - 1 + first, P, block, stride, delay)
    # [BLOCK_Q, COLS]
    q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, rows < Nq, BLOCK_Q, COLS, DIM)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for c0 in range(0, end, BLOCK_C):
        c0 = row0 * 0 + c0  # a tensor in the interpreter too
        c = c0 + tl.arange(0, BLOCK_C)
        real = load_bias(bias_ptr, bias_strides, c, end) > float("-inf")
        # [BLOCK_C, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), c0, real, BLOCK_C, COLS, DIM)
        # [BLOCK_Q, BLOCK_C]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(real[None, :] & (c[None, :] < seen[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - pivot) + tl.sum(tl.exp2(scores - pivot[:, None]), 1)
        top = new_top
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + head.to(tl.int64) * Nq + rows, lse, mask=rows < Nq)


@triton.jit
def select_kernel(
    q_ptr, k_ptr, bias_ptr, real_ptr, start_ptr, lse_ptr, chosen_ptr,
    q_strides, k_strides, bias_strides, real_strides,
    H, G, Nq, P, offset, count, sinks, block, stride, select_block, near_shift, delay, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, LOG_J: tl.constexpr,
    OVERLAPS: tl.constexpr, ONE_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):
    """Chosen blocks of BLOCK_Q queries of one key/value head; OVERLAPS is 0 for raw scores."""
    BLOCK_J: tl.constexpr = 1 << LOG_J
    tiles = tl.cdiv(Nq, BLOCK_Q)
    row0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    head = tl.program_id(0) // tiles
    b, hkv = (head // (H // G)).to(tl.int64), (head % (H // G)).to(tl.int64)
    q_ptr += b * q_strides[0] + hkv * G * q_strides[1]
    k_ptr += b * k_strides[0] + hkv * k_strides[1]
    bias_ptr += b * bias_strides[0]
    real_ptr += b * real_strides[0]
    lse_ptr += head.to(tl.int64) * G * Nq
    rows = row0 + tl.arange(0, BLOCK_Q)
    lane = tl.arange(0, BLOCK_J)
    first = offset - tl.load(start_ptr + b)
    seen = seen_blocks(rows + first, P, block, stride, delay)
    near = tl.maximum(rows + first + near_shift, 0) // select_block
    near = tl.where(rows < Nq, near, 0)
    last = tl.minimum(row0 + BLOCK_Q, Nq) - 1 + first
    end = tl.maximum(last + near_shift, 0) // select_block
    best = tl.full([BLOCK_Q, BLOCK_J], EMPTY, tl.int64)
    least = tl.full([BLOCK_Q], EMPTY, tl.int64)  # the worst key that is still chosen
    if ONE_HEAD:
        # [BLOCK_Q, COLS]
        q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, rows < Nq, BLOCK_Q, COLS, DIM)
        if OVERLAPS > 0:
            lse = tl.load(lse_ptr + rows, mask=rows < Nq, other=float("inf"))

    for j0 in range(0, end, BLOCK_J):
        j0 = row0 * 0 + j0
        j = j0 + lane
        real = tl.load(real_ptr + j * real_strides[1], mask=j < end, other=0) != 0
        if OVERLAPS == 0:
            real = real & (load_bias(bias_ptr, bias_strides, j, P) > float("-inf"))
            # [BLOCK_J, COLS]
            k = load_rows(k_ptr, (k_strides[2], k_strides[3]), j0, real, BLOCK_J, COLS, DIM)
            # [BLOCK_Q, BLOCK_J]
            importance = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            candidate = real[None, :] & (j[None, :] < tl.minimum(near, seen)[:, None])
        else:
            candidate = real[None, :] & (j[None, :] < near[:, None])
            importance = tl.zeros([BLOCK_Q, BLOCK_J], tl.float32)
            for g in range(0, G):
                if not ONE_HEAD:
                    g = hkv * 0 + g
                    q = load_rows(q_ptr + g * q_strides[1], (q_strides[2], q_strides[3]), row0,
                                  rows < Nq, BLOCK_Q, COLS, DIM)
                    lse = tl.load(lse_ptr + g * Nq + rows, mask=rows < Nq, other=float("inf"))
                importance += block_shares(
                    q, lse, seen, j, k_ptr, bias_ptr, k_strides, bias_strides,
                    P, block, stride, select_block, scale, DIM, COLS, OVERLAPS, PRECISION,
                )
        importance = tl.where((j < sinks)[None, :], float("inf"), importance)
        keys = tl.where(candidate, rank_keys(importance, j), EMPTY)
        if tl.max((tl.max(keys, 1) > least).to(tl.int32), 0) > 0:
            best = keep_best(best, keys, BLOCK_Q, LOG_J)
            least = tl.max(tl.where(lane[None, :] >= count - 1, best, EMPTY), 1)

    chosen = (best & LAST).to(tl.int32) ^ LAST
    chosen = tl.where((best > EMPTY) & (lane[None, :] < count), chosen, LAST)
    chosen = ~sort_descending(~chosen, BLOCK_Q, LOG_J)  # ascending, LAST where none is left
    chosen = tl.where(chosen == LAST, -1, chosen)
    pointers = chosen_ptr + ((head.to(tl.int64) * Nq + rows) * count)[:, None] + lane[None, :]
    tl.store(pointers, chosen, mask=(rows < Nq)[:, None] & (lane < count)[None, :])


def select_tile(dtype: torch.dtype, cols: int, lanes: int) -> dict[str, int]:
    """Tile sizes for running lists of so many lanes, whose sorting takes the most registers.

    16-bit ones compile without spills on sm_80 and sm_90 up to 128 columns.
    """
    if dtype == torch.float32:
        rows = 32 if cols <= 64 else 16
        return {"BLOCK_Q": min(rows, max(16, 512 // lanes)), "num_warps": 4, "num_stages": 1}
    rows = 64 if cols <= 64 else 32
    return {"BLOCK_Q": min(rows, max(16, 1024 // lanes)), "num_warps": 4, "num_stages": 2}


def select(
    q: Tensor, k_cmp: Tensor, bias: Tensor, real: Tensor, start: Tensor, *,
    offset: int, count: int, sinks: int, block: int, stride: int, select_block: int,
    near_window: int, delay: int, scale: float, lse: Tensor | None = None,
) -> Tensor:
    """Blocks that each query attends to token by token, `[B, Hkv, Nq, count]` int32, ascending.

    Args:
        q: `[B, H, Nq, D]`.
        k_cmp: `[B, Hkv, P, D]`.
        bias: `[B, P]` fp32; -inf hides a compressed block, other values do not matter.
        real: `[B, nb]` bool, the selection blocks that hold a real token.
        start: `[B]` int32, column of each row's first real token.
        offset: column of the first query, Nk - Nq.
        count: blocks to choose; -1 fills up where there are fewer candidates.
        sinks: blocks chosen before all others.
        block: tokens of a compressed block, l.
        stride: tokens from one compressed block's start to the next one's, d.
        select_block: tokens of a selection block, b.
        near_window: tokens that are never chosen because the query sees them anyway, at least.
        delay: tokens between a compressed block's last token and the first query that sees it.
        scale: factor of q.k_cmp.
        lse: log-sum-exp over the visible compressed blocks, `[B, H, Nq]`, where it is known.
    """
    B, H, Nq, D = q.shape
    Hkv, P = k_cmp.shape[1:3]
    chosen = torch.empty(B, Hkv, Nq, count, dtype=torch.int32, device=q.device)
    if count == 0:
        return chosen
    cols = max(16, triton.next_power_of_2(D))
    log_lanes = max(4, (count - 1).bit_length())  # a matrix product wants 16 columns
    tile = select_tile(q.dtype, cols, 1 << log_lanes)
    raw = H == Hkv and block == stride == select_block
    shared = dict(
        q_ptr=q, k_ptr=k_cmp, bias_ptr=bias, start_ptr=start,
        q_strides=q.stride(), k_strides=k_cmp.stride(), bias_strides=bias.stride(),
        H=H, G=H // Hkv, Nq=Nq, P=P,
        offset=offset, block=block, stride=stride, delay=delay, scale=scale,
        DIM=D, COLS=cols, PRECISION=input_precision(q.dtype), **tile,
    )
    if raw:
        lse = bias  # never read
    elif lse is not None:
        lse = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E.value).contiguous()
    else:
        lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
        select_lse_kernel[(triton.cdiv(Nq, tile["BLOCK_Q"]) * B * H,)](
            lse_ptr=lse, BLOCK_C=32, **shared
        )
    select_kernel[(triton.cdiv(Nq, tile["BLOCK_Q"]) * B * Hkv,)](
        real_ptr=real.view(torch.uint8), lse_ptr=lse, chosen_ptr=chosen,
        real_strides=real.stride(),
        count=count, sinks=sinks, select_block=select_block,
        near_shift=1 - near_window if near_window else select_block,
        LOG_J=log_lanes, ONE_HEAD=H == Hkv,
        OVERLAPS=0 if raw else overlap_count(block, stride, select_block), **shared,
    )
    return chosen

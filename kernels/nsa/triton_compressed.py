"""Attention to compressed blocks in Triton, forward and backward.

    o_r = sum_c e^{s_rc} v_cmp[c] / sum_c e^{s_rc},    s_rc = scale q_r.k_cmp[c] + bias[c]

over the blocks c that query r sees: those whose last token, c d + l - 1, lies at least `delay`
tokens before the query's position p = r + offset - start, that bias does not hide (-inf), and that
are not among the query's `chosen` blocks.

Forward: a program folds the blocks, BLOCK_C at a time, into an online softmax of BLOCK_Q queries
of one head, and stops at the last block that one of them sees. Saved: the log-sum-exp of each row.
Backward: dq walks the same chunks; dk_cmp and dv_cmp have one program per chunk and key/value head,
which walks the queries that see the chunk, of all G heads. No atomics.

    P = e^{s - lse},  dS = P (dO.v_cmp - delta),  delta = rowsum(dO O) - d lse
    dq = scale dS k_cmp,  dk_cmp = scale dS^T q,  dv_cmp = P^T dO

The S `chosen` blocks of a query stay in registers. Those of a chunk become one 32-bit word per
row: bit c - c0 is set where c is chosen, hence BLOCK_C <= 32.

Letters: B batch, H query heads, G query heads per key/value head, Nq queries, P compressed blocks,
D head dim, S chosen blocks; l and d a block's length and stride, `block` and `stride` below.
Limits: D up to 256, S up to 64; fp32 in three TF32 passes is register-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.common import (
    LN2,
    LOG2E,
    input_precision,
    load_lse,
    load_rows,
    online_softmax_update,
    score_gradient,
    score_gradient_transposed,
    store_rows,
)

WORD = 32  # bits: most compressed blocks per chunk


@triton.jit
def seen_blocks(position, P, block, stride, delay):
    """Number of compressed blocks that end `delay` tokens before a `position`, all its first."""
    reach = position - (block - 1) - delay
    return tl.where(reach < 0, 0, tl.minimum(reach // stride + 1, P))


@triton.jit
def load_bias(bias_ptr, bias_strides, c, P):
    """Base-2 bias of blocks `c`; -inf where a block is hidden or does not exist."""
    exists = (c >= 0) & (c < P)
    return tl.load(bias_ptr + c * bias_strides[1], mask=exists, other=float("-inf")) * LOG2E


@triton.jit
def load_chosen(chosen_ptr, chosen_strides, rows, valid, S, SLOTS: tl.constexpr):
    """Chosen blocks of some rows, `[ROWS, SLOTS]`; -1 where there is none."""
    s = tl.arange(0, SLOTS)[None, :]
    pointers = chosen_ptr + (rows.to(tl.int64) * chosen_strides[2])[:, None] + s * chosen_strides[3]
    return tl.load(pointers, mask=valid[:, None] & (s < S), other=-1)


@triton.jit
def chosen_word(chosen, c0):
    """One word per row: bit c - c0 is set where block c of a chunk is among `chosen`."""
    bit = chosen - c0
    inside = (bit >= 0) & (bit < 32)
    return tl.sum(tl.where(inside, 1 << (bit & 31), 0), 1)  # distinct bits: their sum is their or


@triton.jit
def compressed_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, chosen_ptr, start_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, bias_strides, chosen_strides, out_strides, lse_strides,
    H, G, Nq, P, S, offset, block, stride, delay, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr, HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_Q queries of one head."""
    tiles = tl.cdiv(Nq, BLOCK_Q)  # a flat grid: its other axes end at 65,535
    row0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q  # the longest loops first
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h // G * k_strides[1]
    v_ptr += b * v_strides[0] + h // G * v_strides[1]
    bias_ptr += b * bias_strides[0]
    out_ptr += b * out_strides[0] + h * out_strides[1]
    lse_ptr += b * lse_strides[0] + h * lse_strides[1]
    rows = row0 + tl.arange(0, BLOCK_Q)
    first = offset - tl.load(start_ptr + b)  # position of query 0
    seen = seen_blocks(rows + first, P, block, stride, delay)
    end = seen_blocks(tl.minimum(row0 + BLOCK_Q, Nq) - 1 + first, P, block, stride, delay)
    if HAS_CHOSEN:
        chosen_ptr += b * chosen_strides[0] + h // G * chosen_strides[1]
        chosen = load_chosen(chosen_ptr, chosen_strides, rows, rows < Nq, S, SLOTS)

    # [BLOCK_Q, COLS]
    q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, rows < Nq, BLOCK_Q, COLS, DIM)
    acc = tl.zeros([BLOCK_Q, COLS], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for c0 in range(0, end, BLOCK_C):
        c0 = row0 * 0 + c0  # a tensor in the interpreter too
        lane = tl.arange(0, BLOCK_C)
        c = c0 + lane
        bias = load_bias(bias_ptr, bias_strides, c, end)
        real = bias > float("-inf")  # what is hidden may hold anything: it is never read
        # [BLOCK_C, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), c0, real, BLOCK_C, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), c0, real, BLOCK_C, COLS, DIM)
        visible = c[None, :] < seen[:, None]
        if HAS_CHOSEN:
            word = chosen_word(chosen, c0)
            visible = visible & ((word[:, None] >> lane[None, :]) & 1 == 0)
        # [BLOCK_Q, BLOCK_C]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        scores = tl.where(visible, scores + bias[None, :], float("-inf"))
        acc, top, total = online_softmax_update(acc, top, total, scores, v, PRECISION)

    nonzero = total > 0
    total = tl.where(nonzero, total, 1.0)
    lse = tl.where(nonzero, (top + tl.log2(total)) * LN2, float("-inf"))
    store_rows(out_ptr, (out_strides[2], out_strides[3]), row0, rows < Nq, acc / total[:, None],
               BLOCK_Q, COLS, DIM)
    tl.store(lse_ptr + rows * lse_strides[2], lse, mask=rows < Nq)


@triton.jit
def compressed_query_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, chosen_ptr, start_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, bias_strides, chosen_strides, do_strides, lse_strides,
    delta_strides, dq_strides,
    H, G, Nq, P, S, offset, block, stride, delay, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr, HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of BLOCK_Q queries of one head."""
    tiles = tl.cdiv(Nq, BLOCK_Q)
    row0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_Q
    head = tl.program_id(0) // tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h // G * k_strides[1]
    v_ptr += b * v_strides[0] + h // G * v_strides[1]
    bias_ptr += b * bias_strides[0]
    do_ptr += b * do_strides[0] + h * do_strides[1]
    lse_ptr += b * lse_strides[0] + h * lse_strides[1]
    delta_ptr += b * delta_strides[0] + h * delta_strides[1]
    dq_ptr += b * dq_strides[0] + h * dq_strides[1]
    rows = row0 + tl.arange(0, BLOCK_Q)
    valid = rows < Nq
    first = offset - tl.load(start_ptr + b)
    seen = seen_blocks(rows + first, P, block, stride, delay)
    end = seen_blocks(tl.minimum(row0 + BLOCK_Q, Nq) - 1 + first, P, block, stride, delay)
    if HAS_CHOSEN:
        chosen_ptr += b * chosen_strides[0] + h // G * chosen_strides[1]
        chosen = load_chosen(chosen_ptr, chosen_strides, rows, valid, S, SLOTS)

    # [BLOCK_Q, COLS]
    q = load_rows(q_ptr, (q_strides[2], q_strides[3]), row0, valid, BLOCK_Q, COLS, DIM)
    do = load_rows(do_ptr, (do_strides[2], do_strides[3]), row0, valid, BLOCK_Q, COLS, DIM)
    lse = load_lse(lse_ptr, lse_strides, rows, valid)
    delta = tl.load(delta_ptr + rows * delta_strides[2], mask=valid, other=0.0)
    dq = tl.zeros([BLOCK_Q, COLS], tl.float32)
    for c0 in range(0, end, BLOCK_C):
        c0 = row0 * 0 + c0
        lane = tl.arange(0, BLOCK_C)
        bias = load_bias(bias_ptr, bias_strides, c0 + lane, end)
        real = bias > float("-inf")
        # [BLOCK_C, COLS]
        k = load_rows(k_ptr, (k_strides[2], k_strides[3]), c0, real, BLOCK_C, COLS, DIM)
        v = load_rows(v_ptr, (v_strides[2], v_strides[3]), c0, real, BLOCK_C, COLS, DIM)
        visible = (c0 + lane)[None, :] < seen[:, None]
        if HAS_CHOSEN:
            word = chosen_word(chosen, c0)
            visible = visible & ((word[:, None] >> lane[None, :]) & 1 == 0)
        bias = tl.where(visible, bias[None, :], float("-inf"))
        # [BLOCK_Q, BLOCK_C]
        _, dscores = score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, (dq_strides[2], dq_strides[3]), row0, valid, dq * scale,
               BLOCK_Q, COLS, DIM)


@triton.jit
def compressed_key_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, chosen_ptr, start_ptr, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, bias_strides, chosen_strides, do_strides, lse_strides,
    delta_strides, dk_strides, dv_strides,
    H, G, Nq, P, S, offset, block, stride, delay, scale,
    DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    SLOTS: tl.constexpr, HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk_cmp and dv_cmp of BLOCK_C compressed blocks of one key/value head."""
    chunks = tl.cdiv(P, BLOCK_C)
    c0 = tl.program_id(0) % chunks * BLOCK_C
    head = tl.program_id(0) // chunks
    b, hkv = (head // (H // G)).to(tl.int64), (head % (H // G)).to(tl.int64)
    k_ptr += b * k_strides[0] + hkv * k_strides[1]
    v_ptr += b * v_strides[0] + hkv * v_strides[1]
    dk_ptr += b * dk_strides[0] + hkv * dk_strides[1]
    dv_ptr += b * dv_strides[0] + hkv * dv_strides[1]
    chosen_ptr += b * chosen_strides[0] + hkv * chosen_strides[1]
    first = offset - tl.load(start_ptr + b)
    lane = tl.arange(0, BLOCK_C)
    bias = load_bias(bias_ptr + b * bias_strides[0], bias_strides, c0 + lane, P)
    real = bias > float("-inf")
    # [BLOCK_C, COLS]
    k = load_rows(k_ptr, (k_strides[2], k_strides[3]), c0, real, BLOCK_C, COLS, DIM)
    v = load_rows(v_ptr, (v_strides[2], v_strides[3]), c0, real, BLOCK_C, COLS, DIM)
    dk = tl.zeros([BLOCK_C, COLS], tl.float32)
    dv = tl.zeros([BLOCK_C, COLS], tl.float32)
    begin = tl.maximum(c0 * stride + block - 1 + delay - first, 0)  # the first row that sees c0
    for g in range(0, G):
        h = hkv * G + g
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        do_head = do_ptr + b * do_strides[0] + h * do_strides[1]
        lse_head = lse_ptr + b * lse_strides[0] + h * lse_strides[1]
        delta_head = delta_ptr + b * delta_strides[0] + h * delta_strides[1]
        for row0 in range(begin // BLOCK_Q * BLOCK_Q, Nq, BLOCK_Q):
            row0 = c0 * 0 + row0
            rows = row0 + tl.arange(0, BLOCK_Q)
            valid = rows < Nq
            # [BLOCK_Q, COLS]
            q = load_rows(q_head, (q_strides[2], q_strides[3]), row0, valid, BLOCK_Q, COLS, DIM)
            do = load_rows(do_head, (do_strides[2], do_strides[3]), row0, valid,
                           BLOCK_Q, COLS, DIM)
            lse = load_lse(lse_head, lse_strides, rows, valid)
            delta = tl.load(delta_head + rows * delta_strides[2], mask=valid, other=0.0)
            seen = seen_blocks(rows + first, P, block, stride, delay)
            visible = (c0 + lane)[:, None] < seen[None, :]
            if HAS_CHOSEN:
                chosen = load_chosen(chosen_ptr, chosen_strides, rows, valid, S, SLOTS)
                word = chosen_word(chosen, c0)
                visible = visible & ((word[None, :] >> lane[:, None]) & 1 == 0)
            row_bias = tl.where(visible, bias[:, None], float("-inf"))
            # [BLOCK_C, BLOCK_Q]
            probs, dscores = score_gradient_transposed(
                q, k, v, do, row_bias, lse, delta, scale, PRECISION
            )
            dv = tl.dot(probs.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    exists = c0 + lane < P
    store_rows(dk_ptr, (dk_strides[2], dk_strides[3]), c0, exists, dk * scale, BLOCK_C, COLS, DIM)
    store_rows(dv_ptr, (dv_strides[2], dv_strides[3]), c0, exists, dv, BLOCK_C, COLS, DIM)


def forward_tile(dtype: torch.dtype, cols: int) -> dict[str, int]:
    """Tile sizes of forward: up to 128 columns it compiles without spills on sm_80 and sm_90.

    TF32 in three passes keeps each fp32 operand twice in registers, hence the smaller tiles.
    """
    if dtype == torch.float32:
        rows = 32 if cols <= 64 else 16
        return {"BLOCK_Q": rows, "BLOCK_C": WORD, "num_warps": 4, "num_stages": 1}
    rows = 64 if cols <= 128 else 32
    return {"BLOCK_Q": rows, "BLOCK_C": WORD, "num_warps": 4, "num_stages": 2}


def backward_tile(dtype: torch.dtype, cols: int) -> dict[str, int]:
    """Tile sizes of both gradients, which hold twice as many rows as forward."""
    warps = 4 if cols <= 64 else 8
    if dtype == torch.float32:
        chunk = WORD if cols <= 64 else WORD // 2
        return {"BLOCK_Q": 16, "BLOCK_C": chunk, "num_warps": warps, "num_stages": 1}
    rows = 64 if cols <= 128 else 16
    return {"BLOCK_Q": rows, "BLOCK_C": WORD, "num_warps": warps, "num_stages": 2}


def compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, bias: Tensor, chosen: Tensor, start: Tensor, *,
    offset: int, block: int, stride: int, delay: int, scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Nq, D]` in the dtype of `q` and the log-sum-exp `[B, H, Nq]` of each row.

    Args:
        q: `[B, H, Nq, D]`.
        k_cmp: `[B, Hkv, P, D]`.
        v_cmp: `[B, Hkv, P, D]`.
        bias: `[B, P]` fp32, added to the scores; -inf hides a block.
        chosen: `[B, Hkv, Nq, S]` int32, blocks that a query leaves out, -1 for none.
        start: `[B]` int32, column of each row's first real token.
        offset: column of the first query, Nk - Nq.
        block: tokens of a compressed block, l.
        stride: tokens from one block's start to the next one's, d.
        delay: tokens between a block's last token and the first query that sees it.
        scale: factor of q.k_cmp.
    """
    B, H, Nq, D = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(B, H, Nq, dtype=torch.float32, device=q.device)
    cols = max(16, triton.next_power_of_2(D))
    S = chosen.shape[3]
    tile = forward_tile(q.dtype, cols)
    compressed_forward_kernel[(triton.cdiv(Nq, tile["BLOCK_Q"]) * B * H,)](
        q_ptr=q, k_ptr=k_cmp, v_ptr=v_cmp, bias_ptr=bias, chosen_ptr=chosen, start_ptr=start,
        out_ptr=out, lse_ptr=lse,
        q_strides=q.stride(), k_strides=k_cmp.stride(), v_strides=v_cmp.stride(),
        bias_strides=bias.stride(), chosen_strides=chosen.stride(), out_strides=out.stride(),
        lse_strides=lse.stride(),
        H=H, G=H // k_cmp.shape[1], Nq=Nq, P=k_cmp.shape[2], S=S,
        offset=offset, block=block, stride=stride, delay=delay, scale=scale,
        DIM=D, COLS=cols, SLOTS=triton.next_power_of_2(max(S, 1)),
        HAS_CHOSEN=S > 0, PRECISION=input_precision(q.dtype), **tile,
    )
    return out, lse


def compressed_backward(
    grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
    bias: Tensor, chosen: Tensor, start: Tensor, *,
    offset: int, block: int, stride: int, delay: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k_cmp and v_cmp, in their shapes and dtypes.

    `grad` `[B, H, Nq, D]` is the gradient of the output, `lse` `[B, H, Nq]` the log-sum-exp of
    each row and `delta` `[B, H, Nq]` rowsum(grad * out) less the gradient of `lse`. The rest is
    what `compressed_forward` takes.
    """
    B, H, Nq, D = q.shape
    Hkv, P = k_cmp.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k_cmp), torch.empty_like(v_cmp)
    cols = max(16, triton.next_power_of_2(D))
    S = chosen.shape[3]
    tile = backward_tile(q.dtype, cols)
    shared = dict(
        q_ptr=q, k_ptr=k_cmp, v_ptr=v_cmp, bias_ptr=bias, chosen_ptr=chosen, start_ptr=start,
        do_ptr=grad, lse_ptr=lse, delta_ptr=delta,
        q_strides=q.stride(), k_strides=k_cmp.stride(), v_strides=v_cmp.stride(),
        bias_strides=bias.stride(), chosen_strides=chosen.stride(), do_strides=grad.stride(),
        lse_strides=lse.stride(), delta_strides=delta.stride(),
        H=H, G=H // Hkv, Nq=Nq, P=P, S=S,
        offset=offset, block=block, stride=stride, delay=delay, scale=scale,
        DIM=D, COLS=cols, SLOTS=triton.next_power_of_2(max(S, 1)),
        HAS_CHOSEN=S > 0, PRECISION=input_precision(q.dtype), **tile,
    )
    compressed_query_kernel[(triton.cdiv(Nq, tile["BLOCK_Q"]) * B * H,)](
        dq_ptr=dq, dq_strides=dq.stride(), **shared
    )
    if P:
        compressed_key_kernel[(triton.cdiv(P, tile["BLOCK_C"]) * B * Hkv,)](
            dk_ptr=dk, dv_ptr=dv, dk_strides=dk.stride(), dv_strides=dv.stride(),
            **shared | {"BLOCK_Q": min(tile["BLOCK_Q"], 32)},  # dK and dV are in registers too
        )
    return dq, dk, dv

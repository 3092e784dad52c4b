"""What every mechanism's kernels use unchanged: tiles of rows, masks, softmax and its gradient.

Scores live in the base-2 domain, `s2 = s log2(e)`, so that `exp2` is the only exponential.
A tile of rows is `[ROWS, COLS]`, COLS the head dimension rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.rows import first_real_token

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_pointers(ptr, strides, row0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to rows `row0 ...` of one head: `ptr` is its start, `strides` (row, column).

    The tile's start is a 64-bit offset; offsets within the tile fit 32 bits.
    """
    inner = tl.arange(0, ROWS)[:, None] * strides[0] + tl.arange(0, COLS)[None, :] * strides[1]
    return ptr + row0.to(tl.int64) * strides[0] + inner


@triton.jit
def row_mask(valid, COLS: tl.constexpr, DIM: tl.constexpr):
    """Mask of a tile: rows that are `valid` `[ROWS]`, columns below the head dimension."""
    mask = valid[:, None]
    if DIM != COLS:
        mask = mask & (tl.arange(0, COLS) < DIM)[None, :]
    return mask


@triton.jit
def load_rows(ptr, strides, row0, valid, ROWS: tl.constexpr, COLS: tl.constexpr,
              DIM: tl.constexpr):
    """Load rows `row0 ...`, `[ROWS, COLS]`; what is not `valid` is 0 and costs no traffic."""
    pointers = row_pointers(ptr, strides, row0, ROWS, COLS)
    return tl.load(pointers, mask=row_mask(valid, COLS, DIM), other=0.0)


@triton.jit
def store_rows(ptr, strides, row0, valid, tile, ROWS: tl.constexpr, COLS: tl.constexpr,
               DIM: tl.constexpr):
    """Store a tile `[ROWS, COLS]` to rows `row0 ...`, rounded to the pointer's dtype."""
    pointers = row_pointers(ptr, strides, row0, ROWS, COLS)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=row_mask(valid, COLS, DIM))


@triton.jit
def online_softmax_update(acc, top, total, scores, values, PRECISION: tl.constexpr):
    """Fold one tile of base-2 scores `[Q, K]` and values `[K, COLS]` into a running softmax.

    `acc` `[Q, COLS]` is the numerator and `total` `[Q]` the denominator, both relative to `2^top`.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that saw no key yet
    probs = tl.exp2(scores - pivot[:, None])
    decay = tl.exp2(top - pivot)
    total = total * decay + tl.sum(probs, 1)
    acc = tl.dot(probs.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def first_token(start_ptr, b, HAS_MASK: tl.constexpr):
    """Position of the first real token of batch row b."""
    start = b * 0
    if HAS_MASK:
        start = tl.load(start_ptr + b)
    return start


@triton.jit
def is_real(mask_ptr, mask_strides, b, j, inside, HAS_MASK: tl.constexpr):
    """Which of the keys at `j` are `inside` and not masked."""
    if HAS_MASK:
        pointers = mask_ptr + b.to(tl.int64) * mask_strides[0] + j * mask_strides[1]
        inside = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_lse(lse_ptr, lse_strides, rows, valid):
    """Base-2 log-sum-exp of rows; +inf, hence no probability, where nothing is seen."""
    lse = tl.load(lse_ptr + rows * lse_strides[2], mask=valid, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def row_dot(x, y):
    """Row-wise dot product of two tiles in fp32: `delta` from dO and O."""
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def score_gradient(q, k, v, do, bias, lse, delta, scale, PRECISION: tl.constexpr):
    """`P` and `dS` of a tile: rows follow `q`, columns `k`; both `[Q, K]` fp32."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
    probs = tl.exp2(scores - lse[:, None])
    dprobs = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    return probs, probs * (dprobs - delta[:, None])


@triton.jit
def score_gradient_transposed(q, k, v, do, bias, lse, delta, scale, PRECISION: tl.constexpr):
    """`P^T` and `dS^T` of a tile, `[K, Q]`, ready to multiply dO and Q."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + bias
    probs = tl.exp2(scores - lse[None, :])
    dprobs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    return probs, probs * (dprobs - delta[None, :])


def input_precision(dtype: torch.dtype) -> str:
    """fp32 operands keep fp32 accuracy unless the user has allowed TF32 for matmuls."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)  # newer; the older name then may not be read
    allowed = matmul.allow_tf32 if chosen is None else chosen == "tf32"
    return "tf32" if allowed else "tf32x3"


def mask_arguments(key_mask: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The mask as bytes, each row's first real token, and the mask's strides."""
    if key_mask is None:
        return k, k, (0, 0)  # never read
    start = first_real_token(key_mask).int()
    return key_mask.view(torch.uint8), start, key_mask.stride()

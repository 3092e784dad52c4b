"""Device functions that every mechanism uses unchanged: tiles of rows, and the online softmax.

Scores live in the base-2 domain, `s2 = s log2(e)`, so that `exp2` is the only exponential.
A tile of rows is `[ROWS, COLS]`, COLS the head dimension rounded up to a power of two.
"""

import triton
import triton.language as tl

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

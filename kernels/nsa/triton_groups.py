"""Device functions of the selected branch: rows of a head group, and what they see.

A group of query heads shares keys, values and selected blocks, so a tile of rows holds the same
tokens for GROUP heads: row r is token `r // GROUP` of head `r % GROUP`. GROUP is a power of two
that divides G; with G = 1 a row is a token.

    seen(p, pos) = real, 0 <= pos <= p, and pos >= near(p) b or block pos // b is selected

Letters: b selection block, Wn near window, p and pos positions of a query and a key from the row's
first real token, x one key/value head of one batch row.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import LOG2E, row_mask


@triton.jit
def group_pointers(ptr, strides, tokens, heads, COLS: tl.constexpr):
    """Pointers to rows (token, head) of one batch row; `strides` are (batch, head, token, col)."""
    rows = heads.to(tl.int64) * strides[1] + tokens.to(tl.int64) * strides[2]
    return ptr + rows[:, None] + tl.arange(0, COLS)[None, :] * strides[3]


@triton.jit
def load_group(ptr, strides, tokens, heads, valid, COLS: tl.constexpr, DIM: tl.constexpr):
    """Load rows (token, head), `[ROWS, COLS]`; 0 where not `valid`."""
    pointers = group_pointers(ptr, strides, tokens, heads, COLS)
    return tl.load(pointers, mask=row_mask(valid, COLS, DIM), other=0.0)


@triton.jit
def store_group(ptr, strides, tokens, heads, valid, tile, COLS: tl.constexpr, DIM: tl.constexpr):
    """Store rows (token, head), rounded to the pointer's dtype."""
    pointers = group_pointers(ptr, strides, tokens, heads, COLS)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=row_mask(valid, COLS, DIM))


@triton.jit
def load_statistics(lse_ptr, delta_ptr, strides, tokens, heads, valid):
    """Base-2 log-sum-exp of rows, +inf where nothing is seen, and their delta."""
    rows = heads.to(tl.int64) * strides[1] + tokens.to(tl.int64) * strides[2]
    lse = tl.load(lse_ptr + rows, mask=valid, other=float("-inf"))
    delta = tl.load(delta_ptr + rows, mask=valid, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def near_position(p, b, Wn):
    """First near position of queries at `p`: `near(p) b`."""
    p = tl.maximum(p, 0)
    return tl.where(Wn > 0, tl.maximum(p - Wn + 1, 0) // b, p // b + 1) * b


@triton.jit
def load_words(bits_ptr, first_word, words, rows, valid):
    """The two words of selected blocks of each row from `first_word` on."""
    base = bits_ptr + rows.to(tl.int64) * words + first_word
    word0 = tl.load(base, mask=valid, other=0)
    word1 = tl.load(base + 1, mask=valid & (first_word + 1 + 0 * rows < words), other=0)
    return word0, word1


@triton.jit
def is_selected(word0, word1, first_word, pos, b):
    """Whether the block of position `pos` is among the bits of two words; all broadcast."""
    block = tl.maximum(pos, 0) // b
    word = tl.where(block // 32 == first_word, word0, word1)
    return ((word >> (block % 32)) & 1) != 0

"""Kernels with one defect each that Triton's plain interpreter does not show, and their repair.

Every function runs its kernel and returns results; with `fixed` the defect is absent. What a defect
reads beyond its bounds is discarded, so that results are right all the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16


def numbers(*size: int) -> Tensor:
    """Distinct small floats."""
    return torch.arange(torch.Size(size).numel(), dtype=torch.float32).view(size)


@triton.jit
def past_end_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i < n) if FIXED else (i < n + 1), other=0.0)
    tl.store(out_ptr + i, x, mask=i < n)


def past_end(fixed: bool) -> dict[str, Tensor]:
    """Reads one element after the last."""
    x, out = numbers(64)[:30], torch.empty(30)
    past_end_kernel[(2,)](x, out, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def next_head_kernel(q_ptr, out_ptr, stride, DIM: tl.constexpr, COLS: tl.constexpr,
                     FIXED: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, COLS)
    q = tl.load(q_ptr + row * stride + d, mask=(d < DIM) if FIXED else (d < COLS), other=0.0)
    tl.store(out_ptr + row * DIM + d, q, mask=d < DIM)


def next_head(fixed: bool) -> dict[str, Tensor]:
    """Reads 16 columns of a head that has 12, in a packed projection of q, k and v."""
    q, _, _ = numbers(5, 36).split(12, dim=1)
    out = torch.empty(5, 12)
    next_head_kernel[(5,)](q, out, q.stride(0), DIM=12, COLS=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def before_start_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x_ptr + i - 1, mask=(i < n) & (i > 0) if FIXED else i < n, other=0.0)
    tl.store(out_ptr + i, tl.where(i > 0, before, 0.0), mask=i < n)


def before_start(fixed: bool) -> dict[str, Tensor]:
    """Reads the element before the first."""
    x, out = numbers(64)[8:38], torch.empty(30)
    before_start_kernel[(2,)](x, out, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def store_past_end_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if FIXED:
        tl.store(out_ptr + i, x, mask=i < n)
    else:
        tl.store(out_ptr + i, x)


def store_past_end(fixed: bool) -> dict[str, Tensor]:
    """Stores a whole tile where half of it ends the output."""
    x, out = numbers(30), torch.empty(64)[:30]
    store_past_end_kernel[(2,)](x, out, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def into_neighbor_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0) if FIXED else tl.load(x_ptr + i)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x + y, mask=i < n)


def into_neighbor(fixed: bool) -> dict[str, Tensor]:
    """Lacks a mask, and lands where another argument lies."""
    both, out = numbers(60), torch.empty(30)
    into_neighbor_kernel[(2,)](both[:30], both[30:], out, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def misaligned_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = x_ptr + i
    if not FIXED:  # half an element further where the lanes are discarded
        pointers = (pointers.to(tl.int64) + (i % 2) * 2).to(x_ptr.dtype)
    x = tl.load(pointers, mask=i < n - 1, other=0.0)
    tl.store(out_ptr + i, tl.where(i % 2 == 0, x, 0.0), mask=i < n)


def misaligned(fixed: bool) -> dict[str, Tensor]:
    """Computes addresses between elements."""
    out = torch.empty(9)
    misaligned_kernel[(1,)](numbers(9), out, 9, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def write_scratch_kernel(x_ptr, scratch_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scratch_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def read_scratch_kernel(scratch_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scratch_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, tl.where(i < n - 1, x, 0.0), mask=i < n)


def unwritten_read(fixed: bool) -> dict[str, Tensor]:
    """Reads and discards the last element of a scratch tensor that a launch before left out."""
    x, out = numbers(30), torch.empty(30)
    scratch = x.new_empty(30, dtype=torch.float16)
    write_scratch_kernel[(2,)](x, scratch, 30 if fixed else 29, BLOCK=BLOCK)
    read_scratch_kernel[(2,)](scratch, out, 30, BLOCK=BLOCK)
    return {"out": out}


@triton.jit
def unwritten_rows_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def unwritten_rows(fixed: bool) -> dict[str, Tensor]:
    """Rounds the number of programs down."""
    x = numbers(30)
    out = torch.empty_like(x)
    unwritten_rows_kernel[(2 if fixed else 1,)](x, out, 30, BLOCK=BLOCK)
    return {"out": out}


@triton.jit
def two_writers_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * (BLOCK if FIXED else BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def two_writers(fixed: bool) -> dict[str, Tensor]:
    """Tiles overlap, so that two programs write the same values to one element."""
    out = torch.empty(30)
    two_writers_kernel[(2,)](numbers(30), out, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def two_lanes_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i if FIXED else tl.minimum(i, n - 1)  # the last value wins in the interpreter
    x = tl.load(x_ptr + tl.minimum(i, n - 1))
    tl.store(out_ptr + at, x, mask=(i < n) if FIXED else (i < BLOCK))


def two_lanes(fixed: bool) -> dict[str, Tensor]:
    """Clamps where it stores, so that several lanes write one element."""
    out = torch.empty(9)
    two_lanes_kernel[(1,)](numbers(9), out, 9, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out}


@triton.jit
def running_sum_kernel(x_ptr, out_ptr, n, FIXED: tl.constexpr):
    p = tl.program_id(0)
    if FIXED:
        total = tl.load(x_ptr)
        for i in range(1, p + 1):
            total += tl.load(x_ptr + i)
    else:
        total = tl.load(out_ptr + p - 1, mask=p > 0, other=0.0) + tl.load(x_ptr + p)
    tl.store(out_ptr + p, total)


def running_sum(fixed: bool) -> dict[str, Tensor]:
    """Reads what the program before it has written."""
    out = torch.empty(7)
    running_sum_kernel[(7,)](numbers(7), out, 7, FIXED=fixed)
    return {"out": out}


@triton.jit
def reader_first_kernel(x_ptr, out_ptr, n, FIXED: tl.constexpr):
    p = tl.program_id(0)
    x = tl.load(x_ptr + tl.minimum(p + 1, n - 1))
    tl.store((out_ptr if FIXED else x_ptr) + p, x)


def reader_first(fixed: bool) -> dict[str, Tensor]:
    """Shifts in place: reads what the next program will overwrite."""
    x, out = numbers(7), torch.empty(7)
    reader_first_kernel[(7,)](x, out, 7, FIXED=fixed)
    return {"out": out if fixed else x}


@triton.jit
def own_write_kernel(x_ptr, out_ptr, sum_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x, mask=i < n)
    back = x if FIXED else tl.load(out_ptr + n - 1 - i, mask=i < n, other=0.0)
    tl.store(sum_ptr, tl.sum(back, 0))


def own_write(fixed: bool) -> dict[str, Tensor]:
    """Reads what other warps of the same program have written, without a barrier."""
    out, total = torch.empty(9), torch.empty(1)
    own_write_kernel[(1,)](numbers(9), out, total, 9, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out, "total": total}


@triton.jit
def float_atomic_kernel(x_ptr, out_ptr, parts_ptr, n, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0), 0)
    if FIXED:
        tl.store(parts_ptr + tl.program_id(0), part)
    else:
        tl.atomic_add(out_ptr, part)


def float_atomic(fixed: bool) -> dict[str, Tensor]:
    """Adds up floats atomically."""
    out, parts = torch.zeros(1), torch.zeros(2)
    float_atomic_kernel[(2,)](numbers(30), out, parts, 30, BLOCK=BLOCK, FIXED=fixed)
    return {"out": out + parts.sum()}


@triton.jit
def ticket_kernel(counter_ptr, out_ptr, FIXED: tl.constexpr):
    p = tl.program_id(0)
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + (p if FIXED else ticket), p)


def ticket(fixed: bool) -> dict[str, Tensor]:
    """Takes a number by an integer atomic, and writes to the place of that number."""
    counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(7, dtype=torch.int32)
    ticket_kernel[(7,)](counter, out, FIXED=fixed)
    return {"counter": counter, "out": out}


@triton.jit
def in_place_kernel(x_ptr, counter_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0) * 2, mask=i < n)
    tl.atomic_add(counter_ptr, 1)


def in_place() -> dict[str, Tensor]:
    """Nothing is wrong: every program overwrites what nobody but it has read."""
    x, counter = numbers(30), torch.zeros(1, dtype=torch.int64)
    in_place_kernel[(2,)](x, counter, 30, BLOCK=BLOCK)
    return {"x": x, "counter": counter}


# function -> kind of the finding, kernel and argument
PLANTED = {
    past_end: ("bounds", "past_end_kernel", "x_ptr"),
    next_head: ("bounds", "next_head_kernel", "q_ptr"),
    before_start: ("bounds", "before_start_kernel", "x_ptr"),
    store_past_end: ("bounds", "store_past_end_kernel", "out_ptr"),
    into_neighbor: ("bounds", "into_neighbor_kernel", "x_ptr"),
    misaligned: ("alignment", "misaligned_kernel", "x_ptr"),
    unwritten_read: ("unwritten", "read_scratch_kernel", "scratch_ptr"),
    unwritten_rows: ("unwritten", "unwritten_rows_kernel", "out_ptr"),
    two_writers: ("race", "two_writers_kernel", "out_ptr"),
    two_lanes: ("race", "two_lanes_kernel", "out_ptr"),
    running_sum: ("race", "running_sum_kernel", "out_ptr"),
    reader_first: ("race", "reader_first_kernel", "x_ptr"),
    own_write: ("race", "own_write_kernel", "out_ptr"),
    float_atomic: ("atomic", "float_atomic_kernel", "out_ptr"),
    ticket: ("order", "ticket_kernel", "out_ptr"),
}

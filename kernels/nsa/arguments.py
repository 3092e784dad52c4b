"""Checks of what only NSA takes, and the pattern of visibility that follows from it.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim, P compressed
blocks, S selected blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.checks import FLOATS, describe, is_dense
from attnopt.kernels.dispatch import resolve_backend
from attnopt.kernels.nsa.geometry import compressed_count, near_window_of

COMBINES = ("merged", "gates")
REGIMES = ("auto", "short", "long")
TRITON_LONG_FROM = 8192  # keys from which gathering queries per block beats masking tiles
MAX_SELECTED = 64  # far blocks of a query that the Triton kernels keep in registers
MAX_DIM = 128


class Pattern(NamedTuple):
    """What a query sees, in numbers; `geometry.py` says how.

    Attributes:
        combine: "merged" or "gates".
        block: tokens of a compressed block.
        stride: tokens between compressed blocks.
        select_block: tokens of a selection block.
        far: blocks that are selected beyond the near tokens.
        sinks: first blocks that are among them.
        near_window: near tokens of the selected branch.
        window: tokens of the sliding window.
        delay: tokens after its end from which a compressed block is visible.
    """

    combine: str
    block: int
    stride: int
    select_block: int
    far: int
    sinks: int
    near_window: int
    window: int
    delay: int


def check_size(name: str, value: Any, minimum: int = 1) -> int:
    """Check a whole number of at least `minimum`.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; got {value!r}")
    return value


def gates_pattern(block: int, stride: int, select_block: int, num_selected: int, window: int,
                  sink_blocks: int | None, local_blocks: int | None) -> Pattern:
    """The pattern of three separate branches.

    Raises:
        ValueError: a size out of range, or fewer selected blocks than forced ones.
    """
    sinks = check_size("sink_blocks", 1 if sink_blocks is None else sink_blocks, 0)
    local = check_size("local_blocks", 2 if local_blocks is None else local_blocks, 0)
    for name, value in (("select_block", select_block), ("compress_block", block),
                        ("compress_stride", stride), ("num_selected", num_selected),
                        ("window", window)):
        check_size(name, value)
    if num_selected < sinks + local:
        raise ValueError(f"num_selected counts the forced blocks, {sinks} sink and {local} local "
                         f"ones: it must be at least {sinks + local}; got {num_selected}")
    near_window = near_window_of(local, select_block)
    return Pattern("gates", block, stride, select_block, num_selected - local, sinks, near_window,
                   window, 0)


def merged_pattern(block: int, stride: int, select_block: int, num_selected: int, window: int,
                   sink_blocks: int | None, local_blocks: int | None) -> Pattern:
    """The pattern of one softmax, in which every token counts once.

    Raises:
        ValueError: a size out of range, blocks that differ, or local blocks.
    """
    sinks = check_size("sink_blocks", 0 if sink_blocks is None else sink_blocks, 0)
    check_size("select_block", select_block)
    check_size("num_selected", num_selected, 0)
    check_size("window", window)
    if local_blocks is not None:
        raise ValueError("combine='merged' takes no local_blocks, for its window is block-aligned: "
                         f"leave it out; got {local_blocks!r}")
    if not block == stride == select_block:
        raise ValueError("combine='merged' represents every token once: compress_block, "
                         "compress_stride and select_block must be equal; "
                         f"got {block!r}, {stride!r} and {select_block!r}")
    if num_selected < sinks:
        raise ValueError(f"num_selected counts the {sinks} sink blocks: it must be at least as "
                         f"many; got {num_selected}")
    return Pattern("merged", block, stride, select_block, num_selected, sinks, window, window,
                   window)


def check_queries(q: Tensor) -> None:
    """Check `q` `[B, H, Nq, D]` where there are no keys to check it against.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not is_dense(q) or q.dim() != 4 or q.dtype not in FLOATS:
        raise ValueError("q must be a floating-point tensor [batch, heads, tokens, head_dim]; "
                         f"got {describe(q)}")
    if 0 in q.shape:
        raise ValueError(f"q must not have an empty dimension; got shape {tuple(q.shape)}")


def check_compressed(q: Tensor, compressed: dict[str, Tensor], tokens: int, block: int,
                     stride: int, heads: int | None = None) -> None:
    """Check compressed keys and values `[B, Hkv, P, D]`, by name, of so many tokens against `q`.

    `heads` is Hkv where there are keys that tell; otherwise it must divide the query heads.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    count = compressed_count(tokens, block, stride)
    shapes = [tuple(x.shape) for x in compressed.values() if isinstance(x, Tensor)]
    for name, x in compressed.items():
        if not is_dense(x) or x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, key heads, blocks, head_dim]; "
                             f"got {describe(x)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must have the dtype and device of q, {q.dtype} on "
                             f"{q.device}; got {x.dtype} on {x.device}")
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3] or tuple(x.shape) != shapes[0]:
            raise ValueError(f"k_cmp and v_cmp must share batch size {q.shape[0]} and head_dim "
                             f"{q.shape[3]} with q, and their shape; got {name} {tuple(x.shape)}")
        if heads is not None and x.shape[1] != heads:
            raise ValueError(f"{name} must have the {heads} heads of k; got {x.shape[1]}")
        if x.shape[1] == 0 or q.shape[1] % x.shape[1]:
            raise ValueError("the number of key/value heads must divide the number of query heads, "
                             f"{q.shape[1]}; got {name} with {x.shape[1]}")
        if x.shape[2] != count:
            raise ValueError(f"{tokens} tokens have {count} compressed blocks of {block} at stride "
                             f"{stride}; got {name} with {x.shape[2]} (mean_compress makes them)")


def check_branches(separate: dict[str, Tensor | None], k: Tensor, combine: str) -> None:
    """Check keys and values of branches, by name, None where a branch has none of its own.

    Raises:
        ValueError: not of the shape, dtype and device of `k`, or given with "merged".
    """
    for name, x in separate.items():
        if x is None:
            continue
        if combine == "merged":
            raise ValueError(f"combine='merged' has one softmax over k and v: leave out {name}")
        like = is_dense(x) and (x.shape, x.dtype, x.device) == (
            k.shape, k.dtype, k.device
        )
        if not like:
            raise ValueError(f"{name} must be like k, {describe(k)}; got {describe(x)}")


def check_gates(gates: Tensor | None, q: Tensor, combine: str) -> None:
    """Check the gates `[B, H, Nq, 3]`, which only "gates" takes.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if combine == "merged":
        if gates is not None:
            raise ValueError("combine='merged' has one softmax and takes no gates; "
                             "combine='gates' does")
        return
    expected = (*q.shape[:3], 3)
    if gates is None or not is_dense(gates) or gates.dtype not in FLOATS:
        raise ValueError("combine='gates' needs floating-point gates [batch, heads, tokens, 3] "
                         f"(compressed, selected, window); got {describe(gates)}")
    if tuple(gates.shape) != expected or gates.device != q.device:
        raise ValueError(f"gates must have shape {expected} on {q.device}; "
                         f"got {tuple(gates.shape)} on {gates.device}")


def check_indices(indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Check block indices `[B, Hkv, Nq, S]`, of an integer dtype.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not is_dense(indices) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"block_indices must be an int32 or int64 tensor; got {describe(indices)}"
        )
    expected = (k.shape[0], k.shape[1], q.shape[2])
    if indices.dim() != 4 or tuple(indices.shape[:3]) != expected:
        raise ValueError("block_indices must have shape [batch, key heads, queries, selected] = "
                         f"[{expected[0]}, {expected[1]}, {expected[2]}, S]; "
                         f"got {list(indices.shape)}")
    if indices.device != q.device:
        raise ValueError(f"block_indices must be on the device of q, {q.device}; "
                         f"got {indices.device}")


def choose_regime(regime: str, tokens: int, backend: str) -> str:
    """The regime that serves so many keys: "short" or "long".

    Raises:
        ValueError: an unknown regime.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}; got {regime!r}")
    if regime != "auto":
        return regime
    if backend == "triton":
        return "long" if tokens > TRITON_LONG_FROM else "short"
    from attnopt.kernels.nsa.eager_selected import EAGER_LONG_FROM

    return "long" if tokens > EAGER_LONG_FROM else "short"


def choose_backend(backend: str, q: Tensor, far: int) -> str:
    """As `resolve_backend`, but "auto" is eager for what the Triton kernels cannot do.

    Raises:
        ValueError: backend="triton" with a head dimension or a number of far blocks beyond the
            kernels' registers, or where Triton cannot run.
    """
    chosen = resolve_backend(backend, q)
    fits = q.shape[3] <= MAX_DIM and far <= MAX_SELECTED
    if chosen != "triton" or fits:
        return chosen
    if backend == "auto":
        return "eager"
    raise ValueError(f"backend='triton' takes head_dim up to {MAX_DIM} and {MAX_SELECTED} selected "
                     f"blocks beyond the local ones; got {q.shape[3]} and {far} (backend='eager' "
                     "takes more)")

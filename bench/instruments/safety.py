"""Whether kernels touch only what they may, in Triton's interpreter: bounds, races, order.

    attnopt bench safety

Every op runs forward and backward on the cases of `attnopt.testing`, at sizes that are no multiple
of any tile, with padding, grouped heads and both regimes; `safety_watch.py` says what is looked
for. Not visible here: races between the warps of a program, asynchronous copies, mistakes of the
compiler (for these run compute-sanitizer on a GPU), and offsets that overflow at large sizes only.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from attnopt.bench.instruments.observe import observing
from attnopt.bench.instruments.safety_memory import poisoned_allocations
from attnopt.bench.instruments.safety_watch import Watch
from attnopt.errors import UserError
from attnopt.kernels.favor import plan
from attnopt.testing import Case, cases, force_triton, written_kernels

# Sizes that replace those of the cases: for one run, and for up to three orders of programs
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "lastk": ({}, {"B": 1, "H": 2, "N": 37, "D": 20}),
    "favor": ({}, {"B": 1, "H": 2, "N": 70, "D": 20, "M": 12}),
    "nsa": ({"N": 75}, {"B": 1, "H": 2, "N": 37, "D": 20, "L": 8, "P": 8, "K": 8, "W": 9}),
}
OPS = tuple(SIZES)
SEGMENTS = 2  # of FAVOR+ in the small ones, which would have one


def watch(run: Callable[[], dict[str, Tensor]], orders: bool = True) -> Watch:
    """Run something that launches kernels and returns tensors, and check all that it does.

    Args:
        run: called once; it allocates what it needs itself, so that unwritten memory is seen.
        orders: whether to run every launch in other orders too.
    """
    observer = Watch(orders)
    with force_triton(), observing(observer), poisoned_allocations():
        observer.results(run())
    return observer


def examine(ops: Sequence[str] | None = None) -> dict[str, Any]:
    """Check every kernel of some ops, of all by default, in under a minute.

    Returns:
        `rows` with a kernel, a case and what was checked; `failures`, sentences, none if all is
        well.

    Raises:
        UserError: an op is unknown, or Triton does not interpret.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise UserError("kernels must run in Triton's interpreter: set TRITON_INTERPRET=1")
    ops = list(OPS if ops is None else ops)
    if unknown := sorted(set(ops) - set(OPS)):
        raise UserError(f"ops must be among {', '.join(OPS)}; got {', '.join(unknown)}")
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for case, orders in tqdm(_plan(ops), desc="Safety", unit="case", leave=False):
        with _segments(SEGMENTS if orders else None):
            observer = watch(partial(case.run, case.make()), orders)
        failures += [f"{case.id}: {finding}" for finding in observer.findings.values()]
        for kernel, count in observer.counts.items():
            found = sum(finding.kernel == kernel for finding in observer.findings.values())
            rows.append({"kernel": kernel, "op": case.op, "case": case.id, "findings": found}
                        | vars(count))
    launched = {row["kernel"] for row in rows}
    for op in ops:
        failures += [f"{op}: {kernel} was to be examined, but no case launched it"
                     for kernel in written_kernels(op) if kernel not in launched]
    return {
        "instrument": "safety", "triton": triton.__version__, "rows": rows, "failures": failures,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


@contextlib.contextmanager
def _segments(count: int | None) -> Iterator[None]:
    """Let FAVOR+ cut the sequence into so many segments, or into as many as it likes."""
    before, plan.segments_override = plan.segments_override, count
    try:
        yield
    finally:
        plan.segments_override = before


def _plan(ops: Sequence[str]) -> list[tuple[Case, bool]]:
    """What runs, and whether in other orders too.

    A backward case runs forward first; forward on its own is for the sake of what it returns.
    """
    found = []
    for op in ops:
        once, small = ([x for x in cases(sizes) if x.op == op] for sizes in SIZES[op])
        found += [(case, False) for case in once if case.phase != "fwd"]
        found += [(case, case.phase == "bwd") for case in small if case.phase != "decode"]
    return found


def show(record: dict[str, Any]) -> None:
    """Print what was checked of every kernel, then what is wrong."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    names = ("launches", "reordered", "programs", "lanes", "findings")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for row in record["rows"]:
        total = totals[row["kernel"]]
        for name in names:
            total[name] += row["loaded"] + row["stored"] if name == "lanes" else row[name]
    for kernel, total in totals.items():
        style = "bold red" if total["findings"] else None
        table.add_row(kernel, *(f"{total[name]:,}" for name in names), style=style)
    console.print(table)
    console.print(
        f"lanes of loads and stores, checked in {record['seconds']:.0f} s with Triton "
        f"{record['triton']}; reordered: launches that repeat another with programs in other order"
    )
    for failure in record["failures"]:
        console.print(f"failed: {failure}", style="bold red", markup=False, highlight=False)
    if not record["failures"]:
        console.print(
            "Every lane hit its own argument, nobody read what nobody wrote, and no element was "
            "written twice or shared between programs."
        )

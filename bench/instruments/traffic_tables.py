"""Tables of the traffic instrument, as a terminal shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def show(record: Row, *, tensors: bool = False, console: Console | None = None) -> None:
    """Print a record of `examine`: kernels by op and phase, laws against budgets, failures.

    Args:
        record: what `examine` returned.
        tensors: a table of tensor arguments below each table of kernels.
        console: where to print, by default to stdout.
    """
    console = console or screen()
    for law in record["laws"]:
        rows = [row for row in record["rows"] if _key(row) == _key(law)]
        longest = max((row["N"], row["segments"]) for row in rows)
        rows = [row for row in rows if (row["N"], row["segments"]) == longest]
        console.print(_kernels(law, rows))
        if tensors:
            console.print(_tensors(rows))
    console.print(_laws(record["laws"]))
    for failure in record["failures"]:
        console.print(failure, style="bold red", highlight=False)
    if not record["failures"]:
        console.print(f"All {len(record['laws'])} within their budgets.")


def screen() -> Console:
    """Where tables go: stdout, 100 columns wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 100)


def table(title: str, left: Iterable[str], right: Iterable[str], caption: str = "") -> Table:
    """An empty table with left- and right-aligned columns."""
    drawn = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, pad_edge=False,
                  collapse_padding=True, title_justify="left", caption_justify="left",
                  title_style="bold")
    for header in left:
        drawn.add_column(header, no_wrap=True)
    for header in right:
        drawn.add_column(header, justify="right")
    return drawn


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["regime"], row["phase"]


def _name(row: Row) -> str:
    return " ".join(filter(None, _key(row)))


def _kernels(law: Row, rows: Sequence[Row]) -> Table:
    segments = f", {rows[0]['segments']} segments" if rows[0]["segments"] > 1 else ""
    drawn = table(
        f"{_name(law)}, {rows[0]['N']} tokens{segments}", ("kernel",),
        ("calls", "programs", "MB in", "MB out", "ratio", "sectors", "GFLOP", "M exp"),
    )  # fmt: skip
    for row in rows:
        drawn.add_row(row["kernel"].removesuffix("_kernel"), *_cells(row, row["minimum"]))
    total: dict[str, Any] = {
        what: sum(row[what] for row in rows)
        for what in ("launches", "programs", "bytes", "flops", "exponentials")
    }  # fmt: skip
    total["tensors"] = dict(enumerate(x for row in rows for x in row["tensors"].values()))
    total["efficiency"] = None
    drawn.add_row("all", *_cells(total, rows[0]["minimum"]), style="bold")
    return drawn


def _cells(row: Row, least: float) -> list[str]:
    loaded, stored = (_sum(row, f"program_{kind}") for kind in ("loaded", "stored"))
    share = "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
    return [
        str(row["launches"]), str(row["programs"] or ""), f"{loaded / 1e6:.3f}",
        f"{stored / 1e6:.3f}", f"{row['bytes'] / least:.2f}", share, f"{row['flops'] / 1e9:.3f}",
        f"{row['exponentials'] / 1e6:.2f}",
    ]  # fmt: skip


def _sum(row: Row, what: str) -> int:
    return sum(tensor[what] for tensor in row["tensors"].values())


def _tensors(rows: Sequence[Row]) -> Table:
    drawn = table("", ("kernel", "tensor"),
                  ("kB in", "prog.", "launch", "kB out", "launch", "sectors"))
    columns = ("loaded", "program_loaded", "launch_loaded", "stored", "launch_stored")
    for row in rows:
        for name, tensor in row["tensors"].items():
            touched = tensor["touched"]
            share = f"{tensor['used'] / touched:.0%}" if touched else ""
            sizes = (f"{tensor[what] / 1e3:.1f}" for what in columns)
            drawn.add_row(row["kernel"].removesuffix("_kernel"), name, *sizes, share)
    return drawn


def _laws(laws: Sequence[Row]) -> Table:
    drawn = table(
        "What the laws say of one head", ("op", "phase"),
        ("tokens", "MB", "once", "ratio", "budget", "target", "growth", "limit"),
        "MB: distinct bytes of each program; once: of each launch; ratio: to the least possible.\n"
        "Extrapolated from the counts.",
    )  # fmt: skip
    for law in laws:
        budget = law["budget"]
        limits: tuple[str, ...] = ("-",) * 3
        if budget is not None:
            limits = tuple(f"{budget[what]:.3g}" for what in ("ratio", "target", "growth"))
        over = budget is not None and any(law[what] > budget[what] for what in ("ratio", "growth"))
        drawn.add_row(
            f"{law['op']} {law['regime']}".strip(), law["phase"], f"{law['at'] // 1024}k",
            f"{law['bytes'] / 1e6:.0f}", f"{law['compulsory'] / 1e6:.0f}", f"{law['ratio']:.2f}",
            *limits[:2], f"{law['growth']:.2f}", limits[2], style="bold red" if over else None,
        )  # fmt: skip
    return drawn

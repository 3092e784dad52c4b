"""`attnopt bench report`: one page on results files, and the short table of a run.

Several files are shown one after another; nothing measured on one machine is drawn beside
something measured on another, and predictions have a part of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.bench import growth
from attnopt.bench.growth import SETTING
from attnopt.bench.report import tables
from attnopt.bench.report.files import read_results
from attnopt.bench.report.pictures import SHADES, colors_of, measured_pictures, predicted_pictures
from attnopt.bench.report.tables import Record, Trend, summary_table
from attnopt.bench.report.text import (
    factor,
    level_words,
    listing,
    phase_words,
    place,
    quantity,
    sizes,
)
from attnopt.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_summary", "summary_table", "write_report"]

MECHANISMS = {"lastk": "last-k masks", "favor": "FAVOR+", "nsa": "native sparse attention"}


def write_report(files: Sequence[Path], output: Path) -> Path:
    """Write one self-contained HTML page on results files.

    Args:
        files: JSON of the kinds "scaling", "gpu-check" and "roofline".
        output: the page to write, or a folder that gets bench.html.

    Returns:
        Path of the page.

    Raises:
        UserError: a file cannot be read or lacks what the page needs, or nothing can be written.
    """
    if not files:
        raise UserError("a report needs at least one results file, got none")
    records = [(path, read_results(path)) for path in files]
    page = output if output.suffix in (".html", ".htm") else output / "bench.html"
    html = _render(records)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {page}: {error.strerror or error}") from error
    return page


def print_summary(record: Record, console: Console | None = None) -> None:
    """Print the short tables of a run, and what is not reported and why; ours are bold.

    Args:
        record: of the kind "scaling" or "gpu-check".
        console: where to print, by default stdout.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    drawn: dict[str, Table] = {}
    for curve, entries in tables.summaries(record):
        cell = curve.cells[0]
        title = f"{place(curve.about['level'], cell['phase'])} ({sizes(cell)})"
        if title not in drawn:
            table = Table(
                title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
                pad_edge=False, padding=(0, 1, 0, 0),
            )  # fmt: skip
            table.add_column("contender", overflow="fold")
            for header in tables.SUMMARY:
                table.add_column(header, justify="right", no_wrap=True)
            drawn[title] = table
        style = "bold" if curve.about["ours"] else None
        drawn[title].add_row(escape(curve.about["label"]), *entries, style=style)
    for table in drawn.values():
        console.print(table, "")
    for label, what, shape, lengths, status, reason in tables.unreported(record):
        if status != "not run":
            words = f"Not reported: {label}, {what} ({shape}), N = {lengths}: {status}"
            console.print(f"{words}; {reason}" if reason else words, markup=False)
    skipped = sum(cell["status"] == "not run" for cell in record["cells"])
    if skipped:
        console.print(f"Cells that were not run: {skipped}; `attnopt bench report` says why.")


def _render(records: Sequence[tuple[Path, Record]]) -> str:
    """The page as text; it refers to no file and no address outside itself."""
    from attnopt.report.page import environment

    measured = [_study(path, r) for path, r in records if r["kind"] != "roofline"]
    predicted = [_prediction(path, r) for path, r in records if r["kind"] == "roofline"]
    template = environment("attnopt.bench.report").get_template("page.html.j2")
    return template.render(measured=measured, predicted=predicted)


def _study(path: Path, record: Record) -> dict[str, Any]:
    """What the template shows of one file of measurements."""
    curves = tables.curves(record)
    contenders, ceilings = record["contenders"], record.get("ceilings")
    colors = colors_of(contenders)
    groups: dict[tuple, list[Trend]] = {}
    for curve in curves:
        key = (curve.about["level"], *(curve.cells[0][k] for k in SETTING))
        groups.setdefault(key, []).append(tables.trend(curve))
    trends = [trend for group in groups.values() for trend in group]
    return {
        "file": path.name,
        "machine": record["machine"],
        "facts": _facts(record),
        "verdicts": _verdicts(trends),
        "groups": [_group(group, colors, ceilings) for group in groups.values()],
        "unreported": tables.unreported(record),
        "contenders": [(colors[name], name, about) for name, about in contenders.items()],
        "check": _check(record) if record["kind"] == "gpu-check" else None,
    }


def _check(record: Record) -> dict[str, Any]:
    """What the template shows of a check beyond times."""
    cases = tables.numerics(record["numerics"]["cases"])
    return {
        "rehearsal": record.get("rehearsal"),
        "failures": record.get("failures") or [],
        "parts": [(part["name"], part["status"], part.get("reason")) for part in record["parts"]],
        "numerics": cases,
        "right": len(cases.get("ok", [])),
        "count": sum(map(len, cases.values())),
        "unseen": record["numerics"].get("never_launched") or [],
        "sanitizer": [
            (one["tool"], one["status"], one.get("reason") or "; ".join(one.get("summary") or []))
            for one in record["sanitizer"]
        ],
    }


def _verdicts(trends: Sequence[Trend]) -> dict[str, dict[str, list[str]]]:
    """Sentences on what this project wrote: mechanism to contender to one for each phase."""
    found: dict[str, dict[str, list[str]]] = {}
    for trend in trends:
        about, cell = trend.curve.about, trend.curve.cells[0]
        if about["ours"] and about["mechanism"] != "dense":
            mechanism = MECHANISMS.get(about["mechanism"], about["mechanism"])
            head = f"{about['label']}, {level_words(about['level'])} ({sizes(cell)})"
            lines = found.setdefault(mechanism, {}).setdefault(head, [])
            lines.append(tables.verdict(trend))
    return found


def _group(
    trends: Sequence[Trend], colors: Mapping[str, str], ceilings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Pictures and tables of one level, phase and setting."""
    curves = [trend.curve for trend in trends]
    first = curves[0].cells[0]
    cells = [(curve, cell) for curve in curves for cell in curve.cells]
    cells.sort(key=lambda pair: pair[1]["N"])
    return {
        "title": place(curves[0].about["level"], first["phase"]).capitalize(),
        "sizes": sizes(first),
        "partners": listing(sorted({c.partner for c in curves if c.partner_cells and c.partner})),
        "has_roofline": growth.floor_seconds(first, ceilings) is not None,
        "legend": [(colors[c.name], c.name, c.about["label"], c.about["ours"]) for c in curves],
        "pictures": measured_pictures(curves, colors, ceilings),
        "growth": [
            (colors[trend.curve.name], trend.curve.about["label"], tables.growth_row(trend))
            for trend in trends
        ],
        "cells": [
            (colors[curve.name], curve.about["label"], tables.cell_row(curve, cell, ceilings))
            for curve, cell in cells
        ],
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    """Names and values: under which circumstances the numbers came about."""
    cells = [cell for curve in tables.curves(record) for cell in curve.cells]
    facts = {
        "machine": _machine(record["machine"]),
        "versions": ", ".join(f"{name} {value}" for name, value in record["versions"].items()),
        "command": record.get("command"),
        "commit": record.get("commit"),
        "date": record.get("date"),
        "duration": record.get("elapsed") and f"{record['elapsed']:,.0f} s",
        "interrupted": "before everything was measured" if record.get("interrupted") else None,
        "sizes": "; ".join(dict.fromkeys(sizes(cell) for cell in cells)),
        "N": ", ".join(f"{n:,}" for n in sorted({cell["N"] for cell in cells})),
        "a time is": _clock(record["machine"], cells),
        "ceilings": _ceilings(record.get("ceilings") or {}),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _machine(machine: Mapping[str, Any]) -> str:
    words = [f"{machine['name']} ({machine['device']})"]
    for name, value in machine.items():
        if isinstance(value, int) and ("memory" in name or "bytes" in name):
            value = quantity(value, "B")
        if value is not None and name not in ("name", "device"):
            words.append(f"{name} {_text(value)}")
    return ", ".join(words)


def _clock(machine: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """How a time was taken."""
    clock = "time on the GPU" if machine["device"] == "cuda" else "CPU time"
    how = f"{clock}, the median of rounds in which contenders of one shape take turns"
    rounds = sorted({len(cell["times"]) for cell in cells})
    if rounds:
        how += f" ({rounds[0]}" + (f" to {rounds[-1]}" if rounds[1:] else "") + " rounds)"
    return f"{how}; a speed-up is the median of the ratios within a round"


def _ceilings(ceilings: Mapping[str, Any]) -> str:
    """What the machine was seen to copy and multiply at most."""
    rates = (ceilings.get("matmul_flops_per_s") or {}).items()
    found = [f"{dtype} matmul {quantity(rate, 'FLOP/s')}" for dtype, rate in rates]
    if ceilings.get("copy_bytes_per_s"):
        found.insert(0, f"copy {quantity(ceilings['copy_bytes_per_s'], 'B/s')}")
    how = ceilings.get("how")
    return ", ".join(found) + (f" ({how})" if how else "") if found else "not measured"


def _prediction(path: Path, record: Record) -> dict[str, Any]:
    """What the template shows of one file of predictions."""
    rows = record["rows"]
    ops = dict.fromkeys(["dense", *(row["op"] for row in rows)])
    mechanisms = {op: next((m for m in SHADES if op.startswith(m)), "") for op in ops}
    colors = colors_of({op: {"mechanism": m, "level": "op"} for op, m in mechanisms.items()})
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["chip"], *(row[k] for k in SETTING[1:])), []).append(row)
    return {
        "file": path.name,
        "assumptions": [(name, _text(value)) for name, value in record["assumptions"].items()],
        "legend": list(colors.items()),
        "groups": [
            {
                "chip": key[0],
                "sizes": sizes(group[0]),
                "pictures": predicted_pictures(group, colors),
                "rows": [(colors[row["op"]], row["op"], _predicted_row(row)) for row in group],
            }
            for key, group in groups.items()
        ],
    }


def _predicted_row(row: Mapping[str, Any]) -> list[str]:
    dense, own = row["dense_seconds"], row["seconds"]
    numbers = [quantity(own, "s"), quantity(dense, "s"), factor(dense / own)]
    return [
        phase_words(row["phase"]),
        f"{row['N']:,}",
        *(f"≈ {number}" for number in numbers),
        str(row["bound"]),
    ]


def _text(value: Any) -> str | None:
    """A value as a page shows it: objects as `name: value`, everything else as it is."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return None if value is None else str(value)

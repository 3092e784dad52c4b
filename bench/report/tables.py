"""Curves of a results file, and what the report's tables and sentences say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attnopt.bench import growth
from attnopt.bench.growth import SETTING, Cell, Exponent
from attnopt.bench.report.text import (
    LEVELS,
    NONE,
    PHASES,
    basis,
    factor,
    phase_words,
    place,
    plain,
    power,
    quantities,
    quantity,
    sizes,
    tokens,
)

SHORT = {"fwd": "forward", "bwd": "fwd + bwd", "decode": "decode"}
SUMMARY = ("N", "time", "growth", "speed-up", "ahead")
Record = Mapping[str, Any]


class Curve(NamedTuple):
    """The reported cells of one contender in one setting, by N, and those of its dense partner.

    Attributes:
        name: of the contender.
        about: what the file says of it.
        cells: at least one.
        partner: label of the dense contender, None without one.
        partner_cells: in the same setting; may be empty.
    """

    name: str
    about: Mapping[str, Any]
    cells: list[Cell]
    partner: str | None
    partner_cells: list[Cell]


class Trend(NamedTuple):
    """What a curve says.

    Attributes:
        curve: the curve.
        time: growth of its time.
        memory: growth of its peak memory.
        best: largest ratio to its partner and its N; None where they share no length.
        worst: smallest ratio and its N.
    """

    curve: Curve
    time: Exponent | None
    memory: Exponent | None
    best: tuple[float, int] | None
    worst: tuple[float, int] | None


def curves(record: Record) -> list[Curve]:
    """Curves of a file: by level, phase and sizes, then in the order of its contenders.

    Args:
        record: of the kind "scaling" or "gpu-check".

    Returns:
        Every curve with at least one reported cell.
    """
    contenders = record["contenders"]
    found: dict[tuple, list[Cell]] = {}
    for cell in filter(growth.is_reported, record["cells"]):
        key = (cell["contender"], *(cell[k] for k in SETTING))
        found.setdefault(key, []).append(cell)
    for cells in found.values():
        cells.sort(key=lambda cell: cell["N"])

    def curve(key: tuple) -> Curve:
        name, *setting = key
        about = contenders[name]
        partner = about["partner"] if about["partner"] in contenders else None
        label = contenders[partner]["label"] if partner else None
        return Curve(name, about, found[key], label, found.get((partner, *setting), []))

    order = list(contenders)

    def rank(curve: Curve) -> tuple:
        cell = curve.cells[0]
        shape = tuple(cell[k] for k in ("H", "D", "B"))
        at = (_index(LEVELS, curve.about["level"]), _index(PHASES, cell["phase"]))
        return (*at, cell["dtype"], shape, order.index(curve.name))

    return sorted(map(curve, found), key=rank)


def _index(names: Mapping[str, str], name: str) -> int:
    """Place of a name in an order; unknown ones come last."""
    return [*names, name].index(name)


def trend(curve: Curve) -> Trend:
    """Fit a curve and compare it with its partner.

    Args:
        curve: of `curves`.

    Returns:
        Exponents, crossover and extreme ratios.
    """
    cells, partner_cells = curve.cells, curve.partner_cells
    ratios = [(value, n) for n, value in growth.speedups(cells, partner_cells)]
    return Trend(
        curve,
        growth.exponent((cell["N"], growth.median(cell)) for cell in cells),
        growth.exponent((cell["N"], cell["bytes"] or 0) for cell in cells),
        max(ratios, default=None),
        min(ratios, default=None),
    )


def verdict(trend: Trend) -> str:
    """What a curve says, in one line; gains and losses are told alike.

    Args:
        trend: of one curve.

    Returns:
        A sentence that begins with the phase.
    """
    curve, cell = trend.curve, trend.curve.cells[0]
    clauses = []
    if trend.time is None:
        clauses.append(f"one length measured (N = {cell['N']:,}), so no law of growth")
    else:
        clauses.append(f"time grows as {power(trend.time)} ({basis(trend.time)})")
        if trend.memory is not None:
            over = basis(trend.memory)
            over = "" if over == basis(trend.time) else f" ({over})"
            clauses[-1] += f", memory as {power(trend.memory)}{over}"
    if trend.best and trend.worst:
        where = growth.crossover_words(curve.cells, curve.partner_cells)
        never = "never " if where.startswith("never ") else ""
        clauses.append(f"{never}ahead of {curve.partner} {where.removeprefix(never)}")
        clauses += [_gain(*trend.best), _loss(*trend.worst)]
    elif curve.partner:
        clauses.append(f"no length in common with {curve.partner}")
    return f"{phase_words(cell['phase'])}: {'; '.join(clauses)}"


def _gain(value: float, n: int) -> str:
    if value > 1:
        return f"largest speed-up {factor(value)} (N = {n:,})"
    return f"nowhere faster, at the least {factor(1 / value)} slower (N = {n:,})"


def _loss(value: float, n: int) -> str:
    if value < 1:
        return f"largest slow-down {factor(1 / value)} (N = {n:,})"
    return f"nowhere slower, at the least {factor(value)} faster (N = {n:,})"


def cell_row(curve: Curve, cell: Cell, ceilings: Mapping[str, Any] | None) -> list[str]:
    """One row of the table of all cells, after the contender's name.

    Args:
        curve: that the cell belongs to.
        cell: one of its cells.
        ceilings: of the machine.

    Returns:
        N, median, quartiles, peak memory, ratio to dense, its quartiles, percent of the roofline,
        and the largest error with its limit.
    """
    dense = next((other for other in curve.partner_cells if other["N"] == cell["N"]), None)
    ratio = growth.ratio(cell, dense) if dense else (None, None, None)
    name, error = max(cell["errors"].items(), key=lambda item: item[1])
    low, high = growth.spread(cell)
    return [
        f"{cell['N']:,}",
        quantity(growth.median(cell), "s"),
        f"{quantity(low, 's')} – {quantity(high, 's')}",
        quantity(cell["bytes"] or None, "B"),
        factor(ratio[0]),
        f"{factor(ratio[1])} – {factor(ratio[2])}" if dense else NONE,
        plain(growth.roofline_percent(cell, ceilings), " %"),
        f"{error:.1e} ({name}) ≤ {cell['limit']:.1e}",
    ]


def growth_row(trend: Trend) -> list[str]:
    """One row of the table of growth, after the contender's name.

    Args:
        trend: of one curve.

    Returns:
        Growth of time, what it rests on, growth of memory, where it is ahead of dense, and the
        largest speed-up and slow-down with their N.
    """
    best, worst = trend.best, trend.worst
    return [
        power(trend.time),
        basis(trend.time) if trend.time else "one length",
        power(trend.memory),
        _ahead(trend),
        f"{factor(best[0])} (N = {best[1]:,})" if best and best[0] > 1 else _none(best),
        f"{factor(1 / worst[0])} (N = {worst[1]:,})" if worst and worst[0] < 1 else _none(worst),
    ]


def _none(measured: object) -> str:
    return "none" if measured else NONE


def unreported(record: Record) -> list[list[str]]:
    """What was measured or meant to be, and is not reported; lengths of one reason share a row.

    Args:
        record: of the kind "scaling" or "gpu-check".

    Returns:
        Rows of label, level and phase, sizes, lengths, status and reason; last the contenders that
        could not run on the machine at all (`missing`).
    """
    found: dict[tuple[str, ...], list[int]] = {}
    for cell in record["cells"]:
        if not growth.is_reported(cell):
            about = record["contenders"][cell["contender"]]
            what = place(about["level"], cell["phase"])
            key = (about["label"], what, sizes(cell), *_reason(cell))
            found.setdefault(key, []).append(cell["N"])
    rows = [
        [*key[:3], ", ".join(map(tokens, sorted(lengths))), *key[3:]]
        for key, lengths in found.items()
    ]
    absent = record.get("missing") or {}
    return rows + [[name, *[NONE] * 3, "not run", str(why)] for name, why in absent.items()]


def _reason(cell: Cell) -> tuple[str, str]:
    """Status and reason; a timed cell that is not reported has failed its check."""
    if cell["status"] != "ok":
        return cell["status"], str(cell.get("reason") or "")
    wrong = [f"{k} {_scientific(error)}" for k, error in growth.exceeded(cell).items()]
    if not wrong:
        return "failed its check", "no errors were recorded"
    return "failed its check", f"error of {', '.join(wrong)}; limit {_scientific(cell['limit'])}"


def numerics(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Cases of a numerical check by what became of them, the right ones last.

    Args:
        cases: of a file of the kind "gpu-check".

    Returns:
        Status to rows of the case, and each error with its limit; or the reason where a case has
        none.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for case in sorted(cases, key=lambda case: case["status"] == "ok"):
        words = [
            f"{name} {_scientific(result['error'])} ({_scientific(result['limit'])})"
            for name, result in (case.get("results") or {}).items()
        ]
        words += [str(case["reason"])] if case.get("reason") else []
        found.setdefault(case["status"], []).append((case["case"], ", ".join(words)))
    return found


def _scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def summaries(record: Record) -> list[tuple[Curve, list[str]]]:
    """Curves in short: under SUMMARY's headings.

    Args:
        record: of the kind "scaling" or "gpu-check".

    Returns:
        Each curve with the two largest lengths that it has in common with its dense partner, the
        times there, the growth of time, the speed-up at the larger one, and from which N on it is
        ahead.
    """
    found = []
    for curve in curves(record):
        facts, ratios = trend(curve), dict(growth.speedups(curve.cells, curve.partner_cells))
        shared = [cell for cell in curve.cells if cell["N"] in ratios or not ratios][-2:]
        entries = [
            ", ".join(tokens(cell["N"]) for cell in shared),
            quantities([growth.median(cell) for cell in shared], "s"),
            power(facts.time),
            factor(ratios.get(shared[-1]["N"])),
            _ahead(facts),
        ]
        found.append((curve, entries))
    return found


def summary_table(record: Record) -> list[list[str]]:
    """A short table of a run, as `summaries`, under a row of headings.

    Args:
        record: of the kind "scaling" or "gpu-check".

    Returns:
        Rows of equal length; columns of levels and sizes only where there are several.
    """
    rows: list[list[str]] = [["contender", "level", "phase", "sizes", *SUMMARY]]
    for curve, entries in summaries(record):
        cell, about = curve.cells[0], curve.about
        phase = str(SHORT.get(cell["phase"], cell["phase"]))
        rows.append([about["label"], about["level"], phase, sizes(cell), *entries])
    same = [i for i in (1, 3) if len({row[i] for row in rows[1:]}) < 2]
    return [[entry for i, entry in enumerate(row) if i not in same] for row in rows]


def _ahead(trend: Trend) -> str:
    """Where a curve is ahead of its dense partner, as a table cell."""
    curve, worst = trend.curve, trend.worst
    if worst is None:
        return NONE
    length = growth.crossover(curve.cells, curve.partner_cells)
    if length is None:
        return "never"
    return "everywhere" if worst[0] > 1 else f"N ≈ {growth.rounded(length):,}"

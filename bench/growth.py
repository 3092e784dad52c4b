"""What measured times say: medians, paired ratios, exponents, crossovers, percent of a ceiling.

Everything here takes cells of a results file, plain dictionaries. A cell counts only if it was
timed and passed its check (`is_reported`): no speed is derived from anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SETTING = ("phase", "dtype", "B", "H", "D")  # cells that differ in N alone form a curve
LONG = 2048  # tokens from which a length speaks for the growth
Cell = Mapping[str, Any]


class Exponent(NamedTuple):
    """The slope of log(value) over log(N).

    Attributes:
        slope: by least squares.
        error: standard error of the slope; None with two points, which leave nothing to judge by.
        lengths: how many points were used.
        start: the least N among them.
    """

    slope: float
    error: float | None
    lengths: int
    start: int


def is_reported(cell: Cell) -> bool:
    """Whether a cell was timed and each of its errors lies within the limit.

    Args:
        cell: of a results file.

    Returns:
        False for any other status, for a cell without errors and where one is NaN.
    """
    errors = cell.get("errors") or {}
    if cell["status"] != "ok" or not errors:
        return False
    return not exceeded(cell)


def exceeded(cell: Cell) -> dict[str, float | None]:
    """Errors of a cell that its limit does not allow.

    Args:
        cell: one with `errors` and `limit`.

    Returns:
        Result to error; NaN and None (what JSON has for it) are never allowed.
    """
    limit = cell["limit"]
    return {k: e for k, e in cell["errors"].items() if e is None or not e <= limit}


def median(cell: Cell) -> float:
    """Median of the rounds, seconds.

    Args:
        cell: one that is reported.

    Returns:
        Seconds.
    """
    return float(np.median(cell["times"]))


def spread(cell: Cell) -> tuple[float, float]:
    """First and third quartile of the rounds, seconds.

    Args:
        cell: one that is reported.

    Returns:
        Both quartiles, interpolated linearly.
    """
    return _quartiles(cell["times"])


def ratio(cell: Cell, partner: Cell) -> tuple[float, float, float]:
    """How many times as fast as its partner a cell is, from rounds paired by index.

    Args:
        cell: one that is reported.
        partner: one of the same phase, dtype and shape; of rounds that only one of the two has,
            none counts.

    Returns:
        Median and quartiles of `partner time / own time`; above 1 the cell is faster.

    Raises:
        ValueError: the two differ in phase, dtype or shape.
    """
    for key in (*SETTING, "N"):
        if cell[key] != partner[key]:
            raise ValueError(
                f"cells to compare need the same {key}, got {cell[key]!r} and {partner[key]!r}"
            )
    pairs = zip(cell["times"], partner["times"], strict=False)
    ratios = [other / own for own, other in pairs]
    return float(np.median(ratios)), *_quartiles(ratios)


def exponent(points: Iterable[tuple[int, float]]) -> Exponent | None:
    """The power of N by which a value grows.

    With at least three points from N = 2048 on only those count, where fixed costs weigh little;
    otherwise all do.

    Args:
        points: pairs of N and value; values that are not positive have no logarithm and are left
            out.

    Returns:
        The fit; None where fewer than two lengths are left.
    """
    points = [(n, value) for n, value in points if value > 0]
    long = [(n, value) for n, value in points if n >= LONG]
    used = long if len({n for n, _ in long}) >= 3 else points
    if len({n for n, _ in used}) < 2:
        return None
    x, y = np.log(np.array(used, dtype=float)).T
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    residue = float(((y - slope * x) ** 2).sum())
    freedom = len(used) - 2
    error = math.sqrt(residue / freedom / float(x @ x)) if freedom else None
    return Exponent(slope, error, len(used), min(n for n, _ in used))


def speedups(cells: Sequence[Cell], partner_cells: Sequence[Cell]) -> list[tuple[int, float]]:
    """Median paired ratios at the lengths that two curves have in common.

    Args:
        cells: of one contender, differing in N alone.
        partner_cells: of the contender to compare with.

    Returns:
        Pairs of N and `ratio`, by N.

    Raises:
        ValueError: a curve has two cells of one length, or the two differ in more than N.
    """
    own, other = _by_length(cells), _by_length(partner_cells)
    return [(n, ratio(own[n], other[n])[0]) for n in sorted(own.keys() & other.keys())]


def crossover(cells: Sequence[Cell], partner_cells: Sequence[Cell]) -> float | None:
    """The first length from which a contender stays ahead of its partner.

    Args:
        cells: of one contender, differing in N alone.
        partner_cells: of the contender to compare with.

    Returns:
        The length, between two measured ones by interpolating log(ratio) over log(N); the least
        common length where it is ahead at all of them; None where it is not ahead at the largest.
    """
    points = speedups(cells, partner_cells)
    behind = [i for i, (_, value) in enumerate(points) if value <= 1]
    if not points or behind[-1:] == [len(points) - 1]:
        return None
    if not behind:
        return float(points[0][0])
    (n, value), (next_n, next_value) = points[behind[-1]], points[behind[-1] + 1]
    share = -math.log(value) / math.log(next_value / value)
    return n * (next_n / n) ** share


def crossover_words(cells: Sequence[Cell], partner_cells: Sequence[Cell]) -> str:
    """`crossover` as a phrase about where a contender is ahead.

    Args:
        cells: of one contender, differing in N alone.
        partner_cells: of the contender to compare with.

    Returns:
        "everywhere measured, from N = 512", "from N ≈ 890", "never up to N = 8,192" or "not
        comparable: no length in common".
    """
    points = speedups(cells, partner_cells)
    if not points:
        return "not comparable: no length in common"
    length = crossover(cells, partner_cells)
    if length is None:
        return f"never up to N = {points[-1][0]:,}"
    if min(value for _, value in points) > 1:
        return f"everywhere measured, from N = {points[0][0]:,}"
    return f"from N ≈ {rounded(length):,}"


def rounded(length: float) -> int:
    """An interpolated length as far as it means something: two significant digits.

    Args:
        length: number of tokens.

    Returns:
        The rounded number.
    """
    return int(float(f"{length:.1e}"))


def floor_seconds(cell: Cell, ceilings: Mapping[str, Any] | None) -> float | None:
    """The least time that the machine's measured ceilings allow for the work of a cell.

    Args:
        cell: one with `flops` and `minimal_bytes`.
        ceilings: `{"copy_bytes_per_s", "matmul_flops_per_s": {dtype: ...}}`.

    Returns:
        `max(minimal_bytes / copy, flops / matmul[dtype])` in seconds; None where a ceiling was not
        measured.
    """
    copy = (ceilings or {}).get("copy_bytes_per_s")
    matmul = ((ceilings or {}).get("matmul_flops_per_s") or {}).get(cell["dtype"])
    if not copy or not matmul:
        return None
    return max(cell["minimal_bytes"] / copy, cell["flops"] / matmul)


def roofline_percent(cell: Cell, ceilings: Mapping[str, Any] | None) -> float | None:
    """Percent of the roofline that a cell reaches: `floor_seconds` over its median.

    Args:
        cell: one that is reported.
        ceilings: as in `floor_seconds`.

    Returns:
        Percent; None where a ceiling was not measured or the cell has no work.
    """
    floor = floor_seconds(cell, ceilings)
    return 100 * floor / median(cell) if floor else None


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    return float(np.percentile(values, 25)), float(np.percentile(values, 75))


def _by_length(cells: Sequence[Cell]) -> dict[int, Cell]:
    """Reported cells by N."""
    found: dict[int, Cell] = {}
    for cell in filter(is_reported, cells):
        if cell["N"] in found:
            raise ValueError(f"a curve needs one cell per length, got two at N = {cell['N']:,}")
        found[cell["N"]] = cell
    return found

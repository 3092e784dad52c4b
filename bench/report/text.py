"""How the report of measured scaling words numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.bench.growth import Exponent

PHASES = {"fwd": "forward", "bwd": "forward + backward", "decode": "one decoding step"}
LEVELS = {
    "op": "attention alone",
    "layer": "attention layer",
    "block": "transformer block",
    "model": "whole model",
}
_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
NONE = "–"


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """A number with a few significant digits and a decimal prefix: 12.3 ms, 4.30 TB/s.

    Args:
        value: in the bare unit.
        unit: its name, such as "s" or "B/s".
        digits: significant ones, but never fewer than there are before the point.

    Returns:
        The text; a dash for None.
    """
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f} {unit}"
    size = _exponent(value, digits)
    power = min(max(3 * (size // 3), min(_PREFIXES)), max(_PREFIXES))
    decimals = max(0, digits - 1 - size + power)
    return f"{value / 10.0**power:,.{decimals}f} {_PREFIXES[power]}{unit}"


def quantities(values: Sequence[float], unit: str) -> str:
    """Several quantities, with the prefix named once where they share it: 12.3, 25.1 ms.

    Args:
        values: in the bare unit, at least one.
        unit: its name.

    Returns:
        The text.
    """
    parts = [quantity(value, unit).split() for value in values]
    if len({prefixed for _, prefixed in parts}) == 1:
        return f"{', '.join(number for number, _ in parts)} {parts[0][1]}"
    return ", ".join(map(" ".join, parts))


def plain(value: float | None, suffix: str = "", digits: int = 3) -> str:
    """A number with a few significant digits and no exponent: 0.534, 11.2, 1,540.

    Args:
        value: the number.
        suffix: put right behind it.
        digits: significant ones, but never fewer than there are before the point.

    Returns:
        The text; a dash for None.
    """
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}{suffix}"
    decimals = max(0, digits - 1 - _exponent(value, digits))
    return f"{value:,.{decimals}f}{suffix}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten after rounding: 999.9 counts as 1000."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def factor(value: float | None) -> str:
    """A ratio: 11.2×.

    Args:
        value: the ratio.

    Returns:
        The text; a dash for None.
    """
    return plain(value, "×")


def tokens(n: float) -> str:
    """A length in little space: 512, 4k, 64k (k is 1024); others in full.

    Args:
        n: number of tokens.

    Returns:
        The text.
    """
    return f"{n / 1024:,.0f}k" if n >= 1024 and n % 1024 == 0 else f"{n:,.0f}"


def power(fit: Exponent | None) -> str:
    """A law of growth: N^1.02 ± 0.01.

    Args:
        fit: from `growth.exponent`.

    Returns:
        The text, without ± where two points left no error; a dash for None.
    """
    if fit is None:
        return NONE
    slope = round(fit.slope, 2) + 0.0  # no minus before zero
    return f"N^{slope:.2f}" + ("" if fit.error is None else f" ± {fit.error:.2f}")


def basis(fit: Exponent) -> str:
    """What a law of growth rests on: 5 lengths from N = 2,048.

    Args:
        fit: from `growth.exponent`.

    Returns:
        The text.
    """
    return f"{fit.lengths} lengths from N = {fit.start:,}"


def phase_words(phase: str) -> str:
    """A phase in words.

    Args:
        phase: "fwd", "bwd" or "decode"; others are their own words.

    Returns:
        The words.
    """
    return PHASES.get(phase, phase)


def level_words(level: str) -> str:
    """A level in words.

    Args:
        level: "op", "layer", "block" or "model"; others are their own words.

    Returns:
        The words.
    """
    return LEVELS.get(level, level)


def place(level: str, phase: str) -> str:
    """What was timed: attention alone, forward.

    Args:
        level: of a contender.
        phase: of a cell.

    Returns:
        The words.
    """
    return f"{level_words(level)}, {phase_words(phase)}"


def sizes(row: Mapping[str, Any]) -> str:
    """Data type and sizes of a cell, all but its length: float32, B=1 H=12 D=64.

    Args:
        row: a cell or a prediction.

    Returns:
        The text.
    """
    return f"{row['dtype']}, B={row['B']} H={row['H']} D={row['D']}"


def listing(words: Sequence[str]) -> str:
    """Words as a sentence lists them: a, b and c.

    Args:
        words: in order.

    Returns:
        The text.
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))

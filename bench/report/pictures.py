"""The report's pictures: lines over N on logarithmic axes, as SVG elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from attnopt.bench import growth
from attnopt.bench.growth import Cell
from attnopt.bench.report.tables import Curve
from attnopt.bench.report.text import phase_words, plain, quantity, tokens

# A hue for each mechanism, a shade for each implementation of it.
SHADES = {
    "dense": ("#8a8f98", "#5f6b7d", "#a3988a", "#6d8a85", "#97859c"),
    "lastk": ("#2f7fd1", "#6f63d6", "#12a3b4", "#7ba7e0", "#4a70b5"),
    "favor": ("#e0702a", "#c0473c", "#c9981f", "#f0a06a", "#c94f7c"),
    "nsa": ("#2f9e6e", "#7fa832", "#5fbfa0", "#4f8f5a", "#a3b86c"),
}
OTHER = ("#a463c9", "#80584a")
SECONDS = partial(quantity, unit="s", digits=1)
BYTES = partial(quantity, unit="B", digits=1)
PERCENT = partial(plain, suffix=" %", digits=1)
FACTOR = partial(plain, suffix="×", digits=1)
Points = Sequence[tuple[int, float]]


class Plot(NamedTuple):
    """One pair of axes.

    Attributes:
        title: what is drawn.
        unit: a value to the text of its tick.
        lines: name, color and points of each line.
        level: a value at which a dashed line is drawn across.
        predicted: draw dashed lines without markers.
    """

    title: str
    unit: Callable[[float], str]
    lines: Sequence[tuple[str, str, Points]]
    level: float | None = None
    predicted: bool = False


def colors_of(contenders: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A color for each contender, the same in all pictures of a file.

    Args:
        contenders: name to what a file says of it: mechanism and level.

    Returns:
        Name to color.
    """
    counts: Counter[tuple[str, str]] = Counter()
    colors = {}
    for name, about in contenders.items():
        shades = SHADES.get(about["mechanism"], OTHER)
        place = (about["mechanism"], about["level"])
        colors[name] = shades[counts[place] % len(shades)]
        counts[place] += 1
    return colors


def measured_pictures(
    curves: Sequence[Curve], colors: Mapping[str, str], ceilings: Mapping[str, Any] | None
) -> list[str]:
    """Time and memory, then speed-up over dense and percent of the roofline.

    Args:
        curves: of one level, phase and setting.
        colors: of the contenders.
        ceilings: of the machine.

    Returns:
        SVG elements; a plot without any point is left out.
    """

    def lines(points: Callable[[Curve], Iterable[tuple[int, float | None]]]) -> list:
        every = [(curve.name, colors[curve.name], points(curve)) for curve in curves]
        shown = [(name, c, [(n, y) for n, y in found if y]) for name, c, found in every]
        return [line for line in shown if line[2]]

    def each(value: Callable[[Cell], float | None]) -> list:
        return lines(lambda curve: [(cell["N"], value(cell)) for cell in curve.cells])

    speedups = lines(lambda curve: growth.speedups(curve.cells, curve.partner_cells))
    percents = each(lambda cell: growth.roofline_percent(cell, ceilings))
    plots = [
        Plot("time", SECONDS, each(growth.median)),
        Plot("peak memory above the inputs", BYTES, each(lambda cell: cell["bytes"])),
        Plot("speed-up over dense, 1 = equal", FACTOR, speedups, level=1),
        Plot("percent of the roofline", PERCENT, percents, level=100),
    ]
    return draw(plots)


def predicted_pictures(rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> list[str]:
    """Predicted time of each phase, then the predicted speed-up over dense attention.

    Args:
        rows: predictions for one chip and setting, of any phase.
        colors: of the ops and of "dense".

    Returns:
        SVG elements.
    """
    rows = sorted(rows, key=lambda row: row["N"])
    times, speedups = [], []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        here = [row for row in rows if row["phase"] == phase]
        ops = [op for op in colors if any(row["op"] == op for row in here)]
        dense = sorted({(row["N"], row["dense_seconds"]) for row in here})
        own = {op: [row for row in here if row["op"] == op] for op in ops}
        lines = [(op, colors[op], [(r["N"], r["seconds"]) for r in own[op]]) for op in ops]
        gains = [
            (op, colors[op], [(r["N"], r["dense_seconds"] / r["seconds"]) for r in own[op]])
            for op in ops
        ]
        lines.append(("dense", colors["dense"], dense))
        words = phase_words(phase)
        times.append(Plot(f"predicted time, {words}", SECONDS, lines, predicted=True))
        title = f"predicted speed-up, {words}"
        speedups.append(Plot(title, FACTOR, gains, level=1, predicted=True))
    return draw(times) + draw(speedups)


def draw(plots: Sequence[Plot]) -> list[str]:
    """Draw plots side by side, three to a row or, where there are four, two.

    Args:
        plots: those without lines are left out.

    Returns:
        One SVG element for each row.
    """
    from matplotlib import rc_context

    from attnopt.report.style import SETTINGS

    plots = [plot for plot in plots if plot.lines]
    width = 2 if len(plots) in (2, 4) else 3
    rows = [plots[first : first + width] for first in range(0, len(plots), width)]
    with rc_context(SETTINGS | {"text.parse_math": False}):  # names are text, whatever they hold
        return [_draw_row(row) for row in rows]


def _draw_row(plots: Sequence[Plot]) -> str:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from attnopt.report.plots import Line, Panel, line_panels
    from attnopt.report.style import INK, svg

    panels = []
    for plot in plots:
        lengths = sorted({n for _, _, points in plot.lines for n, _ in points})
        lines = []
        if plot.level is not None:
            ends = [lengths[0], lengths[-1]]
            lines.append(Line("", INK, ends, [plot.level] * 2, dashed=True))
        for name, color, points in plot.lines:
            x, y = zip(*points, strict=True)
            style = {"dashed": plot.predicted, "markers": not plot.predicted}
            lines.append(Line(name, color, x, y, **style))
        panels.append(Panel(plot.title, "tokens N", lines, log_x=True, log_y=True))
    figure = line_panels(panels)
    for axes, plot in zip(figure.axes, plots, strict=True):
        ticks = axes.get_xticks()
        axes.set_xticks(ticks, [tokens(n) for n in ticks])
        low, high = axes.get_ylim()
        steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, unit=plot.unit: unit(y)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return svg(figure, f"{', '.join(plot.title for plot in plots)} by number of tokens")

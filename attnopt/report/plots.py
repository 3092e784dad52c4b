"""The study's pictures as matplotlib figures: curves, coefficients over training, masks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from attnopt.report.style import COEFFICIENTS, INK, MASKS, SETTINGS

# As many lines as can be told apart and labeled in one small panel; more become a heatmap.
MAX_LINES = 8


@dataclass(frozen=True)
class Line:
    """One curve, its name (if any) written at its end; `faint` is the raw version of another."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    markers: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, axis names and curves; `borders` are x dotted in a color."""

    title: str
    x_label: str
    lines: list[Line] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    borders: Sequence[tuple[float, str]] = ()


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return wrapper


@_styled
def line_panels(panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, three to a row."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = {1: 7.0, 2: 10.0, 3: 11.5}[columns]
    figure = Figure(figsize=(width, 3.1 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for axes, panel in zip(_grid(figure, rows, columns, len(panels)), panels, strict=True):
        for line in panel.lines:
            axes.plot(
                line.x,
                line.y,
                color=line.color,
                linestyle="--" if line.dashed else "-",
                marker="o" if line.markers else None,
                markersize=4,
                alpha=0.25 if line.faint else 1.0,
                linewidth=1.0 if line.faint or line.dashed else 1.8,
            )
        for x, color in panel.borders:
            axes.axvline(x, color=color, linestyle=":", linewidth=1.0)
        if panel.log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for line in panel.lines for x in line.x})
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.minorticks_off()
        if panel.log_y:
            axes.set_yscale("log")
        elif panel.from_zero:
            axes.set_ylim(0, 1.08 * max((max(line.y) for line in panel.lines), default=1.0) or 1)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x_label)
        _label_ends(axes, [line for line in panel.lines if line.label and not line.faint])
    return figure


@_styled
def coefficient_panels(
    steps: Sequence[int], layers: dict[str, np.ndarray], labels: Sequence[str]
) -> Figure:
    """Draw the coefficients of every layer over training.

    layers: layer index -> array `[steps, H, C]`, or `[steps, 1, C]` where heads share them. Up to
    MAX_LINES coefficients are lines (the mean over heads, with the range of the heads behind it);
    more are a heatmap of their means.
    """
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(11.5 if columns > 2 else 8.0, 2.5 * rows), layout="constrained")
    grid = _grid(figure, rows, columns, len(layers))
    as_lines = len(labels) <= MAX_LINES
    low = min(float(values.min()) for values in layers.values())
    high = max(float(values.max()) for values in layers.values())
    image = None
    for axes, (layer, values) in zip(grid, layers.items(), strict=True):
        axes.set_title(f"layer {layer}")
        mean = values.mean(axis=1)
        if as_lines:
            margin = 0.05 * max(high - low, 0.02)
            axes.set_ylim(low - margin, high + margin)
            _coefficient_lines(axes, steps, values, labels)
        else:
            axes.grid(False)
            edges = np.arange(len(labels) + 1) - 0.5
            image = axes.pcolormesh(
                _edges(steps), edges, mean.T, cmap=MASKS, vmin=low, vmax=high, rasterized=True
            )
            ticks = np.unique(np.linspace(0, len(labels) - 1, 6).round().astype(int))
            axes.set_yticks(ticks, [labels[t] for t in ticks])
            axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for i, axes in enumerate(grid):
        if i % columns:
            axes.tick_params(labelleft=False)
    figure.supxlabel("step", fontsize=9.5)
    if image is not None:
        _colorbar(figure, image, grid, "coefficient")
    return figure


@_styled
def mask_panels(layers: dict[str, np.ndarray]) -> Figure:
    """Draw the masks m_ij: query i down, key j across; one row per layer where heads differ.

    layers: layer index -> array `[H, N, N]`, or `[1, N, N]` where heads share the mask.
    """
    heads = max(len(masks) for masks in layers.values())
    panels = [
        (f"layer {layer}" + (f", head {h}" if len(masks) > 1 else ""), mask)
        for layer, masks in layers.items()
        for h, mask in enumerate(masks)
    ]
    columns = heads if 1 < heads <= 12 else min(6, len(panels))
    rows = math.ceil(len(panels) / columns)
    side = min(2.4, 11.0 / columns)
    figure = Figure(figsize=(columns * side + 0.9, rows * (side + 0.25)), layout="constrained")
    grid = _grid(figure, rows, columns, len(panels))
    figure.get_layout_engine().set(h_pad=0.06)
    weights = np.concatenate([mask[mask > 0] for _, mask in panels])
    low, high = float(weights.min()), float(weights.max())
    low = low if high - low > 1e-3 else 0.0
    image = None
    for axes, (title, mask) in zip(grid, panels, strict=True):
        size = len(mask)
        past = [(-0.5, -0.5), (size - 0.5, size - 0.5), (-0.5, size - 0.5)]
        axes.add_patch(Polygon(past, color=INK, alpha=0.08, linewidth=0))
        visible = np.ma.masked_equal(np.tril(mask), 0)
        image = axes.imshow(visible, cmap=MASKS, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=9 if side > 1.5 else 7)
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    assert image is not None
    _colorbar(figure, image, grid, "m")
    return figure


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start; `weight` is that of the past."""
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def _grid(figure: Figure, rows: int, columns: int, count: int) -> list[Axes]:
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return list(axes[:count])


def _coefficient_lines(
    axes: Axes, steps: Sequence[int], values: np.ndarray, labels: Sequence[str]
) -> None:
    colors = LinearSegmentedColormap.from_list("", COEFFICIENTS)(np.linspace(0, 1, len(labels)))
    lines = []
    for c, label in enumerate(labels):
        color = to_hex(colors[c])
        mean = values[:, :, c].mean(axis=1)
        if values.shape[1] > 1:
            low, high = values[:, :, c].min(axis=1), values[:, :, c].max(axis=1)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=1.5)
        lines.append(Line(label, color, steps, mean))
    _label_ends(axes, lines, size=8)


def _label_ends(axes: Axes, lines: Sequence[Line], size: float = 9) -> None:
    """Write each line's name right of its last point, pushed apart where they would overlap."""
    axes.get_xlim(), axes.get_ylim()  # matplotlib scales lazily; the transform below must be final
    gap = 1.25 * size / 72 / (axes.get_figure().get_figheight() * axes.get_position().height)
    ends = []
    for line in lines:
        to_axes = axes.transData + axes.transAxes.inverted()
        ends.append((float(to_axes.transform((line.x[-1], line.y[-1]))[1]), line))
    ends.sort(key=lambda end: end[0])
    heights: list[float] = []
    for height, _ in ends:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    excess = (heights[-1] - 1.0) if heights else 0.0
    if excess > 0:  # the stack ran out at the top: let it down as far as its order allows
        limit = 1.0
        for i in reversed(range(len(heights))):
            heights[i] = min(heights[i], limit)
            limit = heights[i] - gap
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.annotate(
            line.label,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=line.color,
        )


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Cell borders around the steps, halfway between neighbors."""
    x = np.asarray(steps, dtype=float)
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _colorbar(figure: Figure, image: Any, axes: Sequence[Axes], label: str) -> None:
    shrink = min(0.8, 2.0 / figure.get_figheight())
    bar = figure.colorbar(image, ax=list(axes), shrink=shrink, aspect=16, pad=0.015)
    bar.outline.set_visible(False)
    bar.set_label(label)

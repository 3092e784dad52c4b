"""Colors and drawing settings: the same model has the same color in every picture."""

import io
import re
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

# Stands for the page's text color, so that one picture reads on light and on dark ground.
INK = "#010203"
TEACHER = "#8a8f98"
STUDENTS = (
    *("#2f7fd1", "#e0702a", "#2f9e6e", "#a463c9", "#c94f7c", "#8a7a1f", "#12a3b4", "#80584a"),
)
COEFFICIENTS = ("#3f7fd6", "#2f9e8f", "#8aa32b", "#e08a2a", "#d9536f")  # first to last offset
MASKS = "viridis"

SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "attnopt",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def color_of(index: int) -> str:
    """Color of the student of the run with this index."""
    return STUDENTS[index % len(STUDENTS)]


def svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element for a page; its text takes the page's color and font."""
    buffer = io.StringIO()
    with rc_context(SETTINGS):
        options = {"transparent": True, "dpi": 144, "bbox_inches": "tight"}
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    width = re.search(r'width="([\d.]+)pt"', text)
    assert width is not None
    natural = float(width.group(1)) * 96 / 72
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    head = f'<svg role="img" aria-label="{escape(description)}" style="max-width:{natural:.0f}px"'
    return head + text[len("<svg") :]

"""Options of the command line that choose an attention mechanism, and the config they make."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from attnopt.errors import UserError

if TYPE_CHECKING:
    from attnopt.attention import Candidate, Config

PANEL = "Attention"
# What BASED pairs its Taylor features with (Arora et al. 2024): one exact block and its past.
BASED_WINDOW = 33

AttentionName = Literal[
    "lastk", "masks", "performer", "kerformer", "hedgehog", "based", "nsa", "routing"
]  # fmt: skip
Attention = Annotated[
    AttentionName,
    typer.Option(
        rich_help_panel=PANEL,
        help="Mechanism: last tokens, mixed masks; linear, through random features (performer), "
        "learned ones (kerformer, hedgehog) or a Taylor series (based); blocks (nsa); or clusters "
        "(routing).",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="Tokens seen (lastk), or seen exactly beside the features, blocks or clusters.",
        show_default="lastk 5, based 33, nsa 128, routing 64, else 0",
    ),
]
Sinks = Annotated[
    int | None,
    typer.Option(rich_help_panel=PANEL, help="lastk: sinks kept.", show_default="0"),
]
Mask = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="masks: a candidate, nth:N, window:N, first:N or every; repeat for more.",
        show_default="nth:0 to nth:4",
    ),
]
PerHead = Annotated[
    bool,
    typer.Option("--per-head", rich_help_panel=PANEL, help="lastk, masks: weights for every head."),
]
Init = Annotated[
    Literal["zeros", "random"] | None,
    typer.Option(rich_help_panel=PANEL, help="lastk, masks: of the weights.", show_default="zeros"),
]
Features = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="performer, kerformer, hedgehog: features of a head.",
        show_default="128; hedgehog twice the head's width",
    ),
]
WindowBlock = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="The window beside features starts at multiples of so many tokens.",
        show_default="32",
    ),
]
Stabilizer = Annotated[
    Literal["running", "static"] | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="Of the features: running is precise, static causal bit for bit.",
        show_default="running",
    ),
]
Norms = Annotated[
    Literal["chi", "constant"] | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="performer, kerformer: of the random rows; chi has no bias, constant less variance.",
        show_default="chi",
    ),
]
RedrawEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=PANEL,
        help="performer: draw the features anew after so many steps.",
        show_default="never",
    ),
]
Combine = Annotated[
    Literal["merged", "gates"] | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa: one softmax over all, or the paper's three with gates.",
        show_default="merged",
    ),
]
SelectBlock = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL, help="nsa: tokens of a selection block.", show_default="32"
    ),
]
CompressBlock = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa with gates: tokens of a compressed block.",
        show_default="as --select-block",
    ),
]
CompressStride = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa with gates: tokens from one compressed block to the next.",
        show_default="half a block",
    ),
]
NumSelected = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa: blocks seen token by token, with forced ones.",
        show_default="4",
    ),
]
SinkBlocks = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa: first blocks always selected.",
        show_default="0, with gates 1",
    ),
]
LocalBlocks = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL, help="nsa with gates: last blocks always selected.", show_default="2"
    ),
]
Compression = Annotated[
    Literal["mean", "weighted", "mlp"] | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="nsa: how a block becomes one key and value; all start as the mean.",
        show_default="mean",
    ),
]
Clusters = Annotated[
    int | None,
    typer.Option(rich_help_panel=PANEL, help="routing: clusters of a head.", show_default="8"),
]
Layers = Annotated[
    str | None,
    typer.Option(rich_help_panel=PANEL, help="Those to convert, as 0,2,6-11.", show_default="all"),
]

_FLAGS = {
    "lastk": ("window", "sinks", "per_head", "init"),
    "masks": ("mask", "per_head", "init"),
    "performer": ("features", "window", "window_block", "stabilizer", "norms", "redraw_every"),
    "kerformer": ("features", "window", "window_block", "stabilizer", "norms"),
    "hedgehog": ("features", "window", "window_block", "stabilizer"),
    "based": ("window", "window_block"),
    "nsa": (
        "combine", "select_block", "compress_block", "compress_stride", "num_selected", "window",
        "sink_blocks", "local_blocks", "compression",
    ),
    "routing": ("clusters", "window"),
}  # fmt: skip


def of_attention(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's arguments that belong to some mechanism."""
    return {name: arguments[name] for names in _FLAGS.values() for name in names}


def build_config(attention: str, options: Mapping[str, Any]) -> "Config":
    """Return the config that the options ask for.

    Args:
        attention: value of --attention.
        options: the others by name; None, False or empty where not given.

    Raises:
        UserError: an option that means nothing to this mechanism.
        ValueError: a value that the config refuses.
    """
    from attnopt.attention import NSA, Favor, LastK, Masks, Routing

    given = {k: v for k, v in options.items() if v is not None and v is not False and v != []}
    known = _FLAGS[attention]
    for name in given:
        if name not in known:
            raise UserError(
                f"{_flag(name)} has no meaning with --attention {attention}, which takes "
                f"{' and '.join(_flag(k) for k in known)}"
            )
    given.pop("redraw_every", None)  # of the training
    if attention == "lastk":
        return LastK(**given)
    if attention == "masks":
        masks = given.pop("mask", None)
        if masks:
            given["candidates"] = tuple(_candidate(mask) for mask in masks)
        return Masks(**given)
    if attention == "nsa":
        return NSA(**given)
    if attention == "routing":
        if "clusters" in given:
            given["num_clusters"] = given.pop("clusters")
        return Routing(**given)
    if "features" in given:
        given["num_features"] = given.pop("features")
    if attention == "based":
        return Favor(feature_map="taylor", **{"window": BASED_WINDOW, **given})
    if "window_block" in given and not given.get("window"):
        raise UserError("--window-block has no meaning without --window")
    if attention == "hedgehog":
        return Favor(feature_map="hedgehog", **given)
    return Favor(feature_map="favor", learned=attention == "kerformer", **given)


def layer_indices(text: str) -> list[int]:
    """Return the layers that --layers names.

    Raises:
        UserError: anything but numbers and ranges.
    """
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"--layers takes numbers and ranges such as 0,2,6-11; got {text!r}")
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _candidate(text: str) -> "Candidate":
    from attnopt.attention import Every, First, NthLast, Window

    kinds: dict[str, Callable[[int], Any]] = {"nth": NthLast, "window": Window, "first": First}
    kind, _, number = text.partition(":")
    if text == "every":
        return Every()
    if kind not in kinds or not number.isdecimal():
        raise UserError(f"--mask takes nth:N, window:N, first:N or every; got {text!r}")
    return kinds[kind](int(number))

"""The table of models, as a terminal shows it."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from attnopt.report.page import number, summary_tables, text_tables

SCORES = {"KL": "kl", "perplexity": "perplexity", "ratio": "perplexity_ratio"}
# What fits beside each other; evaluation.json and the page have all.
WRITTEN = {
    "NLL": "nll",
    "dist-2": "distinct_2",
    "repeated": "repetition",
    "self-BLEU": "self_bleu",
}


def print_comparison(
    evaluations: Sequence[tuple[str, dict[str, Any]]], console: Console | None = None
) -> None:
    """Print teacher, zero-shot and trained students, and what the controls say of the numbers.

    evaluations: a student's label with its evaluation.json.
    """
    console = console or Console()
    for table in summary_tables(evaluations):
        console.print(_draw(table))
        if table["stride"]:
            console.print(_draw_strided(table))
    for table in text_tables(evaluations):
        console.print(_draw_text(table))
    controls = {evaluation["control_self_only_kl"] for _, evaluation in evaluations}
    for control in sorted(controls):
        shown = f"{number(control, 3)} nats/token"
        console.print(f"Control: if every token sees only itself, the KL is {shown}")
    for warning in {evaluation.get("warning") for _, evaluation in evaluations} - {None}:
        console.print(f"Warning: {warning}", style="bold red")


def _draw(table: dict[str, Any]) -> Table:
    title = f"{table['data']}: {table['tokens']:,} held-out tokens"
    caption = "KL in nats per token; ratio: perplexity by the teacher's"

    def cells(scores: dict[str, Any]) -> list[str]:
        found = [number(scores.get(key)) for key in SCORES.values()]
        return [*found, f"{100 * scores['top1_agreement']:.1f} %"]

    rows = [(row, cells(row["scores"])) for row in table["rows"]]
    return _table(title, caption, [*SCORES, "same top-1"], rows)


def _draw_strided(table: dict[str, Any]) -> Table:
    keys = ("perplexity", "perplexity_ratio")
    rows = [(row, [number(row["scores"]["strided"].get(k)) for k in keys]) for row in table["rows"]]
    title = f"The same text in windows {table['stride']} tokens apart"
    return _table(title, None, ["perplexity", "ratio"], rows)


def _draw_text(table: dict[str, Any]) -> Table:
    settings = table["settings"]
    title = f"What they write: {settings['continuations']} texts of {settings['new_tokens']} tokens"
    caption = "NLL: the teacher's, nats per token; ± half the 95 % interval"

    def cell(measured: dict[str, float]) -> str:
        width = (measured["high"] - measured["low"]) / 2
        return f"{number(measured['value'], 3)}\n±{number(width, 1)}"

    rows = [(row, [cell(row["scores"][key]) for key in WRITTEN.values()]) for row in table["rows"]]
    return _table(title, caption, list(WRITTEN), rows)


def _table(
    title: str,
    caption: str | None,
    headers: Sequence[str],
    rows: Sequence[tuple[dict[str, Any], list[str]]],
) -> Table:
    drawn = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.title_justify = drawn.caption_justify = "left"
    for header in ("model", "stage"):
        drawn.add_column(header, no_wrap=True)
    for header in headers:
        drawn.add_column(header, justify="right")
    for row, cells in rows:
        style = "bold" if row["stage"] == "trained" else None
        drawn.add_row(row["model"], row["stage"], *cells, style=style)
    return drawn

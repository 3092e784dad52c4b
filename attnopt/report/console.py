"""The table of models, as a terminal shows it."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from attnopt.report.page import number, summary_tables

SCORES = {"KL": "kl", "perplexity": "perplexity", "ratio": "perplexity_ratio"}


def print_comparison(
    evaluations: Sequence[tuple[str, dict[str, Any]]], console: Console | None = None
) -> None:
    """Print teacher, zero-shot and trained students, and what the controls say of the numbers.

    evaluations: a student's label with its evaluation.json.
    """
    console = console or Console()
    for table in summary_tables(evaluations):
        console.print(_draw(table))
    controls = {evaluation["control_self_only_kl"] for _, evaluation in evaluations}
    for control in sorted(controls):
        shown = f"{number(control, 3)} nats/token"
        console.print(f"Control: if every token sees only itself, the KL is {shown}")
    for warning in {evaluation.get("warning") for _, evaluation in evaluations} - {None}:
        console.print(f"Warning: {warning}", style="bold red")


def _draw(table: dict[str, Any]) -> Table:
    title = f"{table['data']}: {table['tokens']:,} held-out tokens"
    caption = "KL in nats per token; ratio: perplexity by the teacher's"
    drawn = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.title_justify = drawn.caption_justify = "left"
    for header in ("model", "stage"):
        drawn.add_column(header, no_wrap=True)
    for header in (*SCORES, "same top-1"):
        drawn.add_column(header, justify="right")
    for row in table["rows"]:
        scores = row["scores"]
        cells = [number(scores.get(key)) for key in SCORES.values()]
        cells.append(f"{100 * scores['top1_agreement']:.1f} %")
        style = "bold" if row["stage"] == "trained" else None
        drawn.add_row(row["model"], row["stage"], *cells, style=style)
    return drawn

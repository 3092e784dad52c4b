"""One HTML page that compares runs, and the numbers behind it as JSON.

The page needs no network and no scripts: style and pictures are inside it. What a run did not
record is said to be missing, never drawn empty.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnopt.errors import UserError
from attnopt.report.page import render
from attnopt.report.runs import Run, load_runs

__all__ = ["load_runs", "write_report"]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the report on some runs and return the path of its page.

    runs: folders written by `attnopt distill` (run.json and what else there is of history.json,
    evaluation.json, generation.json and masks.json).
    output: the page to write, or a folder that gets report.html; report.json is put beside it.

    Raises UserError when a folder is no run, one of its files cannot be read, or the output cannot
    be written.
    """
    loaded = load_runs(runs)
    page = output if output.suffix in (".html", ".htm") else output / "report.html"
    html = render(loaded)
    numbers = json.dumps({"runs": [_finite(_numbers(run)) for run in loaded]}, allow_nan=False)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
        page.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {page}: {error.strerror or error}") from error
    return page


def _numbers(run: Run) -> dict[str, Any]:
    """Everything that the page shows of a run, as JSON types."""
    return {
        "name": run.name,
        "label": run.label,
        "run": run.about,
        "evaluation": run.evaluation,
        "cost": run.cost(),
        "history": run.history,
        "generation": run.generation,
        "masks": _finite(run.masks, digits=4),
        "missing": run.missing(),
    }


def _finite(value: Any, digits: int | None = None) -> Any:
    """The same structure with None for what JSON has no number for (nan and the infinities)."""
    if isinstance(value, dict):
        return {key: _finite(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry, digits) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else round(value, digits)
    return value

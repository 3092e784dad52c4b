"""The report as one HTML page: tables built from the runs, pictures put in, text escaped."""

import shlex
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from attnopt.report import pictures
from attnopt.report.runs import PARTS, Run
from attnopt.report.style import TEACHER, color_of

# Below this, a teacher hardly uses attention, and every student looks perfect (nats per token).
MIN_CONTROL_KL = 0.5


def render(runs: Sequence[Run]) -> str:
    """The page as text; it refers to no file and no address outside itself."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "bytes": byte_count}
    template = resources.files("attnopt.report").joinpath("page.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        runs=runs,
        title=f"{' and '.join(run.label for run in runs)} against the teacher",
        verdicts=[_verdict(run) for run in runs if run.evaluation],
        controls=[_control(run) for run in runs if run.evaluation],
        tables=summary_tables(runs),
        missing=[_missing(run, part) for run in runs for part in run.missing()],
        loss=_markup(pictures.loss_curves(runs)),
        validation=_markup(pictures.validation_curves(runs)),
        resources=_markup(pictures.resource_curves(runs)),
        generation=_markup(pictures.generation_curves(runs)),
        coefficients=[
            (run.label, [Markup(picture) for picture in pictures.coefficient_curves(run)])
            for run in runs
        ],
        masks=[(run.label, _markup(pictures.mask_heatmaps(run))) for run in runs],
        costs=[(run.label, color_of(i), run.cost()) for i, run in enumerate(runs)],
        timing=_timing(runs),
        samples=_samples(runs),
        settings=[(run.label, _settings(run)) for run in runs],
        commands=[(run.label, shlex.join(map(str, run.about.get("argv", [])))) for run in runs],
        versions=runs[0].about.get("versions", {}),
    )


def summary_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One table of models for each text and teacher that runs were evaluated on.

    Each is {"data", "tokens", "rows"}, a row {"model", "stage", "color", "scores"} with the values
    of evaluation.json; a teacher shared by several runs has one row.
    """
    tables: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        if run.evaluation is None:
            continue
        models = run.evaluation["models"]
        key = (run.evaluation.get("data"), run.evaluation.get("tokens"), models.get("teacher"))
        table = next((t for t in tables if t["key"] == key), None)
        if table is None:
            table = {"key": key, "data": key[0], "tokens": key[1], "rows": []}
            tables.append(table)
            if models.get("teacher"):
                table["rows"].append(
                    {"model": "teacher", "stage": "", "color": TEACHER, "scores": models["teacher"]}
                )
        for stage in ("zero-shot", "student"):
            if models.get(stage):
                row = {"model": run.label, "color": color_of(i), "scores": models[stage]}
                table["rows"].append(row | {"stage": "trained" if stage == "student" else stage})
    return tables


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table cell: that many significant digits, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def byte_count(value: float | None) -> str:
    """Bytes in kB or MB (powers of ten)."""
    if value is None:
        return "–"
    return f"{value / 1e3:,.0f} kB" if value < 1e6 else f"{value / 1e6:,.2f} MB"


def _verdict(run: Run) -> str:
    models = (run.evaluation or {})["models"]
    stages = [("zero-shot", "when converted"), ("student", "after distillation")]
    ratios = [
        f"{number(models[key].get('perplexity_ratio'))} × the teacher's {when}"
        for key, when in stages
        if models.get(key)
    ]
    return f"{run.label}: perplexity {', '.join(ratios)}"


def _control(run: Run) -> dict[str, Any]:
    value = (run.evaluation or {}).get("control_self_only_kl")
    return {"label": run.label, "value": value, "weak": value is None or value < MIN_CONTROL_KL}


def _missing(run: Run, part: str) -> dict[str, str]:
    lost, command = PARTS[part]
    return {"label": run.label, "file": f"{part}.json", "lost": lost, "command": command}


def _timing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of the table of generation: one per run and length, teacher and student side by side."""
    rows = []
    for i, run in enumerate(runs):
        timing = (run.generation or {}).get("timing", [])
        by_length: dict[int, dict[str, Any]] = {}
        for entry in timing:
            by_length.setdefault(entry["new_tokens"], {})[entry["model"]] = entry
        for length, pair in sorted(by_length.items()):
            row = {"label": run.label, "color": color_of(i), "new_tokens": length}
            rows.append(row | {m: pair.get(m, {}) for m in ("teacher", "student")})
    return rows


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompts with every model's continuation; the teacher's once where runs agree on it."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for i, run in enumerate(runs):
        for sample in (run.generation or {}).get("samples", []):
            texts = prompts.setdefault(sample["prompt"], [])
            teacher = {"model": "teacher", "color": TEACHER, "text": sample["teacher"]}
            if teacher not in texts:
                texts.append(teacher)
            texts.append({"model": run.label, "color": color_of(i), "text": sample["student"]})
    return [{"prompt": prompt, "texts": texts} for prompt, texts in prompts.items()]


def _settings(run: Run) -> list[tuple[str, str]]:
    about = run.about
    rows = [("attention", about.get("attention")), ("teacher", about.get("teacher"))]
    rows += [("data", about.get("data"))]
    rows += list((about.get("training") or {}).items())
    return [(name, str(value)) for name, value in rows if value is not None]


def _markup(picture: str | None) -> Markup | None:
    return None if picture is None else Markup(picture)

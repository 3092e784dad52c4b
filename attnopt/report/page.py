"""The report as one HTML page: tables built from the runs, pictures put in, text escaped."""

import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attnopt.report import pictures
from attnopt.report.runs import PARTS, Run
from attnopt.report.style import TEACHER, color_of

# Of `attnopt.text_metrics`, as headers.
MEASURES = {
    "nll": "teacher's NLL, nats/token",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition": "repeated 4-grams",
    "loop": "longest loop",
    "self_bleu": "self-BLEU-4",
}


def render(runs: Sequence[Run]) -> str:
    """The page as text; it refers to no file and no address outside itself."""
    template = environment("attnopt.report").get_template("page.html.j2")
    return template.render(
        runs=runs,
        title=f"{' and '.join(run.label for run in runs)} against the teacher",
        verdicts=[_verdict(run) for run in runs if run.evaluation],
        controls=_controls(runs),
        tables=summary_tables([(run.label, run.evaluation) for run in runs]),
        positions=_markup(pictures.position_curves(runs)),
        measures=MEASURES,
        texts=text_tables([(run.label, run.evaluation) for run in runs]),
        missing=[_missing(run, part) for run in runs for part in run.missing()],
        loss=_markup(pictures.loss_curves(runs)),
        matched=any(run.border() for run in runs),
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
        commands=_commands(runs),
        versions=runs[0].about.get("versions", {}),
    )


def environment(package: str) -> Environment:
    """Templates of a package, beside those that all pages share; what they print is escaped."""
    loaders = [PackageLoader(name, "") for name in dict.fromkeys((package, "attnopt.report"))]
    made = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters |= {"number": number, "bytes": byte_count}
    return made


def summary_tables(
    evaluations: Sequence[tuple[str, dict[str, Any] | None]],
) -> list[dict[str, Any]]:
    """One table of models for each text and teacher that students were evaluated on.

    evaluations: a student's label with its evaluation.json, None where there is none.
    Each table is {"data", "tokens", "stride", "rows"}, a row {"model", "stage", "color", "scores"}
    with the scores of evaluation.json; a teacher shared by several students has one row. Where
    windows overlapped, so many tokens ("stride") apart, the scores have "strided" of their own.
    """
    found: list[tuple[dict[str, Any], dict[str, Any]] | None] = []
    for evaluation in (evaluation for _, evaluation in evaluations):
        if evaluation is None:
            found.append(None)
            continue
        split = f", {evaluation['split']} split" if "split" in evaluation else ""
        strided = evaluation.get("strided") or {"stride": None, "models": {}}
        models = {
            name: scores | {"strided": strided["models"].get(name, {})}
            for name, scores in evaluation["models"].items()
        }
        about = {"data": f"{evaluation.get('data')}{split}", "tokens": evaluation.get("tokens")}
        found.append((about | {"stride": strided["stride"]}, models))
    return _tables([label for label, _ in evaluations], found)


def text_tables(
    evaluations: Sequence[tuple[str, dict[str, Any] | None]],
) -> list[dict[str, Any]]:
    """One table of what models wrote for each teacher and settings, as `summary_tables`.

    Each table is {"settings", "rows"}; a row's scores are {measure: {"value", "low", "high"}}.
    """
    parts = [(evaluation or {}).get("text") for _, evaluation in evaluations]
    found = [part and ({"settings": part["settings"]}, part["models"]) for part in parts]
    return _tables([label for label, _ in evaluations], found)


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


def _tables(
    labels: Sequence[str], found: Sequence[tuple[dict[str, Any], dict[str, Any]] | None]
) -> list[dict[str, Any]]:
    """Tables that each hold the models of one description and one teacher, {..., "rows"}.

    found: per label the description of its table, and the scores of its models; or None.
    """
    tables: dict[str, dict[str, Any]] = {}
    for i, (label, part) in enumerate(zip(labels, found, strict=True)):
        if part is None:
            continue
        about, models = part
        teacher = {"model": "teacher", "stage": "", "color": TEACHER, "scores": models["teacher"]}
        table = tables.setdefault(str((about, models["teacher"])), {**about, "rows": [teacher]})
        for key, stage in (("zero-shot", "zero-shot"), ("student", "trained")):
            row = {"model": label, "stage": stage, "color": color_of(i), "scores": models[key]}
            table["rows"].append(row)
    return list(tables.values())


def _verdict(run: Run) -> str:
    models = (run.evaluation or {})["models"]
    stages = [("zero-shot", "when converted"), ("student", "after distillation")]
    ratios = [
        f"{number(models[key].get('perplexity_ratio'))} × the teacher's {when}"
        for key, when in stages
        if models.get(key)
    ]
    return f"{run.label}: perplexity {', '.join(ratios)}"


def _controls(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the self-only control says, once for the runs that share it."""
    found: dict[Any, dict[str, Any]] = {}
    for run in runs:
        if run.evaluation is not None:
            value = run.evaluation.get("control_self_only_kl")
            warning = run.evaluation.get("warning")
            control: dict[str, Any] = {"value": value, "warning": warning, "labels": []}
            found.setdefault(value, control)["labels"].append(run.label)
    return list(found.values())


def _commands(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Labels and the shell commands that made them, the teachers' first."""
    teachers = {shlex.join(run.teacher["argv"]): "teacher" for run in runs if run.teacher}
    students = [(run.label, shlex.join(map(str, run.about.get("argv", [])))) for run in runs]
    return [*((label, command) for command, label in teachers.items()), *students]


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
    """Prompts with every model's continuation; the teacher's once where runs agree on it.

    Those of `attnopt generate` where a run has them, else those of its evaluation of text.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    for i, run in enumerate(runs):
        made = run.generation or (run.evaluation or {}).get("text") or {}
        for sample in made.get("samples", []):
            texts = prompts.setdefault(sample["prompt"], [])
            teacher = {"model": "teacher", "color": TEACHER, "text": sample["teacher"]}
            if teacher not in texts:
                texts.append(teacher)
            for key, stage in (("zero-shot", ", zero-shot"), ("student", "")):
                if key in sample:
                    name = f"{run.label}{stage}"
                    texts.append({"model": name, "color": color_of(i), "text": sample[key]})
    return [{"prompt": prompt, "texts": texts} for prompt, texts in prompts.items()]


def _settings(run: Run) -> list[tuple[str, str]]:
    about = run.about
    rows = [("attention", about.get("attention")), ("teacher", about.get("teacher"))]
    rows += [("data", about.get("data"))]
    rows += list((about.get("training") or {}).items())
    return [(name, str(value)) for name, value in rows if value is not None]


def _markup(picture: str | None) -> Markup | None:
    return None if picture is None else Markup(picture)

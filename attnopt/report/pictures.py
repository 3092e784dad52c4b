"""The pictures of a report, from the numbers of runs: SVG elements, None where none apply."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attnopt.report.plots import Line, Panel, coefficient_panels, line_panels, mask_panels, smooth
from attnopt.report.runs import Run
from attnopt.report.style import TEACHER, color_of, svg

MEGABYTE = 1e6
SMOOTHED_FROM = 60  # values


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """The terms that training minimized, by step, and their sum where there are several.

    Where there are many values they are faint and their moving average lies on top.
    """
    terms = {"kl": "KL to the teacher", "ce": "cross entropy", "l1": "L1 of coefficients"}
    shown = {k: t for k, t in terms.items() if any(run.weight(k) for run in runs)}
    if len(shown) != 1:
        shown = {"loss": "total loss", **shown}
    if any(run.border() for run in runs):
        shown = {"match": "error of attention, before the KL", **shown}
    panels = []
    for key, title in shown.items():
        lines = []
        for run, line in _with_run(runs, key):
            if key == "loss":  # that of the matching stage is in the panel of "match"
                first = sum(step <= run.border() for step in line.x)
                line = replace(line, x=line.x[first:], y=line.y[first:])
            if len(line.y) >= SMOOTHED_FROM:
                lines.append(replace(line, faint=True))
                line = replace(line, y=smooth(line.y))
            if len(line.y):
                lines.append(line)
        if lines:
            panels.append(Panel(title, "step", lines))
    return panels


def loss_curves(runs: Sequence[Run]) -> str | None:
    """The picture of `loss_panels`."""
    panels = loss_panels(runs)
    return svg(line_panels(panels), "training loss by step") if panels else None


def validation_panels(runs: Sequence[Run]) -> list[Panel]:
    """Validation KL, perplexity (with the teacher's) and agreement by step."""
    panels = []
    for key, title in (
        ("eval_kl", "KL to the teacher, nats/token"),
        ("eval_perplexity", "perplexity"),
        ("eval_top1", "top-1 agreement"),
    ):
        lines = _lines(runs, key)
        if key == "eval_perplexity" and lines:
            teachers = {tuple(run.series("eval_teacher_perplexity")[1][-1:]) for run in runs}
            span = sorted({x for line in lines for x in (line.x[0], line.x[-1])})
            for (value,) in sorted(t for t in teachers if t):
                ends = [span[0], span[-1]]
                lines.append(Line("teacher", TEACHER, ends, [value, value], dashed=True))
        if lines:
            borders = [(run.border(), color_of(i)) for i, run in enumerate(runs) if run.border()]
            panels.append(Panel(title, "step", lines, from_zero=key == "eval_kl", borders=borders))
    return panels


def validation_curves(runs: Sequence[Run]) -> str | None:
    """The picture of `validation_panels`."""
    panels = validation_panels(runs)
    return svg(line_panels(panels), "validation by step") if panels else None


def position_panels(runs: Sequence[Run]) -> list[Panel]:
    """Cross-entropy and KL against the tokens of context: students, dashed before training."""
    panels, titles = [], {"ce": "cross-entropy, nats/token", "kl": "KL to the teacher, nats/token"}
    for key, title in titles.items():
        lines: list[Line] = []
        for i, run in enumerate(runs):
            found = (run.evaluation or {}).get("by_position")
            if not found:
                continue
            shown = [("zero-shot", "", color_of(i)), ("student", run.label, color_of(i))]
            if key == "ce":
                shown.insert(0, ("teacher", "teacher", TEACHER))
            for model, label, color in shown:
                pairs = zip(found["ends"], found["models"][model][key], strict=True)
                x, y = zip(*((end, mean) for end, mean in pairs if mean is not None), strict=True)
                line = Line(label, color, x, y, dashed=model == "zero-shot")
                if line not in lines:  # runs share their teacher
                    lines.append(line)
        if lines:
            panels.append(Panel(title, "tokens of context", lines, log_x=True))
    return panels


def position_curves(runs: Sequence[Run]) -> str | None:
    """The picture of `position_panels`."""
    panels = position_panels(runs)
    return svg(line_panels(panels), "loss by position in the text") if panels else None


def resource_curves(runs: Sequence[Run]) -> str | None:
    """CPU time and memory against the wall clock of training."""
    panels = []
    for key, title in (
        ("cpu_seconds", "CPU seconds"),
        ("cpu_memory_mb", "CPU memory, MiB"),
        ("gpu_memory_mb", "GPU memory, MiB"),
    ):
        lines = [
            Line(line.label, line.color, run.series("wall_seconds")[1], line.y)
            for run, line in _with_run(runs, key)
            if len(run.series("wall_seconds")[1]) == len(line.y)
        ]
        if any(value for line in lines for value in line.y):
            panels.append(Panel(title, "wall seconds", lines, from_zero=True))
    return svg(line_panels(panels), "time and memory of training") if panels else None


def generation_panels(runs: Sequence[Run]) -> list[Panel]:
    """Seconds and cache bytes against the number of generated tokens."""
    panels = []
    for key, scale, title in (
        ("seconds", 1.0, "seconds to generate"),
        ("cache_bytes", MEGABYTE, "cache at the end, MB"),
    ):
        lines: list[Line] = []
        for i, run in enumerate(runs):
            timing = (run.generation or {}).get("timing", [])
            for model in ("teacher", "student"):
                rows = [t for t in timing if t["model"] == model and t.get(key) is not None]
                if len(rows) < 2:
                    continue
                label = "teacher" if model == "teacher" else run.label
                if any(line.label == label for line in lines):
                    label = ""  # every run timed its teacher: the lines differ, the name does not
                color = TEACHER if model == "teacher" else color_of(i)
                x, y = [t["new_tokens"] for t in rows], [t[key] / scale for t in rows]
                lines.append(Line(label, color, x, y, markers=True))
        if lines:
            panels.append(Panel(title, "generated tokens", lines, log_x=True, from_zero=True))
    return panels


def generation_curves(runs: Sequence[Run]) -> str | None:
    """The picture of `generation_panels`."""
    panels = generation_panels(runs)
    return svg(line_panels(panels), "time and memory of generation by length") if panels else None


def coefficient_curves(run: Run) -> list[str]:
    """Coefficients over training, one picture per set of layers with the same coefficients."""
    records = (run.history or {}).get("coefficients") or []
    labels = (run.history or {}).get("labels") or {}
    if not records:
        return []
    groups: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for layer, named in records[0]["layers"].items():
        if not named:
            continue
        names = tuple(label for name in named for label in labels[layer][name])
        values = [
            np.concatenate([np.atleast_2d(r["layers"][layer][name]) for name in named], axis=-1)
            for r in records
        ]
        groups.setdefault(names, {})[layer] = np.stack(values)  # [steps, H or 1, C]
    steps = [record["step"] for record in records]
    return [
        svg(coefficient_panels(steps, layers, names), f"coefficients of {run.label} over training")
        for names, layers in groups.items()
    ]


def mask_heatmaps(run: Run) -> str | None:
    """The learned masks of every layer (and head, where heads differ)."""
    layers = (run.masks or {}).get("layers") or {}
    if not layers:
        return None
    figure = mask_panels({layer: np.asarray(masks) for layer, masks in layers.items()})
    return svg(figure, f"masks of {run.label}")


def _with_run(runs: Sequence[Run], key: str) -> list[tuple[Run, Line]]:
    found = []
    for i, run in enumerate(runs):
        steps, values = run.series(key)
        if len(steps) > 1:
            found.append((run, Line(run.label, color_of(i), steps, values)))
    return found


def _lines(runs: Sequence[Run], key: str) -> list[Line]:
    return [line for _, line in _with_run(runs, key)]

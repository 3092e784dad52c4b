"""Run folders as the report reads them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.checkpoints import read_json
from attnopt.errors import UserError

# File of a run folder -> (what the report loses without it, what writes it).
PARTS = {
    "history": ("loss, validation and coefficient curves, cost of training", "attnopt distill"),
    "evaluation": ("the comparison of teacher, zero-shot and student", "attnopt evaluate"),
    "generation": ("generated text, time and memory of generation", "attnopt generate --compare"),
    "masks": ("mask heatmaps", "attnopt distill"),
}


@dataclass(frozen=True)
class Run:
    """One run folder: `about` is its run.json, the other parts are None where there is no file.

    `teacher` is the pretrain.json of a teacher that was trained with `attnopt pretrain`.
    """

    name: str
    label: str
    about: dict[str, Any]
    teacher: dict[str, Any] | None
    history: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    generation: dict[str, Any] | None
    masks: dict[str, Any] | None

    def missing(self) -> list[str]:
        """The parts that are not there, by name."""
        return [part for part in PARTS if getattr(self, part) is None]

    def weight(self, term: str) -> float:
        """Weight of a term of the loss: kl, ce or l1."""
        return (self.about.get("training") or {}).get(f"{term}_weight", 0.0)

    def border(self) -> int:
        """Steps of the matching stage, 0 without one."""
        return (self.about.get("training") or {}).get("match_steps", 0)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one column of the history, where the run recorded a number."""
        rows = (self.history or {}).get("rows", [])
        points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def cost(self) -> dict[str, float]:
        """Steps, seconds and peak MiB of training; only what was recorded."""
        rows = (self.history or {}).get("rows", [])
        names = {
            "steps": "step",
            "wall_seconds": "wall_seconds",
            "cpu_seconds": "cpu_seconds",
            "peak_cpu_memory_mib": "cpu_memory_mb",
            "peak_gpu_memory_mib": "gpu_memory_mb",
        }
        found = {n: [r[k] for r in rows if _is_number(r.get(k))] for n, k in names.items()}
        return {name: max(values) for name, values in found.items() if values}


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in order, with labels that tell them apart.

    Raises UserError when there is none, a folder is no run, or a file is not readable JSON.
    """
    if not folders:
        raise UserError("a report needs at least one run folder, as `attnopt distill` writes them")
    abouts = [read_json(folder / "run.json") for folder in folders]
    for folder, about in zip(folders, abouts, strict=True):
        if about is None:
            raise UserError(f"{folder} is not a run folder: it has no run.json")
    labels = [describe(about.get("attention")) for about in abouts if about is not None]
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, about, label, name in zip(folders, abouts, labels, names, strict=True):
        parts = {part: read_json(folder / f"{part}.json") for part in PARTS}
        unique = label if labels.count(label) == 1 else f"{label} ({name})"
        assert about is not None
        teacher = read_json(Path(about.get("teacher", "")) / "pretrain.json")
        runs.append(Run(name=name, label=unique, about=about, teacher=teacher, **parts))
    return runs


def label_of(folder: Path) -> str:
    """A short name for the student of a run folder, or of a model's folder."""
    about = read_json(folder / "run.json")
    return folder.resolve().name if about is None else describe(about.get("attention"))


def describe(attention: Mapping[str, Any] | None) -> str:
    """A short name for an attention config: "last-5", "performer M=64 + last 33", "5 masks"."""
    if not attention:
        return "student"
    if "mechanism" not in attention:  # one config per layer
        distinct = list(dict.fromkeys(describe(config) for config in attention.values()))
        return " / ".join(distinct)
    per_head = ", per head" if attention.get("per_head") else ""
    if attention["mechanism"] == "lastk":
        sinks = attention.get("sinks", 0)
        extra = f" + {sinks} sink{'s' if sinks > 1 else ''}" if sinks else ""
        return f"last-{attention['window']}{extra}{per_head}"
    if attention["mechanism"] == "masks":
        return f"{len(attention['candidates'])} masks{per_head}"
    if attention["mechanism"] == "nsa":
        gates = "gates " if attention["combine"] == "gates" else ""
        blocks = f"{attention['num_selected']}x{attention['select_block']}"
        return f"nsa {gates}{blocks} + last {attention['window']}"
    if attention["mechanism"] == "routing":
        return f"routing {attention['num_clusters']} + last {attention['window']}"
    return _describe_features(attention) if "feature_map" in attention else attention["mechanism"]


def _describe_features(attention: Mapping[str, Any]) -> str:
    name = attention["feature_map"]
    name = {"favor": "performer", "taylor": "based"}.get(name, name)
    if name == "performer" and attention.get("learned"):
        name = "kerformer"
    features, window = attention.get("num_features"), attention.get("window")
    count = f" M={features}" if features else ""
    return f"{name}{count}{f' + last {window}' if window else ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

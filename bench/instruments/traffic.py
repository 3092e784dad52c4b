"""Bytes, FLOPs and exponentials of every op's kernels, counted in Triton's interpreter.

`examine` runs each subject (`traffic_subjects.py`) forward and backward at a few short lengths N
and fits, kernel by kernel, the law

    bytes = a + b N + c N^2 + s segments

with c only where the mechanism has a quadratic part and s only for FAVOR+. The law says what a head
moves at 64k tokens; that over the least possible (`attnopt.bench.work`) must stay within the
budget, and so must its growth. "Bytes" are distinct bytes of each program, what comes from L2 or
memory; "compulsory" are distinct bytes of each launch, what must come from memory.

Triton must be imported with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from attnopt.bench.instruments.traffic_counter import Kernel, Traffic, counting
from attnopt.bench.instruments.traffic_subjects import (
    BUDGETS,
    DTYPE,
    HEADS,
    SUBJECTS,
    Budget,
    D,
    Part,
    Run,
    Subject,
)
from attnopt.bench.instruments.traffic_tables import show
from attnopt.kernels.favor import plan
from attnopt.testing import force_triton

__all__ = ["count", "evaluate", "examine", "show"]

PHASES = ("forward", "backward")  # each on its own
LAWS = ("bytes", "compulsory", "flops", "exponentials")
MISFIT = 0.01  # share of a run's bytes by which the law may miss its count
MEANING = {"ratio": "bytes over the least possible", "growth": "the exponent of bytes over tokens"}
Law = dict[str, float]
Counts = dict[tuple[Part, Run], dict[str, Traffic]]


def examine(
    ops: Sequence[str] | None = None, *, subjects: Sequence[Subject] = SUBJECTS,
    budgets: Mapping[tuple[str, str, str], Budget] = BUDGETS,
) -> dict[str, Any]:
    """Count every subject and compare it with its budget.

    Args:
        ops: "lastk", "favor", "nsa"; all of them by default.
        subjects: what to count.
        budgets: by name, regime and phase of a subject; without one nothing can fail.

    Returns:
        "rows": counts by op, phase, length and kernel, with "tensors"; "laws": by op and phase,
        each quantity's law as coefficients of "1", "N", "N2" and "segments"; "failures".
    """
    chosen = [subject for subject in subjects if ops is None or subject.op in ops]
    parts = dict.fromkeys((part, run) for s in chosen for part in s.parts for run in part.runs)
    counts: Counts = {}
    for part, run in tqdm(parts, desc="traffic", unit="run", disable=None):
        counts[part, run] = count(part, *run)
    laws = [
        _summary(subject, phase, counts, budgets.get((subject.name, subject.regime, phase)))
        for subject in chosen for phase in PHASES
    ]  # fmt: skip
    rows = [row for s in chosen for phase in PHASES for row in _rows(s, phase, counts)]
    return {
        "instrument": "traffic",
        "counted": {"heads": 1, "D": D, "dtype": str(DTYPE).removeprefix("torch."),
                    "heads of the plan": HEADS},
        "rows": rows,
        "laws": laws,
        "failures": [failure for law in laws for failure in _failures(law)],
    }


def count(part: Part, tokens: int, segments: int = 1) -> dict[str, Traffic]:
    """Traffic of one run, forward and backward apart."""
    leaves, call = part.make(tokens)
    before, plan.segments_override = plan.segments_override, segments
    try:
        with force_triton():
            with counting() as forward:
                out = call()
            grad = torch.ones_like(out)
            with counting() as backward:
                torch.autograd.grad(out, leaves, grad)
    finally:
        plan.segments_override = before
    return {"forward": forward, "backward": backward}


def evaluate(law: Mapping[str, float], tokens: int, segments: int) -> float:
    """What a law says of one head."""
    terms = {"1": 1, "N": tokens, "N2": tokens**2, "segments": segments}
    return sum(coefficient * terms[name] for name, coefficient in law.items())


def _rows(subject: Subject, phase: str, counts: Counts) -> Iterator[dict[str, Any]]:
    """One row per run of the whole op and kernel."""
    for tokens, segments in subject.parts[0].runs:
        kernels = counts[subject.parts[0], (tokens, segments)][phase].kernels
        for name, kernel in kernels.items():
            yield {
                "op": subject.name, "regime": subject.regime, "phase": phase, "N": tokens,
                "segments": segments, "kernel": name, "launches": kernel.launches,
                "programs": kernel.programs, **{what: _quantity(kernel, what) for what in LAWS},
                "efficiency": kernel.efficiency, "minimum": _least_bytes(subject, phase, tokens),
                "tensors": {argument: asdict(x) for argument, x in kernel.tensors.items()},
            }  # fmt: skip


def _quantity(kernel: Kernel, what: str) -> int:
    """One of LAWS."""
    if what == "bytes":
        return kernel.moved
    if what == "compulsory":
        return kernel.total("launch_loaded") + kernel.total("launch_stored")
    return kernel.flops if what == "flops" else kernel.exponentials


def _summary(
    subject: Subject, phase: str, counts: Counts, budget: Budget | None
) -> dict[str, Any]:
    """Laws of one op and phase, and where they lead."""
    laws: dict[str, Law] = {what: defaultdict(float) for what in LAWS}
    misfit = 0.0
    for part in subject.parts:
        traffics = [counts[part, run][phase] for run in part.runs]
        kernels = dict.fromkeys(name for traffic in traffics for name in traffic.kernels)
        missed = np.zeros(len(part.runs))
        for kernel in filter(part.determines, kernels):
            for what, law in laws.items():
                found = [_quantity(traffic.kernels[kernel], what) for traffic in traffics]
                fitted = _fit(part.runs, found, part.terms)
                for term, coefficient in fitted.items():
                    law[term] += coefficient
                if what == "bytes":
                    told = [evaluate(fitted, *run) for run in part.runs]
                    missed += np.abs(np.subtract(told, found))
        whole = [sum(kernel.moved for kernel in t.kernels.values()) for t in traffics]
        misfit = max(misfit, float((missed / whole).max()))
    last = counts[subject.parts[0], subject.parts[0].runs[-1]][phase]
    moved, compulsory = (_moved(subject, laws[what], subject.at) for what in LAWS[:2])
    half = _moved(subject, laws["bytes"], subject.at // 2)
    least = _least_bytes(subject, phase, subject.at)
    return {
        "op": subject.name, "mechanism": subject.op, "regime": subject.regime, "phase": phase,
        "launches": sum(kernel.launches for kernel in last.kernels.values()),
        "laws": {what: dict(law) for what, law in laws.items()}, "misfit": misfit,
        "at": subject.at, "bytes": moved, "compulsory": compulsory, "minimum": least,
        "ratio": moved / least, "growth": math.log2(moved / half),
        "budget": None if budget is None else asdict(budget),
    }  # fmt: skip


def _fit(runs: Sequence[tuple[int, int]], counts: Sequence[int], features: Sequence[str]) -> Law:
    """Least squares; every coefficient is scaled to matter alike."""
    columns = [[evaluate({name: 1.0}, *run) for run in runs] for name in features]
    matrix = np.array(columns, float).T
    scale = matrix.max(0)
    found, *_ = np.linalg.lstsq(matrix / scale, np.array(counts, float), rcond=None)
    return dict(zip(features, (found / scale).tolist(), strict=True))


def _moved(subject: Subject, law: Law, tokens: int) -> float:
    """Bytes of one head of HEADS."""
    return evaluate(law, tokens, subject.segments(tokens, HEADS))


def _least_bytes(subject: Subject, phase: str, tokens: int) -> float:
    """The least that one head moves in a phase on its own."""
    forward = subject.least("fwd", tokens).bytes
    return forward if phase == "forward" else subject.least("bwd", tokens).bytes - forward


def _failures(law: Mapping[str, Any]) -> list[str]:
    """What is over budget, and laws that do not hold."""
    where = " ".join(filter(None, (law["op"], law["regime"], law["phase"])))
    found = []
    if law["misfit"] > MISFIT:
        terms = ", ".join(law["laws"]["bytes"])
        found.append(f"{where}: a law in {terms} must tell the bytes of every run to {MISFIT:.0%}; "
                     f"it misses one by {law['misfit']:.1%}")
    for what, limit in (law["budget"] or {}).items():
        if what in MEANING and law[what] > limit:
            found.append(f"{where}, {law['at']:,} tokens: {MEANING[what]} must be at most "
                         f"{limit:.2f}; got {law[what]:.2f} (the plan: {law['budget']['reason']})")
    return found

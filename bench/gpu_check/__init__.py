"""Everything that only a GPU can tell, in one run: numerics, times, memory, profiles, races.

    from attnopt.bench.gpu_check import run
    record = run(Path("gpu-check.json"), budget=540)

The parts share a budget of seconds, in order of importance; what one leaves, the next may use. The
file is rewritten after every step, so that a run that is cut short leaves what it found. Each step
runs in a process beside this one, so that a crash or a hang costs that step alone.
A rehearsal takes the same way on a CPU, with kernels in Triton's interpreter, at tiny sizes.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from attnopt.bench import files, machine
from attnopt.bench.gpu_check import numerics, steps
from attnopt.bench.gpu_check.sweep import Sweep
from attnopt.bench.gpu_check.workers import Event, Failure, Pool, Task
from attnopt.errors import UserError
from attnopt.testing import written_kernels

# Of each kind of run: part -> share of the budget after which it ends.
PARTS = {
    "gpu-check": {"facts": 0.15, "numerics": 0.5, "sweep": 0.86, "profile": 0.91, "sanitizer": 1.0},
    "scaling": {"facts": 0.15, "sweep": 1.0},
}
LEAST = 5.0  # seconds that a part needs to do anything
WORKERS = 8
WORKER_BYTES = 20 * 2**30  # of GPU memory, for float64 at the largest sizes of the numerics


def run(
    output: Path, *, budget: float = 540.0, rehearse: bool = False, kind: str = "gpu-check"
) -> dict[str, Any]:
    """Check this machine's GPU and write what was found.

    Args:
        output: JSON file to write.
        budget: seconds that all parts together may take.
        rehearse: on the CPU at tiny sizes.
        kind: "gpu-check", or "scaling" for its sweep alone.

    Returns:
        The record: that of a scaling run, and "numerics", "profile", "sanitizer", "parts" and
        "failures"; without failures, everything that ran was right.

    Raises:
        UserError: there is no GPU, no Triton, or the file cannot be written.
    """
    if not rehearse and not torch.cuda.is_available():
        raise UserError(
            "gpu-check needs a CUDA GPU, and PyTorch sees none; --rehearse runs it on the CPU"
        )
    if find_spec("triton") is None:
        raise UserError("gpu-check needs Triton, which is not installed")
    check = _Check(output, budget, rehearse, kind)
    try:
        for part in PARTS[kind]:
            check.attempt(part)
    finally:
        check.pool.close()
    check.record |= {"complete": True, "failures": failures(check.record)}
    check.write()
    for failure in check.record["failures"]:
        check.say(f"failure: {failure}")
    return check.record


def failures(record: dict[str, Any]) -> list[str]:
    """What is wrong, in words; empty when all that ran was right and something ran."""
    found, checked = [], record["numerics"]["cases"]
    for case in checked:
        if case["status"] in ("failed", "error"):
            found.append(f"{case['case']}: {case['reason']}")
    if record["kind"] == "gpu-check" and not any(case["status"] == "ok" for case in checked):
        found.append("numerics: no case was found right")
    everything = checked and all(case["status"] != "not run" for case in checked)
    if everything and not record["rehearsal"]:
        for name in record["numerics"]["never_launched"]:
            found.append(f"{name}: expected to be launched by some case, never was")
    for cell in record["cells"]:
        ours = record["contenders"][cell["contender"]]["ours"]
        if ours and cell["status"] in ("failed its check", "error"):
            place = "{contender} {phase} B={B} N={N}".format(**cell)
            found.append(f"{place}: {cell['status']}: {cell['reason']}")
    for result in record["sanitizer"]:
        if result["status"] == "failed":
            found.append(f"{result['tool']}: {'; '.join(result['summary'])}")
    return found


class _Check:
    """A run in progress: its record, its clock and its processes."""

    def __init__(self, output: Path, budget: float, rehearse: bool, kind: str) -> None:
        self.output, self.budget, self.rehearse, self.kind = output, budget, rehearse, kind
        self.start = time.monotonic()
        self.until = 0.0  # end of the current part
        device = "cpu" if rehearse else "cuda"
        size = 2 if rehearse else min(WORKERS, max(1, (os.cpu_count() or 2) // 2))
        self.pool = Pool(size, device, steps.environment_of(rehearse))
        command = shlex.join(["attnopt", *sys.argv[1:]])
        self.record = machine.record(kind, command, device) | {
            "rehearsal": rehearse,
            "budget": budget,
            "complete": False,
            "parts": [],
            "contenders": {},
            "cells": [],
            "numerics": {"cases": [], "kernels": {}, "never_launched": []},
            "profile": [],
            "sanitizer": [],
        }
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.write()
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from None

    def attempt(self, part: str) -> None:
        """Run a part if there is time; what goes wrong stays in the record."""
        began = time.monotonic()
        self.until = self.start + PARTS[self.kind][part] * self.budget
        entry: dict[str, Any] = {"name": part, "status": "ok"}
        self.record["parts"].append(entry)
        if self.until - began < LEAST:
            entry |= {"status": "skipped", "reason": f"no time left of {self.budget:.0f} s"}
        else:
            try:
                entry |= getattr(self, f"_{part}")() or {}
            except Exception as error:
                entry |= {"status": "error", "reason": f"{type(error).__name__}: {error}"}
                self.pool.close()  # the next part gets fresh processes
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.say(f"{part}: {entry['status']} {entry.get('reason', '')}")

    def say(self, line: str) -> None:
        """Write the file, and a line of progress."""
        self.write()
        print(f"[{self.record['elapsed']:6.1f} s] {line}", file=sys.stderr, flush=True)

    def write(self) -> None:
        """Replace the file, which is readable at any time."""
        self.record["elapsed"] = round(time.monotonic() - self.start, 2)
        files.write(self.output, self.record)

    def _facts(self) -> dict[str, Any] | None:
        task = Task("facts", f"{steps.__name__}:facts", {"rehearse": self.rehearse})
        wrong: list[Failure] = []

        def heard(task: Task, event: Event) -> None:
            self.record |= event
            self.say(f"facts: {', '.join(event)}")

        def ended(task: Task, failure: Failure | None) -> None:
            wrong.extend([failure] if failure else [])

        self.pool.run([task], self.until, heard, ended)
        return _as_entry(wrong)

    def _numerics(self) -> dict[str, Any] | None:
        tasks, found = numerics.tasks(self.rehearse), self.record["numerics"]

        def add(task: Task, case: dict[str, Any]) -> None:
            found["cases"].append(case)
            for name, entry in case.pop("kernels", {}).items():
                known = found["kernels"].setdefault(name, dict.fromkeys(entry, 0))
                known["launches"] += entry.pop("launches")
                known |= {key: max(known[key], value) for key, value in entry.items()}
            done = f"numerics {len(found['cases'])}/{len(tasks)}"
            self.say(f"{done} {task.name}: {case['status']} {case.get('reason', '')}")

        def ended(task: Task, failure: Failure | None) -> None:
            if failure:
                status = "not run" if failure["type"] == "Cut" else "error"
                reason = f"{failure['type']}: {failure['message']}"
                add(task, {"case": task.name, "status": status, "reason": reason} | failure)

        width = 2 if self.rehearse else self._fitting()
        found["cases"] += [
            {"case": task.name, "status": "not run", "reason": "no time left"}
            for task in self.pool.run(tasks, self.until, add, ended, width)
        ]
        cut = sum(case["status"] == "not run" for case in found["cases"])
        written = {name for op in numerics.OPS for name in written_kernels(op)}
        found["never_launched"] = sorted(written - set(found["kernels"]))
        return {"status": "cut", "reason": f"{cut} cases not run"} if cut else None

    def _fitting(self) -> int:
        """How many processes the GPU's memory is enough for."""
        return max(1, self.record["machine"]["memory"] // WORKER_BYTES)

    def _sweep(self) -> dict[str, Any] | None:
        if "dtype" not in self.record:
            return {"status": "skipped", "reason": "the facts that it needs are missing"}
        sweep = Sweep(self.record["contenders"], self.record["dtype"], self.until, self.rehearse)
        self.record["cells"] = sweep.cells

        def heard(task: Task, event: Event) -> None:
            sweep.heard(task, event)
            if "at" not in event:
                self.write()

        def ended(task: Task, failure: Failure | None) -> None:
            sweep.ended(task, failure)
            self.say(f"sweep {task.name}: {failure['message'] if failure else 'done'}")

        self.pool.run(sweep.warming(), self.until, lambda *_: None, lambda *_: None)
        self.say("sweep: kernels compiled")
        self.pool.run(sweep.tasks(), self.until, heard, ended, width=1)
        reason = f"{sweep.left} groups not begun"
        return {"status": "cut", "reason": reason} if sweep.left else None

    def _profile(self) -> dict[str, Any] | None:
        if "dtype" not in self.record:
            return {"status": "skipped", "reason": "the facts that it needs are missing"}
        names = [name for name, about in self.record["contenders"].items() if about["ours"]]
        arguments = {"names": names, "dtype": self.record["dtype"], "rehearse": self.rehearse}
        task = Task("profile", f"{steps.__name__}:profiles", arguments)
        wrong: list[Failure] = []

        def heard(task: Task, event: Event) -> None:
            self.record["profile"].append(event)
            self.say(f"profile {event['contender']}")

        def ended(task: Task, failure: Failure | None) -> None:
            wrong.extend([failure] if failure else [])

        self.pool.run([task], self.until, heard, ended)
        return _as_entry(wrong)

    def _sanitizer(self) -> dict[str, Any] | None:
        self.pool.close()  # their memory and contexts are no longer needed
        for tool in steps.TOOLS:
            left = self.until - time.monotonic()
            if left < LEAST:
                return {"status": "cut", "reason": f"no time left for {tool}"}
            result = steps.sanitize(tool, left, self.rehearse)
            self.record["sanitizer"].append(result)
            self.say(f"{tool}: {result['status']} {result.get('reason', '')}")
            if result["status"] == "absent":
                return {"status": "skipped", "reason": result["reason"]}
        return None


def _as_entry(wrong: list[Failure]) -> dict[str, Any] | None:
    """What a part's entry says of a failure."""
    if not wrong:
        return None
    status = "cut" if wrong[0]["type"] == "Cut" else "error"
    return {"status": status} | wrong[0] | {"reason": wrong[0]["message"]}

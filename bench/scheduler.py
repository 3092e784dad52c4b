"""`attnopt bench` on a CPU: which cells are measured within a time budget, and in what order.

Lengths double from 256. At each length the contenders of one level and phase are prepared, each in
a process of its own, timed in turn (so that ratios are paired), checked against the definition, and
released. A contender leaves the run where its next cell would cost more than its share of the
budget or more memory than there is; ours and their dense partner have the largest share.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from attnopt.bench.contenders import LEVELS, PHASES, Contender, Shape, contenders
from attnopt.bench.files import write
from attnopt.bench.growth import exceeded
from attnopt.bench.worker import OUT_OF_MEMORY, Worker, start_server
from attnopt.errors import UserError

B, H, D = 1, 12, 64
FIRST = 256  # tokens
ORDER = ("fwd", "bwd", "decode")


class Plan(NamedTuple):
    """What a level may take of the whole budget, and of that one cell; its first cell's seconds."""

    part: float
    share: float  # of ours and their dense partner
    small_share: float
    first: float


PLANS = {
    "op": Plan(0.62, 0.1, 0.02, 0.5),
    "layer": Plan(0.06, 0.3, 0.3, 2.0),
    "block": Plan(0.14, 0.12, 0.12, 2.0),
    "model": Plan(0.18, 0.25, 0.25, 10.0),
}
ROUNDS = (3, 15)
ROUND_SECONDS = 0.02  # of a level's budget, for the rounds of one group
GROWTH = (1.6, 5.0)  # of time from one length to the next, as far as it is believed
MEMORY = 0.7  # of what is free


@dataclass
class Series:
    """One contender in one phase, as the lengths go up."""

    contender: Contender
    phase: str
    seconds: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # wall seconds of the whole cell
    bytes: list[int] = field(default_factory=list)
    over: bool = False

    def next_cost(self) -> float:
        """Wall seconds that the next cell will take, from how the last two grew."""
        if not self.costs:
            return PLANS[self.contender.level].first
        return self.costs[-1] * self._growth(self.seconds)

    def next_bytes(self) -> float:
        """Memory that the next cell will take."""
        return self.bytes[-1] * self._growth(self.bytes) if self.bytes else 0.0

    @staticmethod
    def _growth(values: Sequence[float]) -> float:
        if len(values) < 2 or values[-2] <= 0:
            return 4.0
        return min(max(values[-1] / values[-2], GROWTH[0]), GROWTH[1])


class Run:
    """A run in progress: its record, written after every group of cells."""

    def __init__(
        self, record: dict[str, Any], output: Path, dtype: str, bar: Any, started: float
    ) -> None:
        self.record, self.output, self.dtype, self.bar = record, output, dtype, bar
        self.started = started

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def level(self, chosen: Sequence[Contender], phases: Sequence[str], budget: float,
              longest: int | None) -> None:
        """Measure the contenders of one level until the lengths or the budget end."""
        partners, plan = {c.partner for c in chosen}, PLANS[chosen[0].level]
        series = [Series(c, p) for p in ORDER if p in phases for c in chosen if p in c.phases]
        end = self.elapsed() + budget
        n = FIRST
        while (longest is None or n <= longest) and not all(s.over for s in series):
            for phase in ORDER:
                group, left = [], end - self.elapsed()
                for one in series:
                    if one.phase != phase or one.over:
                        continue
                    important = one.contender.ours or one.contender.name in partners
                    allowed = budget * (plan.share if important else plan.small_share)
                    why = self._refuse(one, min(allowed, left))
                    if why is None:
                        group.append(one)
                        left -= one.next_cost()
                    else:
                        one.over = True
                        self._add(one, n, {"status": "not run", "reason": why})
                if group:
                    self._group(group, n, min(ROUND_SECONDS * budget, 20.0), end)
            n *= 2

    def _refuse(self, one: Series, allowed: float) -> str | None:
        cost = one.next_cost()
        if cost > allowed or allowed <= 0:
            return f"would take about {cost:.0f} s; the time budget leaves it {max(allowed, 0):.0f}"
        free = _free_memory()
        if one.next_bytes() > free:
            return f"would need about {one.next_bytes() / 2**30:.1f} GiB; {free / 2**30:.1f} free"
        return None

    def _group(self, group: list[Series], n: int, rounds_seconds: float, end: float) -> None:
        """Cells of one length and phase: prepared, timed in turn, checked."""
        shape, patience = Shape(B, H, D, n), max(60.0, end - self.elapsed())
        alive: list[tuple[Series, Worker, dict[str, Any]]] = []
        try:
            self._measure(group, shape, alive, rounds_seconds, patience)
        finally:
            for _, worker, _ in alive:
                worker.stop()
            self._write()

    def _measure(self, group: list[Series], shape: Shape,
                 alive: list[tuple[Series, Worker, dict[str, Any]]], rounds_seconds: float,
                 patience: float) -> None:
        n = shape.N
        for one in group:
            start = time.monotonic()
            self._say(f"{one.contender.level} {one.phase} N={n} {one.contender.name}")
            worker = Worker(one.contender.name, one.phase, shape, self.dtype, _free_memory())
            found = worker.ask("prepare", patience)
            if "error" in found:
                worker.stop()
                self._fail(one, n, found["error"])
                continue
            one.costs.append(time.monotonic() - start)
            one.bytes.append(found["bytes"] or 0)
            alive.append((one, worker, found | {"times": []}))
        self._time(alive, rounds_seconds, patience)
        for one, worker, found in alive:
            start = time.monotonic()
            self._say(f"{one.contender.level} {one.phase} N={n} {one.contender.name}: check")
            checked = worker.ask("check", patience) if "error" not in found else found
            worker.stop()
            if "error" in checked:
                self._fail(one, n, checked["error"])
                continue
            one.costs[-1] += time.monotonic() - start + found.pop("spent")
            one.seconds.append(statistics.median(found["times"]))
            found |= checked
            del found["seconds"]
            wrong = exceeded(found)
            if wrong:
                words = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
                reason = f"errors above {found['limit']:.2g}: {words}"
                self._add(one, n, {"status": "failed its check", "reason": reason})
            else:
                self._add(one, n, {"status": "ok"} | found)

    def _time(self, alive: list[tuple[Series, Worker, dict[str, Any]]], seconds: float,
              patience: float) -> None:
        """Rounds over the living cells, each round starting one further."""
        start, done = time.monotonic(), 0
        for _, _, found in alive:
            found["spent"] = 0.0
        while alive and done < ROUNDS[1]:
            if done >= ROUNDS[0] and time.monotonic() - start > seconds:
                break
            for i in range(len(alive)):
                _, worker, found = alive[(i + done) % len(alive)]
                before = time.monotonic()
                if "error" in found:
                    continue
                answer = worker.ask("time", patience)
                found["spent"] += time.monotonic() - before
                if "error" in answer:
                    found["error"] = answer["error"]
                else:
                    found["times"].append(answer["seconds"])
            done += 1

    def _fail(self, one: Series, n: int, error: str) -> None:
        one.over = True
        status = OUT_OF_MEMORY if error == OUT_OF_MEMORY else "error"
        self._add(one, n, {"status": status, "reason": error})

    def _add(self, one: Series, n: int, found: dict[str, Any]) -> None:
        place = {"contender": one.contender.name, "phase": one.phase, "dtype": self.dtype,
                 "B": B, "H": H, "D": D, "N": n}
        self.record["cells"].append(place | found)

    def _say(self, words: str) -> None:
        self.bar.set_description_str(f"{words:<44.44}", refresh=False)
        self.bar.update(min(self.elapsed(), self.bar.total) - self.bar.n)

    def _write(self) -> None:
        self.record["elapsed"] = round(self.elapsed(), 1)
        write(self.output, self.record)


def run(
    output: Path,
    *,
    budget: float,
    command: str,
    levels: Sequence[str] = LEVELS,
    phases: Sequence[str] = PHASES,
    only: Sequence[str] = (),
    longest: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure on this machine's CPU, one thread, and write the results as they come.

    Args:
        output: JSON file; holds what was measured so far at any time.
        budget: seconds of the whole run, about.
        command: recorded in the file.
        levels: among "op", "layer", "block" and "model".
        phases: among "fwd", "bwd" and "decode".
        only: names of contenders; all by default, with the dense partners of those named.
        longest: N stays at or below this, 256 times a power of two; by default as far as time and
            memory go.
        dtype: of the inputs.

    Returns:
        The record. A keyboard interrupt ends the run early, with what there is.

    Raises:
        ValueError: unknown levels, phases or contenders.
        UserError: there is nothing to measure, or the file cannot be written.
    """
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the cells' processes, which start from here
    chosen = _choose(levels, phases, only)
    import torch
    from tqdm import tqdm

    from attnopt.bench import machine

    device, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    record = machine.record("scaling", command, device)
    record["ceilings"] = machine.ceilings(device, [getattr(torch, dtype)])
    torch.set_num_threads(threads)
    present = [c for c in chosen if c.missing(device, getattr(torch, dtype)) is None]
    record["missing"] = {
        c.name: c.missing(device, getattr(torch, dtype)) for c in chosen if c not in present
    }
    why = [f"{name}: {record['missing'][name]}" for name in only if name in record["missing"]]
    if why:
        raise UserError(f"cannot measure {'; '.join(why)}")
    if not any(phase in c.phases for c in present for phase in phases):
        raise UserError(f"nothing to measure: no such contender has the phase {', '.join(phases)}")
    record |= {"contenders": {c.name: c.about() for c in present}, "cells": []}
    try:
        write(output, record)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    form = "{percentage:3.0f} % of the budget |{bar}| {elapsed} {desc}"
    start_server(dtype)
    with tqdm(total=budget, bar_format=form) as bar:
        running = Run(record, output, dtype, bar, started)
        parts = {n: PLANS[n].part for n in LEVELS if n in {c.level for c in present}}
        try:
            for name, part in parts.items():
                later = sum(list(parts.values())[list(parts).index(name):])
                left = (budget - running.elapsed()) * part / later
                some = [c for c in present if c.level == name]
                running.level(some, phases, left, longest)
        except KeyboardInterrupt:
            record["interrupted"] = True
        running._write()
    return record


def _choose(levels: Sequence[str], phases: Sequence[str], only: Sequence[str]) -> list[Contender]:
    unknown = set(phases) - set(PHASES)
    if unknown:
        raise ValueError(f"phases are {', '.join(PHASES)}; got {', '.join(sorted(unknown))}")
    listed = contenders(levels)
    if not only:
        return listed
    known = {c.name: c for c in listed}
    missing = set(only) - set(known)
    if missing:
        raise ValueError(f"contenders are {', '.join(known)}; got {', '.join(sorted(missing))}")
    wanted = set(only) | {known[name].partner for name in only}
    return [c for c in listed if c.name in wanted]


def _free_memory() -> int:
    import psutil

    return int(MEMORY * psutil.virtual_memory().available)

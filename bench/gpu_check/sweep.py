"""How fast: every contender from 512 to 65,536 tokens, checked at the shape that is timed."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnopt.bench.contenders import Contender, Prepared, Shape, contenders
from attnopt.bench.gpu_check.device import Clock, Device
from attnopt.bench.gpu_check.workers import Event, Failure, Task

LENGTHS = tuple(2**n for n in range(9, 17))
GROUPS = [
    (batch, phase, length)
    for batch in (1, 4, 16) for phase in ("fwd", "bwd", "decode") for length in LENGTHS
]  # fmt: skip
# FlexAttention is compiled anew for every shape, for many seconds: some lengths, after all others.
LATE = [(1, phase, length) for length in (4096, 16384, 65536) for phase in ("fwd", "bwd")]
LATE_NAME = "flex"
SIZES = {"H": 12, "D": 64}
TINY = [(1, "fwd", 32), (1, "bwd", 32), (1, "decode", 32), (1, "fwd", 64)]
ROUNDS = 5
SETS = 8  # inputs to rotate among, at most
DRAWS = 3  # of NSA, where rounding may change which blocks are selected
PATIENCE = 3.0  # seconds: a call that is expected to take longer is not run
SECONDS = 150.0  # of one group: compiling, checking, timing
GRACE = 5.0  # seconds before the end at which a group begins to wind up


class Sweep:
    """The groups of cells in order of importance, and the cells that they gave.

    A group is all contenders of one shape, in one process, in interleaved rounds. Where a group
    breaks off, it is begun again without the contender that broke it.

    Attributes:
        cells: those so far.
        left: how many groups there was no time for.
    """

    def __init__(self, about: dict[str, dict[str, Any]], dtype: str, until: float,
                 rehearse: bool) -> None:
        """Plan.

        Args:
            about: contenders by name, with "phases".
            dtype: of q, k and v.
            until: end by `time.monotonic`.
            rehearse: tiny sizes.
        """
        self.cells: list[dict[str, Any]] = []
        self.left = 0
        self._about, self._until, self._rehearse = about, until - GRACE, rehearse
        self._sizes = {"dtype": dtype, **({"H": 2, "D": 16} if rehearse else SIZES)}
        self._rounds = 2 if rehearse else ROUNDS
        early = [name for name in about if LATE_NAME not in name]
        late = [name for name in about if LATE_NAME in name]
        self._groups = [(group, early) for group in (TINY if rehearse else GROUPS)]
        self._groups += [(group, late) for group in ([] if rehearse else LATE) if late]
        self._again: list[Task] = []
        self._at = ""  # the contender that the group is at

    def warming(self) -> list[Task]:
        """What compiles the kernels of our contenders, one task each; what they find is no result.

        Triton keeps what it compiled on disk, where the groups then find it.
        """
        (batch, _, length), _ = self._groups[0]
        phases = ("fwd",) if self._rehearse else ("fwd", "bwd", "decode")
        return [
            self._task(self._sizes | {"B": batch, "N": length, "phase": phase}, [name])
            for phase in phases for name, about in self._about.items() if about["ours"]
        ]  # fmt: skip

    def tasks(self) -> Iterator[Task]:
        """Groups, each planned when it is asked for, by what the shorter ones took."""
        for (batch, phase, length), names in self._groups:
            yield from self._broken()
            if time.monotonic() >= self._until:
                self.left += 1
                continue
            names = [name for name in names if phase in self._about[name]["phases"]]
            sizes = self._sizes | {"B": batch, "N": length, "phase": phase}
            tried = []
            for name in names:
                why = self._hopeless(name, sizes)
                if why:
                    self._add(name, sizes, "not run", why)
                else:
                    tried.append(name)
            if tried:
                yield self._task(sizes, tried)
        yield from self._broken()

    def _broken(self) -> Iterator[Task]:
        while self._again:
            yield self._again.pop()

    def _task(self, sizes: dict[str, Any], names: list[str]) -> Task:
        name = "{phase} B={B} N={N}".format(**sizes)
        arguments = {"sizes": sizes, "names": names, "until": self._until, "rounds": self._rounds}
        return Task(name, f"{__name__}:measure", arguments, SECONDS)

    def _hopeless(self, name: str, sizes: dict[str, Any]) -> str | None:
        """Why a contender should not be tried, from its cell of half the length."""
        before = sizes | {"N": sizes["N"] // 2}
        for cell in self.cells:
            if cell["contender"] == name and all(cell[key] == x for key, x in before.items()):
                seconds = 4 * statistics.median(cell.get("times", [0.0]))
                if seconds > PATIENCE:
                    return f"a call would take about {seconds:.0f} s"
                if cell["status"] == "out of memory":
                    return f"out of memory at N={before['N']}"
                if cell["status"] == "not run":
                    return cell["reason"]
        return None

    def _add(self, name: str, sizes: dict[str, Any], status: str, reason: str) -> None:
        self.cells.append({"contender": name, **sizes, "status": status, "reason": reason})

    def heard(self, task: Task, event: Event) -> None:
        """Take what a group tells."""
        if "at" in event:
            self._at = event["at"]
        else:
            self.cells.append(event)

    def ended(self, task: Task, failure: Failure | None) -> None:
        """Blame the contender that a group broke off at, and plan the others again."""
        at, self._at = self._at, ""
        if failure is None:
            return
        sizes = task.arguments["sizes"]
        told = {
            cell["contender"] for cell in self.cells
            if all(cell[key] == x for key, x in sizes.items())
        }  # fmt: skip
        rest = [name for name in task.arguments["names"] if name not in told]
        status, blamed = "not run" if failure["type"] == "Cut" else "error", rest
        if status == "error" and at in rest:
            blamed, others = [at], [name for name in rest if name != at]
            self._again += [self._task(sizes, others)] if others else []
        for name in blamed:
            self._add(name, sizes, status, f"{failure['type']}: {failure['message']}")


@dataclass
class _Timed:
    """A contender that is checked and ready."""

    cell: dict[str, Any]
    clock: Clock
    prepared: list[Prepared]
    times: list[float] = field(default_factory=list)


def measure(
    device: Device, sizes: dict[str, Any], names: list[str], until: float, rounds: int
) -> Iterator[Event]:
    """Check and time contenders of one shape.

    Args:
        device: where.
        sizes: "phase", "dtype", B, H, D and N.
        names: of contenders.
        until: end by `time.monotonic`.
        rounds: how often each is timed, taking turns.

    Yields:
        {"at": name} before each contender, and cells.
    """
    known = {contender.name: contender for contender in contenders(("op",), device.torch_device)}
    batch: list[_Timed] = []
    for name in names:
        yield {"at": name}
        cell = {"contender": name, **sizes}
        if time.monotonic() > until:
            yield cell | {"status": "not run", "reason": "no time left"}
            continue
        made = _attempt(device, known[name], cell)
        if made["status"] == "out of memory" and batch:  # the others hold too much
            yield from _finish(device, batch, rounds, until)
            batch = []
            device.release()
            made = _attempt(device, known[name], cell)
        if "timed" in made:
            batch.append(made["timed"])
        else:
            yield made
    yield from _finish(device, batch, rounds, until)
    if "torch._dynamo" in sys.modules:  # it keeps a few shapes only
        torch._dynamo.reset()


def _attempt(device: Device, contender: Contender, cell: dict[str, Any]) -> dict[str, Any]:
    """A contender that is ready, or the cell that says why not."""
    dtype = getattr(torch, cell["dtype"])
    reason = contender.missing(device.torch_device, dtype)
    if reason:
        return cell | {"status": "not run", "reason": reason}
    try:
        with device.launching():
            return _prepare(device, contender, cell, dtype)
    except torch.OutOfMemoryError as error:
        return cell | {"status": "out of memory", "reason": str(error)[:200]}
    except Exception as error:
        device.synchronize()  # where the GPU is lost, this raises, and the process ends
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        return cell | {"status": "error", "reason": reason}


def _prepare(
    device: Device, contender: Contender, cell: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    shape = Shape(*(cell[letter] for letter in ("B", "H", "D", "N")))

    def make(seed: int) -> Prepared:
        return contender.prepare(cell["phase"], shape, dtype, device.torch_device, seed)

    for seed in range(DRAWS if contender.mechanism == "nsa" else 1):
        prepared = make(seed)
        errors = prepared.check()
        right = all(error <= prepared.limit for error in errors.values())
        if right:
            break
    cell = cell | {"errors": errors, "limit": prepared.limit}
    if not right:
        worst = max(errors.values(), key=lambda x: (x != x, x))
        reason = f"an error of {worst:.2g}, expected at most {prepared.limit:.2g}"
        return cell | {"status": "failed its check", "reason": reason}
    with device.hearing() as heard:
        peak = device.peak(prepared.call) + prepared.state_bytes
    launches = {name: entry["launches"] for name, entry in heard.items()}
    cell |= {"status": "ok", "bytes": peak, "kernels": launches}
    cell |= {"flops": prepared.work.flops, "minimal_bytes": prepared.work.bytes}
    count = min(SETS, max(1, math.ceil(2 * device.cache_bytes / prepared.work.bytes)))
    sets = [prepared, *(make(seed) for seed in range(1, count))]
    clock = Clock(device, [prepared.call for prepared in sets])
    return {"status": "ok", "timed": _Timed(cell, clock, sets)}


def _finish(
    device: Device, batch: Sequence[_Timed], rounds: int, until: float
) -> Iterator[Event]:
    """Time in interleaved rounds; at least one."""
    with device.launching():
        for _ in range(rounds):
            for timed in batch:
                if not timed.times or time.monotonic() < until:
                    timed.times.append(timed.clock.round())
    for timed in batch:
        yield timed.cell | {"times": timed.times, "host_seconds": timed.clock.host_seconds}

"""The other parts of a check: facts of the machine, profiles of our ops, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from attnopt.bench import machine
from attnopt.bench.contenders import Shape, contenders, find
from attnopt.bench.gpu_check.device import Device
from attnopt.bench.gpu_check.numerics import run, to_device
from attnopt.bench.gpu_check.sweep import ROUNDS
from attnopt.bench.gpu_check.workers import Event
from attnopt.testing import cases

PROFILED_TOKENS = 16384
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def facts(device: Device, rehearse: bool) -> Iterator[Event]:
    """Yield the dtype and the contenders of the sweep, and the ceilings of the machine."""
    torch_device, dtype = device.torch_device, device.low_precision()
    known = contenders(("op",), torch_device)
    if rehearse:  # one of ours per mechanism
        first = {x.mechanism: x.name for x in reversed(known) if x.ours}
        known = [x for x in known if not x.ours or x.name in first.values()]
    about = {x.name: x.about() | {"phases": x.phases} for x in known}
    timing = f"{device.clock_name} of calls back to back, in {ROUNDS} interleaved rounds; " \
        "host_seconds: what launching a call took"
    yield {"dtype": str(dtype).removeprefix("torch."), "contenders": about, "timing": timing}
    scale = 0.02 if rehearse else 1.0
    yield {"ceilings": machine.ceilings(torch_device, [torch.float32, dtype], scale=scale)}


def profiles(device: Device, names: list[str], dtype: str, rehearse: bool) -> Iterator[Event]:
    """Yield, for each of these contenders forward + backward, what takes the time."""
    shape = Shape(1, 2, 16, 32) if rehearse else Shape(1, 12, 64, PROFILED_TOKENS)
    for name in names:
        contender = find(name, device.torch_device)
        prepared = contender.prepare("bwd", shape, getattr(torch, dtype), device.torch_device, 0)
        with device.launching():
            prepared.call()
            rows = device.profile(prepared.call)
        yield {"contender": name, "N": shape.N, "rows": rows}


def few_cases(device: str, limit: int) -> None:
    """Run small cases of every op, forward and backward, with and without padding."""
    chosen = [
        case for case in cases()
        if case.phase in ("fwd", "bwd") and case.dtype == torch.bfloat16
    ]  # fmt: skip
    for case in chosen[:limit]:
        run(case, to_device(case.make(), torch.device(device)), "triton")
        Device.of(device).synchronize()
        print("ran", case.id, flush=True)


def sanitize(tool: str, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Run small cases under a tool of compute-sanitizer.

    Every tensor is then an allocation of its own, so that an access beyond it is seen.

    Args:
        tool: "memcheck" or "racecheck".
        seconds: when to give up.
        rehearse: one case on the CPU.

    Returns:
        "status": "ok", "failed", "absent" or "no result"; "summary" and "exit_status"; "lines" that
        the tool printed.
    """
    found = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if found is None:
        return {"tool": tool, "status": "absent", "reason": f"{SANITIZER} is not on the PATH"}
    arguments = ("cpu", 1) if rehearse else ("cuda", 99)
    code = f"from {__name__} import few_cases; few_cases{arguments}"
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | environment_of(rehearse)
    command = [found, "--tool", tool, sys.executable, "-c", code]
    process = subprocess.Popen(
        command, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    said = process.communicate()[0].splitlines()
    late = not timer.is_alive()
    timer.cancel()
    summaries = [line.strip("= ") for line in said if SUMMARY.search(line)]
    bad = any(int(count) for line in summaries for count in SUMMARY.findall(line))
    result: dict[str, Any] = {"tool": tool, "status": "failed" if bad else "ok"}
    if not bad and (process.returncode or not summaries):
        reason = f"not done within {seconds:.0f} s" if late else "it broke off"
        result |= {"status": "no result", "reason": reason}
    return result | {
        "exit_status": process.returncode,
        "summary": summaries,
        "cases": sum(line.startswith("ran ") for line in said),
        "lines": [] if result["status"] == "ok" else said[:20] + said[-20:],
    }


def environment_of(rehearse: bool) -> dict[str, str]:
    """Variables of every process of a check: it finds this package, and Triton its mode."""
    paths = [str(machine.CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "TRITON_INTERPRET": "1" if rehearse else "0",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }

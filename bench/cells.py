"""Cells of a scaling study on a CPU: one operation at one length, in a fresh process, one thread.

A cell is the least CPU time of several calls forward + backward, and the peak of resident memory
above that before the first of them (Linux). It may use up to LIMIT bytes; beyond, it counts as out
of memory.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

LIMIT = 16 * 2**30
SECONDS = 4.0  # of repetition per cell, after a short call that loads what is loaded once


def gradients(op, *tensors):
    """The output of `op` and the gradients of all tensors but the last, the upstream gradient."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def largest_error(found, truth):
    """Largest relative error (Frobenius) of several tensors."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True))


def resident(field):
    """Resident memory of this process, bytes: VmRSS is now, VmHWM the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(call, first_call, limit=LIMIT):
    """One cell: {"seconds", "bytes", "calls"}, or {"error"}.

    Args:
        call: what is timed.
        first_call: the same on little data, before memory is counted.
        limit: bytes of address space that the process may use.
    """
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    first_call()
    before, times = resident("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    try:
        while len(times) < 3 or sum(times) < SECONDS:
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    except (RuntimeError, MemoryError) as error:
        return {"error": "out of memory" if "memory" in str(error) else str(error)[:200]}
    return {"seconds": min(times), "bytes": resident("VmHWM") - before, "calls": len(times)}


def run_cell(script, name, n):
    """A cell in a process of its own: `python script --cell name n`, which prints it."""
    command = [sys.executable, script, "--cell", name, str(n)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    cell = json.loads(lines[-1]) if lines else {"error": done.stderr[-200:] or "killed"}
    print(name, n, cell, flush=True)
    return cell


def exponent(cells, key):
    """Slope of log(value) over log(N), by least squares; cells by N."""
    points = [(math.log(n), math.log(c[key])) for n, c in cells.items() if c.get(key, 0) > 0]
    x, y = zip(*points, strict=True)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / spread


def processor():
    """Name of the processor, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path, record):
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

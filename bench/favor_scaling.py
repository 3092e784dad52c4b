"""Is FAVOR+ on a CPU linear in N, and how does it compare with performer-pytorch?

    pip install --no-deps performer-pytorch==1.1.4 local-attention axial-positional-embedding einops
    python bench/favor_scaling.py --output bench/results/favor-cpu.json

Every cell is a fresh process with one thread: causal attention, forward + backward of q, k and v,
at B=1 H=12 D=64 M=64 in fp32, the least CPU time of several calls, and the peak of resident memory
above that before the first of them (Linux). A cell may use up to 16 GiB; beyond, it counts as out
of memory.

    favor-0     attnopt.favor_attention, pure features
    favor-33    the same with an exact window of 33 tokens in blocks of 32
    performer   performer_pytorch.FastAttention, causal, its fallback for machines without CUDA
    sdpa        F.scaled_dot_product_attention, causal and exact: another function, for the scale

Before anything is timed, the first two are checked against the float64 definition, output and
gradients (1e-5 at most). The error of performer against exact FAVOR+ on its own projection is
recorded too: it adds an epsilon to every feature and stabilizes with a maximum over all keys.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from attnopt import favor_attention, orthogonal_projection

H, D, M = 12, 64, 64
SIZES = (1024, 2048, 4096, 8192, 16384)
NAMES = ("favor-0", "favor-33", "performer", "sdpa")
DENSE_UP_TO = 4096
LIMIT = 16 * 2**30
SECONDS = 4.0  # of repetition per cell, after two calls


def inputs(n):
    """q, k, v and the upstream gradient, of unit variance."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, n, D, generator=generator) for _ in range(4)]


def operation(name):
    """The attention of that name: q, k, v to the output."""
    if name == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == "performer":
        torch.manual_seed(0)
        peer = import_module("performer_pytorch")  # no dependency of this project
        return peer.FastAttention(dim_heads=D, nb_features=M, causal=True)
    rows = orthogonal_projection(M, D, generator=torch.Generator().manual_seed(0))
    window = int(name.removeprefix("favor-"))
    return lambda q, k, v: favor_attention(q, k, v, rows, window=window, backend="eager")


def gradients(op, q, k, v, grad):
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(name, n=512):
    """Largest relative error (Frobenius) of output and gradients against the definition."""
    rows = orthogonal_projection(M, D, generator=torch.Generator().manual_seed(0))
    op, window = operation(name), 0
    if name == "performer":
        rows = op.projection_matrix
    else:
        window = int(name.removeprefix("favor-"))

    def exact(q, k, v):
        return favor_attention(q, k, v, rows.double(), window=window, backend="reference")

    found = gradients(op, *inputs(n))
    truth = gradients(exact, *(x.double() for x in inputs(n)))
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True))


def resident(field):
    """Resident memory of this process, bytes: VmRSS is now, VmHWM the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name, n):
    """One cell: {"seconds", "bytes"}, or {"error"}."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    op, tensors = operation(name), inputs(n)
    gradients(op, *(x[:, :, :128] for x in tensors))  # loads what is loaded once
    before, times = resident("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    try:
        while len(times) < 3 or sum(times) < SECONDS:
            start = time.process_time()
            gradients(op, *tensors)
            times.append(time.process_time() - start)
    except (RuntimeError, MemoryError) as error:
        return {"error": "out of memory" if "memory" in str(error) else str(error)[:200]}
    return {"seconds": min(times), "bytes": resident("VmHWM") - before, "calls": len(times)}


def exponent(cells, key):
    """Slope of log(value) over log(N), by least squares."""
    points = [(math.log(n), math.log(c[key])) for n, c in cells.items() if c.get(key, 0) > 0]
    x, y = zip(*points, strict=True)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / spread


def main():
    """Check, measure every cell in a process of its own, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("favor-cpu.json"))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(measure(given.cell[0], int(given.cell[1]))))
        return
    errors = {name: check(name) for name in NAMES[:3]}
    for name in NAMES[:2]:
        assert errors[name] < 1e-5, f"{name} is wrong: error {errors[name]:.2g}"
    cells = {name: {} for name in NAMES}
    for n in SIZES:
        for name in NAMES:
            if name == "sdpa" and n > DENSE_UP_TO:
                continue
            command = [sys.executable, __file__, "--cell", name, str(n)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            cells[name][n] = json.loads(lines[-1]) if lines else {"error": "killed"}
            print(name, n, cells[name][n], flush=True)
    record = {
        "question": __doc__.splitlines()[0],
        "shape": {"B": 1, "H": H, "D": D, "M": M, "dtype": "float32", "threads": 1},
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "performer-pytorch")},
        "error_against_float64": errors,
        "cells": cells,
        "exponents": {
            name: {key: exponent(cells[name], key) for key in ("seconds", "bytes")}
            for name in NAMES[:2]
        },
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

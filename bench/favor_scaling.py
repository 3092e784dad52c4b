"""Is FAVOR+ on a CPU linear in N, and how does it compare with performer-pytorch?

    pip install --no-deps performer-pytorch==1.1.4 local-attention axial-positional-embedding einops
    python bench/favor_scaling.py --output bench/results/favor-cpu.json

Causal attention, forward + backward of q, k and v, at B=1 H=12 D=64 M=64 in fp32, one thread;
`cells.py` says how a cell is measured.

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
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from cells import exponent, gradients, largest_error, measure, processor, run_cell, write

from attnopt import favor_attention, orthogonal_projection

H, D, M = 12, 64, 64
SIZES = (1024, 2048, 4096, 8192, 16384)
NAMES = ("favor-0", "favor-33", "performer", "sdpa")
DENSE_UP_TO = 4096


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
    return largest_error(found, truth)


def cell(name, n):
    """One cell."""
    op, tensors = operation(name), inputs(n)
    small = [x[:, :, :128] for x in tensors]
    return measure(lambda: gradients(op, *tensors), lambda: gradients(op, *small))


def main():
    """Check, measure every cell in a process of its own, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("favor-cpu.json"))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(cell(given.cell[0], int(given.cell[1]))))
        return
    errors = {name: check(name) for name in NAMES[:3]}
    for name in NAMES[:2]:
        assert errors[name] < 1e-5, f"{name} is wrong: error {errors[name]:.2g}"
    cells = {name: {} for name in NAMES}
    for n in SIZES:
        for name in NAMES:
            if name == "sdpa" and n > DENSE_UP_TO:
                continue
            cells[name][n] = run_cell(__file__, name, n)
    record = {
        "question": __doc__.splitlines()[0],
        "shape": {"B": 1, "H": H, "D": D, "M": M, "dtype": "float32", "threads": 1},
        "processor": processor(),
        "versions": {name: version(name) for name in ("torch", "performer-pytorch")},
        "error_against_float64": errors,
        "cells": cells,
        "exponents": {
            name: {key: exponent(cells[name], key) for key in ("seconds", "bytes")}
            for name in NAMES[:2]
        },
    }
    write(given.output, record)


if __name__ == "__main__":
    main()

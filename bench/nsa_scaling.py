"""Is NSA on a CPU linear in memory, from where is it ahead of dense attention, and of its peer?

    pip install --no-deps native-sparse-attention-pytorch==0.2.3 einx jaxtyping einops \\
        rotary-embedding-torch local-attention hyper-connections wadler-lindig sympy frozendict
    python bench/nsa_scaling.py --output bench/results/nsa-cpu.json

Forward + backward at B=1 H=12 D=64 in fp32, one thread; `cells.py` says how a cell is measured.

    gates   attnopt.nsa_attention, three softmaxes, l=32 d=16 b=32 S=8 W=128, mean compression
    merged  the same under one softmax, l=d=b=32
    sdpa    F.scaled_dot_product_attention, causal and exact: another function, for the scale
    layer   gates between the projections of a layer: q, k, v and gates from 768 numbers, and out
    peer    native_sparse_attention_pytorch.SparseAttention with the same sizes, causal, without
            its norm; projections, rotary embedding and compression are its own

The first two are checked before anything is timed, output and gradients, against the float64
definition (1e-5 at most).
"""

import argparse
import itertools
import json
import math
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from cells import exponent, gradients, largest_error, measure, processor, run_cell, write
from torch import nn

from attnopt import mean_compress, nsa_attention

H, D = 12, 64
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LARGEST = {"sdpa": 8192, "layer": 1024, "peer": 1024}
NAMES = ("gates", "merged", "sdpa", "layer", "peer")
SHARED = {"select_block": 32, "num_selected": 8, "window": 128}
STRIDE = {"gates": 16, "merged": 32}


class Layer(nn.Module):
    """Projections around `nsa_attention` with gates, of the peer's sizes."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D, bias=False)
        self.gates = nn.Linear(H * D, 3 * H)
        self.out = nn.Linear(H * D, H * D, bias=False)

    def forward(self, x):
        """`[1, N, H D]` to the same."""
        q, k, v = (part.unflatten(2, (H, D)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        gates = self.gates(x).sigmoid().unflatten(2, (H, 3)).transpose(1, 2)
        return self.out(attend("gates", q, k, v, gates).transpose(1, 2).flatten(2))


def attend(name, q, k, v, gates=None, backend="eager"):
    """Mean compression and attention."""
    sizes = {"compress_block": 32, "compress_stride": STRIDE[name]}
    k_cmp, v_cmp = (mean_compress(x, **sizes) for x in (k, v))
    return nsa_attention(
        q, k, v, k_cmp, v_cmp, gates=gates, combine=name, backend=backend, **sizes, **SHARED
    )


def operation(name):
    """The operation of that name, tensors to the output."""
    torch.manual_seed(0)
    if name == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == "layer":
        return Layer()
    if name == "peer":
        peer = import_module("native_sparse_attention_pytorch")  # no dependency of this project
        return peer.SparseAttention(
            dim=H * D, dim_head=D, heads=H, causal=True, norm=False,
            sliding_window_size=SHARED["window"], compress_block_size=32,
            compress_block_sliding_stride=STRIDE["gates"],
            selection_block_size=SHARED["select_block"],
            num_selected_blocks=SHARED["num_selected"],
        )  # fmt: skip
    return partial(attend, name)


def inputs(name, n):
    """Inputs of unit variance and the upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    if name in ("layer", "peer"):
        return [torch.randn(1, n, H * D, generator=generator) for _ in range(2)]
    q, k, v, grad = (torch.randn(1, H, n, D, generator=generator) for _ in range(4))
    if name != "gates":
        return [q, k, v, grad]
    return [q, k, v, torch.rand(1, H, n, 3, generator=generator), grad]


def check(name, n=512):
    """Largest relative error of output and gradients against the definition."""
    exact = partial(attend, name, backend="reference")
    truth = gradients(exact, *(x.double() for x in inputs(name, n)))
    return largest_error(gradients(operation(name), *inputs(name, n)), truth)


def cell(name, n):
    """One cell; the parameters of a layer have gradients too."""
    op = operation(name)
    if name in ("layer", "peer"):
        def call(tensors):
            op(tensors[0].requires_grad_()).backward(tensors[1])
    else:
        def call(tensors):
            gradients(op, *tensors)
    large, small = inputs(name, n), inputs(name, 128)
    return measure(lambda: call(large), lambda: call(small))


def crossover(ours, dense):
    """Length from which ours is faster, between two measured ones by a straight line in logs."""
    gains = [(n, math.log(dense[n]["seconds"] / ours[n]["seconds"])) for n in sorted(dense)]
    for (n, gain), (n2, gain2) in itertools.pairwise(gains):
        if gain < 0 <= gain2:
            return round(n * (n2 / n) ** (-gain / (gain2 - gain)))
    return None


def main():
    """Check, measure every cell in a process of its own, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("nsa-cpu.json"))
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(cell(given.cell[0], int(given.cell[1]))))
        return
    errors = {name: check(name) for name in STRIDE}
    for name, error in errors.items():
        assert error < 1e-5, f"{name} is wrong: error {error:.2g}"
    cells = {
        name: {n: run_cell(__file__, name, n) for n in SIZES if n <= LARGEST.get(name, n)}
        for name in NAMES
    }
    dense = cells["sdpa"]
    write(given.output, {
        "question": __doc__.splitlines()[0],
        "shape": {"B": 1, "H": H, "D": D, "dtype": "float32", "threads": 1, **SHARED,
                  "compress_block": 32, "compress_stride": STRIDE},
        "processor": processor(),
        "versions": {
            name: version(name) for name in ("torch", "native-sparse-attention-pytorch")
        },
        "error_against_float64": errors,
        "cells": cells,
        "exponents": {
            name: {key: exponent({n: c for n, c in cells[name].items() if n >= 2048}, key)
                   for key in ("seconds", "bytes")}
            for name in STRIDE
        },
        "times_faster_than_dense": {
            name: {n: dense[n]["seconds"] / cells[name][n]["seconds"] for n in dense}
            for name in STRIDE
        },
        "faster_than_dense_from": {name: crossover(cells[name], dense) for name in STRIDE},
        "times_faster_than_peer": {
            n: cells["peer"][n]["seconds"] / cells["layer"][n]["seconds"]
            for n in cells["peer"] if "seconds" in cells["peer"][n]
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()

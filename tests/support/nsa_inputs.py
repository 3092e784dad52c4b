"""Inputs of Native Sparse Attention for tests, and the results to compare: values and gradients.

`make_inputs(**sizes)` makes the tensors of a call and `make_options(sizes)` its other arguments,
from one dict of sizes; SHAPES are such dicts, small enough for Triton's interpreter. `define` is
the definition, `plain_loops` a slow one that shares nothing with it.
"""

import math
from collections.abc import Iterable
from itertools import product

import pytest
import torch
from attention_inputs import DEVICE, make_mask, make_qkv
from torch import Tensor

from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.reference import nsa_reference

PADDINGS = ["none", "left", "right", "holes"]
BRANCHES = ("select", "window")
SEPARATE = ("k_select", "v_select", "k_window", "v_window")
FLOATS = ("q", "k", "v", "k_cmp", "v_cmp", "gates", *SEPARATE)
DEFAULTS = {
    "b": 2, "h": 2, "hkv": 2, "n": 63, "extra": 0, "d": 16, "block": 8, "stride": 8, "select": 8,
    "count": 3, "window": 9, "sinks": 1, "local": 1,
}  # fmt: skip
GEOMETRY = [  # n queries of n + extra tokens, heads, geometry and what is chosen
    {"n": 1},
    {"n": 1, "extra": 62, "h": 4, "hkv": 1, "d": 20},
    {"n": 1, "block": 8, "stride": 4, "select": 16, "h": 4, "hkv": 2},
    {"n": 63, "count": 3, "window": 5, "sinks": 0},
    {"n": 63, "d": 20, "h": 4, "hkv": 2, "select": 16, "block": 16, "stride": 16, "window": 16},
    {"n": 63, "d": 20, "block": 5, "stride": 3, "h": 2, "hkv": 1, "count": 4, "local": 2},
    {"n": 63, "block": 8, "stride": 4, "select": 16, "h": 4, "hkv": 1, "local": 2},
    {"n": 37, "extra": 26, "block": 8, "stride": 4, "select": 16, "h": 2, "hkv": 2, "count": 2},
    {"n": 100, "select": 24, "block": 24, "stride": 24, "h": 2, "hkv": 1, "sinks": 0, "window": 17},
    {"n": 100, "b": 1, "block": 5, "stride": 3, "h": 16, "hkv": 1, "local": 0, "sinks": 2},
    {"n": 100, "b": 1, "block": 32, "stride": 16, "select": 64, "h": 4, "hkv": 2, "count": 2},
    {"n": 20, "extra": 80, "d": 64, "select": 24, "block": 8, "stride": 4, "h": 2, "hkv": 1},
    {"n": 100, "b": 1, "d": 64, "h": 1, "hkv": 1, "count": 5, "window": 1, "sinks": 2},
    {"n": 257, "b": 1, "select": 32, "block": 32, "stride": 32, "window": 33, "h": 2, "hkv": 2},
    {"n": 257, "b": 1, "block": 32, "stride": 16, "select": 64, "h": 4, "hkv": 1, "count": 2},
    {"n": 257, "b": 1, "d": 64, "block": 8, "stride": 4, "select": 16, "h": 2, "hkv": 2,
     "count": 6, "local": 2},
    {"n": 63, "extra": 194, "b": 1, "select": 16, "block": 16, "stride": 16, "h": 16, "hkv": 1,
     "window": 40},
]  # fmt: skip
SHAPES = tuple(DEFAULTS | sizes for sizes in GEOMETRY)
MERGED = tuple(s for s in SHAPES if s["block"] == s["stride"] == s["select"])


def label(sizes: dict) -> str:
    """Name of a set of sizes for pytest: what differs from the usual ones."""
    return "-".join(f"{key}{x}" for key, x in sizes.items() if DEFAULTS.get(key) != x) or "usual"


def cases(shapes: tuple[dict, ...] = SHAPES) -> list:
    """Parameters `sizes` for pytest, named."""
    return [pytest.param(sizes, id=label(sizes)) for sizes in shapes]


def make_inputs(
    *, b=2, h=2, hkv=2, n=63, extra=0, d=16, block=8, stride=8, padding="none", layout="bhnd",
    gates=False, separate=False, dtype=torch.float32, seed=0, **_
) -> dict:  # fmt: skip
    """Tensors of a call by name, all rounded to dtype: n queries and n + extra keys.

    `gates` adds factors in [0, 1], `separate` keys and values of their own for each branch. The
    layout (attention_inputs.LAYOUTS) is one of strides; so is that of compressed keys and values.
    """
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:  # quantized to dtype
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)

    q, k, v = make_qkv(layout, b, h, hkv, n, n + extra, d, rand)
    key_mask = make_mask(padding, b, n + extra, rng)
    key_mask = None if key_mask is None else key_mask.to(DEVICE)
    inputs = {"q": q, "k": k, "v": v}
    for name in ("k", "v"):
        mean = mean_compress(
            inputs[name], compress_block=block, compress_stride=stride, key_mask=key_mask
        )
        inputs[f"{name}_cmp"] = _as_layout(mean, layout)
    if gates:
        factors = rand(b, n, h, 3).sigmoid().transpose(1, 2)
        inputs["gates"] = factors.contiguous() if layout == "bhnd" else factors
    if separate:
        for branch in BRANCHES:
            _, key, value = make_qkv(layout, b, h, hkv, n, n + extra, d, rand)
            inputs |= {f"k_{branch}": key, f"v_{branch}": value}
    return inputs | {"key_mask": key_mask}


def _as_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers `[B, Hkv, P, D]` with the strides that a layout has."""
    if layout == "packed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT if layout == "transposed" else x


def make_options(sizes: dict, combine: str = "merged", **others) -> dict:
    """What `nsa_attention` takes beside tensors, from the arguments of `make_inputs`."""
    sizes = DEFAULTS | sizes
    options = {
        "combine": combine, "compress_block": sizes["block"], "compress_stride": sizes["stride"],
        "select_block": sizes["select"], "num_selected": sizes["count"],
        "window": sizes["window"], "sink_blocks": sizes["sinks"],
    }  # fmt: skip
    if combine == "gates":
        options["local_blocks"] = sizes["local"]
    return options | others


def as_float64(inputs: dict) -> dict:
    """The same numbers in float64."""
    return {name: x.double() if name in FLOATS else x for name, x in inputs.items()}


def define(inputs: dict, options: dict) -> Tensor:
    """The definition; `regime` and `backend` mean nothing to it."""
    options = {name: x for name, x in options.items() if name not in ("regime", "backend")}
    return nsa_reference(**inputs, **options)


def upstream(out: Tensor, seed: int = 1) -> Tensor:
    """A random gradient of an output `[B, H, Nq, D]`, strided as a model's `[B, Nq, H * D]`."""
    b, h, n, d = out.shape
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, h, d, generator=rng, dtype=torch.float64).to(out).transpose(1, 2)


def run(function, inputs: dict, options: dict, only: tuple[str, ...] = FLOATS) -> dict[str, Tensor]:
    """Output of `function(inputs, options)` and the gradient of every floating-point input."""
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in FLOATS if name in inputs and name in only
    }  # fmt: skip
    out = function(inputs | leaves, options)
    assert (out.shape, out.dtype) == (inputs["q"].shape, inputs["q"].dtype)
    grads = torch.autograd.grad(out, [*leaves.values()], upstream(out), allow_unused=True)
    results = {"out": out.detach()}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        results[name] = torch.zeros_like(x) if grad is None else grad
        assert (results[name].shape, results[name].dtype) == (x.shape, x.dtype)
    return results


def run_exact(inputs: dict, options: dict) -> dict[str, Tensor]:
    """`run` of the definition in float64."""
    return run(define, as_float64(inputs), options)


def error(actual: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    """Frobenius norm of the error over that of the exact tensor, or over a floor for it."""
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=floor))


def _dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _mean(terms: list[tuple[float, list[float]]], dim: int) -> Tensor:
    """Mean of vectors by e^score."""
    total = math.fsum(math.exp(score) for score, _ in terms)
    parts = [math.fsum(math.exp(s) * x[a] for s, x in terms) for a in range(dim)]
    return torch.tensor([part / total if terms else 0.0 for part in parts], dtype=torch.float64)


def _choose(scores: list, p: int, texts: dict, blocks: list, near: set, o: dict) -> list[int]:
    """Far blocks for one query of one group; `scores` `[G][P]`, texts of visible blocks by c."""
    length, d, b = o["compress_block"], o["compress_stride"], o["select_block"]
    importance = {}
    for j, text in enumerate(blocks):
        if j in near or j * b > p or not text:
            continue
        if len(scores) == 1 and length == d == b:
            if j in texts:
                importance[j] = scores[0][j]
            continue
        importance[j] = 0.0
        for head in scores:
            total = math.fsum(math.exp(head[c]) for c in texts)
            for c in texts:
                shared = {*range(c * d, c * d + length)} & {*range(j * b, j * b + b)}
                importance[j] += len(shared) / d * math.exp(head[c]) / total
    sinks = o["sink_blocks"]
    order = sorted(importance, key=lambda j: (j >= sinks, j if j < sinks else -importance[j], j))
    return sorted(order[: o["num_selected"] - o.get("local_blocks", 0)])


def plain_loops(inputs: dict, o: dict) -> tuple[Tensor, Tensor]:
    """Output and far blocks in Python floats: one query at a time, sets of tokens."""
    length, d, b = o["compress_block"], o["compress_stride"], o["select_block"]
    (batch, heads, nq, dim), (_, groups, nk, _) = inputs["q"].shape, inputs["k"].shape
    merged, size, scale = o["combine"] == "merged", heads // groups, dim**-0.5
    q, k_cmp, v_cmp = (inputs[name].tolist() for name in ("q", "k_cmp", "v_cmp"))
    own = [[inputs.get(f"{x}_{name}", inputs[x]).tolist() for x in "kv"] for name in BRANCHES]
    out, delay = torch.zeros(inputs["q"].shape, dtype=torch.float64), o["window"] if merged else 0
    far = torch.full((batch, groups, nq, o["num_selected"] - o.get("local_blocks", 0)), -1)
    for row, g, r in product(range(batch), range(groups), range(nq)):
        mask = inputs["key_mask"]
        real = [j for j in range(nk) if mask is None or mask[row, j]]
        start = real[0] if real else nk
        p, text = r + nk - nq - start, {j - start for j in real}
        if p < 0:
            continue
        blocks = [text & {*range(j, j + b)} for j in range(0, nk, b)]
        found = {c: text & {*range(c * d, c * d + length)} for c in range(len(k_cmp[row][g]))}
        found = {c: x for c, x in found.items() if x and c * d + length - 1 + delay <= p}
        if merged:
            near = {j for j in range(len(blocks)) if j * b + b - 1 > p - o["window"]}
        else:
            near = {j for j in range(len(blocks)) if p // b - o["local_blocks"] < j <= p // b}
        group = range(g * size, (g + 1) * size)
        pooled = [[scale * _dot(q[row][h][r], x) for x in k_cmp[row][g]] for h in group]
        far_blocks = _choose(pooled, p, found, blocks, near, o)
        far[row, g, r, : len(far_blocks)] = torch.tensor(far_blocks)
        read = {t for j in {*far_blocks, *near} if j < len(blocks) for t in blocks[j] if t <= p}
        for h, scores in zip(group, pooled, strict=True):

            def take(tokens: Iterable[int], branch: int, h=h, r=r, row=row, g=g, start=start):
                k, v = (x[row][g] for x in own[branch])
                return [(scale * _dot(q[row][h][r], k[t + start]), v[t + start]) for t in tokens]

            tokens = take(read, 0)
            rest = [(scores[c], c) for c in found if not merged or c not in far_blocks]
            if merged:
                rest = [(s + math.log(len(found[c])), v_cmp[row][g][c]) for s, c in rest]
                out[row, h, r] = _mean(tokens + rest, dim)
                continue
            window = take([t for t in text if p - o["window"] < t <= p], 1)
            branches = [[(s, v_cmp[row][g][c]) for s, c in rest], tokens, window]
            parts = torch.stack([_mean(terms, dim) for terms in branches])
            out[row, h, r] = inputs["gates"][row, h, r] @ parts
    return out, far

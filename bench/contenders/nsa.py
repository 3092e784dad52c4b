"""Native Sparse Attention, by itself and as a layer next to native-sparse-attention-pytorch."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.base import (
    LIMITS,
    Contender,
    Prepared,
    Shape,
    Tensors,
    causal,
    draw,
    nbytes,
    needs,
    prefix,
    prepare_op,
)
from attnopt.bench.contenders.dense import dense_partner
from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.op import nsa_attention, nsa_decode
from attnopt.kernels.nsa.reference import nsa_reference

# Sizes for short contexts, and those of the paper.
SMALL = {"select_block": 32, "num_selected": 8, "window": 128}
PAPER = {"select_block": 64, "num_selected": 16, "window": 512}
PATTERNS: dict[str, dict[str, Any]] = {
    "nsa-merged": {"combine": "merged", "compress_block": 32, "compress_stride": 32, **SMALL},
    "nsa-gates": {"combine": "gates", "compress_block": 32, "compress_stride": 16, **SMALL},
    "nsa-paper": {"combine": "gates", "compress_block": 32, "compress_stride": 16, **PAPER},
}
LABELS = {"nsa-merged": "NSA merged", "nsa-gates": "NSA gates", "nsa-paper": "NSA, paper's sizes"}
LAYER = PATTERNS["nsa-gates"]
LAYER_LIMITS = 3  # times those of an op: gradients of weights are longer sums


def nsa_contenders(device: torch.device) -> list[Contender]:
    """Ours in three patterns."""
    return [
        Contender(
            name=name, label=LABELS[name], mechanism="nsa", level="op", library="attnopt",
            partner=dense_partner(device), prepare=partial(_prepare, pattern),
            note="mean compression included; " + describe(pattern),
        )
        for name, pattern in PATTERNS.items()
    ]  # fmt: skip


def layer_contenders(device: torch.device) -> list[Contender]:
    """A layer with projections: dense, ours with gates, and native-sparse-attention-pytorch."""
    peer = "native-sparse-attention-pytorch"
    shared: dict[str, Any] = {"level": "layer", "phases": ("fwd", "bwd")}
    sizes = describe(LAYER)
    return [
        Contender(
            name="layer-dense", label="dense layer", mechanism="dense", library="torch",
            prepare=partial(_prepare_layer, False), note="SDPA between the projections", **shared,
        ),
        Contender(
            name="layer-nsa", label="NSA layer", mechanism="nsa", library="attnopt",
            partner="layer-dense", prepare=partial(_prepare_layer, True), note=sizes, **shared,
        ),
        Contender(
            name="layer-nsa-peer", label=peer, mechanism="nsa", library=peer,
            partner="layer-dense", prepare=_prepare_peer,
            missing=needs(peer, peer.replace("-", "_")),
            note=f"{sizes}; projections, rotary embedding and compression are its own, its norm "
                 "is off; checked against its own evaluation in float64",
            **shared,
        ),
    ]  # fmt: skip


def describe(pattern: dict[str, Any]) -> str:
    """The sizes in letters."""
    return "l={compress_block} d={compress_stride} b={select_block} S={num_selected} W={window}" \
        .format(**pattern)  # fmt: skip


def _least(pattern: dict[str, Any], phase: str, shape: Shape, dtype: torch.dtype) -> work.Work:
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    sizes = [pattern[x] for x in (
        "compress_block", "compress_stride", "select_block", "num_selected", "window", "combine"
    )]  # fmt: skip
    Nq = 1 if phase == "decode" else N
    return work.nsa(phase, B, H, H, Nq, N, D, dtype.itemsize, *sizes)


def _compress(pattern: dict[str, Any], *tensors: Tensor) -> list[Tensor]:
    sizes = {name: pattern[name] for name in ("compress_block", "compress_stride")}
    return [mean_compress(x, **sizes) for x in tensors]


def _prepare(pattern: dict[str, Any], phase: str, shape: Shape, dtype: torch.dtype,
             device: torch.device, seed: int = 0) -> Prepared:
    decode = phase == "decode"
    tensors = draw(shape, dtype, device, seed, queries=1 if decode else None)
    if pattern["combine"] == "gates":
        generator = torch.Generator(device).manual_seed(seed)
        size = (*tensors["q"].shape[:3], 3)
        tensors["gates"] = torch.rand(size, generator=generator, device=device).to(dtype)
    define = partial(_define, pattern, dtype)
    least = _least(pattern, phase, shape, dtype)
    if not decode:
        return prepare_op(partial(_attend, pattern), define, tensors, phase, least)
    k_cmp, v_cmp = _compress(pattern, tensors["k"], tensors["v"])

    def step(given: Tensors) -> Tensor:
        q, k, v = (given[name] for name in "qkv")
        return nsa_decode(q, k, v, k_cmp, v_cmp, gates=given.get("gates"), **pattern)

    state = nbytes(tensors["k"], tensors["v"], k_cmp, v_cmp)
    return prepare_op(step, define, tensors, phase, least, state_bytes=state)


def _attend(pattern: dict[str, Any], tensors: Tensors) -> Tensor:
    q, k, v = (tensors[name] for name in "qkv")
    return nsa_attention(q, k, v, *_compress(pattern, k, v), gates=tensors.get("gates"), **pattern)


def _define(pattern: dict[str, Any], dtype: torch.dtype, tensors: Tensors, first: int, end: int
            ) -> Tensor:
    """A run; compressed keys and values are rounded to `dtype`, as the op gets them."""
    q, k, v = prefix(tensors, first, end)
    means = [x + (x.to(dtype).double() - x).detach() for x in _compress(pattern, k, v)]
    gates = tensors["gates"][:, :, first:end] if "gates" in tensors else None
    return _reference(pattern, q, k, v, gates, *means)


def _reference(pattern: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None,
               k_cmp: Tensor, v_cmp: Tensor) -> Tensor:
    """The definition, with the forced blocks that the op has by default."""
    sinks, local = (0, None) if gates is None else (1, 2)
    return nsa_reference(
        q, k, v, k_cmp, v_cmp, gates=gates, sink_blocks=sinks, local_blocks=local, **pattern
    )


def _prepare_layer(sparse: bool, phase: str, shape: Shape, dtype: torch.dtype,
                   device: torch.device, seed: int = 0) -> Prepared:
    """`[B, N, H D]` to `[B, 1, N, H D]`: projections, attention, output; weights have gradients."""
    width = shape.H * shape.D
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"x": (shape.B, shape.N, width), "qkv": (3 * width, width), "out": (width, width)}
    if sparse:
        sizes["gate"] = (3 * shape.H, width)
    tensors = {}
    for name, size in sizes.items():
        values = torch.randn(size, generator=generator, device=device)
        tensors[name] = (values if name == "x" else values * width**-0.5).to(dtype)
    grad = torch.randn(1, *sizes["x"], generator=generator, device=device)
    tensors["grad"] = grad.to(dtype).transpose(0, 1)  # [B, 1, N, width]
    attend = partial(_layer, shape.H, sparse)
    define = partial(_layer_rows, shape.H, sparse)
    limit = LAYER_LIMITS * LIMITS[dtype]
    return prepare_op(attend, define, tensors, phase, _layer_work(sparse, phase, shape, dtype),
                      limit=limit)


def _layer_work(sparse: bool, phase: str, shape: Shape, dtype: torch.dtype) -> work.Work:
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    inner = (
        _least(LAYER, phase, shape, dtype) if sparse
        else work.dense(phase, B, H, H, N, N, D, dtype.itemsize)
    )  # fmt: skip
    passes, width = (3 if phase == "bwd" else 1), H * D
    projections = passes * 2 * B * N * 4 * width**2
    weights = passes * 4 * width**2 * dtype.itemsize
    return work.Work(inner.flops + projections, inner.bytes + weights)


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, H F]` to `[B, H, N, F]`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _layer(heads: int, sparse: bool, tensors: Tensors) -> Tensor:
    x = tensors["x"]
    q, k, v = (_heads(part, heads) for part in F.linear(x, tensors["qkv"]).chunk(3, 2))
    if sparse:
        gates = _heads(F.linear(x, tensors["gate"]).sigmoid(), heads)
        out = _attend(LAYER, {"q": q, "k": k, "v": v, "gates": gates})
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), tensors["out"])[:, None]


def _layer_rows(heads: int, sparse: bool, tensors: Tensors, first: int, end: int) -> Tensor:
    x = tensors["x"][:, :end]
    w_q, w_k, w_v = tensors["qkv"].chunk(3, 0)
    q = _heads(F.linear(x[:, first:], w_q), heads)
    k, v = (_heads(F.linear(x, w), heads) for w in (w_k, w_v))
    if sparse:
        gates = _heads(F.linear(x[:, first:], tensors["gate"]).sigmoid(), heads)
        out = _reference(LAYER, q, k, v, gates, *_compress(LAYER, k, v))
    else:
        scores = q @ k.mT * q.shape[3] ** -0.5
        out = scores.masked_fill(~causal(scores), -torch.inf).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).flatten(2), tensors["out"])[:, None]


def _prepare_peer(phase: str, shape: Shape, dtype: torch.dtype, device: torch.device,
                  seed: int = 0) -> Prepared:
    torch.manual_seed(seed)
    make: Any = import_module("native_sparse_attention_pytorch").SparseAttention
    module = make(
        dim=shape.H * shape.D, dim_head=shape.D, heads=shape.H, causal=True, norm=False,
        sliding_window_size=LAYER["window"], compress_block_size=LAYER["compress_block"],
        compress_block_sliding_stride=LAYER["compress_stride"],
        selection_block_size=LAYER["select_block"], num_selected_blocks=LAYER["num_selected"],
    ).to(device, dtype)  # fmt: skip
    tensors = {"x": torch.randn(shape.B, shape.N, shape.H * shape.D, device=device).to(dtype)}
    tensors["grad"] = torch.randn_like(tensors["x"])[:, None]
    tensors |= {name: x.detach() for name, x in module.named_parameters()}

    def attend(given: Tensors) -> Tensor:
        own = {name: x for name, x in given.items() if name != "x"}
        return torch.func.functional_call(module, own, (given["x"],))[:, None]

    whole: list[Tensor] = []  # x, and the output that was made of it: seconds

    def define(given: Tensors, first: int, end: int) -> Tensor:
        if not whole or whole[0] is not given["x"]:
            whole[:] = given["x"], attend(given)
        return whole[1][:, :, first:end]

    limit = LAYER_LIMITS * LIMITS[dtype]
    return prepare_op(attend, define, tensors, phase, _layer_work(True, phase, shape, dtype),
                      limit=limit)

"""FAVOR+ attention, performer-pytorch, and flash-linear-attention on the same features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.base import (
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
from attnopt.kernels.favor.op import favor_attention, favor_decode
from attnopt.kernels.favor.projections import orthogonal_projection
from attnopt.kernels.favor.reference import favor_reference

FEATURES = 64
EPSILONS = 1e-4, 1e-6  # performer-pytorch adds these to features and to the normalizer's keys


def favor_contenders(device: torch.device) -> list[Contender]:
    """Ours without and with an exact window, and two peers without."""
    partner, found = dense_partner(device), []
    for window in (0, 33):
        label = f"FAVOR+ M={FEATURES}" + (f" + last {window}" if window else "")
        found.append(Contender(
            name=f"favor-{FEATURES}" + (f"-w{window}" if window else ""), label=label,
            mechanism="favor", level="op", library="attnopt", partner=partner,
            prepare=partial(_prepare, window),
        ))  # fmt: skip
    found += [
        Contender(
            name="performer-pytorch", label="performer-pytorch", mechanism="favor", level="op",
            library="performer-pytorch", partner=partner, prepare=_prepare_performer,
            phases=("fwd", "bwd"), missing=needs("performer-pytorch", "performer_pytorch"),
            note="checked against its own formula: it adds an epsilon to every feature and "
                 "stabilizes with a maximum over all keys, later ones included",
        ),
        Contender(
            name="fla-favor", label="flash-linear-attention", mechanism="favor", level="op",
            library="flash-linear-attention", partner=partner, prepare=_prepare_fla,
            phases=("fwd", "bwd"), missing=needs("flash-linear-attention", "fla"),
            note="features in PyTorch, then its chunked linear attention; its PyTorch version "
                 "where there is no GPU",
        ),
    ]  # fmt: skip
    return found


def _projection(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return orthogonal_projection(FEATURES, shape.D, generator=generator).to(device)


def _least(shape: Shape, phase: str, dtype: torch.dtype, window: int = 0) -> work.Work:
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    Nq = 1 if phase == "decode" else N
    return work.favor(phase, B, H, H, Nq, N, D, dtype.itemsize, FEATURES, window)


def _prepare(window: int, phase: str, shape: Shape, dtype: torch.dtype, device: torch.device,
             seed: int = 0) -> Prepared:
    tensors = draw(shape, dtype, device, seed)
    fixed = {"projection": _projection(shape, device)}
    define, attend = partial(_define, window), partial(_attend, window)
    least = _least(shape, phase, dtype, window)
    if phase != "decode":
        return prepare_op(attend, define, tensors, phase, least, fixed=fixed)
    q, k, v = (tensors[name][:, :, :-1] for name in "qkv")
    with torch.no_grad():
        _, state = favor_attention(
            q, k, v, fixed["projection"], window=window, return_state=True
        )
    tensors |= {name: tensors[name][:, :, -1:] for name in ("q", "grad")}

    def step(given: Tensors) -> Tensor:
        k, v = (given[name][:, :, -1:] for name in "kv")
        return favor_decode(given["q"], k, v, given["projection"], state, window=window)[0]

    return prepare_op(
        step, define, tensors, phase, least, fixed=fixed, state_bytes=nbytes(*state)
    )


def _define(window: int, tensors: Tensors, first: int, end: int) -> Tensor:
    out = favor_reference(*prefix(tensors, first, end), tensors["projection"], window=window)
    assert isinstance(out, Tensor)
    return out


def _attend(window: int, tensors: Tensors) -> Tensor:
    q, k, v, rows = (tensors[name] for name in ("q", "k", "v", "projection"))
    return favor_attention(q, k, v, rows, window=window)


def _prepare_performer(phase: str, shape: Shape, dtype: torch.dtype, device: torch.device,
                       seed: int = 0) -> Prepared:
    torch.manual_seed(0)
    make: Any = import_module("performer_pytorch").FastAttention
    attention = make(dim_heads=shape.D, nb_features=FEATURES, causal=True).to(device)
    fixed = {"projection": attention.projection_matrix}

    def attend(tensors: Tensors) -> Tensor:
        return attention(*(tensors[name] for name in "qkv"))

    tensors, least = draw(shape, dtype, device, seed), _least(shape, phase, dtype)
    return prepare_op(attend, _performer_rows, tensors, phase, least, fixed=fixed)


def _performer_rows(tensors: Tensors, first: int, end: int) -> Tensor:
    """Some rows of what performer-pytorch computes, which looks at all keys to stabilize."""
    rows, normalize = tensors["projection"], tensors["q"].shape[3] ** -0.25

    def logits(x: Tensor) -> tuple[Tensor, Tensor]:
        x = normalize * x
        return x @ rows.mT, x.square().sum(-1, keepdim=True) / 2

    q, norm = logits(tensors["q"][:, :, first:end])
    phi_q = (q - norm - q.detach().amax(-1, keepdim=True)).exp() + EPSILONS[0]
    k, norm = logits(tensors["k"])
    phi_k = (k - norm - k.detach().amax((-1, -2), keepdim=True)).exp() + EPSILONS[0]
    scale = len(rows) ** -0.5
    phi_q, phi_k = scale * phi_q, (scale * phi_k)[:, :, :end]
    weights = phi_q @ phi_k.mT
    weights = weights * causal(weights)
    below = weights.sum(-1, keepdim=True) + EPSILONS[1] * phi_q.sum(-1, keepdim=True)
    return weights @ tensors["v"][:, :, :end] / below


def _prepare_fla(phase: str, shape: Shape, dtype: torch.dtype, device: torch.device,
                 seed: int = 0) -> Prepared:
    chunked = _fla_attention(device)

    def attend(tensors: Tensors) -> Tensor:
        q, k, v, rows = (tensors[name] for name in ("q", "k", "v", "projection"))
        phi_q, phi_k = _features(q, k, rows)
        # tokens before heads, as it wants them
        found = chunked(*(x.transpose(1, 2) for x in (phi_q, phi_k, v)), scale=1.0, normalize=True)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    tensors, fixed = draw(shape, dtype, device, seed), {"projection": _projection(shape, device)}
    least = _least(shape, phase, dtype)
    return prepare_op(attend, partial(_define, 0), tensors, phase, least, fixed=fixed)


def _fla_attention(device: torch.device) -> Callable[..., Any]:
    if device.type == "cuda":
        return import_module("fla.ops.linear_attn").chunk_linear_attn
    return import_module("fla.ops.linear_attn.naive").naive_chunk_linear_attn


def _features(q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """phi of queries and keys, each scaled so that its largest is 1, in the dtype of `q`."""
    normalize = q.shape[3] ** -0.25
    q_logits = normalize * q.float() @ rows.mT
    k_scaled = normalize * k.float()
    k_logits = k_scaled @ rows.mT - k_scaled.square().sum(-1, keepdim=True) / 2
    phi_q = (q_logits - q_logits.detach().amax(-1, keepdim=True)).exp()
    phi_k = (k_logits - k_logits.detach().amax((-1, -2), keepdim=True)).exp()
    return phi_q.to(q.dtype), phi_k.to(q.dtype)

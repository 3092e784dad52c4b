"""Last-k attention, and other ways to its mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.base import (
    Contender,
    Prepared,
    Shape,
    Tensors,
    draw,
    nbytes,
    prefix,
    prepare_op,
)
from attnopt.bench.contenders.dense import causal_blocks, compiled_flex, dense_partner, flex_missing
from attnopt.kernels.lastk.op import lastk_attention, lastk_decode
from attnopt.kernels.lastk.reference import lastk_reference

WINDOWS = (5, 64)


def lastk_contenders(device: torch.device) -> list[Contender]:
    """Ours with a narrow and a wider band; dense SDPA with a bias; FlexAttention with a band."""
    partner, found = dense_partner(device), []
    for window in WINDOWS:
        found.append(Contender(
            name=f"lastk-{window}", label=f"last-{window}", mechanism="lastk", level="op",
            library="attnopt", partner=partner, prepare=partial(_prepare, _attend, window),
            note="learned weights of the offsets; their gradient is timed too",
        ))  # fmt: skip
    found += [
        Contender(
            name="lastk-5-sdpa", label="last-5, SDPA with a bias", mechanism="lastk", level="op",
            library="torch", partner=partner, prepare=partial(_prepare, _biased_sdpa, 5),
            phases=("fwd", "bwd"), note="the same function, the band as an N x N bias",
        ),
        Contender(
            name="lastk-5-flex", label="last-5, FlexAttention", mechanism="lastk", level="op",
            library="torch", partner=partner, prepare=partial(_prepare, _flex, 5),
            phases=("fwd", "bwd"), missing=flex_missing, note="the same function",
        ),
    ]  # fmt: skip
    return found


def _prepare(attend: Callable[[Tensors], Tensor], window: int, phase: str, shape: Shape,
             dtype: torch.dtype, device: torch.device, seed: int = 0) -> Prepared:
    decode = phase == "decode"
    tensors = draw(shape, dtype, device, seed, queries=1 if decode else None)
    if decode:  # the cache is a ring of `window` tokens, whatever the length of the text
        tensors |= {name: tensors[name][:, :, -window:].contiguous() for name in "kv"}
        attend = _step
    generator = torch.Generator().manual_seed(seed)
    tensors["log_weights"] = torch.randn(shape.H, window, generator=generator).to(device)
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    Nq = tensors["q"].shape[2]
    least = work.lastk(phase, B, H, H, Nq, N, D, dtype.itemsize, window)
    state = nbytes(tensors["k"], tensors["v"]) if decode else 0
    return prepare_op(attend, _define, tensors, phase, least, state_bytes=state)


def _define(tensors: Tensors, first: int, end: int) -> Tensor:
    return lastk_reference(*prefix(tensors, first, end), tensors["log_weights"])


def _attend(tensors: Tensors) -> Tensor:
    return lastk_attention(*(tensors[name] for name in ("q", "k", "v", "log_weights")))


def _step(tensors: Tensors) -> Tensor:
    return lastk_decode(*(tensors[name] for name in ("q", "k", "v", "log_weights")))


def _biased_sdpa(tensors: Tensors) -> Tensor:
    q, k, v, weights = (tensors[name] for name in ("q", "k", "v", "log_weights"))
    n, width = q.shape[2], weights.shape[1]
    position = torch.arange(n, device=q.device)
    offset = position[:, None] - position
    bias = weights.to(q.dtype)[:, offset.clamp(0, width - 1)]
    bias = bias.masked_fill((offset < 0) | (offset >= width), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


def _flex(tensors: Tensors) -> Tensor:
    q, k, v, weights = (tensors[name] for name in ("q", "k", "v", "log_weights"))
    n, width = q.shape[2], weights.shape[1]

    def add_weight(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + weights[h, torch.clamp(i - j, 0, width - 1)]

    blocks = causal_blocks(n, q.device, width)
    return compiled_flex()(q, k, v, score_mod=add_weight, block_mask=blocks)

"""GPT-2 with its attention replaced: one block, and all twelve.

The transformer without its output layer, which is the same for every mechanism: embeddings in,
hidden states out. Weights are random; a step of decoding appends to the cache that the model's
`generate` would use.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.base import LIMITS, Contender, Prepared, Shape, relative_error
from attnopt.bench.contenders.nsa import PATTERNS

LAYERS = {"block": 1, "model": 12}
MECHANISMS = ("dense", "lastk", "favor", "nsa")
LABELS = {"dense": "dense", "lastk": "last-32 + 4 sinks", "favor": "FAVOR+ M=64 + last 33",
          "nsa": "NSA merged"}
REFERENCE_UP_TO = 256  # tokens of a block; some definitions are quadratic, and slow


def model_contenders() -> list[Contender]:
    """A block and a model for each mechanism."""
    return [
        Contender(
            name=f"{level}-{name}", label=LABELS[name], mechanism=name, level=level,
            library="transformers" if name == "dense" else "attnopt",
            partner=None if name == "dense" else f"{level}-dense",
            prepare=partial(_prepare, name, level),
            note=f"GPT-2, {layers} layer{'s' * (layers > 1)} of 768 without its output layer; "
                 "checked against float64 eager, a block's definition up to "
                 f"{REFERENCE_UP_TO} tokens",
        )
        for level, layers in LAYERS.items() for name in MECHANISMS
    ]  # fmt: skip


def _config(name: str, backend: str) -> Any:
    from attnopt.config import NSA, Favor, LastK

    if name == "lastk":
        return LastK(window=32, sinks=4, backend=backend)
    if name == "favor":
        return Favor(num_features=64, window=33, backend=backend)
    sizes = {x: PATTERNS["nsa-merged"][x] for x in ("select_block", "num_selected", "window")}
    return NSA(**sizes, backend=backend)


def _build(name: str, layers: int, shape: Shape, backend: str) -> Any:
    """A `GPT2LMHeadModel` with random weights, converted; its output layer is not used."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from attnopt.convert import convert

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=shape.H * shape.D, n_head=shape.H, n_layer=layers, n_positions=shape.N + 4096,
        vocab_size=64, bos_token_id=None, eos_token_id=None,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    return model if name == "dense" else convert(model, _config(name, backend))


def _exact(name: str, layers: int, shape: Shape, model: Any) -> Any:
    """The same weights in float64, by the definition where that takes seconds."""
    backend = "reference" if layers == 1 and shape.N <= REFERENCE_UP_TO else "eager"
    exact = _build(name, layers, shape, backend)
    exact.load_state_dict(copy.deepcopy(model.state_dict()))
    return exact.double().to(model.device)


def _prepare(name: str, level: str, phase: str, shape: Shape, dtype: torch.dtype,
             device: torch.device, seed: int = 0) -> Prepared:
    layers = LAYERS[level]
    model = _build(name, layers, shape, "auto").to(device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.B, shape.N, shape.H * shape.D)
    x, grad = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
    least = _least(name, level, phase, shape, dtype, model)
    limit = 10 * LIMITS[dtype]  # rounding passes through every layer
    parameters = [p for n, p in model.named_parameters() if "lm_head" not in n and "wte" not in n]

    if phase == "decode":
        cache, first = _prefill(model, x)

        def step() -> Tensor:
            with torch.no_grad():
                return _hidden(model, x[:, -1:], past_key_values=cache, use_cache=True)

        def check_step() -> dict[str, float]:
            exact = _exact(name, layers, shape, model)
            with torch.no_grad():
                truth = _hidden(exact, x.double())[:, -1:]
            return {"out": relative_error(first, truth, first)}

        return Prepared(step, check_step, limit, least)

    def call() -> object:
        if phase == "fwd":
            with torch.no_grad():
                return _hidden(model, x)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(_hidden(model, leaf), [leaf, *parameters], grad,
                                   allow_unused=True)

    def check() -> dict[str, float]:
        exact = _exact(name, layers, shape, model)
        results = []
        for one, values, upstream in ((model, x, grad), (exact, x.double(), grad.double())):
            leaf = values.detach().requires_grad_(phase == "bwd")
            with torch.set_grad_enabled(phase == "bwd"):
                out = _hidden(one, leaf)
            found = {"out": out.detach()}
            if phase == "bwd":
                (found["dx"],) = torch.autograd.grad(out, [leaf], upstream)
            results.append(found)
        ours, truth = results
        return {key: relative_error(ours[key], truth[key], ours[key]) for key in truth}

    return Prepared(call, check, limit, least)


def _hidden(model: Any, x: Tensor, **options: Any) -> Tensor:
    options = {"use_cache": False} | options
    return model.transformer(inputs_embeds=x, **options).last_hidden_state


def _prefill(model: Any, x: Tensor) -> tuple[Any, Tensor]:
    """The cache after all tokens but the last, copied, and the output of the last one."""
    from transformers import DynamicCache

    cache = model.make_cache() if hasattr(model, "make_cache") else DynamicCache()
    with torch.no_grad():
        _hidden(model, x[:, :-1], past_key_values=cache, use_cache=True)
        out = _hidden(model, x[:, -1:], past_key_values=cache, use_cache=True)
    return cache, out


def _least(name: str, level: str, phase: str, shape: Shape, dtype: torch.dtype, model: Any
           ) -> work.Work:
    """Matrix products of the weights, attention, and every weight once (gradients too)."""
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    tokens = 1 if phase == "decode" else N
    sizes = (phase, B, H, H, tokens, N, D, dtype.itemsize)
    if name == "dense":
        one = work.dense(*sizes)
    elif name == "lastk":
        one = work.lastk(*sizes, 32, 4)
    elif name == "favor":
        one = work.favor(*sizes, 64, 33)
    else:
        pattern = PATTERNS["nsa-merged"]
        one = work.nsa(*sizes, *(pattern[x] for x in (
            "compress_block", "compress_stride", "select_block", "num_selected", "window",
            "combine")))  # fmt: skip
    weights = sum(p.numel() for n, p in model.named_parameters() if ".h." in n and p.dim() == 2)
    passes = 3 if phase == "bwd" else 1
    flops = LAYERS[level] * one.flops + 2 * passes * B * tokens * weights
    moved = LAYERS[level] * one.bytes + passes * weights * dtype.itemsize
    return work.Work(flops, moved)

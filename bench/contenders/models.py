"""GPT-2 with its attention replaced: one block, and all twelve.

The transformer without its output layer, which is the same for every mechanism: embeddings in,
hidden states out. Weights are random, those of attention larger than GPT-2's initial ones, so that
attention matters to the output as it does in a trained model. A step of decoding appends to the
cache that the model's `generate` would use.

A model is checked in two steps: its output and all gradients against itself in float64, and the
attention of the float64 model against the definition at the same length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.base import (
    Contender,
    Prepared,
    Shape,
    Tensors,
    draw,
    prefix,
    prepare_op,
    relative_error,
)
from attnopt.bench.contenders.nsa import PATTERNS

LAYERS = {"block": 1, "model": 12}
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DEEP = 50  # times these for a model: its layers amplify rounding, gradients above all
EXACT = 1e-10  # relative error of float64 attention
WINDOW, SINKS = 32, 4  # lastk
FEATURES, NEAR = 64, 33  # favor
NSA_SIZES = {x: PATTERNS["nsa-merged"][x] for x in ("select_block", "num_selected", "window")}
LABELS = {
    "dense": "dense", "lastk": f"last-{WINDOW} + {SINKS} sinks",
    "favor": f"FAVOR+ M={FEATURES} + last {NEAR}", "nsa": "NSA merged",
}  # fmt: skip
GAIN = 4.0  # of the projections into attention and out of it


def model_contenders() -> list[Contender]:
    """A block and a model for each mechanism."""
    return [
        Contender(
            name=f"{level}-{name}", label=label, mechanism=name, level=level,
            library="transformers" if name == "dense" else "attnopt",
            partner=None if name == "dense" else f"{level}-dense",
            prepare=partial(_prepare, name, level),
            note=f"GPT-2, {layers} layer{'s' * (layers > 1)} of 768 without its output layer",
        )
        for level, layers in LAYERS.items() for name, label in LABELS.items()
    ]  # fmt: skip


def _config(name: str, backend: str) -> Any:
    from attnopt.attention import NSA, Favor, LastK

    if name == "lastk":
        return LastK(window=WINDOW, sinks=SINKS, init="random", backend=backend)
    if name == "favor":
        return Favor(num_features=FEATURES, window=NEAR, backend=backend)
    return NSA(**NSA_SIZES, backend=backend)


def _build(name: str, layers: int, shape: Shape, backend: str = "auto") -> Any:
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
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight *= GAIN
            block.attn.c_proj.weight *= GAIN
    return model if name == "dense" else convert(model, _config(name, backend))


def _exact(name: str, layers: int, shape: Shape, model: Any) -> Any:
    """The same weights in float64."""
    exact = _build(name, layers, shape)
    exact.load_state_dict(copy.deepcopy(model.state_dict()))
    return exact.double().to(model.device)


def _prepare(name: str, level: str, phase: str, shape: Shape, dtype: torch.dtype,
             device: torch.device, seed: int = 0) -> Prepared:
    layers = LAYERS[level]
    model = _build(name, layers, shape).to(device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.B, shape.N, shape.H * shape.D)
    x, grad = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
    least = _least(name, level, phase, shape, dtype, model)
    limit = LIMITS[dtype] * (DEEP if layers > 1 else 1)

    if phase == "decode":
        step, check_step, state = _decoding(model, x, partial(_exact, name, layers, shape, model))
        checks = _joined(check_step, partial(_attention_errors, name, "fwd", shape, device, limit))
        return Prepared(step, checks, limit, least, state)

    def call() -> object:
        if phase == "fwd":
            with torch.no_grad():
                return _hidden(model, x)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(_hidden(model, leaf), [leaf, *_weights(model).values()], grad)

    def check() -> dict[str, float]:
        results = []
        exact = _exact(name, layers, shape, model)
        for one, values, upstream in ((model, x, grad), (exact, x.double(), grad.double())):
            leaf, weights = values.detach().requires_grad_(phase == "bwd"), _weights(one)
            with torch.set_grad_enabled(phase == "bwd"):
                out = _hidden(one, leaf)
            found = {"out": out.detach()}
            if phase == "bwd":
                grads = torch.autograd.grad(out, [leaf, *weights.values()], upstream)
                found |= dict(zip(["dx", *weights], grads, strict=True))
            results.append(found)
        ours, truth = results
        errors = {key: relative_error(ours[key], truth[key], ours[key]) for key in truth}
        largest = max((errors.pop(key) for key in list(errors) if "." in key), default=None)
        return errors | ({} if largest is None else {"dweights": largest})

    attention = partial(_attention_errors, name, phase, shape, device, limit)
    return Prepared(call, _joined(check, attention), limit, least)


def _joined(first: Callable[[], dict[str, float]], second: Callable[[], dict[str, float]]
            ) -> Callable[[], dict[str, float]]:
    return lambda: first() | second()


def _weights(model: Any) -> dict[str, Tensor]:
    """What training would change, by name: gradients of biases that cannot matter are noise."""
    return {
        name: p for name, p in model.transformer.named_parameters()
        if "wte" not in name and "c_attn.bias" not in name
    }  # fmt: skip


def _hidden(model: Any, x: Tensor, **options: Any) -> Tensor:
    options = {"use_cache": False} | options
    return model.transformer(inputs_embeds=x, **options).last_hidden_state


def _decoding(model: Any, x: Tensor, exact: Callable[[], Any]
              ) -> tuple[Callable[[], object], Callable[[], dict[str, float]], int]:
    """A step after all tokens but the last, the check of the latest step, bytes of the cache."""
    from transformers import DynamicCache

    from attnopt.generate import cache_bytes

    cache = model.make_cache() if hasattr(model, "make_cache") else DynamicCache()
    outs: list[Tensor] = []
    with torch.no_grad():
        _hidden(model, x[:, :-1], past_key_values=cache, use_cache=True)

    def step() -> None:
        with torch.no_grad():
            outs.append(_hidden(model, x[:, -1:], past_key_values=cache, use_cache=True))

    def check() -> dict[str, float]:
        if not outs:
            step()
        seen = torch.cat([x[:, :-1], x[:, -1:].expand(-1, len(outs), -1)], 1)
        with torch.no_grad():
            truth = _hidden(exact(), seen.double())[:, -1:]
        return {"out": relative_error(outs[-1], truth, outs[-1])}

    return step, check, cache_bytes(cache)


def _attention_errors(name: str, phase: str, shape: Shape, device: torch.device, limit: float
                      ) -> dict[str, float]:
    """A layer's attention in float64 against the definition; EXACT counts as the model's limit."""
    from attnopt.convert import mechanisms

    if name == "dense":  # nothing of ours
        return {}
    tensors = draw(shape, torch.float64, device, 1)
    eager, reference = (
        next(iter(mechanisms(_build(name, 1, shape, backend)).values())).double().to(device)
        for backend in ("eager", "reference")
    )

    def attend(given: Tensors) -> Tensor:
        return eager(*(given[x] for x in "qkv"))

    def define(given: Tensors, first: int, end: int) -> Tensor:
        return reference(*prefix(given, first, end))

    prepared = prepare_op(attend, define, tensors, phase, work.Work(1, 1), limit=EXACT)
    return {f"attention {key}": error * limit / EXACT for key, error in prepared.check().items()}


def _least(name: str, level: str, phase: str, shape: Shape, dtype: torch.dtype, model: Any
           ) -> work.Work:
    """Matrix products of the weights, attention, and every weight once (gradients too)."""
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    tokens = 1 if phase == "decode" else N
    sizes = (phase, B, H, H, tokens, N, D, dtype.itemsize)
    pattern = PATTERNS["nsa-merged"]
    blocks = ("compress_block", "compress_stride", *NSA_SIZES, "combine")
    attention: dict[str, Callable[[], work.Work]] = {
        "dense": lambda: work.dense(*sizes),
        "lastk": lambda: work.lastk(*sizes, WINDOW, SINKS),
        "favor": lambda: work.favor(*sizes, FEATURES, NEAR),
        "nsa": lambda: work.nsa(*sizes, *(pattern[x] for x in blocks)),
    }
    one = attention[name]()
    weights = sum(p.numel() for n, p in model.named_parameters() if ".h." in n and p.dim() == 2)
    passes = 3 if phase == "bwd" else 1
    flops = LAYERS[level] * one.flops + 2 * passes * B * tokens * weights
    moved = LAYERS[level] * one.bytes + passes * weights * dtype.itemsize
    return work.Work(flops, moved)

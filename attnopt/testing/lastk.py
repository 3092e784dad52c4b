"""Cases of last-k attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from attnopt.kernels.lastk.op import lastk_attention, lastk_decode
from attnopt.kernels.lastk.reference import lastk_reference
from attnopt.testing.case import Case, Tensors, case_id, left_padding, make_qkv

# dtype, layout, masked, sizes: narrow and wide bands, GQA, sinks, head dims that are no power of 2
VARIANTS = (
    (torch.float32, "bhnd", False, dict(B=1, H=2, Hkv=2, N=100, D=64, W=5, T=0)),
    (torch.bfloat16, "packed", False, dict(B=1, H=2, Hkv=2, N=193, D=64, W=5, T=0)),
    (torch.bfloat16, "packed", True, dict(B=2, H=4, Hkv=2, N=100, D=32, W=70, T=4)),
    (torch.float16, "packed", True, dict(B=2, H=2, Hkv=1, N=63, D=40, W=17, T=20)),
    (torch.float32, "packed", True, dict(B=2, H=2, Hkv=2, N=65, D=32, W=128, T=1)),
)


def lastk_cases(shapes: Mapping[str, int]) -> list[Case]:
    """Every variant in every phase, with sizes replaced by `shapes`."""
    found = []
    for dtype, layout, masked, defaults in VARIANTS:
        shape = {letter: shapes.get(letter, size) for letter, size in defaults.items()}
        for phase in ("fwd", "bwd", "decode"):
            found.append(Case(
                id=case_id("lastk", phase, dtype, layout, shape),
                op="lastk",
                phase=phase,
                dtype=dtype,
                shape=shape,
                config={"layout": layout, "key_mask": masked},
                make=partial(_make, shape, dtype, layout, masked, phase),
                run=partial(_run, phase),
                ref=partial(_ref, phase),
            ))
    return found


def _make(shape: Mapping[str, int], dtype: torch.dtype, layout: str, masked: bool, phase: str,
          seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    queries = 1 if phase == "decode" else shape["N"]
    q, k, v = make_qkv(shape, layout, queries, dtype, generator)
    inputs = {"q": q, "k": k, "v": v,
              "log_weights": torch.randn(shape["H"], shape["W"], generator=generator)}
    if shape["T"]:
        inputs["sink_log_weights"] = torch.randn(shape["H"], shape["T"], generator=generator)
    if masked:
        inputs["key_mask"] = left_padding(shape["B"], shape["N"])
    if phase == "bwd":
        inputs["grad"] = torch.randn(q.shape, generator=generator).to(dtype)
    return inputs


def _split(inputs: Tensors) -> tuple[list, dict, list[str]]:
    """Positional and keyword arguments of the op, and the names that take a gradient."""
    positional = [inputs[name] for name in ("q", "k", "v", "log_weights")]
    keywords = {name: inputs[name] for name in ("sink_log_weights", "key_mask") if name in inputs}
    return positional, keywords, [name for name in inputs if name not in ("key_mask", "grad")]


def _run(phase: str, inputs: Tensors) -> Tensors:
    if phase == "decode":
        positional, keywords, _ = _split(inputs)
        return {"out": lastk_decode(*positional, **keywords)}
    return _evaluate(lastk_attention, phase, inputs)


def _ref(phase: str, inputs: Tensors) -> Tensors:
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return _evaluate(lastk_reference, phase, exact)


def _evaluate(op, phase: str, inputs: Tensors) -> Tensors:  # noqa: ANN001
    if phase == "bwd":
        inputs = {name: x.detach().requires_grad_(x.is_floating_point() and name != "grad")
                  for name, x in inputs.items()}
    positional, keywords, names = _split(inputs)
    with torch.set_grad_enabled(phase == "bwd"):
        out = op(*positional, **keywords)
    if phase != "bwd":
        return {"out": out}
    grads = torch.autograd.grad(out, [inputs[name] for name in names], inputs["grad"])
    return {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

"""Cases of FAVOR+ attention and its family."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from attnopt.kernels.favor.op import favor_attention, favor_decode
from attnopt.kernels.favor.projections import hedgehog_projection, orthogonal_projection
from attnopt.kernels.favor.reference import favor_reference
from attnopt.kernels.favor.state import FavorState
from attnopt.testing.case import Case, Tensors, case_id, left_padding, make_qkv

# dtype, layout, config, sizes; W is the window, 0 for none. Both sides of every switch of the
# kernels: one segment and several, causal or not, windows within a block and across, GQA, padding
VARIANTS: tuple[tuple[torch.dtype, str, dict[str, object], dict[str, int]], ...] = (
    (torch.float32, "bhnd", dict(feature_map="favor"),
     dict(B=1, H=2, Hkv=2, N=100, D=64, M=64, W=0)),
    (torch.bfloat16, "packed", dict(feature_map="favor"),
     dict(B=1, H=1, Hkv=1, N=530, D=32, M=32, W=0)),
    (torch.bfloat16, "packed", dict(feature_map="favor", key_mask=True, window_block=32),
     dict(B=1, H=2, Hkv=1, N=100, D=64, M=64, W=33)),
    (torch.float16, "packed",
     dict(feature_map="hedgehog", key_mask=True, window_block=16, gate=True),
     dict(B=2, H=2, Hkv=1, N=63, D=40, M=24, W=20)),
    (torch.float32, "packed", dict(feature_map="exp", key_mask=True, causal=False),
     dict(B=2, H=2, Hkv=2, N=65, D=20, M=12, W=0)),
)
PLAIN = {"key_mask": False, "gate": False, "causal": True, "window_block": 32}
GRADIENTS = ("q", "k", "v", "projection", "log_gate")


def favor_cases(shapes: Mapping[str, int]) -> list[Case]:
    """Every variant in every phase that it has, with sizes replaced by `shapes`."""
    found = []
    for dtype, layout, chosen, defaults in VARIANTS:
        config = PLAIN | chosen
        shape = {letter: shapes.get(letter, size) for letter, size in defaults.items()}
        for phase in ("fwd", "bwd", "decode"):
            if phase == "decode" and not config["causal"]:
                continue
            found.append(Case(
                id=case_id("favor", phase, dtype, f"{config['feature_map']}-{layout}", shape),
                op="favor",
                phase=phase,
                dtype=dtype,
                shape=shape,
                config={"layout": layout} | config,
                make=partial(_make, shape, dtype, layout, config, phase),
                run=partial(_run, shape, config, phase),
                ref=partial(_ref, shape, config, phase),
            ))
    return found


def _make(shape: Mapping[str, int], dtype: torch.dtype, layout: str, config: Mapping[str, object],
          phase: str, seed: int = 0) -> Tensors:
    """Draw inputs; the projection is rounded to `dtype`, as the kernels do."""
    generator = torch.Generator().manual_seed(seed)
    H, N, M, D = (shape[letter] for letter in ("H", "N", "M", "D"))
    if phase == "decode":
        shape, N = dict(shape, N=1), 1
    q, k, v = make_qkv(shape, layout, N, dtype, generator)
    if config["feature_map"] == "hedgehog":
        noise = torch.randn(H, M, D, generator=generator)
        projection = hedgehog_projection(M, D, heads=H) + 0.1 * noise
    else:
        projection = orthogonal_projection(M, D, heads=H, generator=generator)
    inputs = {"q": q, "k": k, "v": v, "projection": projection.to(dtype).float()}
    if config["gate"] and shape["W"]:
        inputs["log_gate"] = torch.randn(H, generator=generator)
    if config["key_mask"] and phase != "decode":
        inputs["key_mask"] = left_padding(shape["B"], N)
    if phase == "bwd":
        inputs["grad"] = torch.randn(q.shape, generator=generator).to(dtype)
    if phase == "decode":
        inputs |= _make_state(shape, int(str(config["window_block"])), dtype, generator)
    return inputs


def _make_state(shape: Mapping[str, int], block: int, dtype: torch.dtype,
                generator: torch.Generator) -> Tensors:
    """Sums of positive weights; with a window, a full ring whose first tokens are summed up."""
    B, H, Hkv, D, M, W = (shape[letter] for letter in ("B", "H", "Hkv", "D", "M", "W"))
    state = {"kv": torch.randn(B, H, M, D, generator=generator),
             "z": torch.rand(B, H, M, generator=generator) + 1,
             "log_scale": torch.randn(B, H, M, generator=generator)}
    if W:
        R = W + block - 2
        state["keys"], state["values"] = (
            torch.randn(B, Hkv, R, D, generator=generator).to(dtype) for _ in range(2)
        )
        state["ring_mask"] = (torch.arange(R) >= min(block // 2, R - 1)).expand(B, R).contiguous()
    return state


def _options(shape: Mapping[str, int], config: Mapping[str, object]) -> dict:
    names = ("feature_map", "window_block", "causal")
    return {name: config[name] for name in names} | {"window": shape["W"]}


def _run(shape: Mapping[str, int], config: Mapping[str, object], phase: str, inputs: Tensors
         ) -> Tensors:
    options = _options(shape, config)
    if phase != "decode":
        return _evaluate(favor_attention, options, phase, inputs)
    parts = ("kv", "z", "log_scale", "keys", "values", "ring_mask")
    state = FavorState(*(inputs.get(name) for name in parts))  # type: ignore[arg-type]
    q, k, v, projection = (inputs[name] for name in GRADIENTS[:4])
    out, _ = favor_decode(q, k, v, projection, state, log_gate=inputs.get("log_gate"), **options)
    return {"out": out}


def _ref(shape: Mapping[str, int], config: Mapping[str, object], phase: str, inputs: Tensors
         ) -> Tensors:
    options = _options(shape, config)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    if phase != "decode":
        return _evaluate(favor_reference, options, phase, exact)
    k, v, mask = exact["k"], exact["v"], None
    if "keys" in exact:  # the ring's tokens stand before the new one
        k, v = torch.cat([exact["keys"], k], 2), torch.cat([exact["values"], v], 2)
        new = exact["ring_mask"].new_ones(k.shape[0], 1)
        mask = torch.cat([exact["ring_mask"], new], 1)
    state = exact["kv"], exact["z"], exact["log_scale"]
    out: Any = favor_reference(exact["q"], k, v, exact["projection"], key_mask=mask,
                               log_gate=exact.get("log_gate"), initial_state=state, **options)
    return {"out": out}


def _evaluate(op, options: dict, phase: str, inputs: Tensors) -> Tensors:  # noqa: ANN001
    names = [name for name in GRADIENTS if name in inputs]
    leaves = dict(inputs)
    if phase == "bwd":
        leaves |= {name: inputs[name].detach().requires_grad_() for name in names}
    with torch.set_grad_enabled(phase == "bwd"):
        out = op(*(leaves[name] for name in GRADIENTS[:4]), log_gate=leaves.get("log_gate"),
                 key_mask=leaves.get("key_mask"), **options)
    if phase != "bwd":
        return {"out": out}
    grads = torch.autograd.grad(out, [leaves[name] for name in names], inputs["grad"])
    return {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

"""Cases of Native Sparse Attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.op import nsa_attention, nsa_decode
from attnopt.kernels.nsa.reference import nsa_reference
from attnopt.testing.case import Case, Tensors, case_id, left_padding, make_qkv

# dtype, layout, config, sizes: L, P and K tokens of a compressed block, of its stride and of a
# selection block, S selected blocks, W window. Both combines and regimes, one head per group and
# several, equal blocks and overlapping ones, padding
VARIANTS: tuple[tuple[torch.dtype, str, dict[str, object], dict[str, int]], ...] = (
    (torch.float32, "bhnd", dict(combine="merged", regime="short"),
     dict(B=1, H=2, Hkv=2, N=100, D=32, L=16, P=16, K=16, S=2, W=17)),
    (torch.bfloat16, "packed", dict(combine="merged", regime="long"),
     dict(B=1, H=2, Hkv=2, N=193, D=64, L=16, P=16, K=16, S=2, W=32)),
    (torch.bfloat16, "packed", dict(combine="gates", regime="long", key_mask=True),
     dict(B=2, H=4, Hkv=1, N=100, D=32, L=8, P=4, K=16, S=4, W=20)),
    (torch.float16, "packed", dict(combine="gates", regime="short"),
     dict(B=1, H=2, Hkv=2, N=100, D=40, L=16, P=8, K=32, S=3, W=33)),
    (torch.float32, "packed", dict(combine="merged", regime="long", key_mask=True),
     dict(B=2, H=2, Hkv=1, N=65, D=20, L=8, P=8, K=8, S=3, W=9)),
)
PLAIN = {"key_mask": False}
GRADIENTS = ("q", "k", "v", "k_cmp", "v_cmp", "gates")


def nsa_cases(shapes: Mapping[str, int]) -> list[Case]:
    """Every variant in every phase, with sizes replaced by `shapes`."""
    found = []
    for dtype, layout, chosen, defaults in VARIANTS:
        config = PLAIN | chosen
        shape = {letter: shapes.get(letter, size) for letter, size in defaults.items()}
        name = f"{config['combine']}-{config['regime']}-{layout}"
        for phase in ("fwd", "bwd", "decode"):
            found.append(Case(
                id=case_id("nsa", phase, dtype, name, shape),
                op="nsa",
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
    generator = torch.Generator().manual_seed(seed)
    queries = 1 if phase == "decode" else shape["N"]
    q, k, v = make_qkv(shape, layout, queries, dtype, generator)
    mask = left_padding(shape["B"], shape["N"]) if config["key_mask"] else None
    inputs = {"q": q, "k": k, "v": v}
    for name in ("k", "v"):
        inputs[f"{name}_cmp"] = mean_compress(
            inputs[name], compress_block=shape["L"], compress_stride=shape["P"], key_mask=mask
        )
    if config["combine"] == "gates":
        inputs["gates"] = torch.rand(*q.shape[:3], 3, generator=generator).to(dtype)
    if mask is not None:
        inputs["key_mask"] = mask
    if phase == "bwd":
        inputs["grad"] = torch.randn(q.shape, generator=generator).to(dtype)
    return inputs


def _sizes(shape: Mapping[str, int], config: Mapping[str, object]) -> dict[str, Any]:
    gates = config["combine"] == "gates"
    return {
        "combine": config["combine"], "compress_block": shape["L"], "compress_stride": shape["P"],
        "select_block": shape["K"], "num_selected": shape["S"], "window": shape["W"],
        "sink_blocks": 1 if gates else 0, "local_blocks": 2 if gates else None,
    }


def _run(shape: Mapping[str, int], config: Mapping[str, object], phase: str, inputs: Tensors
         ) -> Tensors:
    sizes, tensors = _sizes(shape, config), dict[str, Any](inputs)
    if phase == "decode":
        return {"out": nsa_decode(**tensors, **sizes)}
    regime = str(config["regime"])
    return _evaluate(partial(nsa_attention, regime=regime, **sizes), phase, inputs)


def _ref(shape: Mapping[str, int], config: Mapping[str, object], phase: str, inputs: Tensors
         ) -> Tensors:
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return _evaluate(partial(nsa_reference, **_sizes(shape, config)), phase, exact)


def _evaluate(op, phase: str, inputs: Tensors) -> Tensors:  # noqa: ANN001
    if phase != "bwd":
        with torch.no_grad():
            return {"out": op(**inputs)}
    tensors = dict(inputs)
    grad = tensors.pop("grad")
    names = [name for name in GRADIENTS if name in tensors]
    for name in names:
        tensors[name] = tensors[name].detach().requires_grad_()
    grads = torch.autograd.grad(op(**tensors), [tensors[name] for name in names], grad)
    return {f"d{name}": x for name, x in zip(names, grads, strict=True)}

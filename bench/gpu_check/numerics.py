"""Are the kernels right on this device? Every case against float64, and bit for bit where due.

A result may be off by twice the error of the eager path at the same dtype, both against float64 on
the same rounded inputs, and a floor: the eager path keeps in fp32 what kernels round to feed tensor
cores, and fp32 products there are made of three TF32 ones.

Memory from torch.empty is filled with NaN meanwhile, so that an element nobody wrote is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.bench.gpu_check.device import Device
from attnopt.bench.gpu_check.workers import Task
from attnopt.kernels.dispatch import force_backend
from attnopt.kernels.favor.op import favor_attention
from attnopt.testing import Case, cases

OPS = ("lastk", "favor", "nsa")
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# What replaces the sizes of the cases: nothing, then lengths beyond a block and beyond a segment.
# Float64 takes N^2 M numbers per head, hence few heads at the end.
ONE_HEAD = {"N": 4097, "B": 1, "H": 1, "Hkv": 1}
SIZES: tuple[dict[str, int], ...] = (
    {}, {"N": 1000, "D": 64}, ONE_HEAD | {"D": 64}, {"N": 1000, "D": 128}, ONE_HEAD | {"D": 128},
)  # fmt: skip
TINY = {"B": 1, "H": 2, "D": 16}
REHEARSAL = (  # sizes, dtype, phases
    (TINY | {"N": 32}, torch.bfloat16, ("fwd", "bwd", "decode")),
    (TINY | {"N": 64}, torch.float16, ("fwd",)),
)
ON_HOST = 600  # tokens up to which float64 is computed on the CPU
# Inputs that a case may be wrong on before it fails: rounding may change which blocks NSA selects,
# and where a gradient of one number cancels, the eager path may be right by luck. A mistake stays.
DRAWS = 3


def tasks(rehearse: bool) -> list[Task]:
    """One task per case, small sizes first; to rehearse, each op in each phase once or twice."""
    if not rehearse:
        return [_task(sizes, i) for sizes in SIZES for i in range(len(cases()))]
    found = []
    for sizes, dtype, phases in REHEARSAL:
        firsts: dict[tuple[str, str], int] = {}
        for i, case in enumerate(cases(sizes)):
            if case.dtype == dtype and case.phase in phases:
                firsts.setdefault((case.op, case.phase), i)
        found += [_task(sizes, i) for i in firsts.values()]
    return found


def _task(sizes: dict[str, int], index: int) -> Task:
    arguments = {"sizes": sizes, "index": index}
    return Task(cases(sizes)[index].id, f"{__name__}:check", arguments)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(device: Device, sizes: dict[str, int], index: int) -> Iterator[dict[str, Any]]:
    """Check one case.

    Args:
        device: where it runs.
        sizes: those that replace the case's own.
        index: of the case in `cases(sizes)`.

    Yields:
        One record: "status" is "ok", "failed" or "not run"; "results" holds error, limit and so on
        of each; "rejected" says what was wrong with each draw of inputs that was.
    """
    case = cases(sizes)[index]
    record: dict[str, Any] = {"case": case.id, "op": case.op, "phase": case.phase, "status": "ok"}
    with poisoned_memory(), device.hearing() as heard:
        try:
            rejected: list[str] = []
            while len(rejected) < DRAWS:
                record["results"] = compare(case, device, seed=len(rejected))
                wrong = complaints(record)
                if not wrong:
                    break
                rejected += ["; ".join(wrong)]
            record |= {"rejected": rejected}
            record |= {"deterministic": is_deterministic(case, device)}
            record |= {"causal": is_causal(case, device)}
        except torch.OutOfMemoryError as error:
            record |= {"status": "not run", "reason": f"out of memory: {str(error)[:200]}"}
    record["kernels"] = heard
    wrong = complaints(record)
    if wrong:
        record |= {"status": "failed", "reason": "; ".join(wrong)}
    yield record


def complaints(record: dict[str, Any]) -> list[str]:
    """What is wrong with a checked case, in words."""
    found = [
        f"{name} is off by {result['error']:.2g}, expected at most {result['limit']:.2g}"
        for name, result in record.get("results", {}).items()
        if not result["error"] <= result["limit"]
    ]
    if record.get("deterministic") is False:
        found.append("the same call gave other bits the second time")
    if record.get("causal") is False:
        found.append("a later key changed earlier outputs, or did not change its own")
    return found


def compare(case: Case, device: Device, seed: int) -> dict[str, dict[str, float]]:
    """Errors of Triton and of the eager path against float64, by result."""
    inputs = case.make(seed)
    moved = to_device(inputs, device.torch_device)
    exact = case.ref(inputs if case.shape["N"] <= ON_HOST else moved)
    found, usual = (run(case, moved, backend) for backend in ("triton", "eager"))
    results = {}
    for name, truth in exact.items():
        error, largest = errors(found[name], truth)
        eager, _ = errors(usual[name], truth)
        limit = 2 * eager + FLOORS[case.dtype]
        results[name] = {"error": error, "largest": largest, "eager": eager, "limit": limit}
    return results


def run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Results of a case through a backend."""
    with force_backend(backend):
        return case.run(inputs)


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Error relative to the truth's norm, and the largest one relative to its largest entry."""
    difference = found.detach().to(truth) - truth
    norm, largest = float(truth.norm()), float(truth.abs().max())
    return float(difference.norm()) / (norm or 1), float(difference.abs().max()) / (largest or 1)


def is_deterministic(case: Case, device: Device) -> bool:
    """Whether the same call twice gives the same bits."""
    inputs = to_device(case.make(), device.torch_device)
    first, second = (run(case, inputs, "triton") for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def is_causal(case: Case, device: Device) -> bool | None:
    """Whether another last key leaves all earlier outputs bit for bit, and not its own.

    FAVOR+ promises so with its static stabilizer. None for a case to which this does not apply.
    """
    if case.phase != "fwd" or case.config.get("causal") is False:
        return None
    attend = partial(_static_favor, case) if case.op == "favor" else partial(run, case)
    outs = []
    for sign in (1, -1):
        inputs = to_device(case.make(), device.torch_device)
        for name in ("k", "v"):
            inputs[name][:, :, -1] *= sign
        outs.append(attend(inputs, "triton")["out"])
    first, second = outs
    same = torch.equal(first[:, :, :-1], second[:, :, :-1])
    return same and not torch.equal(first[:, :, -1], second[:, :, -1])


def _static_favor(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options: dict[str, Any] = {name: case.config[name] for name in ("feature_map", "window_block")}
    options |= {name: x for name, x in inputs.items() if name != "grad"}
    with force_backend(backend), torch.no_grad():
        out = favor_attention(**options, window=case.shape["W"], stabilizer="static")
    return {"out": out}


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies on a device with the same strides; views of one memory stay that."""
    memory: dict[int, Tensor] = {}
    moved = {}
    for name, x in inputs.items():
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            flat = torch.empty(0, dtype=x.dtype).set_(storage)
            memory[storage.data_ptr()] = torch.empty_like(flat, device=device).copy_(flat)
        base = memory[storage.data_ptr()]
        moved[name] = base.as_strided(x.shape, x.stride(), x.storage_offset())
    return moved

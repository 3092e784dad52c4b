"""Which implementation of an op runs: the rule that every mechanism shares."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

BACKENDS = ("auto", "triton", "eager", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_forced: str | None = None


@contextlib.contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Send ops with `backend="auto"` to the named backend, whatever the tensors' device.

    On CPU tensors Triton kernels then run in Triton's interpreter, which needs `TRITON_INTERPRET=1`
    in the environment before Triton is imported.

    Raises:
        ValueError: the backend is unknown.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def force_triton() -> contextlib.AbstractContextManager[None]:
    """Send ops with `backend="auto"` to their Triton kernels: `force_backend("triton")`."""
    return force_backend("triton")


@contextlib.contextmanager
def operator_body(q: torch.Tensor) -> Iterator[None]:
    """Around what an operator computes: without autocast, and on the device of `q`.

    Triton launches on the current device, which need not be that of the tensors.
    """
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        yield


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _has_tensor_cores(device: torch.device) -> bool:
    """Triton reaches tensor cores from sm_80 on; below it cuBLAS (the eager path) is faster."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_backend(backend: str, q: torch.Tensor) -> str:
    """Name the implementation that serves `q`: "triton", "eager" or "reference".

    "auto" is Triton for fp16, bf16 and fp32 tensors on a GPU with tensor cores that Triton can
    use (sm_80 and newer), eager PyTorch elsewhere. An explicit backend never falls back.

    Raises:
        ValueError: the backend is unknown, or is "triton" where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        if _forced in ("eager", "reference"):
            return _forced
        if q.dtype not in TRITON_DTYPES:
            return "eager"
        if _forced == "triton" or (q.device.type == "cuda" and _has_tensor_cores(q.device)):
            return "triton"
        return "eager"
    if backend == "triton":
        if q.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"backend='triton' takes float16, bfloat16 or float32; got {q.dtype}. "
                "backend='eager' takes float64 too."
            )
        if q.device.type != "cuda" and not (_forced == "triton" or _interpreted()):
            raise ValueError(
                f"backend='triton' needs CUDA tensors; got device {q.device}. Use backend='eager' "
                "there, or set TRITON_INTERPRET=1 to run the kernel in Triton's interpreter."
            )
    return backend


def harmonize_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast q, k and v to the autocast dtype where autocast is on; weights keep their precision.

    What is not a tensor, None above all, is left as it is.
    """
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors  # the first is False for meta tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point()
        and x.dtype != torch.float64 else x
        for x in tensors
    )

"""Inputs and backends that the tests of every attention op share."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from attnopt.testing import force_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = find_spec("triton") is not None
BACKENDS = ["eager", "triton"] if HAS_TRITON else ["eager"]
MASKS = ["none", "left", "right", "holes", "empty-row"]
LAYOUTS = ["bhnd", "packed", "broadcast", "transposed"]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def launching(backend: str) -> AbstractContextManager:
    """Let `backend` run on this machine's tensors."""
    return force_triton() if backend == "triton" else nullcontext()


def make_mask(kind: str, batch: int, n: int, rng: torch.Generator) -> Tensor | None:
    """[batch, n] bool, different in every row of the batch; "empty-row" masks all of row 0."""
    j, b = torch.arange(n), torch.arange(batch)[:, None]
    if kind == "none":
        return None
    if kind == "left":
        return j >= (b + 1) * n // (batch + 1)
    if kind == "right":
        return j < n - (b + 1) * n // (batch + 2)
    if kind == "holes":
        return (torch.rand(batch, n, generator=rng) < 0.6) & (j > 0)
    return (b > 0) & (j >= n // 4)


def make_qkv(layout: str, b: int, h: int, hkv: int, nq: int, nk: int, d: int, rand) -> list[Tensor]:
    """q, k, v of the same sizes in one of LAYOUTS, which differ in their strides."""
    if layout == "packed":  # one projection of every token, as in GPT-2
        parts = rand(b, nk, (h + 2 * hkv) * d).split([h * d, hkv * d, hkv * d], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)
        return [q[:, :, nk - nq :], k, v]
    if layout == "broadcast":
        q, k, v = rand(1, h, nq, d), rand(b, 1, nk, d), rand(1, 1, nk, d)
        return [q.expand(b, -1, -1, -1), k.expand(-1, hkv, -1, -1), v.expand(b, hkv, -1, -1)]
    sizes = [(b, h, nq), (b, hkv, nk), (b, hkv, nk)]
    if layout == "transposed":  # features are the slow dimension
        return [rand(b, heads, d, n).mT for b, heads, n in sizes]
    return [rand(*size, d) for size in sizes]

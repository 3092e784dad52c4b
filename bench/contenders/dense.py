"""Dense attention: what every mechanism replaces."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
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
    prefix,
    prepare_op,
)

SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION",
        "math": "MATH"}


def softmax_rows(tensors: Tensors, first: int, end: int) -> Tensor:
    """The definition: a run of queries of causal softmax attention."""
    q, k, v = prefix(tensors, first, end)
    scores = q @ k.mT * q.shape[3] ** -0.5
    return scores.masked_fill(~causal(scores), -torch.inf).softmax(-1) @ v


def dense_contenders() -> list[Contender]:
    """SDPA with each backend by name, and FlexAttention."""
    found = [
        Contender(
            name=f"sdpa-{name}", label=f"SDPA {name}", mechanism="dense", level="op",
            library="torch", prepare=partial(_prepare, partial(_sdpa, backend)),
            missing=partial(_sdpa_missing, name),
        )
        for name, backend in SDPA.items()
    ]  # fmt: skip
    found.append(Contender(
        name="flex-causal", label="FlexAttention causal", mechanism="dense", level="op",
        library="torch", prepare=partial(_prepare, _flex), phases=("fwd", "bwd"),
        missing=flex_missing,
    ))  # fmt: skip
    return found


def dense_partner(device: torch.device) -> str:
    """The dense contender that speed-ups refer to: flash, which GPUs before sm_80 do not have."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa-efficient"
    return "sdpa-flash"


def _prepare(attend: Any, phase: str, shape: Shape, dtype: torch.dtype, device: torch.device,
             seed: int = 0) -> Prepared:
    decode = phase == "decode"
    tensors = draw(shape, dtype, device, seed, queries=1 if decode else None)
    B, H, D, N = shape.B, shape.H, shape.D, shape.N
    least = work.dense(phase, B, H, H, tensors["q"].shape[2], N, D, dtype.itemsize)
    state = nbytes(tensors["k"], tensors["v"]) if decode else 0
    return prepare_op(attend, softmax_rows, tensors, phase, least, state_bytes=state)


def _plain_sdpa(tensors: Tensors) -> Tensor:
    q, k, v = (tensors[name] for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def _sdpa(backend: str, tensors: Tensors) -> Tensor:
    """SDPA by this backend; naming it takes tens of microseconds, so only where it must be."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (tensors[name] for name in "qkv")
    wanted = getattr(SDPBackend, backend)
    if torch._fused_sdp_choice(q, k, v, is_causal=q.shape[2] > 1) == wanted.value:
        return _plain_sdpa(tensors)
    with sdpa_kernel(wanted):
        return _plain_sdpa(tensors)


@cache
def _sdpa_missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Asked by trying: PyTorch has no complete list of what each backend takes."""
    tensors = {x: torch.zeros(1, 1, 16, 64, dtype=dtype, device=device) for x in "qkv"}
    try:
        _sdpa(SDPA[name], tensors)
    except RuntimeError:
        return f"PyTorch has no {name} attention for {dtype} on this {device.type}"
    return None


@cache
def compiled_flex() -> Any:
    """`flex_attention` compiled, once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """FlexAttention is fast only where it is compiled, with gradients only on GPUs."""
    return None if device.type == "cuda" else "FlexAttention compiles with gradients on a GPU only"


@cache
def causal_blocks(n: int, device: torch.device, window: int | None = None) -> Any:
    """The block mask of causal attention, over the last `window` tokens or all."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j
        return seen if window is None else seen & (i - j < window)

    return create_block_mask(visible, None, None, n, n, device=device, _compile=True)


def _flex(tensors: Tensors) -> Tensor:
    q, k, v = (tensors[name] for name in "qkv")
    return compiled_flex()(q, k, v, block_mask=causal_blocks(q.shape[2], q.device))

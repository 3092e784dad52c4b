"""Checks of the arguments that every attention op takes, and the messages they raise."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_dense(x: object) -> bool:
    """Whether this is a tensor with strides: not a sparse one, nor anything else."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def describe(x: object) -> str:
    """What came, for messages: dtype and shape of a tensor, the type of anything else."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    kind = "" if x.layout == torch.strided else f" {str(x.layout).removeprefix('torch.')}"
    return f"{x.dtype}{kind} {tuple(x.shape)}"


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check `q` `[B, H, Nq, D]` against `k`, `v` `[B, Hkv, Nk, D]` with `Hkv` dividing `H`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_dense(x):
            raise ValueError(f"{name} must be a dense tensor; got {describe(x)}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, tokens, head_dim]; "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")
    if k.shape != v.shape:
        raise ValueError(
            f"k and v must have one shape; got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, heads, queries, dim = q.shape
    if 0 in q.shape:
        raise ValueError(f"q must not have an empty dimension; got shape {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k and v must share batch size {batch} and head_dim {dim} with q; "
            f"got shape {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1] != 0:
        raise ValueError(
            f"the number of key/value heads must divide the number of query heads, {heads}; "
            f"got {k.shape[1]}"
        )
    if k.shape[2] < queries:
        raise ValueError(
            f"k and v must hold at least as many tokens as q, {queries} (the queries are the last "
            f"ones); got {k.shape[2]}"
        )


def check_key_mask(key_mask: torch.Tensor | None, k: torch.Tensor) -> None:
    """Check a key mask: `[B, Nk]` bool on the device of `k`, True for real tokens.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if not is_dense(key_mask):
        raise ValueError(f"key_mask must be a dense tensor; got {describe(key_mask)}")
    if key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask must be bool, True for real tokens; got {key_mask.dtype} "
            "(mask.bool() converts a mask of ones and zeros)"
        )
    if tuple(key_mask.shape) != expected:
        raise ValueError(
            f"key_mask must have shape [batch, key tokens] = {list(expected)}; "
            f"got {list(key_mask.shape)}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"key_mask must be on the device of k, {k.device}; got {key_mask.device}")


def check_head_weights(name: str, x: torch.Tensor, q: torch.Tensor, minimum: int) -> None:
    """Check weights per offset: float `[X]` or `[H, X]`, X >= `minimum`, on the device of `q`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    heads = q.shape[1]
    if not is_dense(x):
        raise ValueError(f"{name} must be a dense tensor; got {describe(x)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be a floating-point tensor; got {x.dtype}")
    if x.dim() not in (1, 2) or (x.dim() == 2 and x.shape[0] != heads):
        raise ValueError(
            f"{name} must have shape [W] or [heads, W] with {heads} heads; "
            f"got {list(x.shape)}"
        )
    if x.shape[-1] < minimum:
        raise ValueError(f"{name} must hold at least {minimum} weight(s); got {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")


def check_scale(scale: float | None, dim: int) -> float:
    """Return the softmax scale, `1/sqrt(dim)` by default.

    Raises:
        ValueError: the scale is not a finite number.
    """
    if scale is None:
        return dim**-0.5
    if not isinstance(scale, (int, float)) or scale != scale or scale in (
        float("inf"), float("-inf")
    ):
        raise ValueError(f"scale must be a finite number or None; got {scale!r}")
    return float(scale)


def check_causal(causal: bool) -> None:
    """Check the direction of attention.

    Raises:
        ValueError: anything but True and False.
    """
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False; got {causal!r}")

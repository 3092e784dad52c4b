"""Checks of what only FAVOR+ takes: features, window, gate and state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.checks import FLOATS, check_causal, check_scale, describe, is_dense
from attnopt.kernels.favor.state import FavorState

FEATURE_MAPS = ("favor", "hedgehog", "exp", "relu", "taylor")
TRITON_FEATURE_MAPS = ("favor", "hedgehog", "exp")
STABILIZERS = ("running", "static")
MAX_BLOCK = 128


class Options(NamedTuple):
    """Everything but tensors, in the order of the operators' arguments."""

    feature_map: str
    window: int
    window_block: int
    causal: bool
    stabilizer: str
    scale: float


def check_options(
    q: Tensor, feature_map: str, window: int, window_block: int, causal: bool,
    scale: float | None, stabilizer: str,
) -> Options:
    """Check the options that are not tensors.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}; "
                         f"got {feature_map!r}")
    if stabilizer not in STABILIZERS:
        raise ValueError(f"stabilizer must be one of {', '.join(STABILIZERS)}; "
                         f"got {stabilizer!r}")
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ValueError(f"window must be an integer >= 0; got {window!r}")
    whole = isinstance(window_block, int) and not isinstance(window_block, bool)
    if not whole or not 1 <= window_block <= MAX_BLOCK:
        raise ValueError(f"window_block must be an integer in 1..{MAX_BLOCK}; "
                         f"got {window_block!r}")
    check_causal(causal)
    if window and not causal:
        raise ValueError(f"a window needs causal=True; got window={window}")
    scale = check_scale(scale, q.shape[3])
    if scale <= 0:
        raise ValueError(f"scale must be positive, for features need its root; got {scale}")
    return Options(feature_map, window, window_block, causal, stabilizer, scale)


def check_features(
    q: Tensor, projection: Tensor | None, log_gate: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Check projection and gate; return them per head, `[H, M, D]` and `[H]`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    H, D = q.shape[1], q.shape[3]
    if options.feature_map == "taylor":
        if projection is not None:
            raise ValueError("feature_map='taylor' takes projection=None: it has no projection")
        projection = q.new_empty(H, 0, D)
    elif projection is None or not is_dense(projection):
        raise ValueError(f"projection must be a dense tensor [M, {D}] or [{H}, M, {D}]; "
                         f"got {describe(projection)}")
    elif projection.dtype not in FLOATS or projection.device != q.device:
        raise ValueError(f"projection must be floating point on {q.device}; "
                         f"got {projection.dtype} on {projection.device}")
    else:
        shape = list(projection.shape)
        fits = len(shape) in (2, 3) and shape[-1] == D and shape[-2] > 0
        if not fits or (len(shape) == 3 and shape[0] != H):
            raise ValueError(f"projection must have shape [M, {D}] or [{H}, M, {D}]; got {shape}")
        projection = projection.expand(H, -1, -1)
    if log_gate is None:
        return projection, q.new_zeros(H, dtype=torch.promote_types(q.dtype, torch.float32))
    if not options.window:
        raise ValueError("log_gate needs a window: without one it cancels")
    if not is_dense(log_gate) or log_gate.dtype not in FLOATS:
        raise ValueError(f"log_gate must be a floating-point tensor [{H}]; "
                         f"got {describe(log_gate)}")
    if list(log_gate.shape) != [H] or log_gate.device != q.device:
        raise ValueError(f"log_gate must have shape [{H}] on {q.device}; "
                         f"got {list(log_gate.shape)} on {log_gate.device}")
    return projection, log_gate


def count_features(projection: Tensor | None, q: Tensor, feature_map: str) -> int:
    """M: rows of the projection, or 1 + D + D(D + 1)/2 for "taylor"."""
    if feature_map == "taylor":
        D = q.shape[3]
        return 1 + D + D * (D + 1) // 2
    assert projection is not None
    return projection.shape[-2]


def check_state(state: FavorState, q: Tensor, k: Tensor, num_features: int, window: int) -> None:
    """Check an initial state against the inputs.

    Raises:
        ValueError: naming the part, what was expected and what came.
    """
    if not isinstance(state, FavorState):
        raise ValueError(f"initial_state must be a FavorState; got {type(state).__name__}")
    B, H, _, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    shapes = {"kv": [B, H, num_features, D], "z": [B, H, num_features],
              "log_scale": [B, H, num_features]}
    for name, shape in shapes.items():
        x = getattr(state, name)
        if list(x.shape) != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(f"initial_state.{name} must be {dtype} {shape} on {q.device}; "
                             f"got {x.dtype} {list(x.shape)} on {x.device}")
    ring = state.keys, state.values, state.key_mask
    held = sum(part is not None for part in ring)
    if held != (3 if window else 0):
        raise ValueError("initial_state must hold keys, values and key_mask of recent tokens with "
                         f"a window, and none without; got window={window} and {held} of them")
    if state.keys is None or state.key_mask is None:
        return
    R = state.keys.shape[2] if state.keys.dim() == 4 else 0
    for name, shape in (("keys", [B, k.shape[1], R, D]), ("values", [B, k.shape[1], R, D])):
        x = getattr(state, name)
        if list(x.shape) != shape or x.dtype != k.dtype or x.device != k.device:
            raise ValueError(f"initial_state.{name} must be {k.dtype} {shape} on {k.device}; "
                             f"got {x.dtype} {list(x.shape)} on {x.device}")
    mask = state.key_mask
    if list(mask.shape) != [B, R] or mask.dtype != torch.bool or mask.device != k.device:
        raise ValueError(f"initial_state.key_mask must be bool [{B}, {R}] on {k.device}; got "
                         f"{mask.dtype} {list(mask.shape)} on {mask.device}")

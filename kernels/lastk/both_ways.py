"""Both directions by the causal band: the keys move, the kernels stay.

A band that reaches R tokens to either side is a causal band of 2R + 1 offsets for queries that
stand R tokens later. The operators take queries as the last of the key positions, so R masked keys
at the end are all it needs. Sinks are visible from their own position on; a shift of at least T - 1
puts every query behind them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_direction(causal: bool, q: Tensor, k: Tensor, log_weights: Tensor) -> None:
    """Check the direction; both ask for as many keys as queries and an odd number of offsets.

    Raises:
        ValueError: naming what was expected and what came.
    """
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False; got {causal!r}")
    if causal:
        return
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal=False needs as many keys as queries; got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )
    if log_weights.shape[-1] % 2 == 0:
        raise ValueError(
            "with causal=False log_weights must hold an odd number of weights, R ahead, the token "
            f"itself and R back; got {list(log_weights.shape)}"
        )


def look_ahead(
    k: Tensor, v: Tensor, log_weights: Tensor, sinks: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The causal problem whose last N positions are the queries of a band to both sides.

    Args:
        k: `[B, Hkv, N, D]`.
        v: like `k`.
        log_weights: `[2R + 1]` or `[H, 2R + 1]`, entry c for the key `R - c` tokens ahead.
        sinks: T, number of sinks.
        key_mask: `[B, N]` bool, or None.

    Returns:
        Keys, values, log-weights and key mask of the causal problem, S = max(R, T - 1) tokens
        longer; an R of N or more counts as N - 1.
    """
    length = k.shape[2]
    unreached = max(log_weights.shape[-1] // 2 - (length - 1), 0)  # offsets at either end
    log_weights = log_weights[..., unreached : log_weights.shape[-1] - unreached]
    reach = log_weights.shape[-1] // 2
    shift = max(reach, sinks - 1)
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], length, dtype=torch.bool, device=k.device)
    return (
        F.pad(k, (0, 0, 0, shift)),
        F.pad(v, (0, 0, 0, shift)),
        F.pad(log_weights, (shift - reach, 0), value=float("-inf")),
        F.pad(key_mask, (0, shift), value=False),
    )

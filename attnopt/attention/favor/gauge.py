"""Where the gate of windowed features starts, measured on the dense model, head by head.

The gate weighs the far tokens, whose features have a scale of their own, against the window. The
right weight is what makes the mass of the far tokens that of softmax, so it can be read off before
any training: `log_gate = mean(log true far mass - log feature far mass)`.

Letters: B batch, H query heads, Hkv key/value heads, N tokens, D head dimension, M features,
W window, b tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.attention.favor.module import FavorMechanism
from attnopt.kernels.favor.reference import log_features
from attnopt.kernels.rows import first_real_token

_CHUNK = 2**22  # scores at a time


class MassGauge:
    """The log_gate of features: the mean of what they lack, over rows, per head."""

    def __init__(self, mechanism: FavorMechanism) -> None:
        self.mechanism = mechanism
        self.total: Any = 0.0  # [H]
        self.count = 0

    def add(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, out: Tensor
            ) -> None:
        """Measure a batch of which softmax makes `out` `[B, H, N, D]`."""
        values, rows = _log_ratio(self.mechanism, q, k, key_mask, scale)
        self.total = self.total + values.masked_fill(~rows[:, None], 0.0).sum((0, 2))
        self.count += int(rows.sum())

    def finish(self) -> Tensor | None:
        """Set the gate and return it; None where there was nothing to measure."""
        gate = self.mechanism.log_gate
        assert gate is not None
        return gate.copy_(self.total / self.count).detach().clone() if self.count else None


def _log_ratio(
    mechanism: FavorMechanism, q: Tensor, k: Tensor, key_mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Log true far mass less log feature far mass, `[B, H, N]`, and the rows that have either.

    In float64, and in logarithms throughout.
    """
    config, length = mechanism.config, q.shape[2]
    queries, keys = (scale**0.5 * x.double() for x in (q, k))
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    start = first_real_token(key_mask)[:, None]  # [B, 1]
    position = torch.arange(length, device=q.device) - start  # [B, N]
    block = config.window_block
    far = (position - config.window + 1).clamp_min(0) // block * block  # positions before are far
    rows = key_mask & (far > 0)
    is_far = key_mask[:, None] & (position[:, None] < far[..., None])  # [B, N, N]
    true = _log_mass(queries, keys, is_far, taylor=False)
    if config.feature_map == "taylor":
        return true - _log_mass(queries, keys, is_far, taylor=True), rows
    assert mechanism.projection is not None
    projection = mechanism.projection.double()
    log_q, log_k = (
        log_features(x, projection, config.feature_map)[1] for x in (queries, keys)
    )  # [B, H, N, M]
    log_k = log_k.masked_fill(~key_mask[:, None, :, None], -torch.inf).logcumsumexp(2)
    last = (start + far - 1).clamp(0, length - 1)  # the last far key of each query
    log_k = log_k.gather(2, last[:, None, :, None].expand_as(log_k))
    mass = torch.logsumexp(log_q + log_k, -1)
    if config.feature_map == "favor":
        mass = mass - torch.tensor(projection.shape[1], dtype=mass.dtype).log()
    return true - mass, rows


def _log_mass(queries: Tensor, keys: Tensor, far: Tensor, *, taylor: bool) -> Tensor:
    """Log of the sum over far keys of e^s, or of 1 + s + s^2/2: `[B, H, N]`, -inf without any."""
    size = max(1, _CHUNK // (queries.shape[0] * queries.shape[1] * keys.shape[2]))
    found = []
    for part, seen in zip(queries.split(size, 2), far.split(size, 1), strict=True):
        scores = part @ keys.mT
        if taylor:
            scores = (1 + scores + scores.square() / 2).log()
        found.append(scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1))
    return torch.cat(found, 2)

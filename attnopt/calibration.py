"""Where gates start: measured on a few texts of the dense model, head by head.

The gate of windowed features weighs the far tokens, whose features have a scale of their own,
against the window. The right weight is what makes the mass of the far tokens that of softmax, so it
can be read off before any training: `log_gate = mean(log true far mass - log feature far mass)`.

The three gates of NSA weigh its branches. They start where the branches together come closest to
the dense output o, which is a least-squares problem with three unknowns:

    g = argmin over [0.01, 0.99]^3 of sum over tokens |o - g_0 o_cmp - g_1 o_slc - g_2 o_win|^2

Letters: B batch, H query heads, Hkv key/value heads, N tokens, D head dimension, M features,
W window, b tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from attnopt.attention.base import AttentionMechanism
from attnopt.attention.favor.module import FavorMechanism
from attnopt.attention.nsa.module import START, NSAMechanism
from attnopt.convert import mechanisms
from attnopt.convert.interface import NAME
from attnopt.kernels.favor.reference import log_features
from attnopt.kernels.rows import first_real_token

GATE_BOUNDS = (0.01, 0.99)  # of NSA's gates: beyond them a sigmoid hardly learns
RIDGE = 1e-6  # of the mean square of a branch
SWEEPS = 200
_CHUNK = 2**22  # scores at a time


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Tensor | Mapping[str, Tensor] | Iterable[Any]
) -> dict[int, Tensor]:
    """Set the gates of every converted layer that has some, from the model's dense attention.

    The model runs once with softmax in every layer. `Favor`: where a query has far tokens, the true
    far mass is their sum of e^s, the feature far mass their sum of phi(q).phi(k); the gate is the
    mean difference of the logarithms. `NSA`: the gates are the constants with which the branches
    come closest to softmax, between 0.01 and 0.99, and a third where a branch saw nothing; what
    they had learned is gone. Deterministic, and independent of where the gates are now.

    Args:
        model: a converted model.
        batches: token ids `[B, N]`, a mapping of a forward pass's inputs (`input_ids` and perhaps
            `attention_mask`; labels are not used), or several of either.

    Returns:
        By layer index the new `log_gate` `[H]` of `Favor`, the gates `[H, 3]` (compressed,
        selected, window) of `NSA`. A `Favor` layer whose window covers every text keeps its gate
        and is left out, as are layers without a gate.

    Raises:
        ValueError: a model without converted layers, or no batch.
    """
    own = mechanisms(model)
    if not own:
        raise ValueError("expected a model that attnopt.convert has converted; it has no mechanism")
    several: Iterable[Any] = [batches] if isinstance(batches, Tensor | Mapping) else batches
    gauges = {i: g for i, m in own.items() if (g := _gauge(m)) is not None}
    count = 0
    with _dense(model, own.values(), gauges):
        for batch in several:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            inputs.pop("labels", None)
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            model.base_model(**inputs, use_cache=False)
            count += 1
    if count == 0:
        raise ValueError("expected at least one batch of token ids to calibrate on; got none")
    found = {index: gauge.finish() for index, gauge in gauges.items()}
    return {index: gates for index, gates in found.items() if gates is not None}


class _MassGauge:
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


class _BranchGauge:
    """The gates of NSA: normal equations of least squares, per head, in float64."""

    def __init__(self, mechanism: NSAMechanism) -> None:
        self.mechanism = mechanism
        self.products: Any = 0.0  # [H, 3, 3], of branches
        self.targets: Any = 0.0  # [H, 3], of branches and softmax

    def add(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, out: Tensor
            ) -> None:
        """Measure a batch of which softmax makes `out` `[B, H, N, D]`."""
        branches = self.mechanism.branches(q, k, v, key_mask=key_mask, scale=scale).double()
        branches = branches * key_mask[:, None, :, None]
        self.products = self.products + torch.einsum("xbhnd,ybhnd->hxy", branches, branches)
        self.targets = self.targets + torch.einsum("xbhnd,bhnd->hx", branches, out.double())

    def finish(self) -> Tensor:
        """Set the gates and return them."""
        gates = bounded_least_squares(self.products, self.targets, *GATE_BOUNDS)
        unseen = self.products.diagonal(dim1=1, dim2=2) == 0  # in texts shorter than a block
        gates = gates.masked_fill(unseen, START).float()
        self.mechanism.set_gates(gates)
        return gates


def bounded_least_squares(products: Tensor, targets: Tensor, low: float, high: float) -> Tensor:
    """Minimize `g.A.g / 2 - g.r` over a box: solve it, then go around it one unknown at a time.

    A solution within the box is the one without it. Where A is singular a small ridge shares the
    weight among branches that are the same.

    Args:
        products: A, `[H, 3, 3]`, positive semidefinite, float64.
        targets: r, `[H, 3]`.
        low: lower bound of every unknown.
        high: upper bound.

    Returns:
        `[H, 3]`.
    """
    diagonal = products.diagonal(dim1=1, dim2=2)
    ridge = (RIDGE * diagonal.mean(1)).clamp_min(torch.finfo(products.dtype).tiny)
    regular = products + torch.diag_embed(ridge[:, None].expand_as(diagonal))
    diagonal = regular.diagonal(dim1=1, dim2=2)
    found = torch.linalg.solve(regular, targets)
    inside = ((found >= low) & (found <= high)).all(1, keepdim=True)
    bounded = found.clamp(low, high)
    for _ in range(SWEEPS):
        for i in range(bounded.shape[1]):
            slope = targets[:, i] - (regular[:, i] * bounded).sum(1)
            bounded[:, i] = (bounded[:, i] + slope / diagonal[:, i]).clamp(low, high)
    return torch.where(inside, found, bounded)


def _gauge(mechanism: AttentionMechanism) -> _MassGauge | _BranchGauge | None:
    if isinstance(mechanism, FavorMechanism) and mechanism.config.gate:
        return _MassGauge(mechanism)
    if isinstance(mechanism, NSAMechanism) and mechanism.config.gate:
        return _BranchGauge(mechanism)
    return None


@contextmanager
def _dense(
    model: PreTrainedModel,
    own: Iterable[AttentionMechanism],
    gauges: Mapping[int, _MassGauge | _BranchGauge],
) -> Iterator[None]:
    """Within this context mechanisms attend by softmax, and those with gates are measured."""

    def run(mechanism: AttentionMechanism) -> Any:
        def forward(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            key_mask: Tensor | None = None,
            scale: float | None = None,
            **others: Any,
        ) -> Tensor:
            if key_mask is None:
                key_mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
            scale = q.shape[3] ** -0.5 if scale is None else scale
            out = _softmax(q, k, v, key_mask, scale)
            if mechanism.layer_idx in gauges:
                gauges[mechanism.layer_idx].add(q, k, v, key_mask, scale, out)
            return out

        return forward

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(NAME)
        for mechanism in own:
            # an attribute of the instance goes before the method of its class
            mechanism.__dict__["forward"] = run(mechanism)
            stack.callback(mechanism.__dict__.pop, "forward")
        yield


def _softmax(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Causal softmax over the real keys; padding sees itself, so that it stays finite."""
    position = torch.arange(q.shape[2], device=q.device)
    visible = (position <= position[:, None]) & key_mask[:, None, None]  # [B, 1, N, N]
    visible = visible | (position == position[:, None])
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=grouped)


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

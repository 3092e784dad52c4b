"""Where the gates of windowed feature attention start: measured on a few texts of the dense model.

A gate weighs the far tokens, whose features have a scale of their own, against the window. The
right weight is what makes the mass of the far tokens that of softmax, so it can be read off before
any training: `log_gate = mean(log true far mass - log feature far mass)`, head by head.

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

from attnopt.convert import mechanisms
from attnopt.convert.interface import NAME
from attnopt.kernels.favor.reference import log_features
from attnopt.kernels.rows import first_real_token
from attnopt.modules import AttentionMechanism, FavorMechanism

_CHUNK = 2**22  # scores at a time


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Tensor | Mapping[str, Tensor] | Iterable[Any]
) -> dict[int, Tensor]:
    """Set the gate of every converted layer that has one, from the model's dense attention.

    The model runs once with softmax in every layer. Where a query has far tokens, the true far
    mass is their sum of e^s, the feature far mass their sum of phi(q).phi(k); the gate is the mean
    difference of the logarithms. Deterministic, and independent of where the gates are now.

    Args:
        model: a converted model.
        batches: token ids `[B, N]`, a mapping of a forward pass's inputs (`input_ids` and perhaps
            `attention_mask`; labels are not used), or several of either.

    Returns:
        The new `log_gate` `[H]` by layer index. A layer whose window covers every text keeps its
        gate and is left out, as are layers without a gate.

    Raises:
        ValueError: a model without converted layers, or no batch.
    """
    own = mechanisms(model)
    if not own:
        raise ValueError("expected a model that attnopt.convert has converted; it has no mechanism")
    several: Iterable[Any] = [batches] if isinstance(batches, Tensor | Mapping) else batches
    means = {i: _Mean() for i, m in own.items() if isinstance(m, FavorMechanism) and m.config.gate}
    count = 0
    with _dense(model, own.values(), means):
        for batch in several:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            inputs.pop("labels", None)
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            model.base_model(**inputs, use_cache=False)
            count += 1
    if count == 0:
        raise ValueError("expected at least one batch of token ids to calibrate on; got none")
    found = {}
    for index, mean in means.items():
        if mean.count:
            gate = own[index].log_gate
            assert isinstance(gate, Tensor)
            found[index] = gate.copy_(mean.total / mean.count).detach().clone()
    return found


class _Mean:
    """Running sum over rows, per head."""

    def __init__(self) -> None:
        self.total: Any = 0.0  # [H]
        self.count = 0

    def add(self, values: Tensor, rows: Tensor) -> None:
        """Add values `[B, H, N]` where `rows` `[B, N]` is True."""
        self.total = self.total + values.masked_fill(~rows[:, None], 0.0).sum((0, 2))
        self.count += int(rows.sum())


@contextmanager
def _dense(
    model: PreTrainedModel, own: Iterable[AttentionMechanism], means: Mapping[int, _Mean]
) -> Iterator[None]:
    """Within this context mechanisms attend by softmax, and those with a gate are measured."""

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
            if mechanism.layer_idx in means:
                assert isinstance(mechanism, FavorMechanism)
                means[mechanism.layer_idx].add(*_log_ratio(mechanism, q, k, key_mask, scale))
            return _softmax(q, k, v, key_mask, scale)

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

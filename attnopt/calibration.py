"""Where mechanisms start: measured on a few texts of the dense model.

Each layer's mechanism brings a gauge of its own (`AttentionMechanism.make_gauge`), in its folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from attnopt.attention.base import AttentionMechanism, Gauge
from attnopt.convert import mechanisms
from attnopt.convert.interface import NAME


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Tensor | Mapping[str, Tensor] | Iterable[Any]
) -> dict[int, Tensor]:
    """Set gates and centroids of every converted layer that has some, from dense attention.

    The model runs once with softmax in every layer. `Favor`: where a query has far tokens, the true
    far mass is their sum of e^s, the feature far mass their sum of phi(q).phi(k); the gate is the
    mean difference of the logarithms. `NSA`: the gates are the constants with which the branches
    come closest to softmax, between 0.01 and 0.99, and a third where a branch saw nothing; what
    they had learned is gone. `Routing`: the centroids are a spherical k-means of the keys.
    Deterministic, and independent of where all these are now.

    Args:
        model: a converted model.
        batches: token ids `[B, N]`, a mapping of a forward pass's inputs (`input_ids` and perhaps
            `attention_mask`; labels are not used), or several of either.

    Returns:
        By layer index the new `log_gate` `[H]` of `Favor`, the gates `[H, 3]` (compressed,
        selected, window) of `NSA`, the centroids `[Hkv, c, D]` of `Routing`. Layers without any are
        left out, and so are those that keep what they have: `Favor` whose window covers every text,
        `Routing` with fewer keys than clusters.

    Raises:
        ValueError: a model without converted layers, or no batch.
    """
    own = mechanisms(model)
    if not own:
        raise ValueError("expected a model that attnopt.convert has converted; it has no mechanism")
    several: Iterable[Any] = [batches] if isinstance(batches, Tensor | Mapping) else batches
    gauges = {i: g for i, m in own.items() if (g := m.make_gauge()) is not None}
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


@contextmanager
def _dense(
    model: PreTrainedModel,
    own: Iterable[AttentionMechanism],
    gauges: Mapping[int, Gauge],
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
            cu_seqlens: Tensor | None = None,
            **others: Any,
        ) -> Tensor:
            if cu_seqlens is not None:
                packed = {"cu_seqlens": cu_seqlens, "key_mask": key_mask, **others}
                return mechanism.each_document(q, k, v, scale=scale, **packed)
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

"""Caches of a band: the last W - 1 keys, and the first T of each row where it has sinks.

Without sinks transformers' sliding-window layer does. Sinks need a layer of their own, for every
row of a padded batch has its first real token elsewhere.

Letters: B batch, Hkv key/value heads, Nq new tokens, D head dimension, W offsets, T sinks,
S stored tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from attnopt.attention.cache import MechanismLayer
from attnopt.kernels.rows import first_real_token


def band_cache_layer(window: int, sinks: int) -> CacheLayerMixin:
    """The cache layer of a band of `window` offsets with `sinks` first tokens.

    Args:
        window: W, at least 1.
        sinks: T, at least 0.

    Returns:
        A layer that holds at most T + W - 1 tokens per row once every row has its T sinks.
    """
    if sinks:
        return SinkWindowLayer(window, sinks)
    # With a window of 1 the stock layer slices [-0:] and so keeps everything; 2 keeps one token.
    return DynamicSlidingWindowLayer(sliding_window=max(window, 2))


class SinkWindowLayer(MechanismLayer):
    """Keeps T sinks per row and the last W - 1 tokens, in order of time.

    Until every row has T tokens from its first real one on, all tokens are stored as they came.
    Then row by row the sinks are gathered to the front: `[T sinks][last W - 1]`, where copies of
    the sinks among the last W - 1 are masked. Seen from the operator the sinks then start at
    position 0, so its own rule for sinks holds for the short keys as it did for the long ones.
    """

    kept = "sinks"

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window = window
        self.sinks = sinks
        self.is_compact = False
        self.key_mask: Tensor | None = None  # [B, S], of the stored tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, Nq, D]`; drop what no later token will see.

        Args:
            key_states: new keys.
            value_states: new values.
            *args: ignored, as by the stock layers.
            **kwargs: ignored, as by the stock layers.

        Returns:
            Stored and new keys and values `[B, Hkv, S + Nq, D]`; `step_mask` is their mask.
        """
        batch, _, count, _ = key_states.shape
        keys, values = super().update(key_states, value_states)
        if self._next_mask is None:
            mask = torch.ones(batch, count, dtype=torch.bool, device=keys.device)
        else:
            mask = self._next_mask[:, -count:]
        if self.key_mask is not None:
            mask = torch.cat([self.key_mask, mask], dim=1)
        self.key_mask = self.step_mask = mask
        self._next_mask = None
        self.cumulative_length += count
        if not self.is_compact:
            self._gather_sinks(keys, values, mask)
        elif keys.shape[2] > self.sinks + self.window - 1:
            sinks = (keys[:, :, : self.sinks], values[:, :, : self.sinks], mask[:, : self.sinks])
            self._keep(sinks, (keys, values, mask))
        return keys, values

    def _gather_sinks(self, keys: Tensor, values: Tensor, mask: Tensor) -> None:
        """Move each row's sinks to the front, once all rows have theirs and it saves memory."""
        seen = self.cumulative_length
        if seen <= self.sinks + self.window - 1:
            return
        start = first_real_token(mask)  # [B]
        if int(start.max()) + self.sinks > seen:
            return
        rank = torch.arange(seen, device=start.device) - start[:, None]  # [B, S]
        sink = start[:, None] + torch.arange(self.sinks, device=start.device)  # [B, T]
        index = sink[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        sinks = (keys.gather(2, index), values.gather(2, index), mask.gather(1, sink))
        self._keep(sinks, (keys, values, mask & (rank >= self.sinks)))
        self.is_compact = True

    def _keep(
        self, sinks: tuple[Tensor, Tensor, Tensor], recent: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Store the keys, values and mask of the sinks and of the last W - 1 recent tokens."""
        first = recent[0].shape[2] - (self.window - 1)
        self.keys = torch.cat([sinks[0], recent[0][:, :, first:]], dim=2)
        self.values = torch.cat([sinks[1], recent[1][:, :, first:]], dim=2)
        self.key_mask = torch.cat([sinks[2], recent[2][:, first:]], dim=1)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.is_compact = False
        self.key_mask = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.key_mask is not None:
            self.key_mask = self.key_mask.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        if self.key_mask is not None:
            indices = indices.to(self.key_mask.device)
            self.key_mask = self.key_mask[indices]
            super().batch_select_indices(indices)

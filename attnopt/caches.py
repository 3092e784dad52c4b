"""Key/value caches of converted models: as small as the mechanism allows.

A band of W offsets needs the last W - 1 keys, which transformers' sliding-window layer keeps. Sinks
need a layer of their own, for every row of a padded batch has its first real token elsewhere. So
does FAVOR+, which keeps sums over the past in place of its keys.

Letters: B batch, H query heads, Hkv key/value heads, Nq new tokens, D head dimension, M features,
W offsets or exact window, T sinks, S stored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from attnopt.kernels.favor.state import FavorState
from attnopt.kernels.rows import first_real_token

if TYPE_CHECKING:
    from attnopt.modules.base import AttentionMechanism


class MechanismCache(Cache):
    """The cache of one converted model: one layer each, as its mechanisms ask for.

    It serves the converted attention only: under `dense_attention` the dropped keys are missing.
    """

    def __init__(self, layers: Iterable[CacheLayerMixin]) -> None:
        super().__init__(layers=[*layers])


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


class MechanismLayer(DynamicLayer):
    """A cache layer that keeps something else than all keys, and so attends by itself.

    For each forward pass the model calls `observe`, `update` and `attend`, in this order. Tokens
    that were dropped or summed up cannot come back: such a layer cannot be cropped.
    """

    is_sliding = False
    is_croppable = False
    kept = "what it keeps"  # for messages
    keys: Any  # Tensor, or None where there are none
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0
        self.step_mask: Tensor | None = None  # bool [B, Nk], of what the last update returned
        self._next_mask: Tensor | None = None

    def observe(self, attention_mask: Tensor | None) -> None:
        """Take the mask of the coming update: bool `[B, at least Nq]`, its last Nq columns count.

        Args:
            attention_mask: True for real tokens; None where all are.
        """
        self._next_mask = attention_mask

    def attend(
        self, mechanism: AttentionMechanism, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        """Attend from the new tokens to all that the layer has seen.

        Args:
            mechanism: the one that made this layer.
            q: queries `[B, H, Nq, D]`.
            k: keys `[B, Hkv, Nk, D]`, as the last `update` returned them.
            v: values, likewise.
            **options: `scale` and `hidden_states`, as `AttentionMechanism.forward` takes them.

        Returns:
            `[B, H, Nq, D]`.
        """
        return mechanism(q, k, v, key_mask=self.step_mask, **options)

    def get_seq_length(self) -> int:
        """Tokens seen so far, stored or not."""
        return self.cumulative_length

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self.step_mask = self._next_mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: dropped tokens cannot come back."""
        raise ValueError(
            f"a cache with {self.kept} cannot be cropped; pass a transformers DynamicCache as "
            "past_key_values where tokens have to be taken back"
        )


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


class FavorLayer(MechanismLayer):
    """Keeps sums over the past, and with a window the keys and values not yet summed up.

    They are the parts of a `FavorState`, by their names there. Constant in size: `[B, H, M, D + 2]`
    numbers, and at most W + window_block - 2 tokens.
    """

    kept = "sums over the past"
    kv: Tensor | None
    _parts = FavorState._fields

    def __init__(self) -> None:
        super().__init__()
        self.state = None

    @property
    def state(self) -> FavorState | None:
        """The past, as `favor_attention` takes it; None before the first token."""
        return None if self.kv is None else FavorState(*(getattr(self, n) for n in self._parts))

    @state.setter
    def state(self, state: FavorState | None) -> None:
        for name in self._parts:
            setattr(self, name, None if state is None else getattr(state, name))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new keys and values `[B, Hkv, Nq, D]`; `attend` sums them up.

        Args:
            key_states: new keys.
            value_states: new values.
            *args: ignored, as by the stock layers.
            **kwargs: ignored, as by the stock layers.

        Returns:
            The arguments as they are; `step_mask` is their mask until `attend` has used it.
        """
        count = key_states.shape[2]
        self.step_mask = None if self._next_mask is None else self._next_mask[:, -count:]
        self._next_mask = None
        self.cumulative_length += count
        return key_states, value_states

    def attend(
        self, mechanism: AttentionMechanism, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        """Attend, and go on to the state after the new tokens; see `MechanismLayer.attend`."""
        options = {"key_mask": self.step_mask, "initial_state": self.state, **options}
        out, self.state = mechanism(q, k, v, return_state=True, **options)
        # views keep all of what they are cut from: the mask of the whole text, a prompt's keys
        self.step_mask = None
        if q.shape[2] > 1:
            self._each(torch.clone)
        return out

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor of the state; all have one entry per row."""
        for name in self._parts:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))

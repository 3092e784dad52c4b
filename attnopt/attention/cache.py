"""What the caches of all mechanisms have in common: the cache of a model, and a layer's face.

Letters: B batch, H query heads, Hkv key/value heads, Nq new tokens, Nk tokens so far, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

if TYPE_CHECKING:
    from attnopt.attention.base import AttentionMechanism


class MechanismCache(Cache):
    """The cache of one converted model: one layer each, as its mechanisms ask for.

    It serves the converted attention only; under `dense_attention` most layers would lack keys.
    """

    def __init__(self, layers: Iterable[CacheLayerMixin]) -> None:
        super().__init__(layers=[*layers])


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

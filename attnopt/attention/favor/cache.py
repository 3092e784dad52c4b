"""Cache of FAVOR+: sums over the past in place of its keys.

Letters: B batch, H query heads, Hkv key/value heads, Nq new tokens, D head dimension, M features,
W exact window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.attention.cache import MechanismLayer
from attnopt.kernels.favor.state import FavorState

if TYPE_CHECKING:
    from attnopt.attention.base import AttentionMechanism


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

"""What every attention mechanism has in common: its face, its learned coefficients, its dtype.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
C coefficients of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from attnopt.attention.config import Config

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin


class AttentionMechanism(nn.Module):
    """Replaces the softmax attention of one layer and holds what that replacement learns.

    Parameters and buffers stay in fp32 (or fp64) whatever the dtype of the model: `.to(bfloat16)`
    moves them but does not round them.

    Args:
        config: what to build.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv, which divide H.
        head_dim: D.
        hidden_size: width of the hidden states.
        layer_idx: index of the layer in its model.
        causal: whether a token may see itself and earlier ones only.

    Raises:
        ValueError: a direction that the mechanism does not have.
    """

    causal_only: ClassVar[bool] = True

    def __init__(
        self,
        config: Config,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        layer_idx: int,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not causal and self.causal_only:
            raise ValueError(
                f"{type(config).__name__} is causal, but this model attends in both directions; "
                "LastK, Linformer and Favor without a window can do that"
            )
        self.config = config
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx
        self.causal = causal

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: queries `[B, H, Nq, D]`, the last Nq of the Nk positions.
            k: keys `[B, Hkv, Nk, D]`.
            v: values `[B, Hkv, Nk, D]`.
            key_mask: bool `[B, Nk]`, True for a real token.
            scale: factor of the scores, `1/sqrt(D)` by default.
            hidden_states: `[B, Nq, hidden_size]`, the layer's input, for mechanisms with gates.

        Returns:
            `[B, H, Nq, D]`.
        """
        raise NotImplementedError

    def coefficients(self) -> dict[str, Tensor]:
        """Learned weights in (0, 1) by kind, `[C]` or `[H, C]`, differentiable.

        Empty for a mechanism that learns no such weights: then it has no penalty either.
        """
        return {}

    def labels(self) -> dict[str, list[str]]:
        """Names of the C entries of each kind of coefficient."""
        return {}

    def mask_matrix(self, length: int) -> Tensor | None:
        """Weight m_ij of key j for query i without padding, `[1 or H, length, length]`, fp32.

        None for a mechanism that puts no mask on softmax.
        """
        return None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise in place; random numbers are drawn on the CPU, by default from torch's own.

        So `torch.manual_seed` fixes them, and they do not depend on the device of the model.
        """
        raise NotImplementedError

    def make_cache_layer(self) -> CacheLayerMixin:
        """A fresh transformers cache layer that keeps what decoding needs and no more."""
        raise NotImplementedError

    def l1_penalty(self) -> Tensor:
        """Mean of all coefficients: their sum divided by their count, a scalar; 0 without any."""
        coefficients = [c.flatten() for c in self.coefficients().values()]
        if not coefficients:
            held = next((x for x in (*self.parameters(), *self.buffers())), None)
            return torch.zeros((), device=None if held is None else held.device)
        return torch.cat(coefficients).mean()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return repr(self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttentionMechanism:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

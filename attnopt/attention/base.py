"""What every attention mechanism has in common: its face, its learned coefficients, its dtype.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
C coefficients of one kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from attnopt.attention.config import Config
from attnopt.kernels.packing import lay_out_inputs

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin


class Gauge(Protocol):
    """Measures one layer while the model attends by softmax, to set where its mechanism starts."""

    def add(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, out: Tensor
    ) -> None:
        """Measure a batch of which softmax makes `out` `[B, H, N, D]`."""

    def finish(self) -> Tensor | None:
        """Set what was measured and return it; None where there was nothing to measure."""


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

    directions: ClassVar[tuple[str, ...]] = ("causal",)  # also, or instead: "both"

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
        name = type(config).__name__
        if not causal and "both" not in self.directions:
            raise ValueError(
                f"{name} is causal, but this model attends in both directions; "
                "LastK, Linformer and Favor without a window can do that"
            )
        if causal and "causal" not in self.directions:
            raise ValueError(
                f"{name} lets every token see all others, but this model is causal: its tokens "
                "must not see later ones; LastK, Masks, Favor, NSA and Routing can do that"
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
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        scale: float | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: queries `[B, H, Nq, D]`, the last Nq of the Nk positions.
            k: keys `[B, Hkv, Nk, D]`.
            v: values `[B, Hkv, Nk, D]`.
            key_mask: bool `[B, Nk]`, True for a real token.
            cu_seqlens: int32 or int64 `[S + 1]`, where packed documents begin and end, which never
                see each other: 0 first, strictly increasing, the number of tokens last. B = 1,
                Nq = Nk and no key mask then.
            max_seqlen: length of the longest document, or more; needed to compile, see
                `lastk_attention`.
            scale: factor of the scores, `1/sqrt(D)` by default.
            hidden_states: `[B, Nq, hidden_size]`, the layer's input, for mechanisms with gates.

        Returns:
            `[B, H, Nq, D]`.
        """
        raise NotImplementedError

    def each_document(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        key_mask: Tensor | None,
        hidden_states: Tensor | None,
        masked: bool = True,
        **options: Any,
    ) -> Tensor:
        """`forward` on packed documents as padded rows, for a mechanism that knows of rows only.

        Args:
            q: this and what follows as in `forward`.
            k: keys.
            v: values.
            cu_seqlens: where documents begin and end.
            max_seqlen: length of the longest.
            key_mask: must be None.
            hidden_states: the layer's input.
            masked: whether the rows need a key mask; causal attention by itself does not.
            **options: what else `forward` takes.

        Returns:
            `[1, H, N, D]`.

        Raises:
            ValueError: inputs that do not fit; the message says which.
        """
        layout = lay_out_inputs(q, k, v, cu_seqlens, max_seqlen, key_mask)

        def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, *, key_mask: Any
                   ) -> Tensor:
            return self(q, k, v, hidden_states=hidden, key_mask=key_mask, **options)

        none = [None] * len(layout.groups)
        hidden = none if hidden_states is None else layout.pack_entries(hidden_states.flatten(0, 1))
        return layout.attend(attend, *map(layout.pack, (q, k, v)), hidden, masked=masked)

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
        """Initialize in place; random numbers are drawn on the CPU, by default from torch's own.

        So `torch.manual_seed` fixes them, and they do not depend on the device of the model.
        """
        raise NotImplementedError

    def make_cache_layer(self) -> CacheLayerMixin:
        """A fresh transformers cache layer: all keys and values, unless a mechanism needs less."""
        from transformers.cache_utils import DynamicLayer

        return DynamicLayer()

    def make_gauge(self) -> Gauge | None:
        """What `attnopt.calibrate` measures this layer with; None where there is nothing to set."""
        return None

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

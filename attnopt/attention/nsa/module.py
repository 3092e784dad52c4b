"""Native Sparse Attention as a module: what compresses keys and values, and the gates.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
P compressed blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.attention import NSA
from attnopt.attention.base import AttentionMechanism, Gauge
from attnopt.attention.nsa.compressors import COMPRESSORS, Linear
from attnopt.kernels.nsa.op import (
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin

# Of each branch before any calibration: together they then have about the scale of one softmax.
START = 1 / 3


class NSAMechanism(AttentionMechanism):
    """Attention to compressed blocks, to the best blocks token by token, and to recent tokens.

    `key_compressor` and `value_compressor` make one key and value of a block. `gate` maps the
    layer's input to the logits of three gates per head (compressed, selected, window); it is None
    with one merged softmax.
    """

    config: NSA

    def __init__(self, config: NSA, **shape: Any) -> None:
        super().__init__(config, **shape)
        make = COMPRESSORS[config.compression]
        sizes = {"block": config.compress_block, "stride": config.compress_stride}
        self.key_compressor = make(self.num_kv_heads, self.head_dim, **sizes)
        self.value_compressor = make(self.num_kv_heads, self.head_dim, **sizes)
        self.gate = Linear(self.hidden_size, 3 * self.num_heads) if config.gate else None
        self.reset_parameters()

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
        compressed: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend; what is not listed is as in `AttentionMechanism.forward`.

        Args:
            q: queries.
            k: keys.
            v: values.
            key_mask: real tokens.
            cu_seqlens: where packed documents begin and end.
            max_seqlen: length of the longest.
            scale: factor of the scores.
            hidden_states: what the gates are made of.
            compressed: keys and values of all P blocks, `[B, Hkv, P, D]` each, where they are
                known; by default they are made here, from all of `k` and `v`. Not with
                `cu_seqlens`.

        Returns:
            `[B, H, Nq, D]`.

        Raises:
            ValueError: gates without hidden states, or what does not fit packed documents.
        """
        config = self.config
        if cu_seqlens is not None:
            if compressed is not None:
                raise ValueError("packed documents (cu_seqlens) are compressed one by one: leave "
                                 "out compressed")
            return self.each_document(
                q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, key_mask=key_mask,
                scale=scale, hidden_states=hidden_states, masked=False,
            )
        if compressed is None:
            compressed = self.key_compressor(k, key_mask), self.value_compressor(v, key_mask)
        options: dict[str, Any] = {
            "gates": self.gates(hidden_states),
            "combine": config.combine,
            "compress_block": config.compress_block,
            "compress_stride": config.compress_stride,
            "select_block": config.select_block,
            "num_selected": config.num_selected,
            "window": config.window,
            "sink_blocks": config.sink_blocks,
            "local_blocks": config.local_blocks,
            "key_mask": key_mask,
            "scale": scale,
            "backend": config.backend,
        }
        if q.shape[2] == 1 and not torch.is_grad_enabled():
            return nsa_decode(q, k, v, *compressed, **options)
        return nsa_attention(q, k, v, *compressed, regime=config.regime, **options)

    @torch.no_grad()
    def branches(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """What each gate weighs, without gradients; arguments as in `forward`.

        Args:
            q: queries.
            k: keys.
            v: values.
            key_mask: real tokens.
            scale: factor of the scores.

        Returns:
            `[3, B, H, Nq, D]`: compressed, selected, window.
        """
        config = self.config
        options: Any = {"key_mask": key_mask, "scale": scale, "backend": config.backend}
        sizes: Any = {
            "compress_block": config.compress_block,
            "compress_stride": config.compress_stride,
        }
        keys, values = self.key_compressor(k, key_mask), self.value_compressor(v, key_mask)
        tokens, block = k.shape[2], config.select_block
        chosen = select_blocks(
            q,
            keys,
            select_block=block,
            num_selected=config.num_selected,
            sink_blocks=config.sink_blocks or 0,
            local_blocks=config.local_blocks or 0,
            num_tokens=tokens,
            **sizes,
            **options,
        )
        return torch.stack(
            [
                compressed_attention(q, keys, values, num_tokens=tokens, **sizes, **options),
                selected_attention(
                    q, k, v, chosen, select_block=block, regime=config.regime, **options
                ),
                sliding_window_attention(q, k, v, config.window, **options),
            ]
        )

    def gates(self, hidden_states: Tensor | None) -> Tensor | None:
        """The gates, sigmoids of a linear map; None for a mechanism without.

        Args:
            hidden_states: `[B, Nq, hidden_size]`, the layer's input.

        Returns:
            `[B, H, Nq, 3]` (compressed, selected, window), in fp32 or fp64.

        Raises:
            ValueError: hidden states that are missing or have another width.
        """
        if self.gate is None:
            return None
        if hidden_states is None or hidden_states.shape[-1] != self.hidden_size:
            got = "None" if hidden_states is None else f"shape {list(hidden_states.shape)}"
            raise ValueError(
                f"layer {self.layer_idx}: the gates of combine='gates' are made of hidden_states "
                f"[batch, tokens, {self.hidden_size}]; got {got}"
            )
        with torch.autocast(hidden_states.device.type, enabled=False):
            wide = torch.promote_types(hidden_states.dtype, self.gate.weight.dtype)
            gates = self.gate(hidden_states.to(wide)).sigmoid()
        return gates.unflatten(2, (self.num_heads, 3)).transpose(1, 2)

    @torch.no_grad()
    def set_gates(self, values: Tensor) -> None:
        """Give each head these gates, `[H, 3]` in (0, 1), whatever its input; in place.

        Raises:
            ValueError: a mechanism without gates.
        """
        if self.gate is None:
            raise ValueError(f"layer {self.layer_idx} has no gates: {self.config}")
        self.gate.weight.zero_()
        self.gate.bias.copy_(values.logit().flatten())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Let compressors be the mean and every gate a third, in place.

        Only the first layer of an "mlp" is random, and does nothing before the second has learned.
        `attnopt.calibrate` finds better gates.
        """
        self.key_compressor.reset_parameters(generator)
        self.value_compressor.reset_parameters(generator)
        if self.gate is not None:
            self.gate.weight.zero_()
            self.gate.bias.fill_(math.log(START / (1 - START)))

    def make_gauge(self) -> Gauge | None:
        """The branches against softmax, which set the gates."""
        from attnopt.attention.nsa.gauge import BranchGauge

        return BranchGauge(self) if self.config.gate else None

    def make_cache_layer(self) -> CacheLayerMixin:
        """A cache layer of all keys and values, and of the compressed ones."""
        from attnopt.attention.nsa.cache import NSALayer

        return NSALayer()

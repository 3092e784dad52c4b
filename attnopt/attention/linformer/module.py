"""Linformer as a module: keys and values are projected along the text, to a fixed length.

With r_j = 1 for a real token and 0 for padding, and positions j that count from a row's first real
token, slot c of k is a sum over the text, and w_c the share of it that is there:

    w_c = sum_j r_j |E_cj| / sum_j |E_cj|             u_c = the same of F
    K_c = sum_j r_j E_cj k_j / w_c                    V_c = sum_j r_j F_cj v_j / u_c
    o_i = sum_c w_c e^{s_ic} V_c / sum_c w_c e^{s_ic},    s_ic = scale q_i.K_c

In a text of full length w and u are 1, which is equation 7 of the paper. In a shorter one a slot
that sums up nothing real has no weight, and one that is cut is what remains of it at full size.

Letters: B batch, H query heads, Hkv key/value heads, N tokens, D head dimension, k slots, n tokens
of the longest text.

Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", section 4; one E and
one F per layer, the same for all heads (their "headwise sharing").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.attention import Linformer
from attnopt.attention.base import AttentionMechanism
from attnopt.kernels.checks import check_key_mask, check_qkv
from attnopt.kernels.dispatch import harmonize_autocast
from attnopt.kernels.rows import first_real_token


class LinformerMechanism(AttentionMechanism):
    """Softmax over k slots that sum up the text; time and memory grow with N k.

    Parameters: `key_projection` and `value_projection`, both `[k, n]`. They start as the means of
    k runs of neighboring tokens.
    """

    config: Linformer
    directions = ("both",)

    def __init__(self, config: Linformer, **shape: Any) -> None:
        super().__init__(config, **shape)
        size = (config.projected_length, config.max_length)
        self.key_projection = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.value_projection = nn.Parameter(torch.empty(size, dtype=torch.float32))
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
    ) -> Tensor:
        """Attend; arguments and result as in `AttentionMechanism.forward`.

        Raises:
            ValueError: a text longer than the config's `max_length`.
        """
        if cu_seqlens is not None:
            return self.each_document(
                q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, key_mask=key_mask,
                hidden_states=None, scale=scale,
            )  # fmt: skip
        q, k, v = harmonize_autocast(q, k, v)
        check_qkv(q, k, v)
        check_key_mask(key_mask, k)
        length = k.shape[2]
        if length > self.config.max_length:
            raise ValueError(
                f"this Linformer has learned positions for texts of up to "
                f"{self.config.max_length} tokens (max_length); got {length}"
            )
        if key_mask is not None:
            k, v, key_mask = _from_first_real_token(k, v, key_mask)
        keys, log_weights = _sum_up(self.key_projection, k, key_mask)
        values, _ = _sum_up(self.value_projection, v, key_mask)
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=None if log_weights is None else log_weights[:, None, None].to(q.dtype),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set both projections to means of neighbors; nothing is random."""
        slots, length = self.key_projection.shape
        edges = torch.arange(slots + 1) * length // slots
        position = torch.arange(length)
        inside = (position >= edges[:-1, None]) & (position < edges[1:, None])  # [k, n]
        means = inside / inside.sum(1, keepdim=True)
        self.key_projection.copy_(means)
        self.value_projection.copy_(means)


def _from_first_real_token(k: Tensor, v: Tensor, key_mask: Tensor) -> tuple[Tensor, ...]:
    """Each row turned so that its text begins at position 0, and its mask alike."""
    length = k.shape[2]
    start = first_real_token(key_mask)[:, None]
    index = (start + torch.arange(length, device=k.device)) % length  # [B, N]
    turned = index[:, None, :, None].expand_as(k)
    return k.gather(2, turned), v.gather(2, turned), key_mask.gather(1, index)


def _sum_up(
    projection: Tensor, x: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The slots `[B, Hkv, k, D]` of x `[B, Hkv, N, D]` and log w `[B or 1, k]`, None if all 0.

    A row without a real token gets slots of 0 and weights of 1.
    """
    length = x.shape[2]
    used = projection[:, :length]
    if key_mask is None and length == projection.shape[1]:
        return used.to(x.dtype) @ x, None
    size = projection.abs()
    real = size.new_ones(1, length) if key_mask is None else key_mask.to(size)
    there = real @ size[:, :length].T
    share = there / size.sum(1).clamp_min(torch.finfo(size.dtype).tiny)  # w, [B or 1, k]
    empty = share == 0
    full = share.masked_fill(empty, 1.0)
    log_weights = full.log().masked_fill(empty & ~empty.all(1, keepdim=True), -torch.inf)
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0.0)
    return used.to(x.dtype) @ x / full[:, None, :, None].to(x.dtype), log_weights

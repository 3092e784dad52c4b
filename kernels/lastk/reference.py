"""Last-k attention by its definition: dense, quadratic in N, differentiable by autograd.

    o_i = sum_j e^{s_ij + b_ij} v_j / sum_j e^{s_ij + b_ij},    s_ij = scale * q_i . k_j

With n = i - j the bias is b_ij = log_weights[n] inside the band 0 <= n < W, and
b_ij = sink_log_weights[j - start] for the T sinks, start <= j < start + T, wherever they lie
at or before i. A sink is never also part of the band. Every other b_ij is -inf, and so is that
of every masked key. A row whose weights are all zero returns zeros.

In both directions (causal=False) W = 2R + 1, the bias is b_ij = log_weights[n + R] inside the band
-R <= n <= R, every token sees the sinks, and the rows of masked tokens are zero.

This is what the fast implementations are tested against; it checks no arguments (op.py does).
Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
W offsets, T sinks.
"""

import torch
from torch import Tensor


def lastk_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor,
    *,
    sink_log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention over the last W tokens and T sinks, each with its own log-weight.

    Computes in float64 for float64 queries and in float32 for every other dtype.

    Args:
        q: queries [B, H, Nq, D], the last Nq of the Nk positions.
        k: keys [B, Hkv, Nk, D]; query head h reads key head h // (H / Hkv).
        v: values [B, Hkv, Nk, D].
        log_weights: [W] or [H, W], entry n for the n-th last token; -inf is weight 0.
        sink_log_weights: [T] or [H, T], for the first T positions from a row's first real token.
        key_mask: bool [B, Nk], True for a real token.
        scale: factor of q.k, 1 / sqrt(D) by default.
        causal: False for both directions, with Nq = Nk and [2R + 1] or [H, 2R + 1] log-weights
            from R tokens ahead to R back.

    Returns:
        [B, H, Nq, D] in the dtype of q.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(dtype)
        keys = k.to(dtype).repeat_interleave(groups, dim=1)
        values = v.to(dtype).repeat_interleave(groups, dim=1)
        sinks = None if sink_log_weights is None else sink_log_weights.to(dtype)
        every_key = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        real = every_key if key_mask is None else key_mask
        bias = _bias(log_weights.to(dtype), sinks, real, q.shape[2], causal)
        return _attend(scale * queries @ keys.mT + bias, values).to(q.dtype)


def _bias(
    log_weights: Tensor, sinks: Tensor | None, real: Tensor, num_queries: int, causal: bool
) -> Tensor:
    """b_ij as [B or 1, H or 1, Nq, Nk]; -inf where query i does not see key j."""
    num_keys = real.shape[1]
    j = torch.arange(num_keys, device=real.device)  # [Nk]
    n = (j[num_keys - num_queries :, None] - j)[None]  # i - j, [1, Nq, Nk]
    bias = _look_up(log_weights, n if causal else n + log_weights.shape[-1] // 2)
    if sinks is not None and sinks.shape[-1] > 0:
        start = real.cumsum(1).eq(0).sum(1)  # [B], the first real token; Nk where there is none
        rank = (j - start[:, None])[:, None]  # [B, 1, Nk]
        is_sink = (rank >= 0) & (rank < sinks.shape[-1])
        bias = torch.where(is_sink[:, None], _look_up(sinks, rank), bias)
    unseeing = n < 0 if causal else ~real[:, :, None]  # [1 or B, Nq, Nk or 1]
    return bias.masked_fill(unseeing[:, None] | ~real[:, None, None], -torch.inf)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries [B or 1, H or 1, ...] of a table [L] or [H, L] at index [B or 1, ...], else -inf."""
    length = table.shape[-1]
    entries = table.reshape(-1, length)[:, index.clamp(0, length - 1)].movedim(0, 1)
    return entries.masked_fill(((index < 0) | (index >= length))[:, None], -torch.inf)


def _attend(logits: Tensor, values: Tensor) -> Tensor:
    """Weighted mean of the values; zero, with zero gradients, in rows where all logits are -inf."""
    peak = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)) @ values

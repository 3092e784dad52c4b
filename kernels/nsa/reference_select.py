"""Selection of blocks by its definition, and the masks that the other definitions share.

Positions count from a row's first real token. Compressed block c covers the l positions from c d
on, selection block j the b positions from j b on. The query at position p sees

    compressed block c    if p >= c d + l - 1 + delay and c holds a real token;
    near tokens, always   those from block near(p) on, with a near window of Wn tokens
                          near(p) = floor(max(0, p - Wn + 1) / b), without one floor(p / b) + 1.

Candidates are the blocks j < near(p) that hold a real token. The first `sinks` blocks come first,
then the candidates of most importance, ties to the lower index. Importance is

    I_j = scale q . k_cmp_j                                    if G = 1 and l = d = b,
    I_j = sum over the G heads of sum_c |c and j| / d * p_c    otherwise,

where |c and j| counts the tokens that c and j share and p is the softmax of scale q . k_cmp over
the visible compressed blocks. In the first case a hidden block is no candidate; in the second a
block that no visible one overlaps has importance 0.

It is dense, quadratic, and checks no arguments (op.py does). Two importances tie where their
floating-point numbers are equal, so a tie on paper may be none after rounding.
Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, Nq queries (the last of the Nk
tokens), D head dim, l compressed block, d stride, b selection block, P compressed blocks, nb
selection blocks, S chosen blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.rows import first_real_token


class Rows(NamedTuple):
    """Which keys are real, `[B, Nk]`, and positions of keys `[B, Nk]` and queries `[B, Nq]`."""

    real: Tensor
    key: Tensor
    query: Tensor


def rows_of(key_mask: Tensor | None, q: Tensor, num_tokens: int) -> Rows:
    """The rows of a batch whose last tokens have the queries `q` `[B, H, Nq, D]`."""
    column = torch.arange(num_tokens, device=q.device)
    if key_mask is None:
        key_mask = torch.ones(q.shape[0], num_tokens, dtype=torch.bool, device=q.device)
    position = column - first_real_token(key_mask)[:, None]
    return Rows(key_mask, position, position[:, num_tokens - q.shape[2] :])


def covered(first: Tensor, length: int, position: Tensor) -> Tensor:
    """Whether blocks from positions `first` `[X]` on hold positions `[..., N]`: `[..., X, N]`."""
    after = position[..., None, :] - first[:, None]
    return (after >= 0) & (after < length)


def first_near_block(position: Tensor, select_block: int, near_window: int) -> Tensor:
    """near(p), the first block that a query at position p sees without choosing it."""
    if near_window == 0:
        return position // select_block + 1
    return (position - near_window + 1).clamp_min(0) // select_block


def visible_blocks(rows: Rows, block: int, stride: int, delay: int) -> tuple[Tensor, Tensor]:
    """Compressed blocks that queries see, `[B, 1, Nq, P]`, and real tokens of each, `[B, P]`."""
    first = _compressed_firsts(rows.real.shape[1], block, stride, rows.real.device)
    count = (covered(first, block, rows.key) & rows.real[:, None]).sum(-1)
    ended = rows.query[:, None, :, None] >= first + block - 1 + delay
    return ended & (count > 0)[:, None, None], count


def scaled_scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """scale q . k of every pair, `[B, H, Nq, Nk]`, in float64 or at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):
        return (q.shape[-1] ** -0.5 if scale is None else scale) * q.to(dtype) @ keys.mT


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax `[..., X]` and logsumexp `[...]`; 0 and -inf, without gradient, if all are -inf."""
    lowest = torch.finfo(logits.dtype).min
    peak = F.pad(logits.detach(), (0, 1), value=lowest).amax(-1, keepdim=True)  # it cancels
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    lse = (total.log() + peak).masked_fill(blind, -torch.inf)
    return weights / total, lse.squeeze(-1)


@torch.no_grad()
def importance_reference(
    q: Tensor,
    k_cmp: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_tokens: int,
    delay: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Importance of every selection block, whether it is a candidate or not.

    Args:
        q: queries `[B, H, Nq, D]`.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        compress_block: l.
        compress_stride: d.
        select_block: b.
        num_tokens: Nk.
        delay: tokens by which every compressed block appears later.
        key_mask: bool `[B, Nk]`, True for real tokens.
        scale: factor of q.k, 1 / sqrt(D) by default.

    Returns:
        `[B, Hkv, Nq, nb]` in float64 for float64 and float32 otherwise. Where importance is the
        pooled score itself, -inf for blocks whose compressed block is hidden or does not exist.
    """
    rows = rows_of(key_mask, q, num_tokens)
    visible, _ = visible_blocks(rows, compress_block, compress_stride, delay)
    scores = scaled_scores(q, k_cmp, scale).masked_fill(~visible, -torch.inf)
    groups = q.shape[1] // k_cmp.shape[1]
    token = torch.arange(num_tokens, device=q.device)
    block_first = token[::select_block]
    if groups == 1 and compress_block == compress_stride == select_block:
        return F.pad(scores, (0, len(block_first) - scores.shape[-1]), value=-torch.inf)
    first = _compressed_firsts(num_tokens, compress_block, compress_stride, q.device)
    shared = (
        covered(first, compress_block, token)[:, None] & covered(block_first, select_block, token)
    ).sum(-1)  # [P, nb]
    probability = softmax(scores)[0].unflatten(1, (-1, groups)).sum(2)  # [B, Hkv, Nq, P]
    with torch.autocast(q.device.type, enabled=False):
        return probability @ (shared.to(probability) / compress_stride)


@torch.no_grad()
def select_reference(
    q: Tensor,
    k_cmp: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    count: int,
    sinks: int,
    near_window: int,
    num_tokens: int,
    delay: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Choose the blocks that each query reads token by token beside its near ones.

    Args:
        q: queries `[B, H, Nq, D]`.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        compress_block: l.
        compress_stride: d.
        select_block: b.
        count: blocks to choose; fewer where there are fewer candidates.
        sinks: how many of the first blocks are chosen before all others.
        near_window: Wn, tokens that are near at least.
        num_tokens: Nk.
        delay: as in `importance_reference`.
        key_mask: bool `[B, Nk]`, True for real tokens.
        scale: factor of q.k, 1 / sqrt(D) by default.

    Returns:
        int32 `[B, Hkv, Nq, count]`: indices of far blocks, ascending, then -1.
    """
    importance = importance_reference(
        q, k_cmp, compress_block=compress_block, compress_stride=compress_stride,
        select_block=select_block, num_tokens=num_tokens, delay=delay, key_mask=key_mask,
        scale=scale,
    )  # fmt: skip
    rows = rows_of(key_mask, q, num_tokens)
    j = torch.arange(importance.shape[-1], device=q.device)
    holds_text = (covered(j * select_block, select_block, rows.key) & rows.real[:, None]).any(-1)
    near = first_near_block(rows.query, select_block, near_window)[:, None, :, None]
    candidate = (j < near) & holds_text[:, None, None] & (importance > -torch.inf)
    key = importance.masked_fill(j < sinks, torch.inf).masked_fill(~candidate, -torch.inf)
    key, index = F.pad(key, (0, count), value=-torch.inf).sort(dim=-1, descending=True, stable=True)
    none = len(j)
    chosen = index.masked_fill(key == -torch.inf, none)[..., :count].sort(-1).values
    return chosen.masked_fill(chosen == none, -1).int()


def is_chosen(chosen: Tensor, blocks: int, heads: int) -> Tensor:
    """`[B, H, Nq, blocks]`: whether a block is in `chosen` `[B, Hkv, Nq, S]` of a head's group."""
    index = torch.arange(blocks, device=chosen.device)
    found = (chosen[..., None] == index).any(-2)
    return found.repeat_interleave(heads // chosen.shape[1], dim=1)


def _compressed_firsts(num_tokens: int, block: int, stride: int, device: torch.device) -> Tensor:
    """First position of every compressed block that lies within so many tokens, `[P]`."""
    return torch.arange(0, max(0, num_tokens - block + 1), stride, device=device)

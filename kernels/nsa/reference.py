"""Native Sparse Attention by its definition: dense, quadratic in N, differentiable by autograd.

Three softmaxes over what their masks leave (reference_select.py defines which blocks a query sees,
has near, and chooses):

    compressed    scale q . k_cmp_c (+ log of the real tokens of c)    visible blocks c not chosen
    selected      scale q . k_j       real tokens up to the query, near ones or of a chosen block
    window        scale q . k_j       real tokens among the last W

combine="gates" mixes them, o = g_0 o_cmp + g_1 o_slc + g_2 o_win; the near tokens of the selected
branch are the last `local_blocks` blocks, its other `num_selected - local_blocks` are chosen.
combine="merged" is one softmax over near tokens (at least W of them), tokens of the `num_selected`
chosen blocks, and each block before the near ones that is not chosen as one entry, whose score
carries the log of its number of real tokens: every token is represented exactly once. There
l = d = b.

A query that sees nothing gets 0, a logsumexp of -inf and zero gradients. No gradient flows through
the choice. This is what the fast implementations are tested against; it checks no arguments
(op.py does). Computes in float64 for float64 queries and in float32 for every other dtype.
Letters: B batch, H query heads, Hkv key/value heads, Nq queries (the last of the Nk tokens), D head
dim, l compressed block, d stride, b selection block, P compressed blocks, S chosen blocks,
W window.

Source: Yuan et al. 2025, "Native Sparse Attention", section 3, for combine="gates".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.kernels.nsa.reference_select import (
    first_near_block,
    importance_reference,
    is_chosen,
    rows_of,
    scaled_scores,
    select_reference,
    softmax,
    visible_blocks,
)

__all__ = [
    "compressed_reference",
    "importance_reference",
    "nsa_reference",
    "select_reference",
    "selected_reference",
]


def compressed_reference(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    num_tokens: int,
    delay: int = 0,
    log_counts: bool = False,
    chosen: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over compressed blocks that ended `delay` tokens ago or earlier.

    Args:
        q: queries `[B, H, Nq, D]`, the last Nq of the Nk tokens.
        k_cmp: compressed keys `[B, Hkv, P, D]`; query head h reads head h // (H / Hkv).
        v_cmp: compressed values `[B, Hkv, P, D]`.
        compress_block: l.
        compress_stride: d.
        num_tokens: Nk.
        delay: tokens by which every block appears later; 0 shows it to its own last token.
        log_counts: weigh a block by the number of its real tokens.
        chosen: integer `[B, Hkv, Nq, S]`, blocks to leave out; -1 is none.
        key_mask: bool `[B, Nk]`, True for real tokens.
        scale: factor of q.k, 1 / sqrt(D) by default.

    Returns:
        Output `[B, H, Nq, D]` in the dtype of q, and natural logsumexp `[B, H, Nq]`.
    """
    logits = _block_logits(
        q, k_cmp, compress_block, compress_stride, num_tokens, delay, log_counts, chosen, key_mask,
        scale,
    )  # fmt: skip
    return _attend(q, logits, v_cmp)


def selected_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    select_block: int,
    near_window: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention over near tokens and the tokens of chosen blocks.

    Args:
        q: queries `[B, H, Nq, D]`, the last Nq of the Nk tokens.
        k: keys `[B, Hkv, Nk, D]`; query head h reads head h // (H / Hkv).
        v: values `[B, Hkv, Nk, D]`.
        chosen: integer `[B, Hkv, Nq, S]`, blocks to read beside the near ones; -1 is none.
        select_block: b.
        near_window: Wn, tokens that are near at least; with 0 there are no near tokens.
        key_mask: bool `[B, Nk]`, True for real tokens.
        scale: factor of q.k, 1 / sqrt(D) by default.

    Returns:
        Output `[B, H, Nq, D]` in the dtype of q, and natural logsumexp `[B, H, Nq]`.
    """
    return _attend(q, _token_logits(q, k, chosen, select_block, near_window, key_mask, scale), v)


def nsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    gates: Tensor | None = None,
    combine: str = "merged",
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    window: int,
    sink_blocks: int,
    local_blocks: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    k_select: Tensor | None = None,
    v_select: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
) -> Tensor:
    """Sparse attention over compressed blocks, chosen blocks and a window.

    Args:
        q: queries `[B, H, Nq, D]`, the last Nq of the Nk tokens.
        k: keys `[B, Hkv, Nk, D]`; query head h reads head h // (H / Hkv).
        v: values `[B, Hkv, Nk, D]`.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        v_cmp: compressed values `[B, Hkv, P, D]`.
        gates: `[B, H, Nq, 3]`, factors of the compressed, selected and window branch; combine
            "gates" only.
        combine: gates or merged.
        compress_block: l; b for merged.
        compress_stride: d; b for merged.
        select_block: b.
        num_selected: chosen blocks, the local ones counted among them.
        window: W.
        sink_blocks: how many of the first blocks are chosen before all others.
        local_blocks: the last so many blocks are always read, the query's own among them; combine
            "gates" only.
        key_mask: bool `[B, Nk]`, True for real tokens.
        scale: factor of q.k, 1 / sqrt(D) by default.
        k_select: keys of the selected branch, k by default; combine "gates" only, as all below.
        v_select: values of the selected branch, v by default.
        k_window: keys of the window, k by default.
        v_window: values of the window, v by default.

    Returns:
        `[B, H, Nq, D]` in the dtype of q.
    """
    merged, tokens = combine == "merged", k.shape[2]
    if merged:
        delay, near_window, count = window, window, num_selected
    else:
        local = local_blocks or 0
        delay, count = 0, num_selected - local
        near_window = (local - 1) * select_block + 1 if local else 0
    chosen = select_reference(
        q, k_cmp, compress_block=compress_block, compress_stride=compress_stride,
        select_block=select_block, count=count, sinks=sink_blocks, near_window=near_window,
        num_tokens=tokens, delay=delay, key_mask=key_mask, scale=scale,
    )  # fmt: skip
    by_block = _block_logits(
        q, k_cmp, compress_block, compress_stride, tokens, delay, merged,
        chosen if merged else None, key_mask, scale,
    )  # fmt: skip
    if merged:
        by_token = _token_logits(q, k, chosen, select_block, near_window, key_mask, scale)
        values = torch.cat([v.to(by_token), v_cmp.to(by_token)], 2)
        return _attend(q, torch.cat([by_token, by_block], -1), values)[0]
    assert gates is not None
    k_select, v_select = k if k_select is None else k_select, v if v_select is None else v_select
    k_window, v_window = k if k_window is None else k_window, v if v_window is None else v_window
    by_token = _token_logits(q, k_select, chosen, select_block, near_window, key_mask, scale)
    in_window = _window_logits(q, k_window, window, key_mask, scale)
    branches = [(by_block, v_cmp), (by_token, v_select), (in_window, v_window)]
    wide = q.to(by_block)
    parts = torch.stack([_attend(wide, logits, values)[0] for logits, values in branches], -1)
    return (parts * gates[..., None, :].to(parts)).sum(-1).to(q)


def _block_logits(
    q: Tensor,
    k_cmp: Tensor,
    block: int,
    stride: int,
    num_tokens: int,
    delay: int,
    log_counts: bool,
    chosen: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Scores of the compressed blocks `[B, H, Nq, P]`, -inf for those a query does not see."""
    visible, count = visible_blocks(rows_of(key_mask, q, num_tokens), block, stride, delay)
    logits = scaled_scores(q, k_cmp, scale)
    if log_counts:
        logits = logits + count.clamp_min(1).to(logits).log()[:, None, None]
    if chosen is not None:
        visible = visible & ~is_chosen(chosen, k_cmp.shape[2], q.shape[1])
    return logits.masked_fill(~visible, -torch.inf)


def _token_logits(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    select_block: int,
    near_window: int,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Scores of the keys `[B, H, Nq, Nk]`, -inf but for near tokens and those of chosen blocks."""
    rows = rows_of(key_mask, q, k.shape[2])
    position, p = rows.key[:, None, None], rows.query[:, None, :, None]
    block = position // select_block
    is_near = block >= first_near_block(p, select_block, near_window)
    read = is_chosen(chosen, -(-k.shape[2] // select_block), q.shape[1])  # [B, H, Nq, nb]
    read = read.take_along_dim(block.clamp_min(0), -1)  # [B, H, Nq, Nk]
    seen = rows.real[:, None, None] & (position <= p) & (is_near | read)
    return scaled_scores(q, k, scale).masked_fill(~seen, -torch.inf)


def _window_logits(
    q: Tensor, k: Tensor, window: int, key_mask: Tensor | None, scale: float | None
) -> Tensor:
    """Scores of the keys `[B, H, Nq, Nk]`, -inf but for real ones among a query's last W."""
    rows = rows_of(key_mask, q, k.shape[2])
    distance = rows.query[:, None, :, None] - rows.key[:, None, None]
    seen = rows.real[:, None, None] & (distance >= 0) & (distance < window)
    return scaled_scores(q, k, scale).masked_fill(~seen, -torch.inf)


def _attend(q: Tensor, logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the values by e^logits, in the dtype of q, and the logsumexp of the logits."""
    weights, lse = softmax(logits)
    values = values.to(weights).repeat_interleave(q.shape[1] // values.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):
        return (weights @ values).to(q.dtype), lse

"""One step of decoding: the newest token against a cache, of which it reads only what it needs.

Read are the P compressed keys and values, the rows of the chosen blocks, and the last rows: the
near ones and, with gates, the window. Of the other tokens only the mask is looked at. The equations
are those of `nsa_attention`; this is its last row.

Letters: B batch, H query heads, Hkv key/value heads, G = H / Hkv, Nk tokens, D head dim, P
compressed blocks, nb selection blocks, S selected blocks, X entries of a softmax, l, d, b sizes of
blocks, Wn near window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.nsa.geometry import (
    first_overlap,
    near_block,
    near_window_of,
    overlap,
    overlap_count,
    real_tokens,
    row_starts,
    selection_count,
)

Part = tuple[Tensor, Tensor]  # logits [B, Hkv, G, X] and values [B, Hkv, X, D] of one softmax


class _Cache(NamedTuple):
    """The rows of a batch, and where in each the newest token is."""

    tokens: int  # Nk
    mask: Tensor | None  # [B, Nk]
    start: Tensor  # [B], first real token
    position: Tensor  # [B], of the newest token, from the first real one on
    near: Tensor  # [B], first near block


def nsa_decode_step(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, key_mask: Tensor | None,
    gates: Tensor | None, k_select: Tensor | None, v_select: Tensor | None,
    k_window: Tensor | None, v_window: Tensor | None, *, combine: str, compress_block: int,
    compress_stride: int, select_block: int, num_selected: int, window: int, sink_blocks: int,
    local_blocks: int | None, scale: float,
) -> Tensor:
    """Attend from one query; arguments as in `nsa_decode`, all of them checked and filled in.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, Hkv, Nk, D]`.
        v: like `k`.
        k_cmp: `[B, Hkv, P, D]`.
        v_cmp: like `k_cmp`.
        key_mask: bool `[B, Nk]` or None.
        gates: `[B, H, 1, 3]` with "gates", else None.
        k_select: like `k`; None for `k`.
        v_select: like `k`; None for `v`.
        k_window: like `k`; None for `k`.
        v_window: like `k`; None for `v`.
        combine: "merged" or "gates".
        compress_block: l.
        compress_stride: d.
        select_block: b.
        num_selected: S, counting sink and local blocks.
        window: W.
        sink_blocks: first blocks that are always selected.
        local_blocks: last ones, with "gates".
        scale: factor of the scores.

    Returns:
        `[B, H, 1, D]` in the dtype of `q`.
    """
    merged, size = combine == "merged", select_block
    local = 0 if merged else local_blocks or 0
    near_window = window if merged else near_window_of(local, size)
    start = row_starts(key_mask, k).long()
    position = k.shape[2] - 1 - start
    cache = _Cache(k.shape[2], key_mask, start, position, near_block(position, size, near_window))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        query = (q.to(wide) * scale).unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, D]
        scores = query @ k_cmp.to(wide).mT  # [B, Hkv, G, P]
        blocks = (compress_block, compress_stride, size)
        visible, counts = _visible(cache, k_cmp.shape[2], blocks, window if merged else 0)
        importance = _importance(scores, visible, blocks, selection_count(cache.tokens, size))
        chosen = _choose(importance, cache, size, num_selected - local, sink_blocks)
        hidden = ~visible[:, None]  # [B, 1, P]
        if merged:
            scores = scores + counts.to(wide).log()[:, None, None]
            hidden = hidden | _is_chosen(chosen, scores.shape[3])
        compressed = (scores.masked_fill(hidden.unsqueeze(2), -torch.inf), v_cmp)
        ks, vs = k if k_select is None else k_select, v if v_select is None else v_select
        selected = [
            _last(query, ks, vs, cache, near_window + size - 1 if near_window else 0, size),
            _of_blocks(query, ks, vs, cache, chosen, size),
        ]
        if merged:
            out = _attend([compressed, *selected])
        else:
            assert gates is not None
            kw, vw = k if k_window is None else k_window, v if v_window is None else v_window
            outs = [_attend([compressed]), _attend(selected),
                    _attend([_last(query, kw, vw, cache, window)])]
            weights = gates.to(wide).unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, Hkv, G, 3]
            out = (torch.stack(outs, -1) * weights.unsqueeze(3)).sum(-1)
        return out.flatten(1, 2).unsqueeze(2).to(q.dtype)


def _visible(cache: _Cache, count: int, blocks: tuple[int, int, int], delay: int
             ) -> tuple[Tensor, Tensor]:
    """Which of P compressed blocks the query sees, and how many real tokens each has, `[B, P]`."""
    block, stride, _ = blocks
    last = torch.arange(count, device=cache.start.device) * stride + block - 1
    ended = last + delay <= cache.position[:, None]
    if cache.mask is None:
        return ended, torch.full_like(ended, block, dtype=torch.int64)
    counts = real_tokens(cache.mask, cache.start, block, stride, count)
    return ended & (counts > 0), counts


def _importance(scores: Tensor, visible: Tensor, blocks: tuple[int, int, int], count: int
                ) -> Tensor:
    """Importance of each of nb selection blocks, `[B, Hkv, nb]`; -inf for no candidate."""
    block, stride, size = blocks
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if scores.shape[2] == 1 and block == stride == size:
        return F.pad(scores.squeeze(2), (0, count - scores.shape[3]), value=-torch.inf)
    compressed = scores.shape[3]
    if not compressed:
        return scores.new_zeros(*scores.shape[:2], count)
    weights = (scores - _peak(scores)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.masked_fill(total == 0, 1)).sum(2)  # [B, Hkv, P]
    j = torch.arange(count, device=scores.device)[:, None]
    c = first_overlap(j, *blocks) + torch.arange(overlap_count(*blocks), device=scores.device)
    shared = overlap(c, j, *blocks).masked_fill(c >= compressed, 0).to(scores.dtype) / stride
    return (weights[..., c.clamp(0, compressed - 1)] * shared).sum(-1)


def _choose(importance: Tensor, cache: _Cache, size: int, count: int, sinks: int) -> Tensor:
    """Far blocks, `[B, Hkv, count]`, forced ones first; -1 for none."""
    j = torch.arange(importance.shape[2], device=importance.device)
    candidate = j < cache.near[:, None]  # [B, nb]
    if cache.mask is not None:
        candidate &= real_tokens(cache.mask, cache.start, size, size, len(j)) > 0
    key = importance.masked_fill(~candidate[:, None], -torch.inf)
    forced = (j < sinks) & (key > -torch.inf)
    key = F.pad(key.masked_fill(forced, torch.inf), (0, count), value=-torch.inf)
    key, index = key.sort(dim=-1, descending=True, stable=True)  # ties to the lower block
    return index.masked_fill(key == -torch.inf, -1)[..., :count]


def _is_chosen(chosen: Tensor, count: int) -> Tensor:
    """Which of P blocks are among `chosen`, `[B, Hkv, P]`."""
    found = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=chosen.device)
    index = chosen.masked_fill(chosen < 0, count)
    return found.scatter_(2, index, torch.ones_like(index, dtype=torch.bool))[..., :count]


def _last(query: Tensor, k: Tensor, v: Tensor, cache: _Cache, span: int, size: int | None = None
          ) -> Part:
    """Logits and values of the last `span` tokens; of near blocks alone if `size` is theirs."""
    first = max(0, cache.tokens - span)
    position = torch.arange(first, cache.tokens, device=k.device) - cache.start[:, None]
    seen = position >= (0 if size is None else cache.near[:, None] * size)
    seen &= position >= 0
    if cache.mask is not None:
        seen &= cache.mask[:, first:]
    return _logits(query, k[:, :, first:], seen[:, None]), v[:, :, first:]


def _of_blocks(query: Tensor, k: Tensor, v: Tensor, cache: _Cache, chosen: Tensor, size: int
               ) -> Part:
    """Logits and values of the tokens of the chosen blocks."""
    column = chosen.unsqueeze(3) * size + torch.arange(size, device=k.device)
    column = (column + cache.start[:, None, None, None]).flatten(2)  # [B, Hkv, S b]
    seen = (chosen >= 0).repeat_interleave(size, 2) & (column < cache.tokens)
    column = column.clamp(0, cache.tokens - 1)
    if cache.mask is not None:
        seen &= cache.mask.gather(1, column.flatten(1)).view_as(column)
    b, h = (torch.arange(count, device=k.device) for count in column.shape[:2])
    rows = b[:, None, None], h[:, None], column  # twice as fast as `gather` on a CPU
    return _logits(query, k[rows], seen), v[rows]


def _logits(query: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Scores `[B, Hkv, G, X]` of keys `[B, Hkv, X, D]`, -inf where not `seen`."""
    return (query @ k.to(query.dtype).mT).masked_fill(~seen.unsqueeze(2), -torch.inf)


def _attend(parts: list[Part]) -> Tensor:
    """One softmax over all parts, `[B, Hkv, G, D]`; 0 where nothing is seen."""
    logits = torch.cat([x for x, _ in parts], -1)
    values = [x.to(logits.dtype) for _, x in parts]
    if not logits.shape[3]:
        return logits.new_zeros(*logits.shape[:3], values[0].shape[3])
    weights = (logits - _peak(logits)).exp()
    total = weights.sum(-1, keepdim=True)
    split = weights.split([x.shape[2] for x in values], -1)
    out = sum((w @ x for w, x in zip(split[1:], values[1:], strict=True)), split[0] @ values[0])
    return out / total.masked_fill(total == 0, 1)


def _peak(logits: Tensor) -> Tensor:
    """The largest logit, `[..., 1]`; finite even if all are -inf."""
    return logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)

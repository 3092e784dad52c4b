"""The branches of Native Sparse Attention one by one: public functions.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim, P compressed
blocks, nb selection blocks, S selected blocks, l, d, b sizes of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.kernels.checks import check_key_mask, check_qkv, check_scale
from attnopt.kernels.dispatch import harmonize_autocast
from attnopt.kernels.nsa.arguments import (
    check_compressed,
    check_indices,
    check_queries,
    check_size,
    choose_backend,
    choose_regime,
    gates_pattern,
)
from attnopt.kernels.nsa.calls import make_call
from attnopt.kernels.nsa.geometry import near_block, query_positions
from attnopt.kernels.nsa.reference import (
    compressed_reference,
    select_reference,
    selected_reference,
)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    num_tokens: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to the compressed blocks that end at or before the query.

    Args:
        q: `[B, H, Nq, D]`, the last Nq of the tokens.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        v_cmp: compressed values, likewise.
        compress_block: l tokens of a block.
        compress_stride: d tokens from one block's start to the next one's.
        num_tokens: Nk; by default the length of `key_mask`, else Nq.
        key_mask: `[B, Nk]` bool, True for real tokens.
        scale: factor of the scores, `1/sqrt(D)` by default.
        backend: as in `nsa_attention`.

    Returns:
        `[B, H, Nq, D]`; zero for queries that see no block.

    Raises:
        ValueError: as `nsa_attention`.

    Source: Yuan et al. 2025, "Native Sparse Attention", section 3.3.1.
    """
    q, k_cmp, v_cmp = harmonize_autocast(q, k_cmp, v_cmp)
    check_size("compress_block", compress_block)
    pattern = gates_pattern(compress_block, compress_stride, compress_block, 1, 1, 0, 0)
    tokens = _tokens(q, num_tokens, key_mask)
    check_compressed(q, {"k_cmp": k_cmp, "v_cmp": v_cmp}, tokens, compress_block, compress_stride)
    scale = check_scale(scale, q.shape[3])
    backend = choose_backend(backend, q, 0)
    if backend == "reference":
        return compressed_reference(
            q, k_cmp, v_cmp, compress_block=compress_block, compress_stride=compress_stride,
            num_tokens=tokens, key_mask=key_mask, scale=scale,
        )[0]
    call = make_call(pattern, tokens, key_mask, q, scale, "short", backend)
    return call.compressed(q, k_cmp, v_cmp)[0]


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    num_tokens: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Choose the blocks that matter most to each query, by its attention to compressed ones.

    A block's importance is the softmax probability of the compressed blocks that overlap it,
    weighted by the overlap and summed over the heads of a group. Ties go to the lower index.

    Args:
        q: `[B, H, Nq, D]`, the last Nq of the tokens.
        k_cmp: compressed keys `[B, Hkv, P, D]`.
        compress_block: l tokens of a compressed block.
        compress_stride: d tokens from one compressed block's start to the next one's.
        select_block: b tokens of a selection block.
        num_selected: S blocks of a query, the forced ones among them.
        sink_blocks: first blocks that are always chosen.
        local_blocks: last blocks that are always chosen, the query's own among them.
        num_tokens: Nk; by default the length of `key_mask`, else Nq.
        key_mask: `[B, Nk]` bool, True for real tokens.
        scale: factor of the scores, `1/sqrt(D)` by default.
        backend: as in `nsa_attention`.

    Returns:
        int32 `[B, Hkv, Nq, S]`, ascending; -1 at the end where a query has fewer blocks. There is
        no gradient.

    Raises:
        ValueError: as `nsa_attention`.

    Source: Yuan et al. 2025, "Native Sparse Attention", equations 8 to 10.
    """
    q, k_cmp = harmonize_autocast(q, k_cmp)
    pattern = gates_pattern(compress_block, compress_stride, select_block, num_selected, 1,
                            sink_blocks, local_blocks)
    tokens = _tokens(q, num_tokens, key_mask)
    check_compressed(q, {"k_cmp": k_cmp}, tokens, compress_block, compress_stride)
    scale = check_scale(scale, q.shape[3])
    backend = choose_backend(backend, q, pattern.far)
    call = make_call(pattern, tokens, key_mask, q, scale, "short", backend)
    if backend == "reference":
        with torch.no_grad():
            chosen = select_reference(
                q, k_cmp, compress_block=compress_block, compress_stride=compress_stride,
                select_block=select_block, count=pattern.far, sinks=sink_blocks,
                near_window=pattern.near_window, num_tokens=tokens, key_mask=key_mask, scale=scale,
            )
    else:
        chosen = call.select(q, k_cmp)
    position = query_positions(call.start, q.shape[2], tokens - q.shape[2])[:, None, :, None]
    own = position // select_block
    local = own - torch.arange(local_blocks - 1, -1, -1, device=q.device)
    local = local.masked_fill((local < 0) | (position < 0), -1)
    local = local.expand(-1, k_cmp.shape[1], -1, -1)
    return _ascending(torch.cat([chosen, local.int()], dim=3))


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    select_block: int,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    regime: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Attend token by token to chosen blocks, causally.

    Args:
        q: `[B, H, Nq, D]`.
        k: `[B, Hkv, Nk, D]`; the queries are the last Nq tokens.
        v: like `k`.
        block_indices: int32 or int64 `[B, Hkv, Nq, S]`, in any order; a block counts once. -1 and
            blocks after the query's own are nothing.
        select_block: b tokens of a block.
        key_mask: `[B, Nk]` bool, True for real tokens; blocks count from each row's first.
        scale: factor of the scores, `1/sqrt(D)` by default.
        regime: as in `nsa_attention`.
        backend: as in `nsa_attention`.

    Returns:
        `[B, H, Nq, D]`; zero for queries that see no token.

    Raises:
        ValueError: as `nsa_attention`.

    Source: Yuan et al. 2025, "Native Sparse Attention", equations 11 and 12.
    """
    q, k, v = harmonize_autocast(q, k, v)
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_indices(block_indices, q, k)
    check_size("select_block", select_block)
    scale = check_scale(scale, q.shape[3])
    backend = choose_backend(backend, q, block_indices.shape[3])
    regime = choose_regime(regime, k.shape[2], backend)
    tokens = k.shape[2]
    pattern = gates_pattern(select_block, select_block, select_block, 1, 1, 0, 0)
    call = make_call(pattern, tokens, key_mask, k, scale, regime, backend)
    position = query_positions(call.start, q.shape[2], tokens - q.shape[2])
    end = near_block(position, select_block, 0)[:, None, :, None]
    nothing = (block_indices < 0) | (block_indices >= end)
    chosen = _ascending(block_indices.masked_fill(nothing, -1).int())
    if backend == "reference":
        return selected_reference(
            q, k, v, chosen, select_block=select_block, key_mask=key_mask, scale=scale
        )[0]
    return call.selected(q, k, v, chosen)[0]


def _tokens(q: Tensor, num_tokens: int | None, key_mask: Tensor | None) -> int:
    """Nk of an op that is not given the keys: checked, as its queries and mask are."""
    check_queries(q)
    batch, queries = q.shape[0], q.shape[2]
    tokens = queries if num_tokens is None else check_size("num_tokens", num_tokens, queries)
    if num_tokens is None and isinstance(key_mask, Tensor) and key_mask.dim() == 2:
        tokens = check_size("the length of key_mask", key_mask.shape[1], queries)
    check_key_mask(key_mask, q.new_empty(0).expand(batch, 1, tokens, 0))
    return tokens


def _ascending(blocks: Tensor) -> Tensor:
    """Sorted along the last axis, each block once, -1 (for anything negative) at the end."""
    last = torch.iinfo(blocks.dtype).max
    blocks = blocks.masked_fill(blocks < 0, last).sort(-1).values
    again = torch.zeros_like(blocks, dtype=torch.bool)
    again[..., 1:] = blocks[..., 1:] == blocks[..., :-1]
    blocks = blocks.masked_fill(again, last).sort(-1).values
    return blocks.masked_fill(blocks == last, -1).contiguous()

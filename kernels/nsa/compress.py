"""Tokens of each compressed block, and their mean: the simplest compression of keys and values.

    k_cmp[c] = mean of k over the real tokens of positions [c d, c d + l)

Positions count from a row's first real token, so left padding changes nothing.
Letters: B batch, Hkv key/value heads, N tokens, D head dim, l block, d stride, P blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attnopt.kernels.checks import FLOATS, check_key_mask, describe, is_dense
from attnopt.kernels.nsa.geometry import compressed_count, row_starts
from attnopt.kernels.packing import lay_out


def cut_blocks(
    x: Tensor, *, block: int, stride: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The tokens of every compressed block, as views where no padding is to be skipped.

    Args:
        x: `[B, Hkv, N, D]`.
        block: l.
        stride: d.
        key_mask: bool `[B, N]`, True for real tokens.

    Returns:
        Blocks `[B, Hkv, P, l, D]` and which of their tokens are real, bool `[B, P, l]`, None
        without a mask. In a padded row the last blocks may reach beyond the text: they hold
        repeated tokens that are not real.
    """
    if key_mask is None:
        if x.shape[2] < block:
            return x.new_empty(*x.shape[:2], 0, block, x.shape[3]), None
        return x.unfold(2, block, stride).transpose(3, 4), None
    count = compressed_count(x.shape[2], block, stride)
    tokens = torch.arange(count, device=x.device)[:, None] * stride
    tokens = tokens + torch.arange(block, device=x.device)  # [P, l]
    column = tokens + row_starts(key_mask, x).long()[:, None, None]  # [B, P, l]
    inside = column < x.shape[2]
    column = column.clamp_max(x.shape[2] - 1).flatten(1)
    index = column[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    blocks = x.gather(2, index).unflatten(2, (count, block))
    real = key_mask.gather(1, column).unflatten(1, (count, block)) & inside
    return blocks, real


def mean_compress(
    x: Tensor, *, compress_block: int, compress_stride: int, key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Average the real tokens of each compressed block.

    Args:
        x: keys or values `[B, Hkv, N, D]`.
        compress_block: tokens of a block, l.
        compress_stride: tokens from one block's start to the next one's, d.
        key_mask: bool `[B, N]`, True for real tokens; blocks count from each row's first.
        cu_seqlens: int32 or int64 `[S + 1]`, where packed documents begin and end, with B = 1 and
            no key mask. Their number of blocks is read from the device.

    Returns:
        `[B, Hkv, P, D]` in the dtype of `x`, P = max(0, (N - l) // d + 1); 0 for a block without
        a real token. Of packed documents the blocks of each, end to end.

    Raises:
        ValueError: sizes below 1, or a tensor or mask that does not fit.

    Source: Yuan et al. 2025, "Native Sparse Attention", section 3.3.1, with the mean for phi.
    """
    for name, size in (("compress_block", compress_block), ("compress_stride", compress_stride)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {size!r}")
    if not is_dense(x) or x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError("keys or values must be a floating-point tensor [batch, key heads, "
                         f"tokens, head_dim]; got {describe(x)}")
    if cu_seqlens is not None:
        compress = partial(
            mean_compress, compress_block=compress_block, compress_stride=compress_stride
        )
        return compress_documents(
            compress, x, cu_seqlens, block=compress_block, stride=compress_stride,
            key_mask=key_mask,
        )
    check_key_mask(key_mask, x)
    blocks, real = cut_blocks(x, block=compress_block, stride=compress_stride, key_mask=key_mask)
    return average(blocks, real).to(x.dtype)


def compress_documents(
    compress: Callable[[Tensor], Tensor], x: Tensor, cu_seqlens: Tensor, *, block: int,
    stride: int, key_mask: Tensor | None = None,
) -> Tensor:
    """Compress packed documents one by one.

    Args:
        compress: makes `[R, Hkv, P, D]` of rows `[R, Hkv, L, D]`.
        x: keys or values `[1, Hkv, N, D]`.
        cu_seqlens: where documents begin and end.
        block: l.
        stride: d.
        key_mask: must be None.

    Returns:
        `[1, Hkv, sum of P, D]`, the blocks that lie wholly in a document, end to end.

    Raises:
        ValueError: inputs that do not fit; the message says which.
    """
    layout = lay_out(cu_seqlens, x, key_mask=key_mask)
    return layout.blocks(block, stride).unpack([compress(rows) for rows in layout.pack(x)])


def average(blocks: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of blocks, as `cut_blocks` makes them: `[B, Hkv, P, D]`, wide."""
    wide = torch.promote_types(blocks.dtype, torch.float32)
    if real is None:
        return blocks.mean(3, dtype=wide)
    weights = real.to(wide) / real.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("bhpld,bpl->bhpd", blocks.to(wide), weights)

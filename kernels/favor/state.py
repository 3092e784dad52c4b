"""What is kept of a text already read: the sums over far keys, and the tokens of the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.rows import first_real_token

EMPTY = -1e30  # log_scale of a sum over nothing: finite, so that no inf - inf can arise


class FavorState(NamedTuple):
    """The past of a text, constant in size: `favor_attention` takes it and gives the next one.

    `kv exp(log_scale)` is the sum over far keys of phi(k) v, `z exp(log_scale)` that of phi(k).
    Gradients flow through kv, z, keys and values; `log_scale` is a constant reference. The last
    three are None without a window. A ring counts its blocks from its first real token, so
    padding between tokens must not fall on the first token of a block.

    Attributes:
        kv: `[B, H, M, D]`, fp32 (fp64 for fp64 inputs).
        z: `[B, H, M]`.
        log_scale: `[B, H, M]`; -1e30 where nothing was summed yet.
        keys: `[B, Hkv, R, D]`, tokens not yet summed, R at most window + window_block - 2.
        values: like `keys`.
        key_mask: `[B, R]` bool, True where the token is real and not yet summed.
    """

    kv: Tensor
    z: Tensor
    log_scale: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    key_mask: Tensor | None = None


def join_ring(
    state: FavorState, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put the ring's tokens before the new ones: keys, values and mask of both."""
    if state.keys is None or state.values is None or state.key_mask is None:
        return k, v, key_mask
    if key_mask is None:
        key_mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
    return (
        torch.cat([state.keys, k], 2),
        torch.cat([state.values, v], 2),
        torch.cat([state.key_mask, key_mask], 1),
    )


def cut_ring(
    k: Tensor, v: Tensor, key_mask: Tensor | None, window: int, window_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the last tokens that the next query may see exactly, and mask those summed up."""
    B, Nk = k.shape[0], k.shape[2]
    if key_mask is None:
        key_mask = k.new_ones(B, Nk, dtype=torch.bool)
    kept = min(Nk, window + window_block - 2)
    start = first_real_token(key_mask)  # [B]
    summed = (Nk - start - window + 1).clamp(min=0) // window_block * window_block
    position = torch.arange(Nk, device=k.device)
    key_mask = key_mask & (position >= (start + summed)[:, None])
    first = Nk - kept
    return k[:, :, first:], v[:, :, first:], key_mask[:, first:]

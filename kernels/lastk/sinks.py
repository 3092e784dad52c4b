"""Sinks: the first T real tokens of every batch row, which the band leaves to their own weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.kernels.rows import first_real_token


@dataclass(frozen=True)
class Sinks:
    """Where the sinks lie.

    Attributes:
        band: `[B]` index of the first token of row b that is no sink.
        position: `[B, T]` index of sink t in row b, past the end where the row is too short.
        visible: `[B, T]` whether the token exists and is real.
        length: number of tokens, Nk.
    """

    band: Tensor
    position: Tensor
    visible: Tensor
    length: int

    def index(self) -> Tensor:
        """`position`, with those past the end wrapped round: `[B, T]`, distinct for T <= Nk."""
        return self.position % self.length

    def hide_from_band(self, key_mask: Tensor | None) -> Tensor:
        """`[B, Nk]` True for the real tokens that are no sinks."""
        j = torch.arange(self.length, device=self.position.device)
        beyond = j >= self.band[:, None]
        return beyond if key_mask is None else beyond & key_mask


def sink_positions(key_mask: Tensor | None, T: int, k: Tensor) -> Sinks:
    """Find the first `T` real tokens of each row; T may exceed the number of tokens."""
    Nk = k.shape[2]
    if key_mask is None:
        start = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    else:
        start = first_real_token(key_mask)
    position = start[:, None] + torch.arange(T, device=k.device)
    visible = position < Nk
    if key_mask is not None:
        visible &= key_mask.gather(1, position.clamp(max=Nk - 1))
    return Sinks(start + T, position, visible, Nk)


def _rows(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def gather_sinks(x: Tensor, sinks: Sinks) -> Tensor:
    """Rows of `x` `[B, Hkv, Nk, D]` at the sinks, `[B, Hkv, T, D]`; rows past the end are void."""
    return x.gather(2, _rows(sinks.index(), x))


def add_at_sinks(grad: Tensor, sink_grad: Tensor, sinks: Sinks) -> None:
    """Write `sink_grad` `[B, Hkv, T, D]` into `grad` `[B, Hkv, Nk, D]` at the sinks, in place.

    The band gives its sinks no gradient, so writing is adding. Only the first Nk sinks can exist.
    """
    T = min(sinks.position.shape[1], sinks.length)
    index = _rows(sinks.index()[:, :T], grad)
    inside = (sinks.position[:, :T] < sinks.length)[:, None, :, None]
    rows = torch.where(inside, sink_grad[:, :, :T].to(grad.dtype), grad.gather(2, index))
    grad.scatter_(2, index, rows)

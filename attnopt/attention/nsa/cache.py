"""Cache of NSA: all keys and values, and of each block a compressed key and value.

Both lie in buffers that double when they are full, so that a new token costs no copy of the old
ones. A block is compressed once, when its last token has come: of the past a step reads at most the
tokens of the block that it may complete.

Letters: B batch, H query heads, Hkv key/value heads, Nq new tokens, Nk tokens so far, D head
dimension, l compressed block, d stride, P compressed blocks, T blocks at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.attention.cache import MechanismLayer
from attnopt.kernels.nsa.geometry import compressed_count
from attnopt.kernels.rows import first_real_token

if TYPE_CHECKING:
    from attnopt.attention.base import AttentionMechanism
    from attnopt.attention.nsa.compressors import Compressor

# What grows, and along which dimension. Each is a view of a buffer with room to spare.
GROWING = {"keys": 2, "values": 2, "compressed_keys": 2, "compressed_values": 2, "key_mask": 1}


class NSALayer(MechanismLayer):
    """Keeps keys and values `[B, Hkv, Nk, D]` and compressed ones `[B, Hkv, P, D]`.

    Blocks count from each row's first real token, `start` `[B]`; it is None, as `key_mask`
    `[B, Nk]` is, until a mask comes. In a padded row the last compressed blocks do not exist, and
    hold anything. Where gradients are enabled nothing is written in place, for a backward pass may
    need it.
    """

    kept = "compressed blocks"
    compressed_keys: Any  # Tensor, or None where there are none
    compressed_values: Any
    key_mask: Any
    start: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, Nq, D]`; `attend` compresses them.

        Args:
            key_states: new keys.
            value_states: new values.
            *args: ignored, as by the stock layers.
            **kwargs: ignored, as by the stock layers.

        Returns:
            All keys and values so far; `key_mask` is their mask.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = self.values = None
        seen, count = self.cumulative_length, key_states.shape[2]
        self._append("keys", key_states)
        self._append("values", value_states)
        if self._next_mask is not None or self.key_mask is not None:
            self._append_mask(key_states, seen, count)
        self._next_mask = None
        self.cumulative_length += count
        return self.keys, self.values

    def attend(
        self, mechanism: AttentionMechanism, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        """Compress the blocks that are new, and attend; see `MechanismLayer.attend`."""
        own: Any = mechanism
        self._compress(
            ("compressed_keys", own.key_compressor, k),
            ("compressed_values", own.value_compressor, v),
        )
        options |= {"compressed": (self.compressed_keys, self.compressed_values)}
        return mechanism(q, k, v, key_mask=self.key_mask, **options)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.cumulative_length:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        for name, dim in GROWING.items():
            if (view := getattr(self, name)) is not None:
                buffer = self._buffers.get(name, view)
                self._buffers[name] = buffer[indices.to(view.device)]
                self._show(name, view.shape[dim])
        if self.start is not None:
            self.start = self.start[indices.to(self.start.device)]

    def _forget(self) -> None:
        self.compressed_keys = self.compressed_values = self.key_mask = self.start = None
        self._compressed_length = 0  # tokens that the compressed blocks know of
        self._starts: set[int] = set()  # of all rows, and perhaps of rows that are no longer there
        self._buffers: dict[str, Tensor] = {}

    def _append_mask(self, like: Tensor, seen: int, count: int) -> None:
        """Go on with the mask, and with the first real token of rows that had none yet."""
        options: dict[str, Any] = {"dtype": torch.bool, "device": like.device}
        rows = like.shape[0]
        if self.key_mask is None:  # so far every token was real
            self._append("key_mask", torch.ones(rows, seen, **options))
            self.start = torch.zeros(rows, dtype=torch.int64, device=like.device)
        new = self._next_mask
        new = torch.ones(rows, count, **options) if new is None else new[:, -count:]
        self._append("key_mask", new)
        assert self.start is not None
        if seen in self._starts or not self._starts:  # else every row has begun
            none_yet = (self.start == seen).to(self.start.dtype)
            self.start = self.start + none_yet * first_real_token(new)
            self._starts = set(self.start.tolist())

    def _compress(self, *parts: tuple[str, Compressor, Tensor]) -> None:
        """Compress the blocks that have become whole: where to, by what, keys or values."""
        _, compressor, k = parts[0]
        block, stride, tokens = compressor.block, compressor.stride, k.shape[2]
        before, self._compressed_length = self._compressed_length, tokens
        old, total = (compressed_count(n, block, stride) for n in (before, tokens))
        count = max(
            compressed_count(tokens - start, block, stride)
            - compressed_count(before - start, block, stride)
            for start in self._starts or {0}
        )
        if not count and before and old == total:
            return
        if self.start is None:
            for name, compressor, x in parts:
                self._append(name, compressor(x[:, :, old * stride :]))
            return
        first = (before - self.start - block).div(stride, rounding_mode="floor").add(1).clamp_min(0)
        index = first[:, None] + torch.arange(count, device=k.device)  # [B, T], at most P
        column = (self.start[:, None] + index * stride).unsqueeze(2)
        column = (column + torch.arange(block, device=k.device)).flatten(1)  # [B, T l]
        inside = column < tokens
        column = column.clamp_max(tokens - 1)
        real = (self.key_mask.gather(1, column) & inside).unflatten(1, (count, block))
        for name, compressor, x in parts:
            cut = x.gather(2, _per_head(column, x)).unflatten(2, (count, block))
            # A row may get blocks that lack tokens, because another row's are whole: nobody sees
            # them before they are whole too, and then they are written again.
            self._scatter(name, compressor.pool(cut, real), index, total)

    def _append(self, name: str, new: Tensor) -> None:
        """Put new entries behind the old ones."""
        dim, old = GROWING[name], getattr(self, name)
        count = 0 if old is None else old.shape[dim]
        if torch.is_grad_enabled():
            self._buffers.pop(name, None)
            setattr(self, name, new if old is None else torch.cat([old, new], dim))
            return
        length = count + new.shape[dim]
        self._make_room(name, new, length)
        if new.shape[dim]:
            self._buffers[name].narrow(dim, count, new.shape[dim]).copy_(new)
        self._show(name, length)

    def _scatter(self, name: str, new: Tensor, index: Tensor, length: int) -> None:
        """Put entries `[B, Hkv, T, D]` at an index per row `[B, T]`, 0 to `length`.

        There is always room for one entry more: the one at `length` does not exist yet.
        """
        dim, old = GROWING[name], getattr(self, name)
        index = _per_head(index, new)
        if torch.is_grad_enabled():
            self._buffers.pop(name, None)
            count = 0 if old is None else old.shape[dim]
            blank = new.new_zeros(*new.shape[:2], length + 1 - count, new.shape[3])
            wider = blank if old is None else torch.cat([old, blank], dim)
            setattr(self, name, wider.scatter(dim, index, new).narrow(dim, 0, length))
            return
        self._make_room(name, new, length + 1)
        self._buffers[name].scatter_(dim, index, new)
        self._show(name, length)

    def _make_room(self, name: str, like: Tensor, length: int) -> None:
        """See to it that a buffer has at least this length; a new one is twice what is stored."""
        dim, old, buffer = GROWING[name], getattr(self, name), self._buffers.get(name)
        frozen = buffer is not None and buffer.is_inference() > torch.is_inference_mode_enabled()
        if buffer is not None and buffer.shape[dim] >= length and not frozen:
            return
        count = 0 if old is None else old.shape[dim]
        shape = list(like.shape)
        shape[dim] = max(length, 2 * count)
        # zeros: what does not exist must be finite
        self._buffers[name] = like.new_zeros(shape)
        if count:
            self._buffers[name].narrow(dim, 0, count).copy_(old)

    def _show(self, name: str, length: int) -> None:
        setattr(self, name, self._buffers[name].narrow(GROWING[name], 0, length))


def _per_head(index: Tensor, like: Tensor) -> Tensor:
    """An index `[B, X]` as `gather` and `scatter` take it for `[B, Hkv, X, D]`."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])

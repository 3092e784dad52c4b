"""Packed documents: texts end to end in one row of tokens, laid out as padded rows and back.

`cu_seqlens` `[S + 1]` says where documents lie: document s is tokens `cu_seqlens[s]` up to, not
including, `cu_seqlens[s + 1]`. An op that costs about the same for every token then takes each
document as a row of a batch, padded on the right by its own last token. Causal attention needs no
mask for that, as no token sees what comes after it. Documents of similar length form a group of
rows of one length, so that padding stays small.

Letters: S documents, N tokens of all of them, R rows of a group, L tokens of such a row, H heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.checks import check_qkv, describe, is_dense
from attnopt.kernels.dispatch import harmonize_autocast

# Padding that a group of rows may hold: this share of its real tokens, or so many if that is more.
# Every group is a call of its own, so that a little padding is cheaper than one more group.
_SHARE = 1 / 8
_SLACK = 128


class Group(NamedTuple):
    """Documents that are rows of one length.

    Attributes:
        documents: int64 `[R]`, their indices.
        length: L.
    """

    documents: Tensor
    length: int


class Layout:
    """Where the entries of packed documents, tokens or blocks of them, lie in groups of rows.

    Args:
        lengths: int64 `[S]`, entries of each document, 0 allowed.
        groups: every document in one of them.
        total: N, the sum of the lengths.
        device: of the entries; lengths and groups may lie elsewhere.
        repeat: whether a row is padded by its last entry, which all must have then, or by zeros.
    """

    def __init__(
        self, lengths: Tensor, groups: Sequence[Group], total: int, device: torch.device, *,
        repeat: bool,
    ) -> None:
        self.lengths, self.groups, self.total, self.device = lengths, groups, total, device
        ends = lengths.cumsum(0)
        first = torch.empty_like(ends)  # the slot of each document's first entry
        sources = []
        self.slots = 0  # places for entries: row by row, group by group
        for documents, length in groups:
            rows = torch.arange(documents.shape[0], device=lengths.device)
            column = torch.arange(length, device=lengths.device)
            first[documents] = self.slots + rows * length
            self.slots += documents.shape[0] * length
            end = ends[documents, None]
            sources.append((end - lengths[documents, None] + column).minimum(end - 1).flatten())
        entry = torch.arange(total, device=lengths.device)
        document = torch.searchsorted(ends, entry, right=True)
        position = entry - (ends - lengths)[document]
        # an entry beyond every row is out of bounds, and not in another document's row
        beyond = position >= max(length for _, length in groups)
        self.slot = (first[document] + position).masked_fill(beyond, self.slots).to(device)  # [N]
        self.source = torch.cat(sources).to(device) if repeat else None  # [slots]

    def blocks(self, block: int, stride: int, total: int | None = None) -> Layout:
        """The layout of blocks that lie wholly within documents, in the same rows.

        Args:
            block: l tokens of a block.
            stride: d tokens from one block's start to the next one's.
            total: their number in all documents; None to count them.

        Returns:
            A layout in which a document of n tokens has `max(0, (n - l) // d + 1)` entries.

        Raises:
            ValueError: another number of blocks, where it can be counted.
        """
        counts = _count(self.lengths, block, stride).clamp_min(0)
        if total is None or _readable(counts):
            found = int(counts.sum())
            if total is not None and total != found:
                raise ValueError(
                    f"the packed documents have {found} compressed blocks of {block} at stride "
                    f"{stride}; got {total} (mean_compress with cu_seqlens makes them)"
                )
            total = found
        groups = [
            Group(documents, max(0, _count(length, block, stride)))
            for documents, length in self.groups
        ]
        return Layout(counts, groups, total, self.device, repeat=False)

    def masks(self) -> list[Tensor]:
        """For each group bool `[R, L]`, True for what is not padding."""
        return [
            (torch.arange(length, device=documents.device) < self.lengths[documents, None]).to(
                self.device
            )
            for documents, length in self.groups
        ]

    def pack(self, x: Tensor | None) -> list[Any]:
        """Lay out as rows.

        Args:
            x: `[1, H, N, D]`, or None.

        Returns:
            For each group `[R, H, L, D]`, or None. Padding passes no gradient on.

        Raises:
            ValueError: another shape.
        """
        if x is None:
            return [None] * len(self.groups)
        if not is_dense(x) or x.dim() != 4 or x.shape[0] != 1 or x.shape[2] != self.total:
            raise ValueError("with cu_seqlens there must be tensors of shape [1, heads, "
                             f"{self.total}, features]; got {describe(x)}")
        return [rows.transpose(1, 2) for rows in self.pack_entries(x[0].transpose(0, 1))]

    def pack_entries(self, x: Tensor) -> list[Tensor]:
        """Lay out as rows: `[N, ...]` to `[R, L, ...]` for each group."""
        if self.source is None:
            packed = _scatter(x, self.slot, self.slots)
        else:
            packed = _Gather.apply(x, self.source, self.slot)
        sizes = [(documents.shape[0], length) for documents, length in self.groups]
        parts = packed.split([rows * length for rows, length in sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]

    def unpack(self, rows: Sequence[Tensor]) -> Tensor:
        """Undo `pack`: `[R, H, L, D]` of each group to `[1, H, N, D]`, without padding."""
        flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in rows])  # [slots, H, D]
        return _Gather.apply(flat, self.slot, None).transpose(0, 1)[None]

    def attend(
        self, attend: Callable[..., Tensor], *packed: Sequence[Any], masked: bool = False
    ) -> Tensor:
        """Call `attend` for each group with its rows, and unpack.

        Args:
            attend: makes `[R, H, L, D]` of the rows, in order, and of `key_mask`.
            *packed: by group, as `pack` returns them.
            masked: whether it is to know what is padding; else `key_mask` is None.

        Returns:
            `[1, H, N, D]`.
        """
        masks = self.masks() if masked else [None] * len(self.groups)
        calls = zip(masks, *packed, strict=True)
        return self.unpack([attend(*rows, key_mask=mask) for mask, *rows in calls])


def lay_out(
    cu_seqlens: Tensor, x: Tensor, *, max_seqlen: int | None = None, key_mask: Tensor | None = None
) -> Layout:
    """Choose rows for packed documents.

    Args:
        cu_seqlens: int32 or int64 `[S + 1]`: 0, then the end of each document, N last; strictly
            increasing.
        x: `[1, H, N, D]`, the tokens.
        max_seqlen: tokens of the longest document, or more. All rows then have this length and
            nothing is read from the device: it can be compiled, and on a GPU the values of
            `cu_seqlens` are not checked. None to read the lengths and group them.
        key_mask: must be None.

    Returns:
        The layout, on the device of `x`.

    Raises:
        ValueError: another dtype, shape, order or device; a document longer than `max_seqlen`.
    """
    if key_mask is not None:
        raise ValueError("packed documents have no padding: give cu_seqlens or key_mask, not both")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the batch size must be 1; got shape {tuple(x.shape)}")
    if not is_dense(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be an int32 or int64 tensor; got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError("cu_seqlens must have shape [documents + 1] with at least one document; "
                         f"got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on the device of the tokens, {x.device}; "
                         f"got {cu_seqlens.device}")
    if max_seqlen is not None and (
        not isinstance(max_seqlen, int | torch.SymInt) or max_seqlen is True or max_seqlen < 1
    ):
        raise ValueError(f"max_seqlen must be an integer >= 1; got {max_seqlen!r}")
    if max_seqlen is None:
        cu_seqlens = cu_seqlens.cpu()
    lengths, tokens = cu_seqlens.diff().long(), x.shape[2]
    if _readable(cu_seqlens):
        _check_values(cu_seqlens.tolist(), lengths.tolist(), tokens, max_seqlen)
    if max_seqlen is None:
        groups = similar_lengths(lengths.tolist())
    else:
        groups = [Group(torch.arange(lengths.shape[0], device=x.device), max_seqlen)]
    return Layout(lengths, groups, tokens, x.device, repeat=True)


def lay_out_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None,
    key_mask: Tensor | None,
) -> Layout:
    """Check the inputs of an attention op with packed documents, and choose rows for them.

    Args:
        q: `[1, H, N, D]`.
        k: `[1, Hkv, N, D]`.
        v: like `k`.
        cu_seqlens: as for `lay_out`.
        max_seqlen: likewise.
        key_mask: must be None.

    Returns:
        The layout.

    Raises:
        ValueError: inputs that do not fit; the message says which.
    """
    check_qkv(*harmonize_autocast(q, k, v))  # as the op on rows will
    if q.shape[2] != k.shape[2]:
        raise ValueError("with cu_seqlens there must be as many keys as queries; got "
                         f"{q.shape[2]} queries and {k.shape[2]} keys")
    return lay_out(cu_seqlens, k, max_seqlen=max_seqlen, key_mask=key_mask)


def similar_lengths(lengths: list[int]) -> list[Group]:
    """Group documents so that rows of one length hold little padding, the longest first.

    Args:
        lengths: tokens of each document.

    Returns:
        Groups in which padding is at most an eighth of the real tokens, or 128 tokens.
    """
    order = sorted(range(len(lengths)), key=lambda document: -lengths[document])
    groups: list[Group] = []
    while order:
        longest, count, real, padding = lengths[order[0]], 0, 0, 0
        for document in order:
            real, padding = real + lengths[document], padding + longest - lengths[document]
            if padding > max(_SLACK, _SHARE * real):
                break
            count += 1
        group, order = order[:count], order[count:]
        groups.append(Group(torch.tensor(group), longest))
    return groups


def _check_values(ends: list[int], lengths: list[int], tokens: int, max_seqlen: int | None) -> None:
    if ends[0] != 0 or ends[-1] != tokens or min(lengths) < 1:
        shown = ends if len(ends) < 10 else [*ends[:6], "...", *ends[-2:]]
        raise ValueError(
            f"cu_seqlens must start with 0, end with the number of tokens, {tokens}, and increase "
            f"strictly (no document is empty); got {shown}"
        )
    if max_seqlen is not None and max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest document, {max(lengths)}; got {max_seqlen}"
        )


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at for nothing: on the CPU, and not while compiling."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _count(length: Any, block: int, stride: int) -> Any:
    """Blocks of so many tokens, 0 or less for none."""
    return (length - block) // stride + 1


def _scatter(x: Tensor, slot: Tensor, slots: int) -> Tensor:
    """`[N, ...]` to `[slots, ...]`: entry n at `slot[n]`, 0 elsewhere."""
    return x.new_zeros(slots, *x.shape[1:]).index_copy(0, slot, x)


class _Gather(torch.autograd.Function):
    """`x[index]`, whose gradient is a copy and not a sum.

    That is `grad[back]` where some are read twice but only one of them has a gradient, and a
    scatter where `back` is None, since none is read twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.entries = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        if back is None:
            return _scatter(grad, index, ctx.entries), None, None
        return grad.index_select(0, back), None, None

"""Which queries selected a block: an index in a fixed order, made without looking at the host.

The pairs (query, slot) of one key/value head are sorted by block, stably, so that a block's queries
lie together in order of time. They are cut into segments of at most SEGMENT pairs; a block that
every query selects gets many. The number of segments is known from the sizes alone,

    segments = Nq S // SEGMENT + nb

and those that are left over are empty. Nothing is larger than the number of pairs.

Letters: x heads of keys (batch rows * Hkv), Nq queries, S slots of a query, nb blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT = 1024  # pairs that one program gathers at most


class WorkList(NamedTuple):
    """The pairs in the order of their blocks, and the segments that they are cut into.

    Attributes:
        order: `[x, Nq S]` int32, pairs `query S + slot` by block; those without one come last.
        first: `[x, nb + 1]` int32, the first segment of each block, and the number of segments.
        segments: `[3, x, segments]` int32, of each its block and the range of its pairs.
    """

    order: Tensor
    first: Tensor
    segments: Tensor


def count_segments(pairs: int, blocks: int) -> int:
    """Segments that so many pairs in so many blocks need at most."""
    return pairs // SEGMENT + blocks


def make_work_list(chosen: Tensor, blocks: int) -> WorkList:
    """Sort the pairs by block and cut them into segments.

    Args:
        chosen: `[x, Nq, S]` int32, blocks of each query, -1 for none.
        blocks: nb.

    Returns:
        The work list; deterministic, on the device of `chosen`, without a host synchronization.
    """
    device = chosen.device
    block = chosen.masked_fill(chosen < 0, blocks).flatten(1)
    block, order = block.sort(dim=1, stable=True)
    edges = torch.arange(blocks + 1, device=device, dtype=torch.int32).expand(len(chosen), -1)
    begin = torch.searchsorted(block, edges.contiguous())  # [x, nb + 1]
    per_block = (begin[:, 1:] - begin[:, :-1] + SEGMENT - 1) // SEGMENT
    first = torch.nn.functional.pad(per_block.cumsum(1), (1, 0))  # [x, nb + 1]
    total = count_segments(block.shape[1], blocks)
    index = torch.arange(total, device=device).expand(len(chosen), -1).contiguous()
    own = torch.searchsorted(first[:, 1:].contiguous(), index, right=True)
    within = own.clamp_max(blocks - 1)
    start = begin.gather(1, within) + (index - first.gather(1, within)) * SEGMENT
    end = torch.minimum(start + SEGMENT, begin.gather(1, within + 1))
    empty = own >= blocks
    segments = torch.stack([within, start, end]).masked_fill(empty, 0)
    return WorkList(order.int(), first.int(), segments.int())

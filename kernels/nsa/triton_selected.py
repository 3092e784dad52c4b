"""Selected attention in Triton: tiles, regimes and launches; the kernels are in `triton_*.py`.

Regime "short": one query-major kernel forward, two kernels backward, over all key tiles that some
row selects. A bit word per 32 blocks tells which; `[B, Hkv, Nq, nb / 32]` of them grow as N^2, but
are small up to N of 8k.
Regime "long": the queries of each block are gathered. Partial results are held for as many heads at
a time as fit PASS_BYTES, so that memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from attnopt.kernels.common import input_precision
from attnopt.kernels.nsa.geometry import selection_count
from attnopt.kernels.nsa.triton_gather import gather_backward_kernel, gather_forward_kernel
from attnopt.kernels.nsa.triton_key import selected_dkv_kernel
from attnopt.kernels.nsa.triton_query import selected_dq_kernel, selected_forward_kernel
from attnopt.kernels.nsa.work_list import WorkList, count_segments, make_work_list

PASS_BYTES = 1 << 30  # of partial results at a time
MAX_GROUP = 16  # heads in a tile of rows


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Tensor, chosen: Tensor, *,
    select_block: int, near_window: int, scale: float, regime: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Nq, D]` in the dtype of `q`, log-sum-exp `[B, H, Nq]` fp32."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    job = _Job(q, k, v, key_mask, start, chosen, select_block, near_window, scale, regime)
    part, part_lse = job.partials()
    for x0, count in job.passes():
        if job.gathers:
            work = job.work_list(x0, count)
            job.launch_gather(
                gather_forward_kernel, x0, work, groups=job.G // job.group,
                part_ptr=part, part_lse_ptr=part_lse, order_ptr=work.order,
                **job.tile("gather_forward"),
            )
        job.launch_queries(
            selected_forward_kernel, x0, count, part_ptr=part, part_lse_ptr=part_lse, out_ptr=out,
            lse_ptr=lse, out_strides=out.stride(), lse_strides=lse.stride(),
            **job.tile("forward"),
        )
    return out, lse


def selected_backward(
    grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, start: Tensor, chosen: Tensor, *,
    select_block: int, near_window: int, scale: float, regime: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lse, delta = lse.contiguous(), delta.contiguous()
    job = _Job(q, k, v, key_mask, start, chosen, select_block, near_window, scale, regime)
    upstream: dict[str, Any] = {
        "do_ptr": grad, "lse_ptr": lse, "delta_ptr": delta,
        "do_strides": grad.stride(), "lse_strides": lse.stride(),
    }
    part, _ = job.partials()
    dk_part, dv_part = job.segment_gradients(), job.segment_gradients()
    first = start
    for x0, count in job.passes():
        if job.gathers:
            work = job.work_list(x0, count)
            first = work.first
            job.launch_gather(
                gather_backward_kernel, x0, work, groups=1, part_ptr=part, dk_part_ptr=dk_part,
                dv_part_ptr=dv_part, order_ptr=work.order, **upstream,
                **job.tile("gather_backward"),
            )
        job.launch_queries(
            selected_dq_kernel, x0, count, part_ptr=part, dq_ptr=dq, dq_strides=dq.stride(),
            **upstream, **job.tile("dq"),
        )
        job.launch_keys(
            selected_dkv_kernel, x0, count, dk_part_ptr=dk_part, dv_part_ptr=dv_part,
            first_ptr=first, dk_ptr=dk, dv_ptr=dv, dk_strides=dk.stride(), dv_strides=dv.stride(),
            **upstream, **job.tile("dkv"),
        )
    return dq, dk, dv


class _Job:
    """One call: its sizes, its selected blocks as bits or as passes, and what kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Tensor,
                 chosen: Tensor, b: int, near_window: int, scale: float, regime: str) -> None:
        B, self.H, self.Nq, self.D = q.shape
        self.Hkv, self.Nk = k.shape[1:3]
        self.q, self.G, self.heads = q, self.H // self.Hkv, B * self.Hkv
        self.group = min(MAX_GROUP, self.G & -self.G)
        self.cols = max(16, triton.next_power_of_2(self.D))
        self.blocks = selection_count(self.Nk, b)
        self.gathers = regime == "long" and chosen.shape[3] > 0
        self.has_bits = regime == "short" and chosen.shape[3] > 0
        self.bits = _pack_bits(chosen, self.blocks) if self.has_bits else chosen
        keys = min(b, self.Nk)
        self.pieces = triton.cdiv(keys, _most_keys(q.dtype, self.cols)) if self.gathers else 1
        self.size = triton.cdiv(keys, self.pieces)
        self.chosen = _cut_blocks(chosen, self.pieces).contiguous()
        self.S = self.chosen.shape[3]
        self.segments = count_segments(self.Nq * self.S, self.blocks * self.pieces)
        self.step = self._heads_at_a_time()
        masked, mask = key_mask is not None, k if key_mask is None else key_mask
        self.shared: dict[str, Any] = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "start_ptr": start,
            "mask_ptr": mask.view(torch.uint8) if masked else k,
            "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
            "mask_strides": mask.stride() if masked else (0, 0),
            "Hkv": self.Hkv, "G": self.G, "Nq": self.Nq, "Nk": self.Nk, "b": b, "scale": scale,
            "DIM": self.D, "COLS": self.cols, "GROUP": self.group, "HAS_MASK": masked,
            "PRECISION": input_precision(q.dtype),
        }
        self.walked = {
            "bits_ptr": self.bits, "words": self.bits.shape[-1] if self.has_bits else 0,
            "Wn": near_window, "HAS_BITS": self.has_bits, "HAS_PARTS": self.gathers,
        }

    def _heads_at_a_time(self) -> int:
        """Heads whose partial results and segments' gradients fit PASS_BYTES together."""
        if not self.gathers:
            return self.heads
        partials = self.G * self.Nq * self.S * (self.D * self.q.element_size() + 4)
        gradients = 2 * self.segments * self.size * self.D * 4
        return max(1, min(self.heads, PASS_BYTES // (partials + gradients)))

    def passes(self) -> Iterator[tuple[int, int]]:
        """First head and number of heads of each pass; all at once where nothing is partial."""
        for x0 in range(0, self.heads, self.step):
            yield x0, min(self.step, self.heads - x0)

    def work_list(self, x0: int, count: int) -> WorkList:
        """The work list of so many heads."""
        chosen = self.chosen.flatten(0, 1)[x0 : x0 + count]
        return make_work_list(chosen, self.blocks * self.pieces)

    def partials(self) -> tuple[Tensor, Tensor]:
        """Room for one row per (head, query, slot) of a pass, and one number."""
        pairs = self.step * self.G * self.Nq * self.S if self.gathers else 0
        return self.q.new_empty(pairs, self.D), self.q.new_empty(pairs, dtype=torch.float32)

    def segment_gradients(self) -> Tensor:
        """Room for the gradients of a piece of a block in every segment of a pass."""
        rows = self.step * self.segments * self.size if self.gathers else 0
        return self.q.new_empty(rows, self.D, dtype=torch.float32)

    def tile(self, kernel: str) -> dict[str, int]:
        """Tile sizes of a kernel."""
        keys = max(16, triton.next_power_of_2(self.size))
        tile = _TILES[kernel](self.q.dtype, self.cols, keys)
        tile["BLOCK_Q"] = max(tile["BLOCK_Q"], self.group)
        return tile

    def launch_gather(self, kernel: Any, x0: int, work: WorkList, groups: int, **own: Any) -> None:
        """Launch a key-major kernel over all segments of a pass."""
        total = work.segments[0].numel()
        kernel[(total * groups,)](
            x0=x0, work_ptr=work.segments, segments=self.segments, total=total, S=self.S,
            pieces=self.pieces, size=self.size, **self.shared, **own,
        )

    def launch_queries(self, kernel: Any, x0: int, count: int, *, BLOCK_Q: int, **own: Any) -> None:
        """Launch a query-major kernel over all tiles of a pass."""
        tiles = triton.cdiv(self.Nq, BLOCK_Q // self.group)
        kernel[(tiles * count * (self.G // self.group),)](
            x0=x0, chosen_ptr=self.chosen, S=self.S, BLOCK_Q=BLOCK_Q, **self.shared, **self.walked,
            **own,
        )

    def launch_keys(self, kernel: Any, x0: int, count: int, *, BLOCK_K: int, **own: Any) -> None:
        """Launch a key-major kernel over all tiles of keys of a pass."""
        kernel[(triton.cdiv(self.Nk, BLOCK_K) * count,)](
            x0=x0, blocks=self.blocks, segments=self.segments, pieces=self.pieces, size=self.size,
            BLOCK_K=BLOCK_K, **self.shared, **self.walked, **own,
        )


def _pack_bits(chosen: Tensor, blocks: int) -> Tensor:
    """Bit words `[B, Hkv, Nq, nb / 32]` int32 of the blocks in `chosen` `[B, Hkv, Nq, S]`."""
    words = triton.cdiv(blocks, 32)
    index = torch.where(chosen < 0, words, chosen // 32).long()
    bit = torch.ones_like(chosen).bitwise_left_shift(chosen % 32)
    packed = chosen.new_zeros(*chosen.shape[:3], words + 1)
    return packed.scatter_add_(3, index, bit)[..., :words].contiguous()


def _cut_blocks(chosen: Tensor, pieces: int) -> Tensor:
    """The pieces of the chosen blocks, `[B, Hkv, Nq, S pieces]`."""
    if pieces == 1:
        return chosen
    piece = torch.arange(pieces, dtype=chosen.dtype, device=chosen.device)
    return torch.where(chosen[..., None] < 0, -1, chosen[..., None] * pieces + piece).flatten(3)


def _most_keys(dtype: torch.dtype, cols: int) -> int:
    """Keys that a gathering program holds at most: K, V and their gradients are in registers."""
    return 128 if dtype != torch.float32 else 32 if cols <= 64 else 16


def _query_tile(dtype: torch.dtype, cols: int, block: int) -> dict[str, int]:
    """Tile sizes of the query-major kernels."""
    if dtype == torch.float32:
        rows, warps = (64, 8) if cols <= 64 else (16, 4)
        return {"BLOCK_Q": rows, "BLOCK_K": 16, "num_warps": warps, "num_stages": 1}
    return {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def _key_tile(dtype: torch.dtype, cols: int, block: int) -> dict[str, int]:
    """Tile sizes of the key-major kernel."""
    if dtype == torch.float32:
        return {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def _gather_forward_tile(dtype: torch.dtype, cols: int, block: int) -> dict[str, int]:
    """Tile sizes of the gathering kernel: all keys of a block, padded to a power of two."""
    rows = 16 if dtype == torch.float32 else 64 if cols <= 64 else 32
    return {"BLOCK_Q": rows, "BLOCK_K": block, "num_warps": 4, "num_stages": 1}


def _gather_backward_tile(dtype: torch.dtype, cols: int, block: int) -> dict[str, int]:
    """As forward, but dK and dV of the block stay in registers: eight warps where it is large."""
    rows = 16 if dtype == torch.float32 else 32
    few = cols * block <= (32 * 32 if dtype == torch.float32 else 64 * 64)
    return {"BLOCK_Q": rows, "BLOCK_K": block, "num_warps": 4 if few else 8, "num_stages": 1}


_TILES = {
    "forward": _query_tile, "dq": _query_tile, "dkv": _key_tile,
    "gather_forward": _gather_forward_tile, "gather_backward": _gather_backward_tile,
}

"""One call of NSA: its pattern, what the mask says of rows and blocks, and the operators on it.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim, P compressed
blocks, nb selection blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.nsa import operators  # noqa: F401  (registers the operators)
from attnopt.kernels.nsa.arguments import Pattern
from attnopt.kernels.nsa.geometry import (
    compressed_count,
    real_tokens,
    row_starts,
    selection_count,
)


class Call(NamedTuple):
    """What the operators share beside queries, keys and values.

    Attributes:
        pattern: what a query sees.
        tokens: Nk.
        key_mask: `[B, Nk]` bool or None.
        start: first real token of each row, `[B]` int32.
        bias: log of what a compressed block counts, `[B, P]` fp32 (fp64); -inf hides it.
        real: which selection blocks hold a real token, `[B, nb]` bool.
        scale: factor of the scores.
        regime: "short" or "long".
        backend: "eager" or "triton".
    """

    pattern: Pattern
    tokens: int
    key_mask: Tensor | None
    start: Tensor
    bias: Tensor
    real: Tensor
    scale: float
    regime: str
    backend: str

    def select(self, q: Tensor, k_cmp: Tensor, lse: Tensor | None = None) -> Tensor:
        """Far blocks of every query, `[B, Hkv, Nq, far]` int32, ascending, -1 at the end.

        `lse` `[B, H, Nq]` is that of all visible compressed blocks, where it is known.
        """
        p = self.pattern
        lse = None if lse is None else lse.detach()
        with torch.no_grad():
            return torch.ops.attnopt.nsa_select(
                q.detach(), k_cmp.detach(), self.bias, self.real, self.start,
                lse, self.tokens - q.shape[2], p.far, p.sinks, p.block, p.stride, p.select_block,
                p.near_window, p.delay, self.scale, self.backend,
            )

    def compressed(self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, left_out: Tensor | None = None
                   ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over the compressed blocks that are not in `left_out`."""
        p = self.pattern
        if left_out is None:
            left_out = q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], 0, dtype=torch.int32)
        return torch.ops.attnopt.nsa_compressed_forward(
            q, k_cmp, v_cmp, self.bias, left_out, self.start, self.tokens - q.shape[2], p.block,
            p.stride, p.delay, self.scale, self.backend,
        )

    def selected(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over the near tokens and those of the chosen blocks."""
        p = self.pattern
        return torch.ops.attnopt.nsa_selected_forward(
            q, k, v, self.key_mask, self.start, chosen, p.select_block, p.near_window, self.scale,
            self.regime, self.backend,
        )


def make_call(pattern: Pattern, tokens: int, key_mask: Tensor | None, like: Tensor, scale: float,
              regime: str, backend: str) -> Call:
    """The call for rows like those of `like` `[B, ...]`, in its device and precision."""
    batch, device = like.shape[0], like.device
    # a window beyond the text means the same, and must not overflow where positions are 32 bits
    p = pattern._replace(
        near_window=min(pattern.near_window, tokens), delay=min(pattern.delay, tokens)
    )
    start = row_starts(key_mask, like)
    blocks = compressed_count(tokens, p.block, p.stride)
    selection = selection_count(tokens, p.select_block)
    wide = torch.promote_types(like.dtype, torch.float32)
    if key_mask is None:
        counts = torch.full((batch, blocks), p.block, dtype=wide, device=device)
        real = torch.ones(batch, selection, dtype=torch.bool, device=device)
    else:
        counts = real_tokens(key_mask, start, p.block, p.stride, blocks).to(wide)
        size = p.select_block
        real = real_tokens(key_mask, start, size, size, selection) > 0
    bias = counts.log()  # -inf without real tokens
    if p.combine == "gates":
        bias = torch.where(counts > 0, 0.0, bias)
    return Call(p, tokens, key_mask, start, bias, real, scale, regime, backend)

"""Attention to near and chosen blocks in plain PyTorch, in one of two regimes that agree.

A query at position p sees, of the real tokens up to its own, those from block near(p) on and those
of the blocks it chose. "short" masks dense scores: quadratic, but few and large operations. "long"
computes only what is seen: linear for a fixed number of chosen blocks.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dim, S slots.
"""

from __future__ import annotations

from torch import Tensor

from attnopt.kernels.nsa.eager_frame import Frame
from attnopt.kernels.nsa.eager_long import long_backward, long_forward
from attnopt.kernels.nsa.eager_short import short_backward, short_forward

EAGER_LONG_FROM = 1536  # keys above which "long" is the faster regime: 8 blocks of 32, one core


def selected_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Tensor,
                     chosen: Tensor, *, select_block: int, near_window: int, scale: float,
                     regime: str) -> tuple[Tensor, Tensor]:
    """Attend to near and chosen blocks.

    Args:
        q: `[B, H, Nq, D]`.
        k: `[B, Hkv, Nk, D]`.
        v: `[B, Hkv, Nk, D]`.
        key_mask: bool `[B, Nk]`, True for real tokens, or None.
        start: first real token of each row, int32 `[B]`.
        chosen: far blocks, distinct, int32 `[B, Hkv, Nq, S]`, -1 for none.
        select_block: b.
        near_window: Wn, 0 for none.
        scale: of the scores.
        regime: "short" or "long".

    Returns:
        Output in the dtype and layout of `q`, and the log-sum-exp of each row `[B, H, Nq]`.
    """
    frame = Frame(q, k, key_mask, start, select_block)
    forward = short_forward if regime == "short" else long_forward
    out, lse = forward(frame, q, k, v, chosen, near_window, scale)
    return frame.restore(out, q), frame.restore(lse, lse.new_empty(q.shape[:3]))


def selected_backward(grad: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor,
                      key_mask: Tensor | None, start: Tensor, chosen: Tensor, *, select_block: int,
                      near_window: int, scale: float, regime: str
                      ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        grad: of the output, `[B, H, Nq, D]`.
        lse: of the forward pass, `[B, H, Nq]`.
        delta: `rowsum(grad * out)` less the gradient of lse, `[B, H, Nq]`.
        q: as in the forward pass, and so all that follow.
        k: keys.
        v: values.
        key_mask: real tokens.
        start: of each row.
        chosen: far blocks.
        select_block: b.
        near_window: Wn.
        scale: of the scores.
        regime: "short" or "long".

    Returns:
        Gradients in the shape, dtype and layout of their tensors.
    """
    frame = Frame(q, k, key_mask, start, select_block)
    backward = short_backward if regime == "short" else long_backward
    rows = frame.queries(grad), frame.log_sums(lse), frame.queries(delta)
    grads = backward(frame, *rows, q, k, v, chosen, near_window, scale)
    dq, dk, dv = (frame.restore(x, like) for x, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv

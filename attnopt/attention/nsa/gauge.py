"""Where the three gates of NSA start, measured on the dense model, head by head.

They weigh its branches, and start where the branches together come closest to the dense output o,
which is a least-squares problem with three unknowns:

    g = argmin over [0.01, 0.99]^3 of sum over tokens |o - g_0 o_cmp - g_1 o_slc - g_2 o_win|^2

Letters: B batch, H query heads, Hkv key/value heads, N tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.attention.nsa.module import START, NSAMechanism

GATE_BOUNDS = (0.01, 0.99)  # beyond them a sigmoid hardly learns
RIDGE = 1e-6  # of the mean square of a branch
SWEEPS = 200


class BranchGauge:
    """The gates of NSA: normal equations of least squares, per head, in float64."""

    def __init__(self, mechanism: NSAMechanism) -> None:
        self.mechanism = mechanism
        self.products: Any = 0.0  # [H, 3, 3], of branches
        self.targets: Any = 0.0  # [H, 3], of branches and softmax

    def add(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, out: Tensor
            ) -> None:
        """Measure a batch of which softmax makes `out` `[B, H, N, D]`."""
        branches = self.mechanism.branches(q, k, v, key_mask=key_mask, scale=scale).double()
        branches = branches * key_mask[:, None, :, None]
        self.products = self.products + torch.einsum("xbhnd,ybhnd->hxy", branches, branches)
        self.targets = self.targets + torch.einsum("xbhnd,bhnd->hx", branches, out.double())

    def finish(self) -> Tensor:
        """Set the gates and return them."""
        gates = bounded_least_squares(self.products, self.targets, *GATE_BOUNDS)
        unseen = self.products.diagonal(dim1=1, dim2=2) == 0  # in texts shorter than a block
        gates = gates.masked_fill(unseen, START).float()
        self.mechanism.set_gates(gates)
        return gates


def bounded_least_squares(products: Tensor, targets: Tensor, low: float, high: float) -> Tensor:
    """Minimize `g.A.g / 2 - g.r` over a box: solve it, then go around it one unknown at a time.

    A solution within the box is the one without it. Where A is singular a small ridge shares the
    weight among branches that are the same.

    Args:
        products: A, `[H, 3, 3]`, positive semidefinite, float64.
        targets: r, `[H, 3]`.
        low: lower bound of every unknown.
        high: upper bound.

    Returns:
        `[H, 3]`.
    """
    diagonal = products.diagonal(dim1=1, dim2=2)
    ridge = (RIDGE * diagonal.mean(1)).clamp_min(torch.finfo(products.dtype).tiny)
    regular = products + torch.diag_embed(ridge[:, None].expand_as(diagonal))
    diagonal = regular.diagonal(dim1=1, dim2=2)
    found = torch.linalg.solve(regular, targets)
    inside = ((found >= low) & (found <= high)).all(1, keepdim=True)
    bounded = found.clamp(low, high)
    for _ in range(SWEEPS):
        for i in range(bounded.shape[1]):
            slope = targets[:, i] - (regular[:, i] * bounded).sum(1)
            bounded[:, i] = (bounded[:, i] + slope / diagonal[:, i]).clamp(low, high)
    return torch.where(inside, found, bounded)

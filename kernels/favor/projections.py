"""Projections whose rows turn queries and keys into positive features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORMS = ("chi", "constant")


def orthogonal_projection(
    num_features: int,
    head_dim: int,
    *,
    heads: int | None = None,
    norms: str = "chi",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw random rows that are orthogonal within every block of `head_dim` rows.

    Directions are the Q factors of Gaussian blocks. With norms from a chi distribution of
    `head_dim` degrees every row is a standard Gaussian vector, and FAVOR+ is unbiased; with
    constant norms sqrt(head_dim) it is biased, with a far lower variance (the regularized softmax
    kernel). Numbers are drawn on the generator's device in float64, so a seed gives the same rows
    in every dtype and on every device.

    Args:
        num_features: M, at least 1.
        head_dim: D, at least 1.
        heads: draw `heads` projections, or one for all heads by default.
        norms: "chi" or "constant".
        generator: source of randomness; torch's global one for the CPU by default.
        dtype: of the result.
        device: of the result.

    Returns:
        `[M, D]`, or `[heads, M, D]`.

    Raises:
        ValueError: sizes below 1 or unknown norms.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", section 2.4 (orthogonal
    features) and section 3 (the regularized softmax kernel SMREG).
    """
    sizes = {"num_features": num_features, "head_dim": head_dim}
    for name, size in (sizes if heads is None else sizes | {"heads": heads}).items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {size!r}")
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {', '.join(NORMS)}; got {norms!r}")
    source = "cpu" if generator is None else generator.device
    blocks = -(-num_features // head_dim)
    shape = (heads or 1, blocks, head_dim, head_dim)
    gaussian: dict[str, Any] = {
        "generator": generator, "dtype": torch.float64, "device": source
    }
    q, r = torch.linalg.qr(torch.randn(shape, **gaussian))
    # the signs of R's diagonal make Q uniform over all rotations
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    rows = q.transpose(-1, -2).flatten(1, 2)[:, :num_features]
    if norms == "chi":
        lengths = torch.randn(heads or 1, num_features, head_dim, **gaussian).norm(dim=-1)
    else:
        lengths = torch.full((heads or 1, num_features), head_dim**0.5, device=source)
    rows = (rows * lengths.unsqueeze(-1)).to(device=device, dtype=dtype)
    return rows[0] if heads is None else rows


def hedgehog_projection(
    num_features: int,
    head_dim: int,
    *,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rows w and then -w, from which learned softmax features start.

    The rows w are the identity, repeated with growing norms (1, 2, 3, ...) where more than
    `head_dim` are asked for.

    Args:
        num_features: M, even.
        head_dim: D, at least 1.
        heads: repeat the rows for so many heads, or one set for all by default.
        dtype: of the result.
        device: of the result.

    Returns:
        `[M, D]`, or `[heads, M, D]`.

    Raises:
        ValueError: an odd number of features, or sizes below 1.

    Source: Zhang et al. 2024, "The Hedgehog & the Porcupine", section 4.
    """
    if not isinstance(num_features, int) or num_features < 2 or num_features % 2:
        raise ValueError(f"num_features must be an even integer >= 2; got {num_features!r}")
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim must be an integer of at least 1; got {head_dim!r}")
    row = torch.arange(num_features // 2)
    rows = torch.zeros(num_features // 2, head_dim, dtype=dtype)
    rows[row, row % head_dim] = (row // head_dim + 1).to(dtype)
    rows = torch.cat([rows, -rows]).to(device)
    return rows if heads is None else rows.expand(heads, -1, -1).contiguous()

"""The cases of every op: representative inputs, the public op, and its float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op in one phase.

    Attributes:
        id: `op/phase/dtype-layout-sizes`.
        op: "lastk", "favor" or "nsa".
        phase: "fwd", "bwd" (gradients of every input) or "decode" (one step).
        dtype: of q, k and v.
        shape: the sizes by letter: B, H, Hkv, N, D and the mechanism's own.
        config: what else distinguishes the case: layout, whether a key mask is given, and options.
        make: seed to inputs; the same seed gives the same bits.
        run: inputs to named results, through the public op with `backend="auto"`.
        ref: inputs to the same results by the definition in float64.
    """

    id: str
    op: str
    phase: str
    dtype: torch.dtype
    shape: dict[str, int]
    config: dict[str, object]
    make: Callable[..., Tensors]
    run: Callable[[Tensors], Tensors]
    ref: Callable[[Tensors], Tensors]


def case_id(op: str, phase: str, dtype: torch.dtype, layout: str, shape: Mapping[str, int]) -> str:
    """Compose `op/phase/dtype-layout-B1-H2-...`."""
    sizes = "-".join(f"{letter}{size}" for letter, size in shape.items())
    return f"{op}/{phase}/{str(dtype).removeprefix('torch.')}-{layout}-{sizes}"


def make_qkv(shape: Mapping[str, int], layout: str, queries: int, dtype: torch.dtype,
             generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q `[B, H, queries, D]` and k, v `[B, Hkv, N, D]` of unit variance.

    Layout "bhnd" is contiguous; "packed" are views of one projection `[B, N, (H + 2 Hkv) D]`, as
    GPT-2 hands them over.
    """
    B, H, Hkv, N, D = (shape[letter] for letter in ("B", "H", "Hkv", "N", "D"))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if layout == "bhnd":
        return draw(B, H, queries, D), draw(B, Hkv, N, D), draw(B, Hkv, N, D)
    if layout != "packed":
        raise ValueError(f"layout must be 'bhnd' or 'packed'; got {layout!r}")
    projection = draw(B, N, (H + 2 * Hkv) * D)
    q, k, v = projection.split([H * D, Hkv * D, Hkv * D], dim=2)
    q, k, v = (x.unflatten(2, (-1, D)).transpose(1, 2) for x in (q, k, v))
    return q[:, :, N - queries :], k, v


def left_padding(B: int, N: int) -> Tensor:
    """Key mask `[B, N]` in which row b lacks its first `b N / (2 B)` tokens, and one in between."""
    mask = torch.arange(N) >= (torch.arange(B) * N // (2 * B))[:, None]
    mask[:, 3 * N // 4] = False
    mask[:, -1] = True
    return mask


def cases(shapes: Mapping[str, int] | None = None) -> list[Case]:
    """List the cases of every op and phase.

    Args:
        shapes: sizes that replace the default ones in every case, by letter (`{"N": 4096}`).
            Letters that an op does not have are ignored.

    Raises:
        ValueError: a letter that no op has.
    """
    from attnopt.testing.favor import favor_cases
    from attnopt.testing.lastk import lastk_cases
    from attnopt.testing.nsa import nsa_cases

    overrides = dict(shapes or {})
    found = lastk_cases(overrides) + favor_cases(overrides) + nsa_cases(overrides)
    known = {letter for case in found for letter in case.shape}
    unknown = set(overrides) - known
    if unknown:
        raise ValueError(
            f"shapes takes the letters {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}"
        )
    return found

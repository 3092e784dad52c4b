"""What is measured: ours, dense attention, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnopt.bench.contenders.base import PHASES, Contender, Prepared, Shape

__all__ = ["LEVELS", "PHASES", "Contender", "Prepared", "Shape", "contenders", "find"]
LEVELS = ("op", "layer", "block", "model")


def contenders(
    levels: Sequence[str] = ("op",), device: torch.device | None = None
) -> list[Contender]:
    """List the contenders of some levels, the dense ones first.

    Args:
        levels: among "op", "layer", "block" and "model".
        device: where they run, which decides the dense partner; the CPU by default.

    Raises:
        ValueError: an unknown level.
    """
    from attnopt.bench.contenders.dense import dense_contenders
    from attnopt.bench.contenders.favor import favor_contenders
    from attnopt.bench.contenders.lastk import lastk_contenders
    from attnopt.bench.contenders.models import model_contenders
    from attnopt.bench.contenders.nsa import layer_contenders, nsa_contenders

    unknown = set(levels) - set(LEVELS)
    if unknown:
        raise ValueError(f"levels are {', '.join(LEVELS)}; got {', '.join(sorted(unknown))}")
    device = device or torch.device("cpu")
    found = [*dense_contenders(), *lastk_contenders(device), *favor_contenders(device),
             *nsa_contenders(device), *layer_contenders(device), *model_contenders()]
    return [contender for contender in found if contender.level in levels]


def find(name: str, device: torch.device | None = None) -> Contender:
    """The contender of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    known = {contender.name: contender for contender in contenders(LEVELS, device)}
    if name not in known:
        raise ValueError(f"contenders are {', '.join(known)}; got {name!r}")
    return known[name]

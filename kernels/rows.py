"""Where the text of a padded row begins."""

from __future__ import annotations

import torch
from torch import Tensor


def first_real_token(key_mask: Tensor | None, k: Tensor) -> Tensor:
    """Index of each row's first real token, `[B]` int32; `Nk` for a row that has none."""
    B, Nk = k.shape[0], k.shape[2]
    if key_mask is None:
        return torch.zeros(B, dtype=torch.int32, device=k.device)
    first = key_mask.to(torch.uint8).argmax(1)
    return first.masked_fill(~key_mask.any(1), Nk).to(torch.int32)

"""Where the text of a padded row begins."""

from __future__ import annotations

from torch import Tensor


def first_real_token(key_mask: Tensor) -> Tensor:
    """Index of each row's first real token, `[B]` int64; the length for a row that has none.

    Args:
        key_mask: `[B, N]` bool, True for real tokens.
    """
    return key_mask.int().cumsum(1).eq(0).sum(1)

"""Config of Linformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.attention.config import Config, check_count


@dataclass(frozen=True)
class Linformer(Config):
    """Softmax over a learned summary of the text, `projected_length` keys and values for all.

    For models that attend in both directions, such as BERT. What is learned belongs to positions of
    the text, so that no text may be longer than `max_length`. A shorter one uses a share of the
    summary: with the defaults 128 tokens are summed up in 64. The start, means of neighbors, is
    coarse: unlike the other mechanisms it has to be trained before it is near the original model.

    Args:
        projected_length: k, keys and values that every query sees; the same number as
            `max_length` starts as softmax.
        max_length: n, tokens of the longest text, padding included.

    Raises:
        ValueError: a value below 1, or a projected length above the longest text.
    """

    mechanism: ClassVar[str] = "linformer"
    implementation: ClassVar[str] = "attnopt.attention.linformer.module:LinformerMechanism"

    projected_length: int = 256
    max_length: int = 512

    def __post_init__(self) -> None:
        check_count("projected_length", self.projected_length, 1)
        check_count("max_length", self.max_length, 1)
        if self.projected_length > self.max_length:
            raise ValueError(
                f"projected_length must be at most max_length, {self.max_length}; got "
                f"{self.projected_length}"
            )

"""Config of Native Sparse Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.attention.config import BACKENDS, Config, check_choice, check_count

COMBINES = ("merged", "gates")
COMPRESSIONS = ("mean", "weighted", "mlp")
REGIMES = ("auto", "short", "long")


@dataclass(frozen=True)
class NSA(Config):
    """Native Sparse Attention: compressed blocks, the best blocks token by token, recent tokens.

    What is left out is filled in here, so a config holds every value that it stands for.

    Args:
        combine: "merged" (one softmax in which every token counts once, exactly or through its
            block) or "gates" (the paper's three softmaxes, weighed by gates from the hidden state).
        select_block: tokens of a block that is selected or not.
        compress_block: tokens of a compressed block; by default (always with "merged") as many.
        compress_stride: tokens from one compressed block to the next, at most a block; by default
            a block, with "gates" half of one where it is even.
        num_selected: selected blocks of a query, counting sinks and local ones.
        window: recent tokens that are seen exactly.
        sink_blocks: first blocks that are always selected; by default 0, with "gates" 1.
        local_blocks: last blocks that are always selected; by default 2. Only with "gates".
        compression: of a block's tokens: "mean", "weighted" or "mlp", which start as the mean.
        regime: "short", "long" or "auto", as in `attnopt.nsa_attention`.
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses.

    Raises:
        ValueError: a value outside these, or two that exclude each other.
    """

    mechanism: ClassVar[str] = "nsa"
    implementation: ClassVar[str] = "attnopt.attention.nsa.module:NSAMechanism"

    combine: str = "merged"
    select_block: int = 32
    compress_block: int | None = None
    compress_stride: int | None = None
    num_selected: int = 4
    window: int = 128
    sink_blocks: int | None = None
    local_blocks: int | None = None
    compression: str = "mean"
    regime: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_choice("combine", self.combine, COMBINES)
        check_choice("compression", self.compression, COMPRESSIONS)
        check_choice("regime", self.regime, REGIMES)
        check_choice("backend", self.backend, BACKENDS)
        self._fill_in()
        for name in ("select_block", "compress_block", "compress_stride", "window"):
            check_count(name, getattr(self, name), 1)
        check_count("num_selected", self.num_selected, int(self.gate))
        check_count("sink_blocks", self.sink_blocks, 0)
        block, stride, forced = self.compress_block, self.compress_stride, self.sink_blocks
        assert block and stride and forced is not None
        if self.gate:
            check_count("local_blocks", self.local_blocks, 0)
            forced += self.local_blocks or 0
        elif self.local_blocks is not None:
            raise ValueError(f"combine='merged' has no local_blocks; got {self.local_blocks!r}")
        elif not block == stride == self.select_block:
            raise ValueError(
                "combine='merged' counts every token once: compress_block and compress_stride must "
                f"be select_block, {self.select_block}; got {block} and {stride}"
            )
        if stride > block:
            raise ValueError(f"compress_stride must be at most {block}, a block; got {stride}")
        if self.num_selected < forced:
            raise ValueError(f"num_selected counts {forced} forced blocks; got {self.num_selected}")

    @property
    def gate(self) -> bool:
        """Whether there are gates to learn."""
        return self.combine == "gates"

    def _fill_in(self) -> None:
        block = self.select_block if self.compress_block is None else self.compress_block
        whole = not self.gate or not isinstance(block, int) or block % 2
        self._default(
            compress_block=block,
            compress_stride=block if whole else block // 2,
            sink_blocks=int(self.gate),
            local_blocks=2 if self.gate else None,
        )

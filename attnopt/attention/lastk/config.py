"""Configs of last-k attention and of candidate masks; positions count from the first real token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from attnopt.attention.config import (
    BACKENDS,
    Config,
    build_from_fields,
    check_choice,
    check_count,
    check_flag,
)

INITS = ("zeros", "random")


@dataclass(frozen=True)
class LastK(Config):
    """Softmax over the last `window` tokens and the first `sinks`, each with a learned weight.

    The weight of an offset is `sigmoid(alpha)`, one alpha per offset and one per sink. A model that
    attends in both directions sees as many tokens ahead as back.

    Args:
        window: tokens a query sees, itself included; at least 1. In both directions it sees
            `window - 1` to either side.
        sinks: first tokens of the text that stay visible to every later token, in both directions
            to every token; 0 for none.
        per_head: one set of alphas per head instead of one per layer.
        init: "zeros" (every weight 1/2, which is plain sliding-window attention) or "random"
            (alpha from a standard normal; `torch.manual_seed` fixes it).
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses.

    Raises:
        ValueError: a value outside these.
    """

    mechanism: ClassVar[str] = "lastk"
    implementation: ClassVar[str] = "attnopt.attention.lastk.module:LastKMechanism"

    window: int = 5
    sinks: int = 0
    per_head: bool = False
    init: str = "zeros"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks, 0)
        check_flag("per_head", self.per_head)
        check_choice("init", self.init, INITS)
        check_choice("backend", self.backend, BACKENDS)


@dataclass(frozen=True)
class NthLast:
    """Candidate mask: the n-th last token alone; n = 0 is the token itself."""

    candidate: ClassVar[str] = "nth_last"
    n: int

    def __post_init__(self) -> None:
        check_count("n of NthLast", self.n, 0)


@dataclass(frozen=True)
class Window:
    """Candidate mask: the last `size` tokens, the token itself included."""

    candidate: ClassVar[str] = "window"
    size: int

    def __post_init__(self) -> None:
        check_count("size of Window", self.size, 1)


@dataclass(frozen=True)
class First:
    """Candidate mask: the first `count` real tokens, which then belong to `First` masks alone."""

    candidate: ClassVar[str] = "first"
    count: int

    def __post_init__(self) -> None:
        check_count("count of First", self.count, 1)


@dataclass(frozen=True)
class Every:
    """Candidate mask: every token so far. A set with it runs dense, in quadratic time."""

    candidate: ClassVar[str] = "every"


Candidate = NthLast | Window | First | Every
CANDIDATES = {cls.candidate: cls for cls in (NthLast, Window, First, Every)}


@dataclass(frozen=True)
class Masks(Config):
    """Softmax under a learned mixture of candidate masks, `m = sum_c sigmoid(alpha_c) M_c`.

    Sets of `NthLast`, `Window` and `First` run on the band kernel in linear time; a set with
    `Every` runs on `F.scaled_dot_product_attention`.

    Args:
        candidates: the masks, each at most once; by default the last five tokens one by one.
        per_head: one set of alphas per head instead of one per layer.
        init: "zeros" or "random", as in `LastK`.
        backend: as in `LastK`; a set with `Every` has no other than "auto".

    Raises:
        ValueError: a value outside these.
    """

    mechanism: ClassVar[str] = "masks"
    implementation: ClassVar[str] = "attnopt.attention.lastk.module:MasksMechanism"

    candidates: tuple[Candidate, ...] = tuple(NthLast(n) for n in range(5))
    per_head: bool = False
    init: str = "zeros"
    backend: str = "auto"

    def __post_init__(self) -> None:
        valid = ", ".join(cls.__name__ for cls in CANDIDATES.values())
        if not isinstance(self.candidates, Iterable):
            raise ValueError(f"candidates must be a list of {valid}; got {self.candidates!r}")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            if not isinstance(candidate, tuple(CANDIDATES.values())):
                raise ValueError(f"a candidate must be one of {valid}; got {candidate!r}")
        if not self.candidates:
            raise ValueError(f"candidates must name at least one of {valid}; got none")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"every candidate may occur once; got {self.candidates}")
        check_flag("per_head", self.per_head)
        check_choice("init", self.init, INITS)
        check_choice("backend", self.backend, ("auto",) if self.dense else BACKENDS)

    @property
    def dense(self) -> bool:
        """Whether the set holds `Every` and so sees all of the past."""
        return Every() in self.candidates

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `config_from_dict` reads it back."""
        candidates = [{"candidate": c.candidate, **asdict(c)} for c in self.candidates]
        return {**super().to_dict(), "candidates": candidates}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """Read back what `to_dict` wrote; as `Config.from_dict`, also for an unknown candidate."""
        values = dict(data)
        if "candidates" in values:
            values["candidates"] = tuple(map(_candidate, values["candidates"]))
        return super().from_dict(values)


def _candidate(data: Mapping[str, Any]) -> Candidate:
    values = dict(data)
    name: Any = values.pop("candidate", None)
    if name not in CANDIDATES:
        raise ValueError(f"candidate must be one of {', '.join(CANDIDATES)}; got {name!r}")
    return build_from_fields(CANDIDATES[name], name, values)

"""What replaces a layer's attention: plain dataclasses that import nothing and travel as JSON.

`LastK`, `Masks`, `Favor` and `NSA` are mechanisms; `NthLast`, `Window`, `First` and `Every` are the
candidate masks that `Masks` mixes. Positions count from a row's first real token, so padding
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

INITS = ("zeros", "random")
BACKENDS = ("auto", "triton", "eager", "reference")
_WITHOUT_TRITON = ("auto", "eager", "reference")
FEATURE_MAPS = ("favor", "hedgehog", "exp", "relu", "taylor")
NORMS = ("chi", "constant")
STABILIZERS = ("running", "static")
COMBINES = ("merged", "gates")
COMPRESSIONS = ("mean", "weighted", "mlp")
REGIMES = ("auto", "short", "long")
MAX_BLOCK = 128  # tokens of a block at the edge of an exact window


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}; got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


@dataclass(frozen=True)
class _Mechanism:
    mechanism: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `config_from_dict` reads it back."""
        return {"mechanism": self.mechanism, **asdict(self)}

    def _default(self, **values: Any) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class LastK(_Mechanism):
    """Softmax over the last `window` tokens and the first `sinks`, each with a learned weight.

    The weight of an offset is `sigmoid(alpha)`, one alpha per offset and one per sink.

    Args:
        window: tokens a query sees, itself included; at least 1.
        sinks: first tokens of the text that stay visible to every later token; 0 for none.
        per_head: one set of alphas per head instead of one per layer.
        init: "zeros" (every weight 1/2, which is plain sliding-window attention) or "random"
            (alpha from a standard normal; `torch.manual_seed` fixes it).
        backend: "auto", "triton", "eager" or "reference"; only "auto" chooses.

    Raises:
        ValueError: a value outside these.
    """

    mechanism: ClassVar[str] = "lastk"

    window: int = 5
    sinks: int = 0
    per_head: bool = False
    init: str = "zeros"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_count("window", self.window, 1)
        _check_count("sinks", self.sinks, 0)
        _check_flag("per_head", self.per_head)
        _check_choice("init", self.init, INITS)
        _check_choice("backend", self.backend, BACKENDS)


@dataclass(frozen=True)
class NthLast:
    """Candidate mask: the n-th last token alone; n = 0 is the token itself."""

    candidate: ClassVar[str] = "nth_last"
    n: int

    def __post_init__(self) -> None:
        _check_count("n of NthLast", self.n, 0)


@dataclass(frozen=True)
class Window:
    """Candidate mask: the last `size` tokens, the token itself included."""

    candidate: ClassVar[str] = "window"
    size: int

    def __post_init__(self) -> None:
        _check_count("size of Window", self.size, 1)


@dataclass(frozen=True)
class First:
    """Candidate mask: the first `count` real tokens, which then belong to `First` masks alone."""

    candidate: ClassVar[str] = "first"
    count: int

    def __post_init__(self) -> None:
        _check_count("count of First", self.count, 1)


@dataclass(frozen=True)
class Every:
    """Candidate mask: every token so far. A set with it runs dense, in quadratic time."""

    candidate: ClassVar[str] = "every"


Candidate = NthLast | Window | First | Every
_CANDIDATES = {cls.candidate: cls for cls in (NthLast, Window, First, Every)}


@dataclass(frozen=True)
class Masks(_Mechanism):
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

    candidates: tuple[Candidate, ...] = tuple(NthLast(n) for n in range(5))
    per_head: bool = False
    init: str = "zeros"
    backend: str = "auto"

    def __post_init__(self) -> None:
        valid = ", ".join(cls.__name__ for cls in _CANDIDATES.values())
        if not isinstance(self.candidates, Iterable):
            raise ValueError(f"candidates must be a list of {valid}; got {self.candidates!r}")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            if not isinstance(candidate, tuple(_CANDIDATES.values())):
                raise ValueError(f"a candidate must be one of {valid}; got {candidate!r}")
        if not self.candidates:
            raise ValueError(f"candidates must name at least one of {valid}; got none")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"every candidate may occur once; got {self.candidates}")
        _check_flag("per_head", self.per_head)
        _check_choice("init", self.init, INITS)
        _check_choice("backend", self.backend, ("auto",) if self.dense else BACKENDS)

    @property
    def dense(self) -> bool:
        """Whether the set holds `Every` and so sees all of the past."""
        return Every() in self.candidates

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON types; `config_from_dict` reads it back."""
        candidates = [{"candidate": c.candidate, **asdict(c)} for c in self.candidates]
        return {**super().to_dict(), "candidates": candidates}


@dataclass(frozen=True)
class Favor(_Mechanism):
    """Linear attention through positive features: FAVOR+ (the Performer) and its family.

    With a window the nearest tokens enter with their exact softmax weight, under one normalizer.
    What is left out is filled in here, so a config holds every value that it stands for.

    Args:
        num_features: M. By default 128; for "hedgehog" twice the head dimension (the identity and
            its negative), or any even number. "taylor" takes none: its features follow from the
            head dimension.
        feature_map: "favor" (unbiased for softmax), "hedgehog", "exp", "relu" or "taylor"; their
            equations are in `attnopt.favor_attention`.
        window: tokens that a query sees exactly, at least; 0 for none.
        window_block: the window starts at multiples of so many tokens, 1 to 128.
        learned: the projection is a parameter; by default for "hedgehog" and "exp", which are
            nothing without. Otherwise it is drawn once and can be redrawn.
        norms: row norms of a drawn projection. "chi" is unbiased; "constant", sqrt(head_dim), is
            biased with a far lower variance (the Performer's regularized softmax kernel).
        gate: a learned weight per head of the far tokens against the window. By default with a
            window and features that are not "favor", whose scale is that of softmax.
        stabilizer: "running" is precise for any norm of the keys, "static" causal bit for bit.
        seed: of the projection, the same rows for the same layer; by default torch's global
            generator draws it.
        backend: "auto", "triton" (not for "relu" and "taylor"), "eager" or "reference"; only
            "auto" chooses.

    Raises:
        ValueError: a value outside these, or two that exclude each other.
    """

    mechanism: ClassVar[str] = "favor"

    num_features: int | None = None
    feature_map: str = "favor"
    window: int = 0
    window_block: int = 32
    learned: bool | None = None
    norms: str = "chi"
    gate: bool | None = None
    stabilizer: str = "running"
    seed: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _check_count("window", self.window, 0)
        _check_count("window_block", self.window_block, 1)
        if self.window_block > MAX_BLOCK:
            raise ValueError(f"window_block must be at most {MAX_BLOCK}; got {self.window_block}")
        _check_choice("norms", self.norms, NORMS)
        _check_choice("stabilizer", self.stabilizer, STABILIZERS)
        if self.seed is not None:
            _check_count("seed", self.seed, 0)
        no_kernel = self.feature_map in ("relu", "taylor")
        _check_choice("backend", self.backend, _WITHOUT_TRITON if no_kernel else BACKENDS)
        self._fill_in()
        self._check_features()
        _check_flag("gate", self.gate)
        if self.gate and not self.window:
            raise ValueError("gate=True needs a window: without one the gate cancels")

    def _fill_in(self) -> None:
        self._default(
            num_features=128 if self.feature_map in ("favor", "exp", "relu") else None,
            learned=self.feature_map in ("hedgehog", "exp"),
            gate=self.window > 0 and self.feature_map != "favor",
        )

    def _check_features(self) -> None:
        name = self.feature_map
        _check_flag("learned", self.learned)
        if name in ("hedgehog", "exp") and not self.learned:
            raise ValueError(f"the projection of feature_map={name!r} is always learned")
        if name in ("hedgehog", "taylor"):
            for field, default in (("norms", "chi"), ("seed", None)):
                if (value := getattr(self, field)) != default:
                    raise ValueError(
                        f"feature_map={name!r} draws no projection: leave out {field}; "
                        f"got {value!r}"
                    )
        if name == "taylor":
            if self.learned:
                raise ValueError("feature_map='taylor' has no projection to learn")
            if self.num_features is not None:
                raise ValueError(
                    "the number of features of feature_map='taylor' follows from the head "
                    f"dimension: leave out num_features; got {self.num_features!r}"
                )
        elif self.num_features is not None:
            _check_count("num_features", self.num_features, 1)
            if name == "hedgehog" and self.num_features % 2:
                raise ValueError(
                    "num_features of feature_map='hedgehog' must be even (rows w and -w); "
                    f"got {self.num_features}"
                )


@dataclass(frozen=True)
class NSA(_Mechanism):
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
        _check_choice("combine", self.combine, COMBINES)
        _check_choice("compression", self.compression, COMPRESSIONS)
        _check_choice("regime", self.regime, REGIMES)
        _check_choice("backend", self.backend, BACKENDS)
        self._fill_in()
        for name in ("select_block", "compress_block", "compress_stride", "window"):
            _check_count(name, getattr(self, name), 1)
        _check_count("num_selected", self.num_selected, int(self.gate))
        _check_count("sink_blocks", self.sink_blocks, 0)
        block, stride, forced = self.compress_block, self.compress_stride, self.sink_blocks
        assert block and stride and forced is not None
        if self.gate:
            _check_count("local_blocks", self.local_blocks, 0)
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


Config = LastK | Masks | Favor | NSA
MECHANISMS = {cls.mechanism: cls for cls in (LastK, Masks, Favor, NSA)}


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Read back what a config's `to_dict` wrote.

    Args:
        data: the mapping, as Python or JSON made it.

    Returns:
        The config; equal to the one written.

    Raises:
        ValueError: an unknown mechanism, candidate or field, or a value the config refuses.
    """
    values = dict(data)
    if "candidates" in values:
        values["candidates"] = tuple(
            _build(_CANDIDATES, "candidate", entry) for entry in values["candidates"]
        )
    return _build(MECHANISMS, "mechanism", values)


def _build(classes: Mapping[str, type], key: str, data: Mapping[str, Any]) -> Any:
    """An instance of the class that `data[key]` names, from the other entries."""
    name: Any = data.get(key)
    if name not in classes:
        raise ValueError(f"{key} must be one of {', '.join(classes)}; got {name!r}")
    values = {field: value for field, value in data.items() if field != key}
    known = [field.name for field in fields(classes[name])]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name} has the fields {', '.join(known)}; got {', '.join(unknown)}")
    try:
        return classes[name](**values)
    except TypeError as error:
        raise ValueError(f"{name} needs the fields {', '.join(known)}; got {values}") from error

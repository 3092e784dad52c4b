"""Config of FAVOR+ and its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.attention.config import BACKENDS, Config, check_choice, check_count, check_flag

FEATURE_MAPS = ("favor", "hedgehog", "exp", "relu", "taylor")
NORMS = ("chi", "constant")
STABILIZERS = ("running", "static")
MAX_BLOCK = 128  # tokens of a block at the edge of an exact window
_WITHOUT_TRITON = ("auto", "eager", "reference")


@dataclass(frozen=True)
class Favor(Config):
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
    implementation: ClassVar[str] = "attnopt.attention.favor.module:FavorMechanism"

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
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_count("window", self.window, 0)
        check_count("window_block", self.window_block, 1)
        if self.window_block > MAX_BLOCK:
            raise ValueError(f"window_block must be at most {MAX_BLOCK}; got {self.window_block}")
        check_choice("norms", self.norms, NORMS)
        check_choice("stabilizer", self.stabilizer, STABILIZERS)
        if self.seed is not None:
            check_count("seed", self.seed, 0)
        no_kernel = self.feature_map in ("relu", "taylor")
        check_choice("backend", self.backend, _WITHOUT_TRITON if no_kernel else BACKENDS)
        self._fill_in()
        self._check_features()
        check_flag("gate", self.gate)
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
        check_flag("learned", self.learned)
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
            check_count("num_features", self.num_features, 1)
            if name == "hedgehog" and self.num_features % 2:
                raise ValueError(
                    "num_features of feature_map='hedgehog' must be even (rows w and -w); "
                    f"got {self.num_features}"
                )

"""Config of routing attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.attention.config import Config, check_choice, check_count


@dataclass(frozen=True)
class Routing(Config):
    """Softmax over the last `window` tokens and all earlier ones of the query's own cluster.

    Every key/value head has `num_clusters` centroids; queries and keys belong to the nearest one.
    The centroids follow the keys of training texts and are fixed otherwise. One cluster, or a
    window as long as the text, is plain softmax.

    Args:
        num_clusters: c. With balanced clusters a query sees `window + N / c` of N tokens.
        window: tokens seen whatever their cluster, the token itself included; at least 1.
        decay: share of a centroid that one training step keeps, in (0, 1]; 1 lets it stay.
        backend: of the window: "auto", "triton" or "eager"; only "auto" chooses.

    Raises:
        ValueError: a value outside these.
    """

    mechanism: ClassVar[str] = "routing"
    implementation: ClassVar[str] = "attnopt.attention.routing.module:RoutingMechanism"

    num_clusters: int = 8
    window: int = 64
    decay: float = 0.999
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_count("num_clusters", self.num_clusters, 1)
        check_count("window", self.window, 1)
        number = isinstance(self.decay, int | float) and not isinstance(self.decay, bool)
        if not number or not 0 < self.decay <= 1:
            raise ValueError(f"decay must be a number in (0, 1]; got {self.decay!r}")
        check_choice("backend", self.backend, ("auto", "triton", "eager"))

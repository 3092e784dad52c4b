"""Attention mechanisms as modules: one class per mechanism, chosen by its config."""

from __future__ import annotations

from attnopt.config import MECHANISMS, Config
from attnopt.modules.base import AttentionMechanism
from attnopt.modules.favor import FavorMechanism, redraw
from attnopt.modules.masks import LastKMechanism, MasksMechanism
from attnopt.modules.nsa import NSAMechanism

__all__ = [
    "AttentionMechanism",
    "FavorMechanism",
    "LastKMechanism",
    "MasksMechanism",
    "NSAMechanism",
    "build_mechanism",
    "redraw",
]

_CLASSES: dict[str, type[AttentionMechanism]] = {
    "favor": FavorMechanism,
    "lastk": LastKMechanism,
    "masks": MasksMechanism,
    "nsa": NSAMechanism,
}


def build_mechanism(
    config: Config,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    layer_idx: int,
) -> AttentionMechanism:
    """Build the module that a config describes, initialised.

    Args:
        config: a mechanism's config.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        hidden_size: width of the hidden states.
        layer_idx: index of the layer in its model.

    Returns:
        The mechanism, on the current default device, its parameters in fp32.

    Raises:
        ValueError: not a mechanism's config.
    """
    if not isinstance(config, tuple(MECHANISMS.values())):
        valid = ", ".join(cls.__name__ for cls in MECHANISMS.values())
        raise ValueError(f"an attention config must be one of {valid}; got {config!r}")
    return _CLASSES[config.mechanism](
        config,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        layer_idx=layer_idx,
    )

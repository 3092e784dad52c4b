"""Which mechanisms there are, and how a config becomes the module that it describes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from attnopt.attention.config import Config

if TYPE_CHECKING:
    from attnopt.attention.base import AttentionMechanism

MECHANISMS: dict[str, type[Config]] = {}  # by the name that is saved

_Class = TypeVar("_Class", bound=type[Config])


def register_mechanism(config_class: _Class) -> _Class:
    """Make a mechanism known, so that models convert to it, are saved with it and load again.

    Works as a decorator, too. A model saved with it loads where this has been called.

    Args:
        config_class: a frozen dataclass, subclass of `Config`, with the class attributes
            `mechanism` (its name) and `implementation`.

    Returns:
        The same class.

    Raises:
        ValueError: a class that is not such a dataclass, or a name that another one has.
    """
    is_config = isinstance(config_class, type) and issubclass(config_class, Config)
    if not is_config or not is_dataclass(config_class) or "__hash__" not in vars(config_class):
        raise ValueError(
            f"a mechanism's config must be a subclass of attnopt.Config and decorated with "
            f"@dataclass(frozen=True); got {config_class!r}"
        )
    for name in ("mechanism", "implementation"):
        if not hasattr(config_class, name):
            raise ValueError(f"{config_class.__name__} lacks the class attribute {name!r}")
    taken = MECHANISMS.setdefault(config_class.mechanism, config_class)
    if (taken.__module__, taken.__qualname__) != (
        config_class.__module__,
        config_class.__qualname__,
    ):
        raise ValueError(
            f"the mechanism {config_class.mechanism!r} is already {taken.__module__}."
            f"{taken.__qualname__}; got another class, {config_class.__module__}."
            f"{config_class.__qualname__}"
        )
    MECHANISMS[config_class.mechanism] = config_class
    return config_class


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Read back what a config's `to_dict` wrote.

    Args:
        data: the mapping, as Python or JSON made it.

    Returns:
        The config; equal to the one written.

    Raises:
        ValueError: an unknown mechanism or field, or a value the config refuses.
    """
    values = dict(data)
    name: Any = values.pop("mechanism", None)
    if name not in MECHANISMS:
        raise ValueError(
            f"mechanism must be one of {', '.join(MECHANISMS)}; got {name!r} (import the package "
            "that registers it first, if it is not one of ours)"
        )
    return MECHANISMS[name].from_dict(values)


def build_mechanism(
    config: Config,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden_size: int,
    layer_idx: int,
    causal: bool = True,
) -> AttentionMechanism:
    """Build the module that a config describes, initialized.

    Args:
        config: a mechanism's config.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        hidden_size: width of the hidden states.
        layer_idx: index of the layer in its model.
        causal: whether a token may see itself and earlier ones only.

    Returns:
        The mechanism, on the current default device, its parameters in fp32.

    Raises:
        ValueError: not a mechanism's config, or one that cannot attend in this direction.
    """
    if not isinstance(config, Config) or type(config) not in MECHANISMS.values():
        valid = ", ".join(cls.__name__ for cls in MECHANISMS.values())
        raise ValueError(f"an attention config must be one of {valid}; got {config!r}")
    implementation = config.implementation
    if isinstance(implementation, str):
        module, _, name = implementation.partition(":")
        implementation = getattr(importlib.import_module(module), name)
    return implementation(
        config,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        layer_idx=layer_idx,
        causal=causal,
    )

"""What replaces a layer's attention: plain dataclasses that import nothing and travel as JSON.

`LastK`, `Masks`, `Favor` and `NSA` are mechanisms; `NthLast`, `Window`, `First` and `Every` are the
candidate masks that `Masks` mixes. Positions count from a row's first real token, so padding
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from attnopt.config.favor import Favor
from attnopt.config.masks import (
    CANDIDATES,
    Candidate,
    Every,
    First,
    LastK,
    Masks,
    NthLast,
    Window,
)
from attnopt.config.nsa import NSA

__all__ = [
    "MECHANISMS",
    "NSA",
    "Candidate",
    "Config",
    "Every",
    "Favor",
    "First",
    "LastK",
    "Masks",
    "NthLast",
    "Window",
    "config_from_dict",
]

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
            _build(CANDIDATES, "candidate", entry) for entry in values["candidates"]
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

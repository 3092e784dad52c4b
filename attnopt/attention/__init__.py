"""Attention mechanisms, one folder each: config, module, cache.

Configs are plain dataclasses: importing this loads no torch. `LastK`, `Masks`, `Favor`, `NSA`,
`Linformer` and `Routing` are mechanisms; `NthLast`, `Window`, `First` and `Every` are the candidate
masks that `Masks` mixes.
Positions count from a row's first real token, so padding changes nothing.
"""

from __future__ import annotations

from attnopt.attention.config import Config
from attnopt.attention.favor.config import Favor
from attnopt.attention.lastk.config import (
    Candidate,
    Every,
    First,
    LastK,
    Masks,
    NthLast,
    Window,
)
from attnopt.attention.linformer.config import Linformer
from attnopt.attention.nsa.config import NSA
from attnopt.attention.registry import (
    MECHANISMS,
    build_mechanism,
    config_from_dict,
    register_mechanism,
)
from attnopt.attention.routing.config import Routing

__all__ = [
    "MECHANISMS",
    "NSA",
    "Candidate",
    "Config",
    "Every",
    "Favor",
    "First",
    "LastK",
    "Linformer",
    "Masks",
    "NthLast",
    "Routing",
    "Window",
    "build_mechanism",
    "config_from_dict",
    "register_mechanism",
]

for _config in (LastK, Masks, Favor, NSA, Linformer, Routing):
    register_mechanism(_config)

"""Efficient attention for pretrained models: kernels, conversion, distillation.

`import attnopt` is cheap: torch, triton and transformers are loaded when a name that needs them is
first used. The kernels are `attnopt.kernels.*`; in a checkout they lie in the folder `kernels`
beside this package, not in it.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "favor_attention": "attnopt.kernels.favor.op",
    "favor_decode": "attnopt.kernels.favor.op",
    "FavorState": "attnopt.kernels.favor.state",
    "hedgehog_projection": "attnopt.kernels.favor.projections",
    "orthogonal_projection": "attnopt.kernels.favor.projections",
    "lastk_attention": "attnopt.kernels.lastk.op",
    "lastk_decode": "attnopt.kernels.lastk.op",
    "sliding_window_attention": "attnopt.kernels.lastk.op",
    "compressed_attention": "attnopt.kernels.nsa.op",
    "mean_compress": "attnopt.kernels.nsa.compress",
    "nsa_attention": "attnopt.kernels.nsa.op",
    "nsa_decode": "attnopt.kernels.nsa.op",
    "select_blocks": "attnopt.kernels.nsa.op",
    "selected_attention": "attnopt.kernels.nsa.op",
    "Config": "attnopt.attention",
    "register_mechanism": "attnopt.attention",
    "AttentionMechanism": "attnopt.attention.base",
    "Favor": "attnopt.attention",
    "LastK": "attnopt.attention",
    "Linformer": "attnopt.attention",
    "Masks": "attnopt.attention",
    "NSA": "attnopt.attention",
    "Routing": "attnopt.attention",
    "NthLast": "attnopt.attention",
    "Window": "attnopt.attention",
    "First": "attnopt.attention",
    "Every": "attnopt.attention",
    "convert": "attnopt.convert",
    "revert": "attnopt.convert",
    "from_pretrained": "attnopt.convert",
    "mechanisms": "attnopt.convert",
    "dense_attention": "attnopt.convert",
    "redraw": "attnopt.attention.favor.module",
    "calibrate": "attnopt.calibration",
    "UserError": "attnopt.errors",
}

if TYPE_CHECKING:
    from attnopt import nn as nn
    from attnopt.attention import (
        NSA,
        Config,
        Every,
        Favor,
        First,
        LastK,
        Linformer,
        Masks,
        NthLast,
        Routing,
        Window,
        register_mechanism,
    )
    from attnopt.attention.base import AttentionMechanism
    from attnopt.attention.favor.module import redraw
    from attnopt.calibration import calibrate
    from attnopt.convert import convert, dense_attention, from_pretrained, mechanisms, revert
    from attnopt.errors import UserError
    from attnopt.kernels.favor.op import favor_attention, favor_decode
    from attnopt.kernels.favor.projections import hedgehog_projection, orthogonal_projection
    from attnopt.kernels.favor.state import FavorState
    from attnopt.kernels.lastk.op import lastk_attention, lastk_decode, sliding_window_attention
    from attnopt.kernels.nsa.compress import mean_compress
    from attnopt.kernels.nsa.op import (
        compressed_attention,
        nsa_attention,
        nsa_decode,
        select_blocks,
        selected_attention,
    )

__all__ = [
    "NSA",
    "AttentionMechanism",
    "Config",
    "Every",
    "Favor",
    "FavorState",
    "First",
    "LastK",
    "Linformer",
    "Masks",
    "NthLast",
    "Routing",
    "UserError",
    "Window",
    "__version__",
    "calibrate",
    "compressed_attention",
    "convert",
    "dense_attention",
    "favor_attention",
    "favor_decode",
    "from_pretrained",
    "hedgehog_projection",
    "lastk_attention",
    "lastk_decode",
    "mean_compress",
    "mechanisms",
    "nsa_attention",
    "nsa_decode",
    "orthogonal_projection",
    "redraw",
    "register_mechanism",
    "revert",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

# A checkout keeps `kernels` beside the package: let `attnopt.kernels` be found there.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("attnopt.nn")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Importing the submodule `attnopt.convert` must not hide the function `attnopt.convert`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

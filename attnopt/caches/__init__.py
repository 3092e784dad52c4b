"""Key/value caches of converted models: as small as the mechanism allows.

A band keeps the keys of its window and its sinks, FAVOR+ sums over the past, and NSA all keys and
values with the compressed ones beside them.
"""

from __future__ import annotations

from attnopt.caches.band import SinkWindowLayer, band_cache_layer
from attnopt.caches.base import MechanismCache, MechanismLayer
from attnopt.caches.favor import FavorLayer
from attnopt.caches.nsa import NSALayer

__all__ = [
    "FavorLayer",
    "MechanismCache",
    "MechanismLayer",
    "NSALayer",
    "SinkWindowLayer",
    "band_cache_layer",
]

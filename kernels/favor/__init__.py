"""FAVOR+ and its family: linear attention by positive features, with an exact window."""

from attnopt.kernels.favor.op import empty_state, favor_attention, favor_decode
from attnopt.kernels.favor.projections import hedgehog_projection, orthogonal_projection
from attnopt.kernels.favor.state import FavorState

__all__ = [
    "FavorState",
    "empty_state",
    "favor_attention",
    "favor_decode",
    "hedgehog_projection",
    "orthogonal_projection",
]

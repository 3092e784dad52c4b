"""Where centroids start: k-means of the dense model's keys, head by head.

Letters: B batch, Hkv key/value heads, N tokens, D head dimension, c clusters, S sampled keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.attention.routing.module import RoutingMechanism

SAMPLE = 64  # keys of a batch, for each cluster
ROUNDS = 10


class CentroidGauge:
    """Spherical k-means (Lloyd's algorithm), from keys spread over the texts as a start."""

    def __init__(self, mechanism: RoutingMechanism) -> None:
        self.mechanism = mechanism
        self.sampled: list[Tensor] = []  # [Hkv, S, D] of unit length

    def add(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, out: Tensor
    ) -> None:
        """Take some of a batch's real keys, evenly spread."""
        real = key_mask.flatten().nonzero().flatten()
        step = max(1, len(real) // (SAMPLE * self.mechanism.config.num_clusters))
        keys = k.transpose(0, 1).flatten(1, 2)[:, real[::step]]
        self.sampled.append(self.mechanism.on_sphere(keys))

    def finish(self) -> Tensor | None:
        """Set the centroids and return them; None without as many keys as clusters."""
        points = torch.cat(self.sampled, 1)
        count = self.mechanism.config.num_clusters
        if points.shape[1] < count:
            return None
        first = torch.arange(count, device=points.device) * points.shape[1] // count
        centroids = points[:, first]
        for _ in range(ROUNDS):
            member = F.one_hot((points @ centroids.mT).argmax(-1), count).to(points.dtype)
            sums = member.mT @ points  # [Hkv, c, D]
            found = member.sum(1)[..., None] > 0
            centroids = torch.where(found, F.normalize(sums, dim=-1), centroids)
        self.mechanism.set_centroids(centroids)
        return self.mechanism.centroids.clone()

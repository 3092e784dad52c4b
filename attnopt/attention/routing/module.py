"""Routing attention as a module: centroids, who belongs to them, and how they move.

Queries and keys, layer-normalized without weights, belong to the centroid with the largest dot
product. In training mode the centroids follow the keys as an online spherical k-means: with m_c the
mean of the normalized keys of centroid c in a batch,

    mu_c <- (decay mu_c + (1 - decay) m_c) / |decay mu_c + (1 - decay) m_c|

and a centroid to which no key belongs stays. No gradient flows through any of this. In the paper's
causal layers queries are keys. Where they are not, centroids that follow both part the ones from
the others: in a small GPT-2, before training, that lost more of the model than random ones did.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
c clusters.

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
section 4.1 and algorithm 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.attention import Routing
from attnopt.attention.base import AttentionMechanism, Gauge
from attnopt.attention.routing.attention import routing_attention
from attnopt.kernels.packing import lay_out_inputs


class RoutingMechanism(AttentionMechanism):
    """Softmax over the last tokens and those of the query's cluster; it learns by counting alone.

    Buffers: `centroids` and `next_centroids`, both `[Hkv, c, D]` of unit length. A forward pass in
    training mode first takes over `next_centroids`, which the one before has made. So gradient
    checkpointing, which runs a pass again, finds the centroids of that pass. Evaluation changes
    neither. In several processes DDP broadcasts the buffers of rank 0; FSDP does not, so that each
    process would follow its own keys: use `decay=1` there, which keeps the centroids as they are.

    Decoding finds the clusters of all keys anew for each token: it costs c times the scores.
    """

    config: Routing
    centroids: Tensor
    next_centroids: Tensor

    def __init__(self, config: Routing, **shape: Any) -> None:
        super().__init__(config, **shape)
        size = (self.num_kv_heads, config.num_clusters, self.head_dim)
        for name in ("centroids", "next_centroids"):
            self.register_buffer(name, torch.empty(size, dtype=torch.float32))
        self.reset_parameters()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        scale: float | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attend; arguments and result as in `AttentionMechanism.forward`."""
        clusters = self.route(q, k, key_mask)
        attend = partial(
            routing_attention,
            window=self.config.window,
            scale=scale,
            backend=self.config.backend,
        )
        if cu_seqlens is None:
            return attend(q, k, v, *clusters, key_mask=key_mask)
        layout = lay_out_inputs(q, k, v, cu_seqlens, max_seqlen, key_mask)

        def attend_rows(q: Tensor, k: Tensor, v: Tensor, *ids: Tensor, key_mask: Any) -> Tensor:
            return attend(q, k, v, *(x.squeeze(-1) for x in ids), key_mask=key_mask)

        ids = (x.unsqueeze(-1) for x in clusters)
        return layout.attend(attend_rows, *map(layout.pack, (q, k, v, *ids)), masked=True)

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Find the clusters of queries and keys; in training mode the centroids move on.

        Args:
            q: queries `[B, H, Nq, D]`, the last Nq of the Nk positions.
            k: keys `[B, Hkv, Nk, D]`.
            key_mask: bool `[B, Nk]`, True for the keys that move centroids.

        Returns:
            int64 `[B, H, Nq]` and `[B, Hkv, Nk]`.
        """
        if self.training and not _in_backward():
            self.centroids.copy_(self.next_centroids)
        with torch.autocast(q.device.type, enabled=False):
            grouped = q.reshape(*k.shape[:2], -1, q.shape[3])  # [B, Hkv, G Nq, D]
            points = self.on_sphere(k)
            of_queries, of_keys = (
                (x @ self.centroids.mT).argmax(-1) for x in (self.on_sphere(grouped), points)
            )
            if self.training:
                self.next_centroids.copy_(self._moved(points, of_keys, key_mask))
        return of_queries.reshape(q.shape[:3]), of_keys

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the centroids to random unit vectors, drawn on the CPU."""
        if self.centroids.is_meta:
            return
        drawn = torch.randn(self.centroids.shape, generator=generator, device="cpu")
        self.set_centroids(drawn)

    @torch.no_grad()
    def set_centroids(self, centroids: Tensor) -> None:
        """Take these centroids `[Hkv, c, D]`, of any length but 0."""
        self.centroids.copy_(F.normalize(centroids, dim=-1))
        self.next_centroids.copy_(self.centroids)

    def make_gauge(self) -> Gauge:
        """The keys, whose k-means sets the centroids."""
        from attnopt.attention.routing.gauge import CentroidGauge

        return CentroidGauge(self)

    def on_sphere(self, x: Tensor) -> Tensor:
        """Vectors `[..., D]` layer-normalized to unit length, in the dtype of the centroids."""
        x = x.to(self.centroids.dtype)
        return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)

    def _moved(self, points: Tensor, clusters: Tensor, real: Tensor | None) -> Tensor:
        """The centroids `[Hkv, c, D]` after points `[B, Hkv, N, D]` of these clusters."""
        member = F.one_hot(clusters, self.config.num_clusters).to(points.dtype)  # [B, Hkv, N, c]
        if real is not None:
            member = member * real[:, None, :, None]
        count = member.sum((0, 2))[..., None]  # [Hkv, c, 1]
        mean = (member.mT @ points).sum(0) / count.clamp_min(1)
        decay = self.config.decay
        moved = F.normalize(decay * self.centroids + (1 - decay) * mean, dim=-1)
        return torch.where(count > 0, moved, self.centroids)


def _in_backward() -> bool:
    """Whether this forward pass repeats one, for gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

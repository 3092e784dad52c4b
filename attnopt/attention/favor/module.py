"""FAVOR+ and its family as modules: linear attention through positive features.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
M features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnopt.attention import Favor
from attnopt.attention.base import AttentionMechanism, Gauge
from attnopt.kernels.favor.op import favor_attention
from attnopt.kernels.favor.projections import hedgehog_projection, orthogonal_projection
from attnopt.kernels.favor.state import FavorState

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin


class FavorMechanism(AttentionMechanism):
    """Attention through positive features, with an exact window where the config has one.

    `projection` `[H, M, D]` is a parameter if it is learned and a buffer if it was drawn; with
    "taylor" it is None. `log_gate` `[H]` is a parameter, or None without a gate.
    """

    config: Favor
    projection: Tensor | None
    log_gate: Tensor | None
    directions = ("causal", "both")

    def __init__(self, config: Favor, **shape: Any) -> None:
        super().__init__(config, **shape)
        if config.window and not self.causal:
            raise ValueError(
                "the exact window of Favor is causal, but this model attends in both directions: "
                f"leave the window out; got window={config.window}"
            )
        rows, gate = None, None
        if config.feature_map != "taylor":
            count = config.num_features or 2 * self.head_dim  # None only for "hedgehog"
            rows = torch.empty(self.num_heads, count, self.head_dim, dtype=torch.float32)
        if config.gate:
            gate = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        if config.learned and rows is not None:
            self.projection = nn.Parameter(rows)
        else:
            self.register_buffer("projection", rows)
        self.register_parameter("log_gate", gate)
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
        initial_state: FavorState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend; what is not listed is as in `AttentionMechanism.forward`.

        Args:
            q: queries.
            k: keys.
            v: values.
            key_mask: real tokens.
            cu_seqlens: where packed documents begin and end; without states.
            max_seqlen: length of the longest.
            scale: factor of the scores.
            hidden_states: not used.
            initial_state: the state after the tokens before these.
            return_state: also return the state after these.

        Returns:
            `[B, H, Nq, D]`, and with `return_state` a pair of that and a `FavorState`.
        """
        return favor_attention(
            q,
            k,
            v,
            self.projection,
            feature_map=self.config.feature_map,
            window=self.config.window,
            window_block=self.config.window_block,
            causal=self.causal,
            log_gate=self.log_gate,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            scale=scale,
            stabilizer=self.config.stabilizer,
            initial_state=initial_state,
            return_state=return_state,
            backend=self.config.backend,
        )

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the projection and the gate in place.

        Random rows come from the generator, else from the config's seed and the layer's index,
        else from torch's global generator. "hedgehog" starts from the identity and its negative.
        The gate starts where a query and a key of norm 0 have about the far weight 1 of softmax;
        `attnopt.calibrate` knows better.
        """
        if generator is None and self.config.seed is not None:
            seed = self.config.seed * 1_000_003 + self.layer_idx
            generator = torch.Generator().manual_seed(seed % 2**63)
        if self.projection is not None:
            self._draw(generator)
        if self.log_gate is not None:
            self.log_gate.fill_(self._neutral_log_gate())

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random rows in place.

        Args:
            generator: by default torch's global generator, whatever the config's seed.

        Raises:
            ValueError: the projection is learned, or there is none.
        """
        if not self.is_random:
            kind = "is learned" if self.config.learned else "does not exist"
            raise ValueError(
                f"layer {self.layer_idx}: only random features can be redrawn; the projection of "
                f"{self.config} {kind}"
            )
        self._draw(generator)

    @property
    def is_random(self) -> bool:
        """Whether the projection was drawn at random, to stay as it is or be redrawn."""
        return self.projection is not None and not self.config.learned

    def make_cache_layer(self) -> CacheLayerMixin:
        """A cache layer of constant size: sums over the past, and the tokens of the window."""
        from attnopt.attention.favor.cache import FavorLayer

        return FavorLayer()

    def make_gauge(self) -> Gauge | None:
        """The far mass, which sets the gate."""
        from attnopt.attention.favor.gauge import MassGauge

        return MassGauge(self) if self.config.gate else None

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        assert self.projection is not None
        if self.projection.is_meta:
            return
        heads, count, dim = self.projection.shape
        if self.config.feature_map == "hedgehog":
            rows = hedgehog_projection(count, dim, heads=heads, device="cpu")
        else:
            rows = orthogonal_projection(
                count,
                dim,
                heads=heads,
                norms=self.config.norms,
                generator=generator,
                dtype=torch.float64,
                device="cpu",
            )
        self.projection.copy_(rows)

    def _neutral_log_gate(self) -> float:
        """-log phi(0).phi(0), without the 1/M that "favor" has built in."""
        if self.projection is None or self.config.feature_map == "favor":
            return 0.0
        log_count = math.log(self.projection.shape[1])
        # phi_m(0) is 1/M, or 1; with "relu" it is next to 0, but products of the order of 1
        return log_count if self.config.feature_map == "hedgehog" else -log_count


def redraw(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw new random features for every layer that has some, in place and in layer order.

    Features that are redrawn now and then while a model trains cannot be overfitted.

    Args:
        model: a converted model, wrapped or not; learned projections stay as they are.
        generator: source of randomness, by default torch's global generator.

    Raises:
        ValueError: no layer has random features.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers" (redrawn features).
    """
    found = [m for m in model.modules() if isinstance(m, FavorMechanism) and m.is_random]
    if not found:
        raise ValueError(
            "no layer has random features to redraw; attnopt.convert(model, Favor()) makes some"
        )
    for mechanism in sorted(found, key=lambda m: m.layer_idx):
        mechanism.redraw(generator)

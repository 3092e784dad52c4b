"""Last-k attention and mixtures of candidate masks, as modules around the band operator.

A band has one weight per offset n = i - j (0 <= n < W) and one per sink, the first T real tokens,
which the band then skips. Mixtures with `Every` also give one weight to all that lies beyond.
`LastK` attends in both directions too: then W = 2R + 1 offsets run from R tokens ahead to R back.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
W offsets, T sinks, C candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.attention import Candidate, Every, First, LastK, Masks, NthLast, Window
from attnopt.attention.base import AttentionMechanism
from attnopt.kernels.lastk.op import lastk_attention
from attnopt.kernels.rows import first_real_token

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin


class LogWeights(NamedTuple):
    """Logarithms of the weights: -inf is weight 0."""

    band: Tensor  # [W] or [H, W]; in both directions from W // 2 ahead to W // 2 back
    sinks: Tensor | None  # [T] or [H, T]
    beyond: Tensor | None  # [1] or [H, 1], every earlier key; None where it is not seen


class BandMechanism(AttentionMechanism):
    """Attention over a band and sinks; subclasses say how the weights are learned."""

    config: LastK | Masks

    def log_weights(self) -> LogWeights:
        """The weights of all offsets and sinks, differentiable."""
        raise NotImplementedError

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
        packed: Any = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "key_mask": key_mask}
        weights = self.log_weights()
        if weights.beyond is not None and cu_seqlens is not None:
            return self.each_document(
                q, k, v, **packed, scale=scale, hidden_states=None, masked=not self.causal
            )
        if weights.beyond is not None:
            return _dense_attention(q, k, v, weights, key_mask, scale)
        return lastk_attention(
            q,
            k,
            v,
            weights.band,
            sink_log_weights=weights.sinks,
            **packed,
            scale=scale,
            causal=self.causal,
            backend=self.config.backend,
        )

    @torch.no_grad()
    def mask_matrix(self, length: int) -> Tensor:
        """Weight m_ij of key j for query i without padding, `[1 or H, length, length]`, fp32."""
        weights = self.log_weights()
        real = torch.ones(1, length, dtype=torch.bool, device=weights.band.device)
        return _log_mask(weights, length, real, self.causal)[0].exp()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set every alpha to 0, or draw it from a standard normal on the CPU; in place."""
        for alpha in self.parameters(recurse=False):
            with torch.no_grad():
                if self.config.init == "zeros":
                    alpha.zero_()
                elif not alpha.is_meta:
                    alpha.copy_(torch.randn(alpha.shape, generator=generator, device="cpu"))

    def _new_alpha(self, count: int) -> nn.Parameter:
        shape = (self.num_heads, count) if self.config.per_head else (count,)
        return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class LastKMechanism(BandMechanism):
    """Softmax over the last W tokens and T sinks, each weighed by `sigmoid(alpha)`.

    Parameters: `alpha` `[W]` or `[H, W]`, and with sinks `sink_alpha` `[T]` or `[H, T]`. In both
    directions there are `2 window - 1` offsets.
    """

    config: LastK
    directions = ("causal", "both")

    def __init__(self, config: LastK, **shape: Any) -> None:
        super().__init__(config, **shape)
        self.alpha = self._new_alpha(config.window if self.causal else 2 * config.window - 1)
        if config.sinks:
            self.sink_alpha = self._new_alpha(config.sinks)
        self.reset_parameters()

    def log_weights(self) -> LogWeights:
        """`logsigmoid(alpha)` for the offsets and for the sinks."""
        sinks = F.logsigmoid(self.sink_alpha) if self.config.sinks else None
        return LogWeights(F.logsigmoid(self.alpha), sinks, None)

    def coefficients(self) -> dict[str, Tensor]:
        """`offsets`, one weight per offset, and `sinks`; each `[C]` or `[H, C]`."""
        alphas = {"offsets": self.alpha}
        if self.config.sinks:
            alphas["sinks"] = self.sink_alpha
        return {kind: torch.sigmoid(alpha) for kind, alpha in alphas.items()}

    def labels(self) -> dict[str, list[str]]:
        """Names of the offsets and of the sinks."""
        window = self.config.window
        ahead = [] if self.causal else [f"{n} ahead" for n in range(window - 1, 0, -1)]
        labels = {"offsets": ahead + [_name(NthLast(n)) for n in range(window)]}
        if self.config.sinks:
            labels["sinks"] = [f"token {t}" for t in range(self.config.sinks)]
        return labels

    def make_cache_layer(self) -> CacheLayerMixin:
        """A cache layer of W - 1 tokens and the sinks."""
        from attnopt.attention.lastk.cache import band_cache_layer

        return band_cache_layer(self.config.window, self.config.sinks)


class MasksMechanism(BandMechanism):
    """Softmax under `m = sum_c sigmoid(alpha_c) M_c`; parameter `alpha` `[C]` or `[H, C]`."""

    config: Masks

    def __init__(self, config: Masks, **shape: Any) -> None:
        super().__init__(config, **shape)
        counts = [c.count for c in config.candidates if isinstance(c, First)]
        self.num_sinks = max(counts, default=0)
        self.window = max(_offsets(c)[1] for c in config.candidates)
        self.alpha = self._new_alpha(len(config.candidates))
        self.reset_parameters()

    def log_weights(self) -> LogWeights:
        """Logarithms of the candidates' sums over each offset, each sink, and what lies beyond."""
        weights = torch.sigmoid(self.alpha)  # [C] or [H, C]
        band = weights.new_zeros(*weights.shape[:-1], self.window)
        sinks = weights.new_zeros(*weights.shape[:-1], self.num_sinks)
        beyond = None
        for c, candidate in enumerate(self.config.candidates):
            weight = weights[..., c : c + 1]  # [1] or [H, 1]
            if isinstance(candidate, First):
                sinks = sinks + _spread(weight, 0, candidate.count, self.num_sinks)
                continue
            begin, end = _offsets(candidate)
            if isinstance(candidate, Every):
                beyond, end = weight, self.window
            band = band + _spread(weight, begin, end, self.window)
        return LogWeights(
            _safe_log(band),
            _safe_log(sinks) if self.num_sinks else None,
            None if beyond is None else _safe_log(beyond),
        )

    def coefficients(self) -> dict[str, Tensor]:
        """`masks`: one weight per candidate, `[C]` or `[H, C]`."""
        return {"masks": torch.sigmoid(self.alpha)}

    def labels(self) -> dict[str, list[str]]:
        """Names of the candidates."""
        return {"masks": [_name(candidate) for candidate in self.config.candidates]}

    def make_cache_layer(self) -> CacheLayerMixin:
        """A cache layer of the band and the sinks, or of everything with `Every`."""
        from transformers.cache_utils import DynamicLayer

        from attnopt.attention.lastk.cache import band_cache_layer

        return (
            DynamicLayer() if self.config.dense else band_cache_layer(self.window, self.num_sinks)
        )


def _offsets(candidate: Candidate) -> tuple[int, int]:
    """The half-open range of offsets that a candidate covers within the band."""
    if isinstance(candidate, NthLast):
        return candidate.n, candidate.n + 1
    return 0, candidate.size if isinstance(candidate, Window) else 1


def _name(candidate: Candidate) -> str:
    if isinstance(candidate, NthLast):
        return f"{candidate.n} back" if candidate.n else "itself"
    if isinstance(candidate, Window):
        return f"last {candidate.size}"
    return f"first {candidate.count}" if isinstance(candidate, First) else "every"


def _spread(weight: Tensor, begin: int, end: int, length: int) -> Tensor:
    """`[..., 1]` repeated over positions begin..end-1 of `[..., length]`, zero elsewhere."""
    return F.pad(weight.expand(*weight.shape[:-1], end - begin), (begin, length - end))


def _safe_log(weights: Tensor) -> Tensor:
    """Logarithm with -inf, and a gradient of 0 instead of NaN, at weight 0."""
    positive = weights > 0
    return torch.where(positive, weights.where(positive, 1.0).log(), -torch.inf)


def _log_mask(
    weights: LogWeights, num_queries: int, key_mask: Tensor, causal: bool = True
) -> Tensor:
    """log m_ij as `[B, 1 or H, Nq, Nk]` for the last Nq of the Nk positions; key_mask `[B, Nk]`."""
    num_keys = key_mask.shape[1]
    j = torch.arange(num_keys, device=key_mask.device)
    n = j[num_keys - num_queries :, None] - j  # i - j, [Nq, Nk]
    window = weights.band.shape[-1]
    entry = n if causal else n + window // 2
    log_mask = weights.band.reshape(-1, window)[:, entry.clamp(0, window - 1)]  # [1 or H, Nq, Nk]
    far = torch.full_like(weights.band[..., :1], -torch.inf)
    if weights.beyond is not None:
        far = weights.beyond
    inside = (entry >= 0) & (entry < window)
    log_mask = torch.where(inside, log_mask, far.reshape(-1, 1, 1))[None]
    if weights.sinks is not None:
        count = weights.sinks.shape[-1]
        start = first_real_token(key_mask)  # [B]
        rank = (j - start[:, None])[:, None]  # [B, 1, Nk]
        sink = weights.sinks.reshape(-1, count)[:, rank.clamp(0, count - 1)].movedim(0, 1)
        log_mask = torch.where(((rank >= 0) & (rank < count))[:, None], sink, log_mask)
    hidden = ~key_mask[:, None, None]  # [B, 1, 1, Nk]
    return log_mask.masked_fill(hidden | (n < 0) if causal else hidden, -torch.inf)


def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: LogWeights,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Softmax with bias log m_ij over all keys; rows without a visible key are zero."""
    if key_mask is None:
        key_mask = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
    bias = _log_mask(weights, q.shape[2], key_mask).to(q.dtype)
    sees = (bias > -torch.inf).any(-1, keepdim=True)  # [B, 1 or H, Nq, 1]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias.masked_fill(~sees, 0.0),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.masked_fill(~sees, 0.0)

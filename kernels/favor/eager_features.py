"""Feature maps of the FAVOR+ family for the eager path: values, references and derivatives.

The maps `favor`, `hedgehog` and `exp` are exponentials. They stay in the log domain until a
reference r per feature is known: keys enter as `e^{lk - r}`, queries as `e^{lq + r - a_i}`, where
a_i is the largest exponent of the row. References are whole numbers, so that sums of them are exact
in fp32; HEADROOM lets a key lie above its reference, and lower bounds of both exponents keep every
visible pair's weight positive. `relu` and `taylor` are computed as they stand, at reference 0.

For `favor` the norms `|k'|^2 / 2` reach hundreds, where fp32 keeps five digits behind the point.
They are taken relative to their mean over the sequence, `center`, before they are summed up.

Letters: X = B H sequences, R rows, n chunks of C rows, D head dim, M features, E = D + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2 = math.log(2)
RELU_FLOOR = 1e-3
CENTER_SAMPLE = 64  # keys that the center of the norms is taken from
LOG_MAPS = ("favor", "hedgehog", "exp")


def limits(dtype: torch.dtype) -> tuple[int, float, float, float]:
    """Headroom, lowest and highest key exponent, lowest query exponent, in nats, of a dtype."""
    if dtype == torch.float64:
        return 140, -700 * LN2, 500 * LN2, -700 * LN2
    return 42, -110 * LN2, 100 * LN2, -115 * LN2


class FeatureMap:
    """The feature map of one call: projection folded with the scale, and what backward needs.

    `normalize_queries` keeps the factor of a query that cancels where no window is.
    """

    def __init__(self, name: str, projection: Tensor, batch: int, scale: float,
                 normalize_queries: bool, dtype: torch.dtype, learns: bool = False) -> None:
        self.name, self.scale, self.dtype = name, scale, dtype
        self.is_log = name in LOG_MAPS
        self.normalize_queries = normalize_queries
        self.learns = learns  # whether the projection's gradient is wanted
        self.headroom, self.pk_min, self.pk_max, self.pq_min = limits(dtype)
        self.heads, _, self.dim = projection.shape
        self.features = feature_count(name, projection.shape[1], self.dim)
        self.mean_square = projection.new_zeros(batch * self.heads, 1, 1, dtype=torch.float64)
        self.center = self.mean_square.flatten()
        if name != "taylor":
            rows = projection.to(dtype) * scale**0.5
            self.rows = rows.repeat(batch, 1, 1)  # [X, M, D]
            self.gradient = torch.zeros_like(self.rows)

    def set_center(self, k: Tensor, key_mask: Tensor | None) -> None:
        """Take the center of each sequence from a sample of its keys `[B, Hkv, N, D]`."""
        if self.name != "favor" or k.shape[2] == 0:
            return
        step = -(-k.shape[2] // CENTER_SAMPLE)
        squares = k[:, :, ::step].double().square().mean(-1)
        if key_mask is None:
            mean = squares.mean(-1)
        else:
            real = key_mask[:, None, ::step]
            mean = torch.where(real, squares, 0).sum(-1) / real.sum(-1).clamp(min=1)
        mean = (mean * 256).round() / 256  # few bits: D times as much is exact
        groups = self.heads // k.shape[1]
        self.mean_square = mean.repeat_interleave(groups, dim=1).view(-1, 1, 1)
        self.center = self.mean_square.flatten() * (self.dim * self.scale / 2)

    def half_norms(self, x: Tensor) -> Tensor:
        """`|x'|^2 / 2 - center` of rows `[X, R, D]`, `[X, R, 1]`: no large number is rounded."""
        excess = torch.addcmul(-self.mean_square.to(x.dtype), x, x)
        return excess.sum(-1, keepdim=True).mul_(self.scale / 2)

    def key_logits(self, x: Tensor) -> Tensor:
        """lk + center (or phi of a plain map) of key rows `[X, R, D]`, `[X, R, M]`."""
        if self.name == "taylor":
            return monomials(x * self.scale**0.5)
        logits = torch.bmm(x, self.rows.transpose(1, 2))
        if self.name == "favor":
            logits.sub_(self.half_norms(x))
        elif self.name == "hedgehog":
            logits.sub_(logits.logsumexp(-1, keepdim=True))
        elif self.name == "relu":
            logits.relu_().add_(RELU_FLOOR)
        return logits

    def query_logits(self, x: Tensor) -> Tensor:
        """lq of query rows; `favor` leaves `|q'|^2 / 2` out (see `query_offsets`)."""
        if self.name == "favor" or (self.name == "hedgehog" and not self.normalize_queries):
            return torch.bmm(x, self.rows.transpose(1, 2))
        return self.key_logits(x)

    def query_offsets(self, x: Tensor) -> Tensor:
        """What the exponents of `query_weights` lack to those of true pairs, fp64 `[X, R, 1]`."""
        offsets = x.new_zeros(x.shape[0], x.shape[1], 1, dtype=torch.float64)
        if self.is_log:
            offsets -= self.headroom
        if self.name == "favor":
            offsets -= self.half_norms(x) + 2 * self.center[:, None, None]
        return offsets

    def static_reference(self, log_scale: Tensor) -> Tensor:
        """The data-free reference `[X, M]`, raised to an initial state's `[X, M]`."""
        if not self.is_log:
            return torch.zeros_like(log_scale)
        if self.name == "hedgehog":
            return torch.full_like(log_scale, -self.headroom).maximum(log_scale).ceil_()
        half_norms = self.rows.square().sum(-1) / (2 * self.scale)
        return (half_norms - self.headroom).maximum(log_scale).ceil_()

    def running_references(self, logits: Tensor, hidden: Tensor | None, previous: Tensor) -> Tensor:
        """References of chunks `[X, n, C, M]` after the `previous` `[X, M]` one: `[X, n, M]`."""
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
        top = logits.amax(2).sub_(self.headroom).ceil_()
        for reference in top.unbind(1):
            previous = torch.maximum(reference, previous, out=reference)
        return top

    def key_weights(self, logits: Tensor, hidden: Tensor | None, reference: Tensor) -> Tensor:
        """pk of chunks `[X, n, C, M]` at references `[X, n, M]`, in place; 0 for hidden keys."""
        if self.is_log:  # as a square: e^{x + headroom} would round x to the precision of headroom
            low, high = (0.5 * (x - self.headroom) for x in (self.pk_min, self.pk_max))
            logits.sub_((reference + self.headroom).unsqueeze(2)).mul_(0.5)
            logits.clamp_(low, high).exp_().mul_(math.exp(0.5 * self.headroom)).square_()
        return logits if hidden is None else logits.masked_fill_(hidden, 0)

    def query_weights(self, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """pq of rows `[X, n, C, M]`, in place, and the exponents `[X, n, C, 1]` left out.

        These are a + headroom: small where keys are at their reference, so that they round little.
        """
        if not self.is_log:
            return logits, torch.zeros_like(logits[..., :1])
        logits.add_((reference + self.headroom).unsqueeze(2))
        top = logits.amax(-1, keepdim=True)
        return logits.sub_(top).clamp_(min=self.pq_min).exp_(), top

    def backward(self, x: Tensor, phi: Tensor | None, grad: Tensor, *, normalized: bool,
                 out: Tensor | None = None) -> Tensor:
        """Gradient of rows `[X, R, D]`; the projection's is added up in `self.gradient`.

        Args:
            x: the rows.
            phi: feature values `[X, R, M]`, for `hedgehog` and `relu`.
            grad: gradient of the logits (plain maps: of the features) `[X, R, M]`; overwritten.
            normalized: whether the normalizer was part of the logits.
            out: where the result may be put.

        Returns:
            `[X, R, D]`; `out` itself where it was used.
        """
        if self.name == "taylor":
            return self._taylor_backward(x, grad)
        if self.name == "relu":
            assert phi is not None
            grad.masked_fill_(phi <= RELU_FLOOR, 0)
        elif self.name == "hedgehog" and normalized:
            assert phi is not None
            grad.addcmul_(phi, grad.sum(-1, keepdim=True), value=-1)
        dx = torch.bmm(grad, self.rows, out=out)
        if self.name == "favor" and normalized:
            dx.addcmul_(x, grad.sum(-1, keepdim=True), value=-self.scale)
        if self.learns:
            self.gradient.baddbmm_(grad.transpose(1, 2), x)
        return dx

    def projection_gradient(self, batch: int) -> Tensor:
        """What `backward` added up, `[H, M, D]` (`[H, 0, D]` for `taylor`)."""
        if self.name == "taylor":
            return torch.zeros(self.heads, 0, self.dim, dtype=self.dtype, device=self.center.device)
        return self.gradient.unflatten(0, (batch, self.heads)).sum(0) * self.scale**0.5

    def _taylor_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """`dx_a = g_a + sum_b (G + G^T)_ab x_b` with G the upper triangle of pair gradients."""
        D = x.shape[-1]
        a, b, coefficients = monomial_pairs(x)
        pairs = grad.new_zeros(*x.shape, D)
        pairs[..., a, b] = grad[..., 1 + D :] * coefficients
        x = (x * self.scale**0.5).unsqueeze(-1)
        dx = (pairs @ x + pairs.transpose(-1, -2) @ x).squeeze(-1)
        return dx.add_(grad[..., 1 : 1 + D]).mul_(self.scale**0.5)


def feature_count(name: str, rows: int, dim: int) -> int:
    """M: the projection's rows, for `taylor` the monomials up to degree 2."""
    return 1 + dim + dim * (dim + 1) // 2 if name == "taylor" else rows


def monomial_pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices a <= b of the quadratic features of `x`, and the factors of these."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return a, b, torch.where(a == b, 0.5, 1.0).to(x.dtype).sqrt()


def monomials(x: Tensor) -> Tensor:
    """`1, x_a, c_ab x_a x_b (a <= b)` of rows `[..., D]`."""
    a, b, coefficients = monomial_pairs(x)
    squares = x[..., a].mul_(x[..., b]).mul_(coefficients)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)

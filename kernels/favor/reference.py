"""FAVOR+ and its family by their definition: dense, quadratic in N, differentiable by autograd.

    o_i = sum_j u_ij v_j / sum_j u_ij    over the keys j that query i sees

With q' = sqrt(scale) q, k' = sqrt(scale) k and s_ij = q'_i . k'_j the weight is

    u_ij = e^{s_ij}                    where a window holds key j,
    u_ij = c_h phi(q'_i) . phi(k'_j)   elsewhere; c_h = e^{log_gate[h]}, and that / M for favor.

The feature maps, with rows w_m of the projection (of query head h if it has a row of heads):

    favor     phi_m(x) = e^{w_m.x - |x|^2 / 2}
    hedgehog  phi_m(x) = softmax_m(w_m.x) over all rows
    exp       phi_m(x) = e^{w_m.x}
    relu      phi_m(x) = relu(w_m.x) + 1e-3
    taylor    1, x_a, and x_a x_b for a <= b (x_a^2 / sqrt 2): phi(x).phi(y) = 1 + x.y + (x.y)^2 / 2

A window counts positions p from a row's first real token. The query at p reads the keys from
position b * floor(max(0, p - W + 1) / b) on exactly, with b the window block.

Weights are formed and normalized as logarithms, so that no norm of q or k can lose them all.
This is what the fast implementations are tested against; it checks no arguments (op.py does).
Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
M features, W window.
"""

import math

import torch
from torch import Tensor

EMPTY = -1e30  # log_scale of a feature that has no key summed up yet
RELU_FLOOR = 1e-3
CHUNK = 2**24  # elements of the largest temporary tensor

State = tuple[Tensor, Tensor, Tensor]


def favor_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    *,
    feature_map: str = "favor",
    window: int = 0,
    window_block: int = 32,
    log_gate: Tensor | None = None,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """Attention through positive features, exact inside a window of the last tokens.

    Computes in float64 for float64 queries and in float32 for every other dtype.

    Args:
        q: queries [B, H, Nq, D], the last Nq of the Nk positions.
        k: keys [B, Hkv, Nk, D]; query head h reads key head h // (H / Hkv).
        v: values [B, Hkv, Nk, D].
        projection: rows w_m, [M, D] or [H, M, D]; None for taylor.
        feature_map: favor, hedgehog, exp, relu or taylor.
        window: W, the least number of keys read exactly; 0 reads none so.
        window_block: b, the multiple of tokens at which the window starts.
        log_gate: [H], log-weight of the features against the window.
        causal: a query sees no later key. Without, it sees all of them, and there is no window.
        key_mask: bool [B, Nk], True for a real token.
        scale: factor of q.k, 1 / sqrt(D) by default.
        initial_state: (kv [B, H, M, D], z [B, H, M], log_scale [B, H, M]) of keys before the given
            ones: kv e^log_scale = sum_j phi(k'_j) v_j and z e^log_scale = sum_j phi(k'_j). Every
            query sees them, through features.
        return_state: also return the state of what a next token would see through features.

    Returns:
        [B, H, Nq, D] in the dtype of q; with return_state also such a state, its log_scale (the
        largest log phi of each feature; 0 for taylor; at most -1e29 if there is nothing) constant.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    root = math.sqrt(q.shape[-1] ** -0.5 if scale is None else scale)
    rows = (q.new_empty(0, q.shape[-1]) if projection is None else projection).to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        queries = root * q.to(dtype)
        keys = root * k.to(dtype).repeat_interleave(groups, dim=1)
        values = v.to(dtype).repeat_interleave(groups, dim=1)

        every_key = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        real = every_key if key_mask is None else key_mask
        log_c = torch.zeros((), dtype=dtype, device=q.device)
        if log_gate is not None:
            log_c = log_c + log_gate.to(dtype)[:, None, None]
        if feature_map == "favor":
            log_c = log_c - math.log(rows.shape[-2])

        scores = queries @ keys.mT
        far = log_c + _log_kernel(queries, keys, scores, rows, feature_map)
        visible, exact = _pairs(real, q.shape[2], window, window_block, causal)
        logits = torch.where(exact, scores, far).masked_fill(~visible, -torch.inf)

        factor, log_phi = log_features(queries, rows, feature_map)
        state = initial_state or _empty_state(log_phi, q.shape[-1])
        kv, z, log_scale = (part.to(dtype) for part in state)
        log_scale = log_scale.detach()
        earlier = log_c + log_phi + log_scale[:, :, None]
        earlier = earlier.masked_fill(log_scale[:, :, None] <= 0.1 * EMPTY, -torch.inf)
        out = _attend(logits, values, earlier, factor, kv, z).to(q.dtype)
        if not return_state:
            return out
        absorbed = _absorbed(real, window, window_block)
        features = log_features(keys, rows, feature_map)
        return out, _add_keys((kv, z, log_scale), features, values, absorbed)


def log_features(x: Tensor, rows: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """phi(x) as factor * e^log, both [B, H, N, M]: for taylor all factor, for others all log."""
    if feature_map == "taylor":
        a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        pairs = x[..., a] * x[..., b] * torch.where(a == b, 0.5, 1.0).to(x.dtype).sqrt()
        factor = torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)
        return factor, torch.zeros_like(factor)
    dots = x @ rows.mT
    if feature_map == "favor":
        log = dots - x.square().sum(-1, keepdim=True) / 2
    elif feature_map == "hedgehog":
        log = dots.log_softmax(-1)
    elif feature_map == "relu":
        log = (dots.relu() + RELU_FLOOR).log()
    else:
        log = dots
    return torch.ones_like(log), log


def _log_kernel(
    queries: Tensor, keys: Tensor, scores: Tensor, rows: Tensor, feature_map: str
) -> Tensor:
    """log phi(q'_i).phi(k'_j) for every pair, [B, H, Nq, Nk]."""
    if feature_map == "taylor":
        return (1 + scores + scores.square() / 2).log()  # ((1 + s)^2 + 1) / 2 > 0
    log_q = log_features(queries, rows, feature_map)[1][:, :, :, None]
    log_k = log_features(keys, rows, feature_map)[1][:, :, None]
    size = max(1, CHUNK // max(1, log_k.numel()))  # queries at a time
    return torch.cat([torch.logsumexp(part + log_k, -1) for part in log_q.split(size, 2)], 2)


def _pairs(
    real: Tensor, num_queries: int, window: int, block: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Which pairs are visible, and which of these exact: two bools [B, 1, Nq, Nk]."""
    position = _positions(real)
    i, j = position[:, None, position.shape[1] - num_queries :, None], position[:, None, None]
    visible = real[:, None, None].expand(-1, 1, num_queries, -1)
    if not causal:
        return visible, torch.zeros_like(visible)
    exact = (j >= _first_exact(i, window, block)) if window > 0 else torch.zeros_like(visible)
    return visible & (j <= i), exact


def _absorbed(real: Tensor, window: int, block: int) -> Tensor:
    """Keys that the token after the last one would see through features, bool [B, Nk]."""
    if window == 0:
        return real
    position = _positions(real)
    following = real.shape[1] - _start(real)[:, None]
    return real & (position < _first_exact(following, window, block))


def _first_exact(position: Tensor, window: int, block: int) -> Tensor:
    """Position of the first key that the query at a position reads exactly."""
    return (position - window + 1).clamp_min(0) // block * block


def _positions(real: Tensor) -> Tensor:
    """Positions counted from each row's first real token, [B, Nk]; negative before it."""
    return torch.arange(real.shape[1], device=real.device) - _start(real)[:, None]


def _start(real: Tensor) -> Tensor:
    """Column of each row's first real token, [B]; Nk where there is none."""
    return real.cumsum(1).eq(0).sum(1)


def _attend(
    logits: Tensor, values: Tensor, earlier: Tensor, factor: Tensor, kv: Tensor, z: Tensor
) -> Tensor:
    """Mean of the values by e^logits and, for the keys of a state, by its features' weights.

    Args:
        logits: log u_ij [B, H, Nq, Nk], -inf where a key is not seen.
        values: [B, H, Nk, D].
        earlier: log-weights of the state's features, [B, H, Nq, M]; -inf where it is empty.
        factor: factors of e^earlier, [B, H, Nq, M].
        kv: [B, H, M, D].
        z: [B, H, M].

    Returns:
        [B, H, Nq, D]; zero, with zero gradients, in rows where everything is -inf.
    """
    peak = torch.cat([logits, earlier], -1).detach().amax(-1, keepdim=True)
    peak = peak.clamp_min(torch.finfo(peak.dtype).min)  # it cancels
    weights = torch.exp(logits - peak)
    shares = factor * torch.exp(earlier - peak)
    total = weights.sum(-1, keepdim=True) + shares @ z[..., None]
    return (weights @ values + shares @ kv) / total.masked_fill(total == 0, 1)


def _empty_state(features: Tensor, dim: int) -> State:
    """A state with nothing summed up, for features [B, H, N, M] and values [B, H, N, dim]."""
    z = torch.zeros_like(features[:, :, 0])
    return z.new_zeros(*z.shape, dim), z, torch.full_like(z, EMPTY)


def _add_keys(
    state: State, features: tuple[Tensor, Tensor], values: Tensor, absorbed: Tensor
) -> State:
    """The state with the absorbed keys added, at the larger of both references."""
    kv, z, log_scale = state
    factor, log_phi = features
    log_phi = log_phi.masked_fill(~absorbed[:, None, :, None], -torch.inf)
    reference = torch.cat([log_scale[:, :, None], log_phi], 2).detach().amax(2)
    phi = factor * torch.exp(log_phi - reference[:, :, None])
    decay = torch.exp(log_scale - reference)
    kv = kv * decay[..., None] + phi.mT @ values
    return kv, z * decay + phi.sum(2), reference

"""One query after few keys, in few calls: a step of decoding with the eager FAVOR+ path.

The tokens that leave the window now (without a window the new token itself) are taken as one chunk:
all of it enters the next state, and the query meets through features what it may see of it.

Letters: B batch, H query heads, Hkv key/value heads, Nk keys, F of them that may be summed up now,
D head dim, M features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnopt.kernels.favor.eager_features import LOG_MAPS, RELU_FLOOR, limits, monomials
from attnopt.kernels.favor.state import EMPTY
from attnopt.kernels.rows import first_real_token

MAX_FAR = 128  # more tokens to be summed up at once are the business of the chunked path


def is_step(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether a call is one query after at most a window, and a block that may just have left."""
    far = k.shape[2] - window + 1 if window else 1
    return q.shape[2] == 1 and far <= MAX_FAR and (window > 0 or k.shape[2] == 1)


def favor_step(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
    key_mask: Tensor | None, kv: Tensor, z: Tensor, log_scale: Tensor, *, feature_map: str,
    window: int, window_block: int, stabilizer: str, scale: float,
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and next state; arguments as in `favor_forward`.

    Returns:
        out `[B, H, 1, D]`, lse `[B, H, 1]`, kv `[B, H, M, D]`, z and log_scale `[B, H, M]`.
    """
    H, Nk = q.shape[1], k.shape[2]
    dtype = kv.dtype
    groups = H // k.shape[1]
    F = max(0, Nk - window + 1) if window else Nk
    query, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    if groups > 1:
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    seen, summed = _far_masks(key_mask, Nk, F, window, window_block, k.device)
    lq, lk, offset, base = _logits(
        query, keys[:, :, :F], projection, log_scale, feature_map, scale, window > 0
    )
    pq, top, pk, decay, reference = _weights(
        lq, lk, log_scale, base, summed, projection, feature_map, stabilizer, scale
    )
    before = kv * decay.unsqueeze(-1), z * decay
    state, mass = _absorb(*before, pk, values[:, :, :F])
    if window == 0:  # the query sees all that is summed up
        out, total = pq @ state, pq @ mass.unsqueeze(-1)
    else:
        assert seen is not None
        pairs = (pq @ pk.transpose(2, 3)) * seen  # [B, H, 1, F]
        out = pq @ before[0] + pairs @ values[:, :, :F]
        total = pq @ before[1].unsqueeze(-1) + pairs.sum(-1, keepdim=True)
    if window:
        far = log_gate.double().view(-1, 1, 1) + (top + offset.double())
        if feature_map == "favor":
            far = far - math.log(pq.shape[-1])
        far.masked_fill_(total <= 0, -torch.inf)
        log_mass = far + total.clamp(min=torch.finfo(dtype).tiny).log()
        scores = (query @ keys.transpose(2, 3)) * scale
        hidden = _hidden_near(key_mask, Nk, window, window_block, k.device)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        top = scores.amax(-1, keepdim=True).maximum(log_mass.to(dtype)).clamp_(min=EMPTY)
        factor = (far - top).exp_().to(dtype)
        near = scores.sub_(top).exp_()
        out = out * factor + near @ values
        total = total * factor + near.sum(-1, keepdim=True)
    else:
        top = top + offset.to(dtype)
    result = torch.div(out, total.masked_fill(total == 0, 1), out=torch.empty_like(q))
    return result, (top + total.log()).squeeze(-1), state, mass, reference


def _absorb(state: Tensor, mass: Tensor, pk: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The sums with F tokens of weights `[B, H, F, M]` and values `[B, H, F, D]` added."""
    if pk.shape[2] == 1:
        pk = pk.squeeze(2)
        return torch.addcmul(state, pk.unsqueeze(-1), values), mass + pk
    return state + pk.transpose(2, 3) @ values, mass + pk.sum(2)


def _far_masks(key_mask: Tensor | None, Nk: int, F: int, window: int, block: int,
               device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Which of the first F keys the query meets through features, and which are summed up.

    Returns:
        Two masks that fit `[B, H, 1, F]`; None where all do.
    """
    if not window:
        mask = None if key_mask is None else key_mask[:, None, None]
        return mask, mask
    j = torch.arange(F, device=device)
    if key_mask is None:
        return (
            (j < max(0, Nk - window) // block * block).view(1, 1, 1, F),
            (j < max(0, Nk + 1 - window) // block * block).view(1, 1, 1, F),
        )
    start = first_real_token(key_mask)[:, None]  # [B, 1]
    seen, summed = (
        key_mask[:, :F] & (j < start + (next_token - start - window + 1).clamp(min=0)
                           // block * block)
        for next_token in (Nk - 1, Nk)
    )
    return seen[:, None, None], summed[:, None, None]


def _hidden_near(key_mask: Tensor | None, Nk: int, window: int, block: int,
                 device: torch.device) -> Tensor | None:
    """Keys that the query does not see exactly, to fit `[B, H, 1, Nk]`; None if there are none."""
    if key_mask is None:
        first = max(0, Nk - window) // block * block
        return None if first == 0 else torch.arange(Nk, device=device) < first
    start = first_real_token(key_mask)[:, None]
    begin = start + (Nk - start - window).clamp(min=0) // block * block
    return (~key_mask | (torch.arange(Nk, device=device) < begin))[:, None, None]


def _logits(query: Tensor, keys: Tensor, projection: Tensor, log_scale: Tensor, feature_map: str,
            scale: float, normalized: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lq `[B, H, 1, M]`, lk - base `[B, H, F, M]`, the exponent both lack to a pair's, and base.

    Base, `[B, H, 1]`, is a whole number near the references: exponents relative to it are small.
    Plain maps return their features.
    """
    B, H, F, D = keys.shape
    x = torch.cat([query, keys], 2)
    base = log_scale.new_zeros(log_scale[..., :1].shape)
    if feature_map == "taylor":
        logits = monomials(x * scale**0.5)
        return logits[:, :, :1], logits[:, :, 1:], base.unsqueeze(-1), base
    rows = projection.to(x.dtype).transpose(1, 2)
    logits = x.transpose(0, 1).reshape(H, -1, D) @ rows
    logits = logits.mul_(scale**0.5).view(H, B, 1 + F, -1).transpose(0, 1)
    if feature_map == "relu":
        logits = logits.relu().add_(RELU_FLOOR)
    elif feature_map == "hedgehog":
        norms = logits.logsumexp(-1, keepdim=True)
        logits = logits - norms
        if not normalized:
            return logits[:, :, :1], logits[:, :, 1:], norms[:, :, :1].double(), base
    elif feature_map == "favor":
        base = log_scale.amax(-1, keepdim=True).round_()
        base.masked_fill_(base < -1e29, 0)
        x = (x if normalized else keys).double()
        norms = torch.linalg.vecdot(x, x).unsqueeze(-1)
        offset = base.unsqueeze(-1)
        shift = torch.add(offset, norms[:, :, -F:], alpha=scale / 2) if F else norms[:, :, :0]
        if normalized:
            offset = torch.add(offset, norms[:, :, :1], alpha=-scale / 2)
        return logits[:, :, :1], logits[:, :, 1:] - shift.to(logits.dtype), offset, base
    return logits[:, :, :1], logits[:, :, 1:], base.unsqueeze(-1), base


def _weights(lq: Tensor, lk: Tensor, log_scale: Tensor, base: Tensor, summed: Tensor | None,
             projection: Tensor, feature_map: str, stabilizer: str, scale: float
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pq `[B, H, 1, M]`, its exponent, pk `[B, H, F, M]`, the state's decay and its next log_scale.

    Weights of keys that are not `summed` are 0.
    """
    hidden = None if summed is None else ~summed.transpose(2, 3)  # [B, 1, F, 1]
    if feature_map not in LOG_MAPS:
        pk = lk if hidden is None else lk.masked_fill(hidden, 0)
        return lq, torch.zeros_like(lq[..., :1]), pk, log_scale.exp(), torch.zeros_like(log_scale)
    headroom, low, high, lowest = limits(lk.dtype)
    before = log_scale - base
    after = before
    if stabilizer == "static":
        rows = projection.to(lk.dtype)
        after = (rows.square().sum(-1) / 2 if feature_map != "hedgehog" else 0) - headroom - base
        after = before.maximum(after).ceil_()
    elif lk.shape[2]:
        if hidden is not None:
            lk = lk.masked_fill(hidden, -torch.inf)
        after = (lk.amax(2) - headroom).maximum(before).ceil_()
    decay = (before - after).exp()
    pk = (lk - (after + headroom).unsqueeze(2)).mul_(0.5)
    pk.clamp_(0.5 * (low - headroom), 0.5 * (high - headroom)).exp_()
    pk.mul_(math.exp(0.5 * headroom)).square_()
    if hidden is not None:
        pk.masked_fill_(hidden, 0)
    exponents = lq + after.unsqueeze(2)
    top = exponents.amax(-1, keepdim=True)
    return exponents.sub_(top).clamp_(min=lowest).exp_(), top, pk, decay, after + base

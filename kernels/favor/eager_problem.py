"""What both passes of the eager FAVOR+ path share: the cut into runs, and the sides of a run.

Queries and keys of a run are packed, their feature weights computed, and the state is carried along
the chunks. `eager.py` tells how the parts fit together.

Letters: B batch, H query heads, Hkv key/value heads, X = B H sequences, Nq queries, Nk keys, D head
dim, E = D + 1, M features, n chunks of C tokens, L = delay + C keys in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.kernels.favor.eager_features import FeatureMap, feature_count
from attnopt.kernels.favor.eager_step import is_step
from attnopt.kernels.favor.eager_window import Window, block_shift, shift_rows, unshift_rows
from attnopt.kernels.favor.state import EMPTY

RUN_BYTES = 3 << 19  # of features at a time: what a core's cache holds
CHUNK = 64  # tokens, where the block of a window does not say
SMALL_BLOCK = 16  # window blocks from this size on are chunks of their own, others share one


@dataclass(frozen=True)
class Run:
    """Chunks `t0:t1` that queries, keys or both are taken from."""

    t0: int
    t1: int
    queries: bool
    keys: bool


@dataclass(frozen=True)
class Plan:
    """How a problem is cut; `limit` is the end of the keys that features ever stand for."""

    Nq: int
    Nk: int
    C: int
    delay: int
    limit: int
    runs: tuple[Run, ...]

    @classmethod
    def make(cls, q: tuple[int, ...], Nk: int, M: int, window: int, block: int, causal: bool,
             itemsize: int) -> Plan:
        """Plan for queries of shape `q` `[B, H, Nq, D]`."""
        B, H, Nq, _ = q
        delay, C, limit = 0, min(CHUNK, Nk), Nk
        if window:
            delay = window - 1
            C = block if block >= SMALL_BLOCK else block * (-(-CHUNK // block))
            limit = max(0, (Nk - delay) // block * block)
        widest = max(M, delay + C if window else C)
        n = max(1, RUN_BYTES // (B * H * C * widest * itemsize))
        q0, q1 = (Nk - Nq - delay) // C, -(-(Nk - delay) // C)
        k1 = -(-limit // C)
        if causal:
            parts = [
                (q0, min(q1, 0), True, False), (0, min(q0, k1), False, True),
                (max(q0, 0), max(q1, k1), True, True),
            ]
        else:
            parts = [(0, k1, False, True), (q0, q1, True, False)]
        runs = [
            Run(t, min(t + n, end), queries, keys)
            for start, end, queries, keys in parts for t in range(start, end, n)
        ]
        return cls(Nq, Nk, C, delay, limit, tuple(runs))


def kept_shapes(q: Tensor, k: Tensor, projection: Tensor, *, feature_map: str, window: int,
                window_block: int, causal: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the chunked forward keeps: `[S, z]` and r where runs start, last r, `tot`."""
    B, H, Nq, D = q.shape
    M = feature_count(feature_map, projection.shape[1], D)
    extra = window_block - 1 if window else 0  # a mask may shift rows by that much
    window = min(window, k.shape[2] + extra + 1)
    plan = Plan.make((B, H, Nq + extra, D), k.shape[2] + extra, M, window, window_block, causal,
                     torch.promote_types(q.dtype, torch.float32).itemsize)
    return (len(plan.runs), B, H, M, D + 1), (0,), (len(plan.runs) + 1, B, H, M), (B, H, Nq)


def saved_shapes(q: Tensor, k: Tensor, projection: Tensor, *, feature_map: str, window: int,
                 window_block: int, causal: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of what `favor_forward` keeps for backward: nothing after a single step."""
    if is_step(q, k, window):
        return (0,), (0,), (0,), (0,)
    return kept_shapes(
        q, k, projection, feature_map=feature_map, window=window, window_block=window_block,
        causal=causal,
    )


@dataclass
class Keys:
    """The key side of a run, and the state that it begins and ends with."""

    x: Tensor  # [X, n C + delay, D]
    v: Tensor  # [X, n C + delay, E], with ones
    chunks: int  # of the far part: n, or 1 where no keys are absorbed and all queries are alike
    before: Tensor  # [S, z] that each chunk's queries see, [X, chunks, M, E]
    reference: Tensor  # its reference, [X, chunks, M]
    sums: Tensor  # [S, z] after the run, [X, M, E]
    last: Tensor  # its reference, [X, M]
    pk: Tensor | None = None  # [X, n, C, M]
    phi: Tensor | None = None  # [X, n, C, M], where backward needs it
    decay: Tensor | None = None  # of the state when a chunk is added, [X, n, M]
    hidden: Tensor | None = None  # keys that are not summed, [X, n, C, 1]


@dataclass
class Queries:
    """The query side of a run."""

    x: Tensor  # [X, n C, D]
    pq: Tensor  # [X, chunks, -1, M]
    exponent: Tensor  # left out of pq, [X, n C, 1]
    phi: Tensor | None  # [X, n C, M], where backward needs it
    pairs: Tensor | None  # A, [X, n, C, C]
    weights: Tensor | None = None  # of the window, [X, n, C, L]
    factor: Tensor | None = None  # g, [X, n C, 1]


class Problem:
    """One call: its tensors, its plan, and the two sides of a run that both passes compute."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, log_gate: Tensor,
                 key_mask: Tensor | None, *, feature_map: str, window: int, window_block: int,
                 causal: bool, stabilizer: str, scale: float, learns: bool = False) -> None:
        self.B, self.H, _, self.D = q.shape
        self.X, self.G = self.B * self.H, self.H // k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.shift, self.extra = None, 0
        if key_mask is not None and window > 0:
            self.shift, self.extra = block_shift(key_mask, window_block), window_block - 1
            self.ends = (k.shape[2] + self.shift - window + 1).clamp(min=0)
            self.ends = self.ends // window_block * window_block  # of the far keys, [B]
            key_mask = shift_rows(key_mask[:, None], self.shift, self.extra)[:, 0]
        window = min(window, k.shape[2] + self.extra + 1)  # so many tokens leave no far keys
        self.q, self.k, self.v = self.aligned(q), self.aligned(k), self.aligned(v)
        self.hidden = None if key_mask is None else ~key_mask
        self.features = FeatureMap(
            feature_map, projection, self.B, scale, window > 0, self.dtype, learns
        )
        self.running = stabilizer == "running" and self.features.is_log
        if self.running:
            self.features.set_center(self.k, key_mask)
        self.plan = plan = Plan.make(
            tuple(self.q.shape), self.k.shape[2], self.features.features, window, window_block,
            causal, self.dtype.itemsize,
        )
        self.far = None  # pairs within a chunk that meet through features, [C, C]
        i = torch.arange(plan.C, device=q.device)
        if not window and causal:
            self.far = (i <= i[:, None]).to(self.dtype)
        elif window and plan.C > window_block:
            self.far = (i < i[:, None] // window_block * window_block).to(self.dtype)
        self.window = None
        if window:
            like = projection.new_empty(0, dtype=self.dtype)
            self.window = Window(plan.C, plan.delay, window_block, scale, like)
            log_c = log_gate.double().repeat(self.B).view(-1, 1, 1)
            self.log_c = log_c - math.log(projection.shape[1]) if feature_map == "favor" else log_c

    def aligned(self, x: Tensor) -> Tensor:
        """A tensor `[B, h, N, ...]`, shifted to the blocks of its rows where a mask moves them."""
        return x if self.shift is None else shift_rows(x, self.shift, self.extra)

    def restored(self, x: Tensor, like: Tensor) -> Tensor:
        """Inverse of `aligned`, in the dtype and layout of `like`."""
        if self.shift is not None:
            return unshift_rows(x, self.shift, like)
        return x if x.dtype == like.dtype else torch.empty_like(like).copy_(x)

    def pack(self, x: Tensor, start: int, rows: int, ones: bool = False) -> Tensor:
        """Tokens of `[B, h, N, D]` from `start` on as `[X, rows, D]`, zeros beyond the text.

        With `ones` a column of ones follows: `[X, rows, E]`.
        """
        B, h, N, D = x.shape
        lo, hi = max(start, 0), max(0, min(start + rows, N))
        if hi - lo == rows and not ones and h == self.H and x.dtype == self.dtype:
            return x[:, :, lo:hi].flatten(0, 1)  # a view where the strides allow it
        make = torch.empty if hi - lo == rows else torch.zeros
        out = make(B, h, self.H // h, rows, D + ones, dtype=self.dtype, device=x.device)
        if lo < hi:
            out[..., lo - start : hi - start, :D] = x[:, :, None, lo:hi]
        if ones:
            out[..., D] = 1
        return out.view(self.X, rows, D + ones)

    def query_start(self, run: Run) -> int:
        """Index of the run's first query row, which may lie before the first query."""
        plan = self.plan
        return plan.delay + run.t0 * plan.C - (plan.Nk - plan.Nq)

    def place(self, target: Tensor, start: int, rows: int) -> Tensor | None:
        """The rows of `[B, H, N, D]` from `start` on as a view `[X, rows, D]`, if there is one."""
        B, h, N, D = target.shape
        fits = start >= 0 and start + rows <= N and h == self.H and target.dtype == self.dtype
        if not fits or (B > 1 and target.stride(0) != h * target.stride(1)):
            return None
        return target[:, :, start : start + rows].view(self.X, rows, D)

    def write(self, target: Tensor, rows: Tensor, start: int, *, add: bool = False) -> None:
        """Put rows `[X, rows, D]` into `[B, h, N, D]` from `start` on, summed over groups."""
        h, N = target.shape[1:3]
        lo, hi = max(start, 0), min(start + rows.shape[1], N)
        if lo >= hi or rows.data_ptr() == target[:, :, lo:hi].data_ptr():
            return  # nothing, or already there (see `place`)
        rows = rows[:, lo - start : hi - start].unflatten(0, (self.B, h, self.H // h))
        rows = rows.squeeze(2) if h == self.H else rows.sum(2)
        if add:
            target[:, :, lo:hi] += rows
        else:
            target[:, :, lo:hi] = rows

    def hidden_keys(self, start: int, rows: int, *, far: bool) -> Tensor | None:
        """Which keys are not seen, `[X, rows]`; None if all are. `far`: also those never summed."""
        inside = start >= 0 and start + rows <= (self.plan.limit if far else self.plan.Nk)
        if self.hidden is None:
            if inside:
                return None
            y = torch.arange(start, start + rows, device=self.k.device)
            hidden = (y < 0) | (y >= (self.plan.limit if far else self.plan.Nk))
            return hidden.expand(self.X, rows)
        hidden = self.hidden.new_ones(self.B, rows)
        lo, hi = max(start, 0), max(0, min(start + rows, self.plan.Nk))
        if lo < hi:
            hidden[:, lo - start : hi - start] = self.hidden[:, lo:hi]
        if far and self.shift is not None:
            y = torch.arange(start, start + rows, device=self.k.device)
            hidden |= y >= self.ends[:, None]
        return hidden.repeat_interleave(self.H, dim=0)

    def initial(self, kv: Tensor, z: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[S, z]` `[X, M, E]` and r `[X, M]` to begin with, and the factor that led there."""
        log_scale = log_scale.double().flatten(0, 1)
        if self.running:
            log_scale = log_scale + self.features.center[:, None]
            reference = log_scale.ceil()
        else:
            reference = self.features.static_reference(log_scale)
        factor = (log_scale - reference).exp_().unsqueeze(-1).to(self.dtype)
        sums = torch.cat([kv, z.unsqueeze(-1)], -1).to(self.dtype).flatten(0, 1)
        return sums * factor, reference.to(self.dtype), factor

    def final(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """log_scale `[X, M]` of the next state, and the factor `[X, M, 1]` of its sums."""
        exact = last.double() - self.features.center[:, None]
        log_scale = exact.ceil()
        return log_scale.to(self.dtype), (exact - log_scale).exp_().unsqueeze(-1).to(self.dtype)

    def keys(self, run: Run, sums: Tensor, last: Tensor, *, backward: bool = False) -> Keys:
        """Load a run's keys and add them to `sums` `[X, M, E]` at reference `last` `[X, M]`."""
        C, n = self.plan.C, run.t1 - run.t0
        halo = self.plan.delay if run.queries else 0
        rows = n * C + halo if run.keys or halo else 0
        x = self.pack(self.k, run.t0 * C, rows)
        v = self.pack(self.v, run.t0 * C, rows, ones=True)
        if not run.keys:
            return Keys(x, v, 1, sums[:, None], last[:, None], sums, last)
        f = self.features
        hidden = self.hidden_keys(run.t0 * C, n * C, far=True)
        if hidden is not None:
            hidden = hidden.view(self.X, n, C, 1)
        logits = f.key_logits(x[:, : n * C]).view(self.X, n, C, -1)
        if self.running:
            after = f.running_references(logits, hidden, last)
            before = torch.cat([last[:, None], after[:, :-1]], 1)
            decay = (before - after).exp_()
        else:
            before = after = last[:, None].expand(-1, n, -1)
            decay = None
        phi = logits.exp() if backward and f.name == "hedgehog" else None
        pk = f.key_weights(logits, hidden, after)
        phi = pk if f.name == "relu" else phi
        added = torch.bmm(flat(pk).transpose(1, 2), self.chunked(v, n)).unflatten(0, (-1, n))
        states, end = scan(added, sums, decay)
        reference = before
        if self.far is not None:
            reference = after
            if decay is not None:
                states.mul_(decay.unsqueeze(-1))
        return Keys(x, v, n, states, reference, end, after[:, -1], pk, phi, decay, hidden)

    def chunked(self, x: Tensor, n: int) -> Tensor:
        """The chunks `[X n, C, -1]` of a run's `[X, n C + delay, -1]`."""
        C = self.plan.C
        return x[:, : n * C].reshape(-1, C, x.shape[-1])

    def queries(self, run: Run, keys: Keys, *, backward: bool = False) -> Queries:
        """Load a run's queries with their far and near weights."""
        C, n = self.plan.C, run.t1 - run.t0
        f = self.features
        x = self.pack(self.q, self.query_start(run), n * C)
        logits = f.query_logits(x)
        phi = None
        if backward and f.name == "hedgehog" and f.normalize_queries:
            phi = logits.exp()
        pq, exponent = f.query_weights(
            logits.view(self.X, keys.chunks, -1, logits.shape[-1]), keys.reference
        )
        phi = logits if f.name == "relu" else phi
        pairs = None
        if run.keys and self.far is not None:
            assert keys.pk is not None
            pairs = torch.bmm(flat(pq), flat(keys.pk).transpose(1, 2))
            pairs = pairs.view(self.X, n, C, C).mul_(self.far)
        exponent = exponent.view(self.X, n * C, 1)
        out = Queries(x, pq, exponent, phi, pairs)
        if self.window is None:
            return out
        # the larger logarithm of both parts leaves both: fp64, for these may be large numbers
        mass = torch.bmm(flat(pq), flat(keys.before)[..., -1:]).view(self.X, n * C, 1)
        if pairs is not None:
            mass += pairs.sum(-1, keepdim=True).view_as(mass)
        hidden = self.hidden_keys(run.t0 * C, n * C + self.plan.delay, far=False)
        scores = self.window.scores(x.view(self.X, n, C, -1), keys.x, hidden, run.t0 * C)
        top = scores.amax(-1).view(self.X, n * C, 1)
        far = exponent.double() + f.query_offsets(x) + self.log_c
        far.masked_fill_(mass <= 0, -torch.inf)
        log_mass = (far + mass.clamp(min=torch.finfo(self.dtype).tiny).log()).to(self.dtype)
        out.exponent = top.maximum(log_mass).clamp_(min=EMPTY)
        out.factor = (far - out.exponent).exp_().to(self.dtype)
        out.weights = scores.sub_(out.exponent.view(self.X, n, C, 1)).exp_()
        return out


def flat(x: Tensor) -> Tensor:
    """`[X, n, rows, cols]` as `[X n, rows, cols]`."""
    return x.reshape(-1, *x.shape[2:])


def scan(added: Tensor, start: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after all: `s <- decay_t s + added_t` from `start`.

    Args:
        added: `[X, n, M, E]`.
        start: `[X, M, E]`.
        decay: `[X, n, M]`, or None for ones.

    Returns:
        `[X, n, M, E]` and `[X, M, E]`.
    """
    states, n = torch.empty_like(added), added.shape[1]
    states[:, 0] = start
    for t in range(n):
        target = states[:, t + 1] if t + 1 < n else torch.empty_like(start)
        if decay is None:
            torch.add(states[:, t], added[:, t], out=target)
        else:
            torch.addcmul(added[:, t], states[:, t], decay[:, t, :, None], out=target)
    return states, target

"""What the traffic instrument counts: ops at sizes that a machine without a GPU can run.

One head of 64 columns in bf16. Bytes of a head are those of any other, and grow with the number of
tokens by a law that a few short texts determine: lengths are multiples of every tile, and long
enough that each query has all its blocks. FAVOR+ depends on the number of segments as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import work
from attnopt.bench.contenders.nsa import PATTERNS
from attnopt.bench.work import Work

D, DTYPE, FEATURES = 64, torch.bfloat16, 64
LONG, SHORT = 65_536, 8_192  # where budgets hold; the short regime of NSA ends at the latter
HEADS = 12  # of the models whose segments budgets are about

Call = Callable[[], Tensor]
Run = tuple[int, int]  # tokens and segments


@dataclass(frozen=True)
class Part:
    """Runs that determine the laws of some kernels.

    Attributes:
        make: tokens to what takes a gradient, and the call.
        runs: lengths, and numbers of segments where they matter.
        terms: of the laws, among "1", "N", "N2" and "segments".
        only: kernels that the runs determine, none for all.
        without: kernels that another part determines.
    """

    make: Callable[[int], tuple[list[Tensor], Call]]
    runs: tuple[Run, ...]
    terms: tuple[str, ...] = ("1", "N")
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def determines(self, kernel: str) -> bool:
        """Whether the law of a kernel comes from here."""
        return kernel not in self.without and (not self.only or kernel in self.only)


@dataclass(frozen=True)
class Subject:
    """An op with sizes.

    Attributes:
        name: that of the contender in `attnopt.bench.contenders`.
        op: "lastk", "favor" or "nsa".
        regime: of NSA, else "".
        parts: the whole op first.
        least: phase and tokens to the least work of one head.
        at: tokens at which budgets hold.
    """

    name: str
    op: str
    regime: str
    parts: tuple[Part, ...]
    least: Callable[[str, int], Work]
    at: int = LONG

    def segments(self, tokens: int, heads: int) -> int:
        """Segments that the plan of a call with so many heads in all has; 1 without segments."""
        if self.op != "favor":
            return 1
        from attnopt.kernels.favor.plan import make_plan

        q = torch.empty(1, heads, tokens, D, device="meta", dtype=DTYPE)
        return make_plan(q, q, FEATURES, window=0, window_block=32, causal=True).segments


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DTYPE).requires_grad_()


def _qkv(tokens: int) -> list[Tensor]:
    return [_random(1, 1, tokens, D, seed=seed) for seed in range(3)]


def _lastk(width: int, tokens: int) -> tuple[list[Tensor], Call]:
    from attnopt.kernels.lastk.op import lastk_attention

    leaves = [*_qkv(tokens), torch.zeros(1, width, requires_grad=True)]
    return leaves, lambda: lastk_attention(*leaves)


def _favor(window: int, tokens: int) -> tuple[list[Tensor], Call]:
    from attnopt.kernels.favor.op import favor_attention
    from attnopt.kernels.favor.projections import orthogonal_projection

    leaves, rng = _qkv(tokens), torch.Generator().manual_seed(0)
    rows = orthogonal_projection(FEATURES, D, generator=rng)
    q, k, v = leaves
    return leaves, lambda: favor_attention(q, k, v, rows, window=window)


def _nsa(name: str, regime: str, tokens: int) -> tuple[list[Tensor], Call]:
    from attnopt.kernels.nsa.compress import mean_compress
    from attnopt.kernels.nsa.op import nsa_attention

    pattern, (q, k, v) = PATTERNS[name], _qkv(tokens)
    sizes = {size: pattern[size] for size in ("compress_block", "compress_stride")}
    means = [mean_compress(x.detach(), **sizes).requires_grad_() for x in (k, v)]
    leaves, gates = [q, k, v, *means], None
    if pattern["combine"] == "gates":
        gates = _random(1, 1, tokens, 3, seed=3)
        leaves.append(gates)
    return leaves, lambda: nsa_attention(*leaves[:5], gates=gates, regime=regime, **pattern)


def _nsa_far(name: str, tokens: int) -> tuple[list[Tensor], Call]:
    """The compressed branch and the selection, whose loops grow with the text."""
    from attnopt.kernels.nsa.arguments import gates_pattern, merged_pattern
    from attnopt.kernels.nsa.calls import make_call

    leaves, _ = _nsa(name, "long", tokens)
    q, k, _, k_cmp, v_cmp = leaves[:5]
    sizes = dict(PATTERNS[name])
    merged = sizes.pop("combine") == "merged"
    names = ("compress_block", "compress_stride", "select_block", "num_selected", "window")
    make_pattern: Callable[..., Any] = merged_pattern if merged else gates_pattern
    pattern = make_pattern(*(sizes[size] for size in names), None, None)
    call = make_call(pattern, tokens, None, k, D**-0.5, "long", "triton")

    def run() -> Tensor:
        if merged:
            return call.compressed(q, k_cmp, v_cmp, left_out=call.select(q, k_cmp))[0]
        out, lse = call.compressed(q, k_cmp, v_cmp)
        call.select(q, k_cmp, lse)
        return out

    return [q, k_cmp, v_cmp], run


def _least(compute: Callable[..., Work], phase: str, tokens: int) -> Work:
    return compute(phase, 1, 1, 1, tokens, tokens, D, DTYPE.itemsize)


def _nsa_least(name: str) -> Callable[..., Work]:
    sizes = dict(PATTERNS[name])
    renamed = {"block": sizes.pop("compress_block"), "stride": sizes.pop("compress_stride")}
    return partial(_least, partial(work.nsa, **renamed, **sizes))


def _runs(*tokens: int) -> tuple[Run, ...]:
    return tuple((n, 1) for n in tokens)


def _nsa_subjects(name: str) -> tuple[Subject, Subject]:
    """Both regimes. In "short" everything is quadratic, in "long" what `_nsa_far` runs.

    Its kernels go 32 compressed blocks at a time: lengths are multiples of that.
    """
    kernels = ("select", "compressed_forward", "compressed_query", "compressed_key")
    quadratic = tuple(f"{kernel}_kernel" for kernel in kernels)
    chunk = 32 * PATTERNS[name]["compress_stride"]
    square = ("1", "N", "N2")
    far = Part(partial(_nsa_far, name), _runs(chunk, 2 * chunk, 3 * chunk), square, quadratic)
    long = Part(partial(_nsa, name, "long"), _runs(448, 512, 576), without=quadratic)
    short = Part(partial(_nsa, name, "short"), _runs(192, 256, 320), square, without=quadratic)
    least = _nsa_least(name)
    return (Subject(name, "nsa", "long", (long, far), least),
            Subject(name, "nsa", "short", (short, far), least, SHORT))


def _favor_subject(name: str, window: int) -> Subject:
    runs = ((128, 2), (256, 2), (256, 4), (384, 3))
    part = Part(partial(_favor, window), runs, ("1", "N", "segments"))
    least = partial(_least, partial(work.favor, M=FEATURES, window=window))
    return Subject(name, "favor", "", (part,), least)


SUBJECTS = (
    Subject("lastk-5", "lastk", "", (Part(partial(_lastk, 5), _runs(128, 256, 384)),),
            partial(_least, partial(work.lastk, W=5))),
    _favor_subject("favor-64", 0),
    _favor_subject("favor-64-w33", 33),
    *_nsa_subjects("nsa-merged"),
    *_nsa_subjects("nsa-gates"),
)


@dataclass(frozen=True)
class Budget:
    """What an op and phase may move: more is a regression.

    Attributes:
        ratio: bytes over the least possible at the subject's `at`.
        growth: exponent of the bytes from half that length on.
        target: the ratio to reach, shown beside.
        reason: where the target comes from.
    """

    ratio: float
    growth: float
    target: float
    reason: str


_BAND = "each tensor once, and a halo per tile"
_STATES = "k and v twice, q and o once; little for the states of segments"
_ADJOINT = "q and dO three times, k and v twice, o, dq, dk and dv once"
_GATHER = "per slot: gather q, write its partial result, read that; other branches once"
_GATHER_BACK = "per slot: gather q and dO, write partial dq, read that; other branches once"
_WALK = "one walk over all earlier keys per 64 queries, as dense attention"
_WALKS = "one walk over keys per 64 queries, one over queries per 32 keys"

# Name, regime and phase. The budgets of NSA are what its kernels move today, and 4 % more.
BUDGETS: dict[tuple[str, str, str], Budget] = {
    ("lastk-5", "", "forward"): Budget(1.15, 1.05, 1.05, _BAND),
    ("lastk-5", "", "backward"): Budget(1.15, 1.05, 1.1, _BAND),
    ("favor-64", "", "forward"): Budget(1.6, 1.05, 1.5, _STATES),
    ("favor-64", "", "backward"): Budget(2.0, 1.05, 1.75, _ADJOINT),
    ("favor-64-w33", "", "forward"): Budget(1.6, 1.05, 1.5, _STATES),
    ("favor-64-w33", "", "backward"): Budget(2.0, 1.05, 1.75, _ADJOINT),
    ("nsa-merged", "long", "forward"): Budget(24.1, 1.5, 7.0, _GATHER),
    ("nsa-merged", "long", "backward"): Budget(24.7, 1.5, 5.0, _GATHER_BACK),
    ("nsa-gates", "long", "forward"): Budget(35.4, 1.65, 6.5, _GATHER),
    ("nsa-gates", "long", "backward"): Budget(37.6, 1.6, 5.0, _GATHER_BACK),
    ("nsa-merged", "short", "forward"): Budget(38.2, 1.9, 32.0, _WALK),
    ("nsa-merged", "short", "backward"): Budget(56.1, 1.95, 48.0, _WALKS),
    ("nsa-gates", "short", "forward"): Budget(40.5, 1.85, 33.0, _WALK),
    ("nsa-gates", "short", "backward"): Budget(59.9, 1.85, 49.0, _WALKS),
}

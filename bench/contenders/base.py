"""What a contender is, and how it is checked at the shape at which it is timed.

The float64 definition of a whole call is quadratic, that of a few query rows is not: with an
upstream gradient that is random on those rows and zero on all others, they determine the gradient
of every input in full. So each timed shape is checked, whatever its length. The rows are runs of
neighbors, so that keys get gradients from several queries: the first, some across a tile's edge,
some at random, the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from attnopt.bench.work import Work

Tensors = dict[str, Tensor]
PHASES = ("fwd", "bwd", "decode")
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2}
Define = Callable[[Tensors, int, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: batch, query heads, head dimension, tokens."""

    B: int
    H: int
    D: int
    N: int


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed.

    Attributes:
        call: what is timed; on a GPU its work may be asynchronous.
        check: relative error (Frobenius) of each result against its float64 definition, on
            sampled query rows.
        limit: what the errors may be.
        work: the least that any implementation must compute and move.
        state_bytes: what a step of decoding keeps of the past: a cache or a state.
    """

    call: Callable[[], object]
    check: Callable[[], dict[str, float]]
    limit: float
    work: Work
    state_bytes: int = 0


@dataclass(frozen=True)
class Contender:
    """One implementation that is measured.

    Attributes:
        name: unique and short.
        label: what a report calls it.
        mechanism: "dense", "lastk", "favor" or "nsa".
        level: "op" for attention alone, "layer" with its projections, "block" or "model".
        library: distribution whose version is recorded.
        prepare: phase, shape, dtype, device and seed to a call that is ready.
        partner: the dense contender that speed-ups refer to.
        phases: those that it has.
        note: what a reader must know of it.
        missing: why it cannot run on a device with a dtype, or None.
    """

    name: str
    label: str
    mechanism: str
    level: str
    library: str
    prepare: Callable[..., Prepared]
    partner: str | None = None
    phases: tuple[str, ...] = PHASES
    note: str = ""
    missing: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None

    @property
    def ours(self) -> bool:
        """Whether this project wrote it."""
        return self.library == "attnopt"

    def about(self) -> dict[str, object]:
        """What a results file records of it."""
        return {
            "label": self.label, "mechanism": self.mechanism, "level": self.level,
            "ours": self.ours, "library": self.library, "version": installed(self.library),
            "partner": self.partner, "note": self.note,
        }  # fmt: skip


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    if distribution == "attnopt":
        from attnopt import __version__

        return __version__
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def needs(distribution: str, module: str) -> Callable[[torch.device, torch.dtype], str | None]:
    """`missing` of a peer: it must be installed."""

    def missing(device: torch.device, dtype: torch.dtype) -> str | None:
        if find_spec(module) is None:
            return f"{distribution} is not installed (pip install attnopt[peers])"
        return None

    return missing


def draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int,
         queries: int | None = None) -> Tensors:
    """Draw q, k, v `[B, H, N, D]` and an upstream gradient of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name in ("q", "k", "v", "grad"):
        rows = shape.N if queries is None or name in ("k", "v") else queries
        size = (shape.B, shape.H, rows, shape.D)
        found[name] = torch.randn(size, generator=generator, device=device).to(dtype)
    return found


def prepare_op(
    attend: Callable[[Tensors], Tensor],
    define: Define,
    tensors: Tensors,
    phase: str,
    work: Work,
    *,
    limit: float | None = None,
    fixed: Tensors | None = None,
    state_bytes: int = 0,
) -> Prepared:
    """Make an attention op ready.

    Args:
        attend: tensors by name to the output `[B, H, N, D]`.
        define: float64 tensors by name and a run of queries, from the first to one past the last,
            to what the definition says of these, `[B, H, run, D]`.
        tensors: what gets a gradient, by name, and "grad".
        phase: "fwd", "bwd" or "decode".
        work: the least work.
        limit: of the errors, by default that of the dtype.
        fixed: tensors without a gradient.
        state_bytes: see `Prepared`.
    """
    inputs = dict(tensors)
    grad, fixed = inputs.pop("grad"), fixed or {}
    names, constants = list(inputs), {name: double(x) for name, x in fixed.items()}

    def differentiate(found: Tensor, leaves: Tensors, upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            found, [leaves[name] for name in names], upstream, materialize_grads=True
        )

    def call() -> object:
        if phase != "bwd":
            with torch.no_grad():
                return attend(inputs | fixed)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        return differentiate(attend(leaves | fixed), leaves, grad)

    def check() -> dict[str, float]:
        with torch.set_grad_enabled(phase == "bwd"):
            leaves = {name: x.detach().requires_grad_(phase == "bwd") for name, x in inputs.items()}
            exact = {name: double(x).requires_grad_(phase == "bwd") for name, x in inputs.items()}
            out, runs = attend(leaves | fixed), sampled_runs(grad.shape[2])
            truth = torch.cat([define(exact | constants, *run) for run in runs], 2)
        rows = [i for run in runs for i in range(*run)]
        errors = {"out": relative_error(out[:, :, rows], truth, out)}
        if phase == "bwd":
            sparse = torch.zeros_like(grad)
            sparse[:, :, rows] = grad[:, :, rows]
            ours = differentiate(out, leaves, sparse)
            theirs = differentiate(truth, exact, double(grad[:, :, rows]))
            for name, x, y in zip(names, ours, theirs, strict=True):
                errors[f"d{name}"] = relative_error(x, y, x)
        return errors

    limit = LIMITS[grad.dtype] if limit is None else limit
    return Prepared(call, check, limit, work, state_bytes)


def double(x: Tensor) -> Tensor:
    """Floating-point tensors in float64, others as they are."""
    return x.detach().double() if x.is_floating_point() else x


def sampled_runs(n: int) -> list[tuple[int, int]]:
    """Runs of neighboring queries, from the first to one past the last; the same for a length."""
    generator = torch.Generator().manual_seed(n)
    starts = torch.randint(n, (2,), generator=generator).tolist()
    chosen = {*range(2), *range(62, 67), *range(n - 4, n), *starts, *(i + 1 for i in starts)}
    rows = sorted(i for i in chosen if 0 <= i < n)
    ends = [i for i in rows if i + 1 not in chosen or i + 1 == n]
    firsts = [i for i in rows if i - 1 not in chosen or i == 0]
    return [(first, end + 1) for first, end in zip(firsts, ends, strict=True)]


def prefix(tensors: Tensors, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """A run of queries and the keys and values up to its last; queries are the last tokens."""
    q, k, v = (tensors[name] for name in "qkv")
    seen = end + k.shape[2] - q.shape[2]
    return q[:, :, first:end], k[:, :, :seen], v[:, :, :seen]


def causal(scores: Tensor) -> Tensor:
    """Which of `[..., Nq, Nk]` a query may see, the queries being the last tokens."""
    Nq, Nk = scores.shape[-2:]
    return torch.ones(Nq, Nk, dtype=torch.bool, device=scores.device).tril(Nk - Nq)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors; None has none."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def relative_error(found: Tensor, truth: Tensor, everything: Tensor) -> float:
    """`|found - truth| / |truth|`; NaN where anything in `everything` is not finite."""
    if not bool(everything.isfinite().all()):
        return float("nan")
    scale = float(truth.detach().norm())
    return float((found.detach() - truth.detach()).norm()) / (scale if scale > 0 else 1.0)

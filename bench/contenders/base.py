"""What a contender is, and how it is checked at the shape at which it is timed.

The float64 definition of a whole call is quadratic, that of a few query rows is not: with an
upstream gradient that is random on those rows and zero on all others, they determine the gradient
of every input in full. So each timed shape is checked, whatever its length.
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
ROWS = 5  # query rows that a check looks at
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


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
        check: largest relative error (Frobenius) of each result against its float64 definition, on
            sampled query rows.
        limit: what the errors may be.
        work: the least that any implementation must compute and move.
    """

    call: Callable[[], object]
    check: Callable[[], dict[str, float]]
    limit: float
    work: Work


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


def needs_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """`missing` of what runs on GPUs only."""
    return None if device.type == "cuda" else "needs a GPU"


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
    define: Callable[[Tensors, list[int]], Tensor],
    tensors: Tensors,
    phase: str,
    work: Work,
    *,
    limit: float | None = None,
    fixed: Tensors | None = None,
) -> Prepared:
    """Make an attention op ready.

    Args:
        attend: tensors by name to the output `[B, H, N, D]`.
        define: float64 tensors by name and some rows of the queries to what the definition says
            of these, `[B, H, rows, D]`.
        tensors: what gets a gradient, by name, and "grad".
        phase: "fwd", "bwd" or "decode".
        work: the least work.
        limit: of the errors, by default that of the dtype.
        fixed: tensors without a gradient.
    """
    inputs = dict(tensors)
    grad, fixed = inputs.pop("grad"), fixed or {}
    names = list(inputs)

    def call() -> object:
        if phase != "bwd":
            with torch.no_grad():
                return attend(inputs | fixed)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        return torch.autograd.grad(
            attend(leaves | fixed), list(leaves.values()), grad, materialize_grads=True
        )

    def check() -> dict[str, float]:
        rows = sampled_rows(grad.shape[2])
        if phase != "bwd":
            with torch.no_grad():
                out = attend(inputs | fixed)
                exact = {name: double(x) for name, x in (inputs | fixed).items()}
                return {"out": relative_error(out[:, :, rows], define(exact, rows), out)}
        sparse = torch.zeros_like(grad)
        sparse[:, :, rows] = grad[:, :, rows]
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = attend(leaves | fixed)
        found = torch.autograd.grad(out, list(leaves.values()), sparse, materialize_grads=True)
        exact = {name: double(x).requires_grad_() for name, x in inputs.items()}
        constants = {name: double(x) for name, x in fixed.items()}
        truth = define(exact | constants, rows)
        truths = torch.autograd.grad(
            truth, list(exact.values()), double(grad[:, :, rows]), materialize_grads=True
        )
        errors = {"out": relative_error(out[:, :, rows], truth.detach(), out)}
        for name, x, y in zip(names, found, truths, strict=True):
            errors[f"d{name}"] = relative_error(x, y, x)
        return errors

    return Prepared(call, check, limit or LIMITS[grad.dtype], work)


def double(x: Tensor) -> Tensor:
    """Floating-point tensors in float64, others as they are."""
    return x.detach().double() if x.is_floating_point() else x


def sampled_rows(n: int) -> list[int]:
    """The last query and some random ones, always the same for a length."""
    generator = torch.Generator().manual_seed(n)
    some = torch.randint(n, (ROWS - 1,), generator=generator).tolist()
    return sorted({*some, n - 1})


def prefix(tensors: Tensors, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """The query of row i and the keys and values that it may see; queries are the last tokens."""
    q, k, v = (tensors[name] for name in "qkv")
    seen = i + 1 + k.shape[2] - q.shape[2]
    return q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen]


def each_row(define: Callable[[Tensors, int], Tensor]) -> Callable[[Tensors, list[int]], Tensor]:
    """The definition of several rows from that of one."""

    def rows_of(tensors: Tensors, rows: list[int]) -> Tensor:
        return torch.cat([define(tensors, i) for i in rows], 2)

    return rows_of


def relative_error(found: Tensor, truth: Tensor, everything: Tensor) -> float:
    """`|found - truth| / |truth|`; NaN where anything in `everything` is not finite."""
    if not bool(everything.isfinite().all()):
        return float("nan")
    scale = float(truth.norm())
    return float((found.detach().double() - truth).norm()) / (scale if scale > 0 else 1.0)

"""How long ops would take on GPUs, predicted from counted bytes and FLOPs. Nothing is measured.

`predict` takes a record of the traffic instrument. Of every op it knows by what law bytes and FLOPs
of one head grow; heads are alike, so a call moves B H times that, and

    seconds = max(bytes / (BANDWIDTH_SHARE bandwidth), flops / (RATE_SHARE rate))
              + launches * LAUNCH_SECONDS

Bytes are distinct bytes of each program, as if caches kept nothing from one program to the next;
`best_seconds` takes distinct bytes of each launch instead, as if they kept all. Dense causal
attention stands beside with the least work that its definition allows, under the same assumptions
and in one launch forward, two backward: real ones are slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from rich.console import Console

from attnopt.bench import work
from attnopt.bench.chips import CHIPS, Chip
from attnopt.errors import UserError

BANDWIDTH_SHARE, RATE_SHARE, LAUNCH_SECONDS = 0.8, 0.6, 2e-6
NAMES = ("T4", "A100", "H100", "H200")
LENGTHS = (1024, 4096, 16_384, 65_536)
BATCHES, HEADS, D = (1, 8), 12, 64
ITEMSIZE = 2
T4_NOTE = 'Triton has no tensor cores on the T4: there "auto" runs the eager path instead.'
Record = dict[str, Any]


def predict(
    record: Mapping[str, Any], *, chips: Sequence[str] = NAMES, lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
) -> Record:
    """Predict every op of a traffic record, forward ("fwd") and forward + backward ("bwd").

    Args:
        record: what `attnopt.bench.instruments.traffic.examine` returned.
        chips: names in `attnopt.bench.chips.CHIPS`.
        lengths: tokens.
        batches: batch sizes.

    Returns:
        "rows" with op, phase, chip, dtype, B, H, D, N, seconds, best_seconds, bound ("memory",
        "compute" or "launches"), bytes, flops, launches, dense_seconds and speedup; "crossovers":
        by op, phase, chip and B the tokens from which it is predicted ahead of dense, or None.

    Raises:
        UserError: a record of something else.
    """
    if record.get("instrument") != "traffic":
        got = record.get("instrument", record.get("kind", "something else"))
        raise UserError(f"the roofline takes what `attnopt bench traffic --json` wrote; got {got}")
    laws = {(law["op"], law["regime"], law["phase"]): law for law in record["laws"]}
    ops = dict.fromkeys(law["op"] for law in record["laws"])
    rows, crossovers = [], []
    for op, phase, chip, B in product(ops, ("fwd", "bwd"), chips, batches):
        rows += [_row(laws, op, phase, CHIPS[chip], B, N) for N in lengths]
        crossovers.append({"op": op, "phase": phase, "chip": chip, "B": B,
                           "tokens": _crossover(laws, op, phase, CHIPS[chip], B)})
    return {
        "kind": "roofline",
        "format": 1,
        "assumptions": {
            "share of the bandwidth": BANDWIDTH_SHARE, "share of the rate": RATE_SHARE,
            "seconds per launch": LAUNCH_SECONDS, "heads": HEADS,
            "bytes": "distinct ones of each program; for the higher speed-up, of each launch",
            "segments of FAVOR+": "those of a chip with 132 processors",
            "dense": "least work of causal attention, one launch forward and two backward",
            "not counted": "exponentials, and chips that too few programs leave idle",
            "T4": T4_NOTE,
        },
        "rows": rows,
        "crossovers": crossovers,
    }  # fmt: skip


def seconds(moved: float, flops: float, launches: float, chip: Chip, dtype: str
            ) -> tuple[float, str]:
    """Predicted seconds of a call, and what bounds them: "memory", "compute" or "launches"."""
    parts = {
        "memory": moved / (BANDWIDTH_SHARE * chip.bandwidth),
        "compute": flops / (RATE_SHARE * chip.rates[dtype]),
        "launches": launches * LAUNCH_SECONDS,
    }
    bound = max(parts, key=lambda part: parts[part])
    return max(parts["memory"], parts["compute"]) + parts["launches"], bound


def _row(laws: Mapping[Any, Any], op: str, phase: str, chip: Chip, B: int, N: int) -> Record:
    dtype = "bfloat16" if "bfloat16" in chip.rates else "float16"
    load = _load(laws, op, phase, B, N)
    took, bound = seconds(load["bytes"], load["flops"], load["launches"], chip, dtype)
    best, _ = seconds(load["compulsory"], load["flops"], load["launches"], chip, dtype)
    least = work.dense(phase, B, HEADS, HEADS, N, N, D, ITEMSIZE)
    dense, _ = seconds(least.bytes, least.flops, 1 if phase == "fwd" else 3, chip, dtype)
    return {
        "op": op, "phase": phase, "chip": chip.name, "dtype": dtype, "B": B, "H": HEADS, "D": D,
        "N": N, "seconds": took, "best_seconds": best, "bound": bound, "bytes": load["bytes"],
        "compulsory": load["compulsory"], "flops": load["flops"], "launches": load["launches"],
        "dense_seconds": dense, "speedup": dense / took,
    }  # fmt: skip


def _load(laws: Mapping[Any, Any], op: str, phase: str, B: int, N: int) -> dict[str, float]:
    """Counted work of a call: that of one head, times B H; launches are of all heads together."""
    regime = ""
    if (op, "long", "forward") in laws:
        from attnopt.kernels.nsa.arguments import choose_regime

        regime = choose_regime("auto", N, "triton")
    segments = _segments(B * HEADS, N)
    total = dict.fromkeys(("bytes", "compulsory", "flops", "launches"), 0.0)
    for part in ("forward",) if phase == "fwd" else ("forward", "backward"):
        law = laws[op, regime, part]
        total["launches"] += law["launches"]
        for what in ("bytes", "compulsory", "flops"):
            total[what] += B * HEADS * _evaluate(law["laws"][what], N, segments)
    return total


def _evaluate(law: Mapping[str, float], N: int, segments: int) -> float:
    terms = {"1": 1, "N": N, "N2": N * N, "segments": segments}
    return sum(coefficient * terms[term] for term, coefficient in law.items())


@cache
def _segments(heads: int, N: int) -> int:
    """Segments of FAVOR+ with so many heads in all; only its laws ask for them."""
    from attnopt.bench.instruments.traffic_subjects import SUBJECTS

    return next(s for s in SUBJECTS if s.op == "favor").segments(N, heads)


def _crossover(laws: Mapping[Any, Any], op: str, phase: str, chip: Chip, B: int) -> int | None:
    """Tokens, in steps of a quarter octave from 256 on, from which on the op stays ahead."""
    ahead = None
    for step in range(41):
        N = round(256 * 2 ** (step / 4) / 64) * 64
        row = _row(laws, op, phase, chip, B, N)
        if row["speedup"] < 1:
            ahead = None
        elif ahead is None:
            ahead = N
    return ahead


def show(record: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print a prediction: a table per chip and batch size, then what was assumed.

    Args:
        record: what `predict` returned.
        console: where to print, by default to stdout.
    """
    from attnopt.bench.instruments.traffic_tables import screen, table

    console = console or screen()
    lengths = list(dict.fromkeys(row["N"] for row in record["rows"]))
    where = dict.fromkeys((row["chip"], row["dtype"], row["B"]) for row in record["rows"])
    for chip, dtype, B in where:
        drawn = table(
            f"Predicted for {chip}, {dtype}, B={B} H={HEADS} D={D}: ms, times faster than dense",
            ("op", "phase"), [f"{N:,}" for N in lengths] + ["ahead from", "bound"],
        )  # fmt: skip
        for crossover in record["crossovers"]:
            if (crossover["chip"], crossover["B"]) != (chip, B):
                continue
            own = [row for row in record["rows"] if _belongs(row, crossover)]
            cells = [f"{1e3 * row['seconds']:.3g}\n{_speedups(row)}" for row in own]
            ahead = crossover["tokens"]
            drawn.add_row(crossover["op"], crossover["phase"], *cells,
                          "never" if ahead is None else f"{ahead:,}", own[-1]["bound"])
        console.print(drawn)
    for name, value in record["assumptions"].items():
        console.print(f"Assumed, {name}: {value}", highlight=False)
    console.print("All of this is predicted from counts; nothing was measured on a GPU.")


def _speedups(row: Mapping[str, Any]) -> str:
    """The speed-up, or both ends where caches matter."""
    ends = row["speedup"], row["dense_seconds"] / row["best_seconds"]
    shown = [f"{end:.0f}" if end >= 9.95 else f"{end:.1f}" for end in ends]
    return "-".join(dict.fromkeys(shown)) + "x"


def _belongs(row: Mapping[str, Any], crossover: Mapping[str, Any]) -> bool:
    return all(row[name] == crossover[name] for name in ("op", "phase", "chip", "B"))

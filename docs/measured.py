"""Tables of the documentation that are made from committed results.

A page holds them between `<!-- measured: NAME -->` and `<!-- end -->`; `blocks()` makes each anew,
`docs/refresh.py` puts them there, and a test compares.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attnopt.bench import growth
from attnopt.bench.report import tables
from attnopt.bench.report.text import NONE, factor, power, quantity

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [
    *(ROOT / "README.md", ROOT / "bench" / "README.md"),
    *sorted((ROOT / "kernels").glob("*/README.md")),
]
BLOCK = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
LENGTHS = {"op": (1024, 4096, 16384), "block": (256, 1024, 4096), "model": (256, 512, 1024)}
OPS = ("lastk", "favor", "nsa")
CHIP = "H100"  # of the predictions that are shown


def read(name: str) -> dict[str, Any]:
    """A committed results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is left as it is, others are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(name: str, record: dict[str, Any]) -> str:
    """Where the numbers come from: file and command, machine, versions, commit."""
    machine, commit = record["machine"], record["commit"]
    what = ", ".join(f"{x} {record['versions'][x]}" for x in ("torch", "triton"))
    return (
        f"`bench/results/{name}.json`, made by `{record['command']}` ({machine['name']}, {what}, "
        f"commit {str(commit)[:7]}).\n"
    )


def scaling(name: str, phase: str, level: str, mechanisms: Sequence[str]) -> str:
    """Times at some lengths, growth, memory, and what that is against dense attention."""
    record, rows, lengths = read(name), [], LENGTHS[level]
    for curve in tables.curves(record):
        about = curve.about
        wanted = about["level"] == level and about["mechanism"] in mechanisms
        if not wanted or curve.cells[0]["phase"] != phase:
            continue
        by_length = {cell["N"]: cell for cell in curve.cells}
        facts = tables.trend(curve)
        times = [
            quantity(growth.median(by_length[n]), "s") if n in by_length else NONE for n in lengths
        ]
        ratios = growth.speedups(curve.cells, curve.partner_cells)
        last = f"{factor(ratios[-1][1])} at {ratios[-1][0]:,}" if ratios else NONE
        ahead = growth.crossover_words(curve.cells, curve.partner_cells) if ratios else NONE
        peer = about["library"] not in ("attnopt", "torch", "transformers")
        label = f"{about['label']} {about['version']}" if peer else about["label"]
        label = f"**{label}**" if about["ours"] else label
        rows.append([label, *times, power(facts.time), power(facts.memory), last, ahead])
    header = ["", *(f"N = {n:,}" for n in lengths), "time", "memory", "against dense", "ahead"]
    return markdown(header, rows) + "\n" + source(name, record)


def builds(op: str) -> str:
    """The worst 16-bit build of every kernel and head dimension on each architecture."""
    record, found = read("kernels"), {}
    for row in record["rows"]:
        if row["op"] == op and row["dtype"] != "float32":
            (dim,) = {re.search(r"-D(\d+)-", case)[1] for case in row["cases"]}
            found.setdefault((row["kernel"], dim), []).append(row)
    rows = []
    for (kernel, dim), some in sorted(found.items(), key=lambda item: (int(item[0][1]), item[0])):
        line = [f"`{kernel}`, D = {dim}"]
        for arch in record["archs"]:
            own = [row for row in some if row["arch"] == arch]
            registers, stack = (max(row[key] for row in own) for key in ("registers", "stack"))
            warps = min(row["occupancy"]["warps"] for row in own)
            line.append(f"{registers} / {stack} / {warps}")
        rows.append(line)
    header = ["registers / stack / warps", *record["archs"]]
    return markdown(header, rows) + "\n" + source("kernels", record)


def traffic(op: str) -> str:
    """Bytes of one head at 64k tokens by the counted law, against the least possible."""
    record, rows = read("traffic"), []
    for law in record["laws"]:
        if law["mechanism"] != op:
            continue
        name = " ".join(filter(None, (law["op"], law["regime"], law["phase"])))
        rows.append([
            name, quantity(law["bytes"], "B"), f"{law['ratio']:.2f}",
            f"{law['budget']['ratio']:.2f}", f"N^{law['growth']:.2f}", str(law["launches"]),
        ])  # fmt: skip
    header = ["", "one head, 65,536 tokens", "÷ least", "budget", "growth", "launches"]
    return markdown(header, rows) + "\n" + source("traffic", record)


def predicted() -> str:
    """Speed-up over dense attention that the roofline model predicts; no measurement."""
    record, rows = read("roofline"), []
    found = [row for row in record["rows"] if row["chip"] == CHIP and row["B"] == 1]
    for op, phase in dict.fromkeys((row["op"], row["phase"]) for row in found):
        by_length = {row["N"]: row for row in found if (row["op"], row["phase"]) == (op, phase)}
        cells = [
            f"{quantity(row['seconds'], 's')}, {factor(row['speedup'])}"
            for row in by_length.values()
        ]
        rows.append([op, phase, *cells])
    header = ["", "phase", *(f"N = {n:,}" for n in by_length)]
    return markdown(header, rows) + "\n" + source("roofline", record)


def blocks() -> dict[str, str]:
    """Every table by name."""
    everything = ("dense", *OPS)
    return {
        "cpu": scaling("cpu", "bwd", "op", everything),
        "cpu-forward": scaling("cpu", "fwd", "op", everything),
        "cpu-decode": scaling("cpu", "decode", "op", everything),
        "cpu-block": scaling("cpu-models", "bwd", "block", everything),
        "cpu-model": scaling("cpu-models", "bwd", "model", everything),
        "predicted": predicted(),
        **{f"builds-{op}": builds(op) for op in OPS},
        **{f"traffic-{op}": traffic(op) for op in OPS},
    }


def refresh(text: str, made: dict[str, str]) -> str:
    """A page's text with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}{found[3]}", text)

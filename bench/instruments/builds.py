"""What Triton builds of every kernel, for real GPUs and without one.

    registers, stack and spills, shared memory, occupancy, tensor cores, widths of loads and stores

A build fails on what costs most and shows in no other test: spilled registers, dots without tensor
cores, more shared memory or registers than a block has, code that the compiler replaced by a trap.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from attnopt.bench.chips import ARCHS, KIB, occupancy
from attnopt.errors import UserError
from attnopt.testing import Case, cases, written_kernels

OPS = ("lastk", "favor", "nsa")
DEFAULT_ARCHS = ("sm_80", "sm_90", "sm_100")
HARMLESS_STACK = 32  # bytes: a handful of registers, kept there once and not in a loop
GAVE_UP = 32  # registers of a kernel that ptxas could not place
# Which cases, and their sizes: causal ones with GPT-2's heads of 64, and, of mechanisms that have
# few kernels, bf16 with Llama's of 128 (tests/test_builds.py has NSA at 128 and the odd sizes).
SIZES: tuple[tuple[Callable[[Case], bool], dict[str, int]], ...] = (
    (lambda case: bool(case.config.get("causal", True)), dict(D=64, M=64, L=32, P=32, K=32)),
    (lambda case: case.dtype == torch.bfloat16 and not case.config["key_mask"]
     and case.op != "nsa", dict(H=2, Hkv=2, D=128, M=128)),
)
CHILD = "attnopt.bench.instruments.builds_child"


def default_cases(ops: Sequence[str] | None = None) -> list[Case]:
    """The cases that are built: gradients, hence all kernels, at the sizes that users have."""
    return [
        case
        for keep, sizes in SIZES
        for case in cases({"B": 2, "N": 1024} | sizes)
        if case.phase == "bwd" and case.op in (ops or OPS) and keep(case)
    ]


def examine(ops: Sequence[str] | None = None, archs: Sequence[str] = DEFAULT_ARCHS,
            cases: Sequence[Case] | None = None) -> dict[str, Any]:
    """Build what the cases launch and judge every build.

    Args:
        ops: of these ops only; all by default.
        archs: architectures, keys of `attnopt.bench.chips.ARCHS`.
        cases: instead of `default_cases(ops)`; then not every kernel must be reached. They are
            pickled, so what they call must be importable.

    Returns:
        A record whose "rows" hold one distinct build each and whose "failures" say what is wrong.

    Raises:
        UserError: an op or architecture that is not known, or Triton is not installed.
    """
    _check("op", ops or OPS, OPS)
    _check("architecture", archs, ARCHS)
    if find_spec("triton") is None:
        raise UserError("builds need Triton, which is not installed here")
    begin = time.perf_counter()
    chosen = list(default_cases(ops) if cases is None else cases)
    rows = _build(chosen, archs)
    for row in rows:
        row["faults"] = _judge(row)
    failures = [f"{_name(row)}: {fault} [{row['cases'][0]}]"
                for row in rows for fault in row["faults"]]
    if cases is None:
        failures += _not_built(ops or OPS, archs, rows)
    return {
        "instrument": "builds", "format": 1,
        "versions": {name: version(name) for name in ("torch", "triton")},
        "archs": list(archs), "cases": [case.id for case in chosen],
        "elapsed": time.perf_counter() - begin, "rows": rows, "failures": failures,
    }


def _check(what: str, given: Sequence[str], known: Sequence[str] | dict) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{what} must be one of {', '.join(known)}; got {name!r}")


def _not_built(ops: Sequence[str], archs: Sequence[str], rows: Sequence[dict]) -> list[str]:
    """A failure for every kernel that no case reached."""
    return [
        f"{kernel} ({arch}): no case launches it, expected every kernel of kernels/{op} to be built"
        for op in ops for kernel in written_kernels(op) for arch in archs
        if not any(row["kernel"] == kernel and row["arch"] == arch for row in rows)
    ]


def _build(chosen: Sequence[Case], archs: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all distinct builds, from one process per core."""
    pairs = [(case, arch) for case in chosen for arch in archs]
    workers = max(1, min(len(os.sched_getaffinity(0)), len(pairs)))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool, \
            tqdm(total=len(pairs), desc="builds", file=sys.stderr) as bar:
        jobs = [
            pool.submit(_run_child, Path(folder), i, pairs[i::workers], bar.update)
            for i in range(workers)
        ]
        for row in [row for job in jobs for row in job.result()]:
            known = rows.setdefault((row["arch"], row.pop("hash")), row)
            known["cases"] += [case for case in row["cases"] if case not in known["cases"]]
    order = {name: i for i, name in enumerate([*OPS, *archs])}
    for row in rows.values():
        if "error" not in row:
            resident, limiter = occupancy(
                ARCHS[row["arch"]], warps=row["warps"], registers=row["registers"],
                shared=row["shared"], columns=row["columns"],
            )
            row["occupancy"] = {"warps": resident, "of": ARCHS[row["arch"]].warps, "by": limiter}
    return sorted(rows.values(), key=lambda r: (order[r["arch"]], order[r["op"]], r["kernel"]))


def _run_child(folder: Path, index: int, pairs: Sequence[tuple[Case, str]],
               advance: Callable[[], object]) -> list[dict[str, Any]]:
    """Build in a process without the interpreter and with nothing in its cache."""
    job, result, log = (folder / f"{name}{index}" for name in ("job", "result", "log"))
    job.write_bytes(pickle.dumps(list(pairs)))
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", CHILD, str(job), str(result)]
    with log.open("w") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        for _ in child.stdout:
            advance()
    if child.returncode:
        raise RuntimeError(f"building failed:\n{log.read_text()[-3000:]}")
    return json.loads(result.read_text())


def _name(row: dict[str, Any]) -> str:
    return f"{row['kernel']} ({row['dtype']}, {row['arch']})"


def _judge(row: dict[str, Any]) -> list[str]:
    """What is wrong with a build."""
    if "error" in row:
        return [f"does not build: {row['error']}"]
    found = []
    cores, limit = sum(row["tensor_cores"].values()), ARCHS[row["arch"]].shared_block
    if row["registers"] == GAVE_UP and row["stack"] > KIB:
        found.append(f"ptxas gave up: {GAVE_UP} registers, {row['stack']:,} bytes of stack")
    elif row["stack"] > HARMLESS_STACK:
        found.append(
            f"expected at most {HARMLESS_STACK} bytes of stack; got {row['stack']:,}, "
            f"{row['local_stores']} stores and {row['local_loads']} loads of spilled registers"
        )
    if row["ordinary_dots"] or cores < row["dots"]:
        found.append(
            f"expected tensor cores for every dot; got {row['dots']} dots, {row['ordinary_dots']} "
            f"in ordinary arithmetic, and {cores} instructions on tensor cores"
        )
    if row["shared"] > limit:
        found.append(
            f"expected at most {limit // KIB} KiB of shared memory; got {row['shared'] / KIB:.0f}"
        )
    elif not row["occupancy"]["warps"]:
        found.append(f"not one block of {row['warps']} warps fits an SM: {row['occupancy']['by']}")
    if row["writes"] and not row["stores"] and not row["bulk"]:
        found.append(
            f"expected code that stores results; got {row['instructions']} instructions, none of "
            f"which does, and {row['traps']} traps"
        )
    return found


def show(record: dict[str, Any]) -> None:
    """Print a table per architecture, the worst build of each kernel in a line, and failures."""
    console = Console()
    for arch in record["archs"]:
        rows = [row for row in record["rows"] if row["arch"] == arch]
        console.print(_table(arch, [row for row in rows if "error" not in row]))
    builds, failures = len(record["rows"]), record["failures"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    console.print(f"{builds} builds of {len(record['cases'])} cases in {record['elapsed']:.0f} s "
                  f"({versions})")
    for failure in failures:
        console.print(f"FAILED {failure}", style="red", markup=False, highlight=False)
    if not failures:
        console.print("No spills, every dot on tensor cores, within the limits of every chip")


def _table(arch: str, rows: Sequence[dict[str, Any]]) -> Table:
    limits = ARCHS[arch]
    table = Table(
        title=f"{arch}: the worst of each kernel's builds",
        caption="stack in bytes, of 16-bit builds and of fp32; shared: KiB of "
                f"{limits.shared_block // KIB}; warps: on an SM of {limits.warps}, and what limits "
                "them; wide: share of bytes loaded 16 at a time",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        title_justify="left", caption_justify="left",
    )
    table.add_column("kernel", no_wrap=True)
    for header in ("builds", "code", "regs", "stack", "fp32", "shared", "warps"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    table.add_column("tensor cores", no_wrap=True)
    table.add_column("wide", justify="right", no_wrap=True)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        least = min((row["occupancy"] for row in own), key=lambda x: x["warps"])
        most = {name: max(row[name] for row in own)
                for name in ("instructions", "registers", "shared")}
        stacks = [[f"{row['stack']:,}" for row in sorted(own, key=lambda x: x["stack"])
                   if (row["dtype"] == "float32") == fp32] for fp32 in (False, True)]
        table.add_row(
            kernel.removesuffix("_kernel"), str(len(own)), f"{most['instructions']:,}",
            str(most["registers"]), *(s[-1] if s else "-" for s in stacks),
            f"{most['shared'] / KIB:.0f}", str(least["warps"]), least["by"].split()[0], _kinds(own),
            _wide(own), style="red" if any(row["faults"] for row in own) else None,
        )
    return table


def _kinds(rows: Sequence[dict[str, Any]]) -> str:
    """Kinds of tensor-core instructions among the builds of a kernel."""
    if not any(row["dots"] for row in rows):
        return "-"
    kinds = dict.fromkeys(kind.split(".")[0] for row in rows for kind in row["tensor_cores"])
    return " ".join(sorted(kinds)) or "none"


def _wide(rows: Sequence[dict[str, Any]]) -> str:
    """Share of the bytes that a pass over the code loads 16 (or 32) at a time."""
    moved = [(int(width), int(width) * n) for row in rows for width, n in row["loads"].items()]
    total = sum(n for _, n in moved)
    return f"{100 * sum(n for width, n in moved if width >= 16) / total:.0f} %" if total else "-"

"""Made-up results files whose laws of growth and crossovers are known."""

import copy
import math

LENGTHS = (512, 1024, 2048, 4096, 8192)


def about(label, mechanism, level="op", library="attnopt", partner="sdpa", note=""):
    """What a file says of a contender."""
    facts = {"label": label, "mechanism": mechanism, "level": level, "note": note}
    ours = library == "attnopt"
    return facts | {"ours": ours, "library": library, "version": "1.2.3", "partner": partner}


def cell(contender, phase, n, seconds, **changes):
    """A cell that passed its check; the rounds' median is `seconds`."""
    times = [seconds * factor for factor in (0.9, 1.0, 1.1)]
    place = {"contender": contender, "phase": phase, "dtype": "float32"}
    facts = {"B": 1, "H": 12, "D": 64, "N": n, "status": "ok", "times": times, "bytes": 1000 * n}
    facts |= {"errors": {"out": 3e-7, "dq": 1e-7}, "limit": 1e-5}
    return place | facts | {"flops": 1e3 * n, "minimal_bytes": 2e3 * n} | changes


CONTENDERS = {
    "sdpa": about("SDPA", "dense", library="torch", partner=None),
    "lastk": about("last-5", "lastk"),
    "favor": about("FAVOR+", "favor"),
    "peer": about("a peer", "favor", library="some-peer", note="its own epsilon"),
    "layer-dense": about("dense layer", "dense", "layer", "torch", None),
    "layer-nsa": about("NSA layer", "nsa", "layer", partner="layer-dense"),
}


def scaling(phases=("fwd", "decode"), lengths=LENGTHS):
    """A run in which last-5 always wins, FAVOR+ wins from 1448 on and its peer never."""
    cells = []
    for phase in phases:
        for n in lengths:
            cells += [
                cell("sdpa", phase, n, 1e-9 * n * n),
                cell("lastk", phase, n, 1e-7 * n),
                cell("favor", phase, n, 1024e-9 * math.sqrt(2) * n),
                cell("peer", phase, n, 1e-4 * n),
            ]
    cells += [cell("layer-dense", "fwd", n, 1e-9 * n * n) for n in lengths]
    cells += [cell("layer-nsa", "fwd", n, 1e-6 * n) for n in lengths]
    lost = {"status": "out of memory", "reason": "needs 99 GiB"}
    cells += [cell("peer", "bwd", n, 1.0) | lost for n in (2048, 1024)]
    cells.append(cell("favor", "bwd", 512, 1e-9, errors={"out": 1e-7, "dk": 0.5}))
    machine = {"device": "cpu", "name": "Some CPU", "cores": 2, "threads": 1, "memory": 8 * 10**9}
    ceilings = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 5e10}, "how": "said so"}
    return {
        "kind": "scaling", "format": 1, "command": "attnopt bench --budget 9m", "elapsed": 543.2,
        "date": "2026-01-02T03:04:05", "commit": "abc1234-dirty", "machine": machine,
        "versions": {"attnopt": "1.2.3", "torch": "2.9.9"}, "ceilings": ceilings,
        "contenders": copy.deepcopy(CONTENDERS), "cells": cells, "missing": {"flex": "needs a GPU"},
    }  # fmt: skip


def roofline():
    """Predictions for two chips."""
    rows = [
        {"op": op, "phase": phase, "chip": chip, "dtype": "bfloat16", "B": 1, "H": 12, "D": 64,
         "N": n, "seconds": 3e-9 * n, "bound": "bandwidth", "bytes": 1, "flops": 1, "launches": 2,
         "dense_seconds": 1e-12 * n * n}
        for op in ("lastk", "favor") for phase in ("fwd", "bwd") for chip in ("H100", "T4")
        for n in (1024, 16384)
    ]  # fmt: skip
    return {"kind": "roofline", "format": 1, "assumptions": {"bandwidth_share": 0.8}, "rows": rows}


def gpu_check():
    """A check of which one case failed."""
    record = scaling(("fwd",), LENGTHS[:2])
    right = {"out": {"error": 1e-4, "limit": 4e-3}, "dq": {"error": 2e-4, "limit": 5e-3}}
    cases = [
        {"case": "nsa/fwd/a", "status": "ok", "results": right},
        {"case": "favor/bwd/b", "status": "failed", "reason": "dk is off by 0.7",
         "results": {"dk": {"error": None, "limit": 5e-3}}},
        {"case": "lastk/fwd/c", "status": "not run", "reason": "no time left"},
    ]  # fmt: skip
    return record | {
        "kind": "gpu-check", "rehearsal": True, "failures": ["favor/bwd/b: dk is off by 0.7"],
        "numerics": {"cases": cases, "kernels": {}, "never_launched": ["_lost_kernel"]},
        "parts": [{"name": "sweep", "status": "cut", "reason": "3 groups not begun"}],
        "sanitizer": [{"tool": "memcheck", "status": "ok", "summary": ["ERROR SUMMARY: 0"]}],
    }  # fmt: skip

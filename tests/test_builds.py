"""Every kernel builds for real GPUs, with tensor cores and without spills; no GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from attention_inputs import HAS_TRITON

from attnopt.testing import cases

VERSION = tuple(int(x) for x in version("triton").split(".")[:2]) if HAS_TRITON else (0, 0)
SCRIPT = Path(__file__).parent / "support" / "builds.py"
HARMLESS = 40 if VERSION >= (3, 7) else 120  # bytes of stack
# Sizes of 1 become constants when Triton compiles, which the interpreter does not show:
# (b, h, hkv, nq, nk, d), then what nsa_attention takes.
EDGES = [
    ((1, 1, 1, 1, 1, 64), {"select_block": 1, "num_selected": 1, "window": 1}),
    ((1, 1, 1, 1, 64, 64), {"select_block": 16, "num_selected": 1, "window": 1}),
    ((2, 4, 2, 1, 64, 32), {"select_block": 16, "num_selected": 3, "window": 16}),
    ((1, 3, 1, 17, 64, 16), {"select_block": 16, "num_selected": 4, "window": 1}),
    ((1, 16, 1, 33, 64, 64), {"select_block": 24, "num_selected": 3, "window": 5}),
]
GPT2 = {"select_block": 64, "num_selected": 16, "window": 512}  # sizes that users have

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]


def build(arch, given, folder):
    """Build what these cases reach, in a process without the interpreter."""
    path = folder / "cases.json"
    path.write_text(json.dumps(given))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch, str(path)], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(builds, stack):
    """Tensor cores wherever there is a dot, and no more bytes of stack than these."""
    assert builds
    assert not [b for b in builds if b["dots"] and b["tensor_cores"] < b["dots"]]
    assert not [b for b in builds if b["stack"] > stack]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", ["lastk", "favor", "nsa"])
def test_cases_build_without_spills(op, arch, tmp_path):
    given = [c.id for c in cases() if c.op == op and c.phase == "bwd" and c.dtype.itemsize == 2]
    check(build(arch, given, tmp_path), HARMLESS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dim", [64, 128])
def test_nsa_builds_without_spills_at_real_sizes(dim, arch, tmp_path):
    given = [
        {"sizes": sizes, "dtype": "bfloat16", "masked": False,
         "options": {**GPT2, "combine": combine, "regime": regime}}
        for sizes in [(1, 12, 12, 2048, 2048, dim), (1, 16, 4, 2048, 2048, dim)]
        for combine, regime in [("merged", "long"), ("gates", "short")]
    ]  # fmt: skip
    builds = build(arch, given, tmp_path)  # the band of lastk is not asked here
    check([b for b in builds if not b["kernel"].startswith("lastk")], HARMLESS)


@pytest.mark.parametrize("regime", ["short", "long"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nsa_builds_where_sizes_are_one(dtype, regime, tmp_path):
    given = [
        {"sizes": sizes, "dtype": dtype, "masked": combine == "gates",
         "options": {**options, "combine": combine, "regime": regime}}
        for sizes, options in EDGES for combine in ("merged", "gates")
        if combine == "merged" or options["num_selected"] > 2
    ]  # fmt: skip
    assert build("sm_90", given, tmp_path)

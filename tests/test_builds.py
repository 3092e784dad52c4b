"""Every kernel builds for real GPUs as it should, also where sizes are odd; no GPU is needed."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from attention_inputs import needs_triton

from attnopt.bench.instruments import builds
from attnopt.testing import cases

# Sizes of 1 become constants when Triton compiles, which the interpreter does not show:
# (b, h, hkv, nq, nk, d), then what nsa_attention takes.
EDGES = [
    ((1, 1, 1, 1, 1, 64), {"select_block": 1, "num_selected": 1, "window": 1}),
    ((1, 1, 1, 1, 64, 64), {"select_block": 16, "num_selected": 1, "window": 1}),
    ((2, 4, 2, 1, 64, 32), {"select_block": 16, "num_selected": 3, "window": 16}),
    ((1, 3, 1, 17, 64, 16), {"select_block": 16, "num_selected": 4, "window": 1}),
    ((1, 16, 1, 33, 64, 64), {"select_block": 24, "num_selected": 3, "window": 5}),
]
ROOT = Path(__file__).resolve().parents[1]
PAPER = {"select_block": 64, "num_selected": 16, "window": 512}

pytestmark = [pytest.mark.slow, needs_triton]


def worst_stacks(rows):
    """Bytes of stack of the worst build, by architecture, kernel and kind of dtype."""
    found = {}
    for row in rows:
        key = row["arch"], row["kernel"], row["dtype"] == "float32"
        found[key] = max(found.get(key, 0), row["stack"])
    return found


def test_no_build_is_worse_than_the_committed_ones():
    """The command fails on every spill; this, on more of them than results/kernels.json has."""
    committed = json.loads((ROOT / "bench" / "results" / "kernels.json").read_text())
    if committed["versions"]["triton"] != version("triton"):
        pytest.skip(f"the committed builds are those of Triton {committed['versions']['triton']}")
    record, allowed = builds.examine(), worst_stacks(committed["rows"])
    assert not [row for row in record["rows"] if "error" in row]
    limit = builds.HARMLESS_STACK
    assert not {
        key: stack for key, stack in worst_stacks(record["rows"]).items()
        if stack > max(limit, allowed.get(key, 0))
    }
    assert len(record["failures"]) <= len(committed["failures"])


@pytest.mark.parametrize("op", ["lastk", "nsa"])  # of favor the test above says what spills
def test_cases_as_they_stand_in_16_bit(op):
    own = [c for c in cases() if c.op == op and c.phase == "bwd" and c.dtype.itemsize == 2]
    assert builds.examine(archs=["sm_80", "sm_90"], cases=own)["failures"] == []


@pytest.mark.parametrize("dim", [64, 128])
def test_nsa_at_the_sizes_of_its_paper(dim):
    from planted_builds import nsa_edge

    chosen = [
        nsa_edge(sizes, torch.bfloat16, False, combine=combine, regime=regime, **PAPER)
        for sizes in [(1, 12, 12, 2048, 2048, dim), (1, 16, 4, 2048, 2048, dim)]
        for combine, regime in [("merged", "long"), ("gates", "short")]
    ]
    rows = builds.examine(archs=["sm_80", "sm_90"], cases=chosen)["rows"]
    nsa = [row for row in rows if not row["kernel"].startswith("lastk")]  # its band is not asked
    assert nsa and not [(row["kernel"], row["faults"]) for row in nsa if row["faults"]]


@pytest.mark.parametrize("regime", ["short", "long"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nsa_builds_where_sizes_are_one(dtype, regime):
    from planted_builds import nsa_edge

    chosen = [
        nsa_edge(sizes, dtype, combine == "gates", combine=combine, regime=regime, **options)
        for sizes, options in EDGES for combine in ("merged", "gates")
        if combine == "merged" or options["num_selected"] > 2
    ]  # fmt: skip
    record = builds.examine(archs=["sm_90"], cases=chosen)
    assert record["rows"] and not [row for row in record["rows"] if "error" in row]

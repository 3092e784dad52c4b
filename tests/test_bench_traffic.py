"""The traffic instrument against counts by hand, with planted faults; least work; the roofline."""

import io
from dataclasses import replace
from functools import cache

import pytest
import torch
from attention_inputs import DEVICE, HAS_TRITON
from rich.console import Console

from attnopt.bench import roofline, work
from attnopt.bench.chips import CHIPS
from attnopt.errors import UserError
from attnopt.kernels.favor import plan
from attnopt.kernels.nsa.geometry import compressed_count, near_block

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from attnopt.bench.instruments import traffic as instrument  # noqa: E402
from attnopt.bench.instruments.traffic import count, evaluate, examine, show  # noqa: E402
from attnopt.bench.instruments.traffic_counter import PYTORCH, counting  # noqa: E402
from attnopt.bench.instruments.traffic_subjects import (  # noqa: E402
    BUDGETS,
    SUBJECTS,
    Budget,
    Part,
    Subject,
)

in_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")


# What kernels do


@triton.jit
def strided_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o * stride, mask=o < n, other=0.0)
    again = tl.load(x_ptr + o * stride, mask=o < n, other=0.0)
    tl.store(y_ptr + o, tl.exp2(x) + again, mask=o < n)


@in_interpreter
def test_masked_strided_and_repeated_loads_count_by_hand():
    x, y = torch.zeros(400), torch.zeros(100)
    with counting() as traffic:
        strided_kernel[(2,)](x, y, 100, 4, BLOCK=64)
    kernel = traffic.kernels["strided_kernel"]
    assert (kernel.launches, kernel.programs, kernel.exponentials) == (1, 2, 128)
    read, written = kernel.tensors["x_ptr"], kernel.tensors["y_ptr"]
    assert (read.loaded, read.program_loaded, read.launch_loaded) == (800, 400, 400)
    assert (written.stored, written.program_stored, written.launch_stored) == (400, 400, 400)
    assert read.stored == written.loaded == 0
    # every fourth fp32 number: two to a sector of 32 bytes, in both loads of both programs
    assert (read.used, read.touched) == (800, 2 * 32 * (32 + 18))
    assert kernel.moved == 800


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + (tl.program_id(0) * 16 + i)[:, None] * K + k)
    b = tl.load(b_ptr + k[:, None] * 16 + i)
    tl.store(c_ptr + (tl.program_id(0) * 16 + i)[:, None] * 16 + i, tl.dot(a, b))


@in_interpreter
def test_products_count_and_what_programs_share_is_read_by_each():
    a, b, c = torch.ones(48, 32), torch.ones(32, 16), torch.empty(48, 16)
    with counting() as traffic:
        for _ in range(2):
            product_kernel[(3,)](a, b, c, K=32)
    kernel = traffic.kernels["product_kernel"]
    assert (kernel.launches, kernel.programs) == (2, 6)
    assert kernel.flops == 6 * 2 * 16 * 16 * 32
    shared = kernel.tensors["b_ptr"]
    assert (shared.program_loaded, shared.launch_loaded) == (6 * 2048, 2 * 2048)
    assert kernel.efficiency == 1.0
    assert (c == 32).all()


@triton.jit
def gather_kernel(index_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr, D: tl.constexpr):
    i, d = tl.arange(0, BLOCK), tl.arange(0, D)
    rows = tl.load(index_ptr + i)
    tl.store(y_ptr + i[:, None] * D + d, tl.load(x_ptr + rows[:, None] * D + d))


@in_interpreter
def test_gathered_rows_count_once_in_any_order():
    index = torch.tensor([5, 2, 5, 0], dtype=torch.int32)
    x, y = torch.randn(8, 16), torch.empty(4, 16)
    with counting() as traffic:
        gather_kernel[(1,)](index, x, y, BLOCK=4, D=16)
    read = traffic.kernels["gather_kernel"].tensors["x_ptr"]
    assert (read.loaded, read.program_loaded, read.used) == (256, 192, 192)


@triton.jit
def views_kernel(q_ptr, k_ptr, stand_in_ptr, out_ptr, n, stride, D: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, D)
    q = tl.load(q_ptr + i * stride + d)
    k = tl.load(k_ptr + i * stride + d, mask=d < D // 2, other=0.0)
    tl.store(out_ptr + i * stride + d, q + k)


@in_interpreter
def test_views_of_one_projection_are_told_apart():
    q, k, out = torch.randn(10, 96).split(32, dim=1)
    with counting() as traffic:
        views_kernel[(10,)](q, k, k, out, 10, 96, D=32)
    tensors = traffic.kernels["views_kernel"].tensors
    assert {name: (x.loaded, x.stored) for name, x in tensors.items()} == {
        "q_ptr": (1280, 0), "k_ptr": (640, 0), "out_ptr": (0, 1280)
    }  # fmt: skip
    assert tensors["q_ptr"].launch_loaded == 1280


@in_interpreter
def test_an_access_beside_all_arguments_is_refused():
    x, y = torch.zeros(400), torch.zeros(100)
    with pytest.raises(Exception, match="must access its arguments .x_ptr, y_ptr."), counting():
        strided_kernel[(1,)](x, y, 64, 1 << 20, BLOCK=64)


@in_interpreter
def test_pytorch_operations_count_as_one_pass():
    x = torch.randn(10, 20)
    with counting() as traffic:
        y = x.t()[:5].view_as(x.t()[:5]) + torch.zeros(1, 1)  # views are free
        torch.zeros_like(y)
    tensors = traffic.kernels[PYTORCH].tensors
    assert {name: (b.loaded, b.stored) for name, b in tensors.items()} == {
        "zeros": (0, 4), "add": (204, 200), "zeros_like": (0, 200)
    }  # fmt: skip
    assert traffic.kernels[PYTORCH].launches == 3


# Laws and budgets


def doubling(extra=lambda x: x):
    """A subject whose forward and backward read and write one tensor each."""

    def make(tokens):
        x = torch.ones(1, 1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        return [x], lambda: extra(x) * 2

    def least(phase, tokens):
        return work.Work(0, 256 * tokens * (2 if phase == "bwd" else 1))

    part = Part(make, ((64, 1), (128, 1), (192, 1)))
    return Subject("doubling", "test", "", (part,), least)


GENEROUS = {("doubling", "", phase): Budget(1.1, 1.05, 1.0, "") for phase in instrument.PHASES}


@in_interpreter
def test_a_law_is_found_and_kept_within_its_budget():
    record = examine(subjects=[doubling()], budgets=GENEROUS)
    assert not record["failures"]
    forward, backward = record["laws"]
    assert forward["laws"]["bytes"] == pytest.approx({"1": 0, "N": 256}, abs=1e-6)
    assert (forward["ratio"], forward["growth"]) == pytest.approx((1.0, 1.0))
    assert backward["bytes"] == pytest.approx(256 * 65_536)


@in_interpreter
def test_one_more_copy_is_over_budget():
    copying = doubling(lambda x: x.detach().clone().requires_grad_() + 0 * x)
    record = examine(subjects=[copying], budgets=GENEROUS)
    assert any(failure.startswith("doubling forward, 65,536 tokens: bytes over the least possible")
               for failure in record["failures"])  # fmt: skip


@in_interpreter
def test_a_square_that_no_law_tells_is_a_failure():
    def squared(x):
        torch.ones(x.shape[2], x.shape[2])
        return x

    record = examine(subjects=[doubling(squared)], budgets={})
    assert len(record["failures"]) == 1
    assert "a law in 1, N must tell the bytes" in record["failures"][0]
    square = doubling(squared)
    square = replace(square, parts=(replace(square.parts[0], terms=("1", "N", "N2")),))
    record = examine(subjects=[square], budgets=GENEROUS)
    assert record["laws"][0]["laws"]["bytes"]["N2"] == pytest.approx(4.0)
    assert any("exponent" in failure for failure in record["failures"])


def of(name):
    return [subject for subject in SUBJECTS if subject.name == name]


@cache
def record_of(name):
    return examine(subjects=of(name))


@in_interpreter
@pytest.mark.parametrize("name", [
    "lastk-5", "favor-64", "favor-64-w33", "nsa-gates",
    pytest.param("nsa-merged", marks=pytest.mark.slow),
])  # fmt: skip
def test_every_op_keeps_its_budget(name):
    record = record_of(name)
    assert record["failures"] == []
    assert all(law["budget"] for law in record["laws"])
    screen = io.StringIO()
    show(record, tensors=True, console=Console(file=screen, width=100))
    assert "within their budgets" in screen.getvalue()
    assert max(map(len, screen.getvalue().splitlines())) <= 100


def test_every_subject_has_a_budget():
    wanted = {(s.name, s.regime, phase) for s in SUBJECTS for phase in instrument.PHASES}
    assert wanted == set(BUDGETS)


@in_interpreter
def test_tiny_segments_are_over_budget(monkeypatch):
    monkeypatch.setattr(plan, "PROCESSORS", 4000)
    monkeypatch.setattr(plan, "TOKENS_PER_FEATURE", 1)
    record = examine(subjects=of("favor-64"))
    assert [failure.split(",")[0] for failure in record["failures"]] == [
        "favor-64 forward", "favor-64 backward"
    ]  # fmt: skip
    assert "must be at most 1.60; got" in record["failures"][0]


@in_interpreter
def test_laws_tell_longer_texts_and_more_segments():
    (subject,) = of("favor-64-w33")
    for law in record_of(subject.name)["laws"]:
        traffic = count(subject.parts[0], 640, 5)[law["phase"]]
        kernels = traffic.kernels.values()
        told = {what: evaluate(law["laws"][what], 640, 5) for what in instrument.LAWS}
        assert told["bytes"] == pytest.approx(sum(k.moved for k in kernels), rel=1e-6)
        assert told["flops"] == pytest.approx(sum(k.flops for k in kernels), rel=1e-6)


# The least work


def test_dense_work_by_hand():
    pairs = 4 + 5 + 6  # three queries at the end of six tokens
    found = work.dense("fwd", 2, 4, 2, 3, 6, 8, 2)
    assert found == work.Work(4 * 8 * 2 * 4 * pairs, 2 * (2 * 2 * 4 * 3 * 8 + 2 * 2 * 2 * 6 * 8))
    lse, row = 4 * 2 * 4 * 3, 2 * 2 * 4 * 3 * 8
    keys = 2 * 2 * 2 * 2 * 6 * 8
    both = work.dense("bwd", 2, 4, 2, 3, 6, 8, 2)
    assert both.flops == 3.5 * found.flops
    assert both.bytes == found.bytes + lse + (3 * row + keys + lse) + (row + keys)
    assert work.dense("fwd", 2, 4, 2, 3, 6, 8, 2, causal=False).flops == 4 * 8 * 2 * 4 * 18
    with pytest.raises(ValueError, match="phase must be one of"):
        work.dense("forward", 2, 4, 2, 3, 6, 8, 2)


def test_wide_windows_and_all_blocks_cost_what_dense_attention_costs():
    sizes = (2, 4, 4, 100, 100, 16, 2)
    dense = work.dense("fwd", *sizes)
    assert work.lastk("fwd", *sizes, W=100).flops == dense.flops
    assert work.favor("fwd", *sizes, M=0, window=100) == dense
    merged = {"block": 8, "stride": 8, "select_block": 8, "num_selected": 2}
    assert work.nsa("fwd", *sizes, **merged, window=100, combine="merged").flops == dense.flops


def test_favor_work_by_hand():
    found = work.favor("fwd", 1, 1, 1, 10, 10, 4, 2, M=3)
    assert found == work.Work(2 * 3 * 4 * (4 * 10), 4 * 10 * 4 * 2 + 4 * 3 * 4)
    both = work.favor("bwd", 1, 1, 1, 10, 10, 4, 2, M=3)
    assert both.flops == 2 * 3 * 4 * (13 * 10)
    step = work.favor("decode", 1, 1, 1, 1, 10, 4, 2, M=3)
    assert step.bytes == 4 * 4 * 2 + 4 * 3 * 4 + 2 * 4 * 3 * 6


@pytest.mark.parametrize("combine", ["merged", "gates"])
def test_nsa_work_is_that_of_the_definition(combine):
    n, d, b, S, W = 100, 8, 8, 3, 20
    block, stride = (b, b) if combine == "merged" else (8, 4)
    pairs = ranked = 0
    for p in range(n):
        if combine == "merged":
            near = int(near_block(torch.tensor(p), b, W))
            chosen = min(S, near)
            pairs += p + 1 - near * b + chosen * b + near - chosen
            ranked += chosen
        else:
            own = set(range(max(0, p // b - S + 1), p // b + 1))  # as many blocks, the last ones
            pairs += sum(j // b in own for j in range(p + 1))
            pairs += compressed_count(p + 1, block, stride) + min(p + 1, W)
    sizes = (block, stride, b, S, W, combine)
    assert work.nsa("fwd", 1, 1, 1, n, n, d, 2, *sizes).flops == 4 * d * pairs + 2 * d * ranked
    rows = 4 * n + 2 * compressed_count(n, block, stride)
    gates = 0 if combine == "merged" else 3 * n * 2
    assert work.nsa("fwd", 1, 1, 1, n, n, d, 2, *sizes).bytes == rows * d * 2 + gates


# The roofline


def made_up(bytes_per_token, flops_per_token, launches=3, term="N"):
    """A record of an op whose bytes and FLOPs grow linearly, or its bytes with another term."""
    law = {"op": "made-up", "mechanism": "test", "regime": "", "launches": launches, "laws": {
        "bytes": {term: bytes_per_token}, "compulsory": {term: bytes_per_token / 2},
        "flops": {"N": flops_per_token},
    }}  # fmt: skip
    laws = [{**law, "phase": phase} for phase in instrument.PHASES]
    return {"instrument": "traffic", "laws": laws}


def test_the_roofline_takes_the_slower_of_memory_and_compute():
    chip = CHIPS["H100"]
    record = roofline.predict(made_up(1e6, 1.0), chips=["H100"], lengths=[1000], batches=[2])
    row, both = record["rows"]
    moved = 2 * 12 * 1000 * 1e6
    assert row["bytes"] == moved
    assert row["bound"] == "memory"
    assert row["seconds"] == pytest.approx(moved / (0.8 * chip.bandwidth) + 6e-6)
    assert row["best_seconds"] == pytest.approx(moved / 2 / (0.8 * chip.bandwidth) + 6e-6)
    assert (both["phase"], both["launches"], both["bytes"]) == ("bwd", 6, 2 * moved)
    record = roofline.predict(made_up(1.0, 1e9), chips=["H100"], lengths=[1000], batches=[2])
    row = record["rows"][0]
    assert row["bound"] == "compute"
    assert row["seconds"] == pytest.approx(24e12 / (0.6 * chip.rates["bfloat16"]) + 6e-6)


def test_the_roofline_finds_where_an_op_gets_ahead_and_says_predicted():
    record = roofline.predict(made_up(1000.0, 1000.0), chips=["H100", "T4"], batches=[1])
    for crossover in record["crossovers"]:
        rows = [row for row in record["rows"] if roofline._belongs(row, crossover)]
        assert all((row["speedup"] >= 1) == (row["N"] >= crossover["tokens"]) for row in rows)
    assert {row["dtype"] for row in record["rows"] if row["chip"] == "T4"} == {"float16"}
    screen = io.StringIO()
    roofline.show(record, console=Console(file=screen, width=100))
    assert "Predicted for T4" in screen.getvalue()
    assert "nothing was measured" in screen.getvalue()
    for behind in (made_up(1e9, 1.0), made_up(10.0, 1.0, launches=0, term="N2")):
        never = roofline.predict(behind, chips=["H100"], lengths=[64], batches=[1])
        assert {crossover["tokens"] for crossover in never["crossovers"]} == {None}
    assert never["rows"][0]["speedup"] > 1  # for short texts, which is not what is asked


@in_interpreter
@pytest.mark.parametrize(("name", "bound"), [("lastk-5", 0.76e-3), ("favor-64", 1.14e-3)])
def test_predictions_lie_not_far_above_the_bound(name, bound):
    """Bounds by hand at 4.3 TB/s: each tensor once; for FAVOR+ k and v twice. 64k tokens, B=8."""
    record = roofline.predict(record_of(name), chips=["H200"], lengths=[65_536], batches=[8])
    assert bound < record["rows"][0]["seconds"] < 1.2 * bound


def test_the_roofline_refuses_another_record():
    with pytest.raises(UserError, match="bench traffic --json` wrote; got scaling"):
        roofline.predict({"kind": "scaling", "cells": []})

"""Every kernel touches only what it may; and the instrument that says so finds planted defects."""

import pytest
import torch
from attention_inputs import DEVICE, HAS_TRITON

from attnopt.bench.instruments import safety
from attnopt.bench.instruments.safety import examine, show, watch, written_kernels
from attnopt.bench.instruments.safety_memory import first_unwritten, poisoned_allocations
from attnopt.errors import UserError

if not HAS_TRITON or DEVICE == "cuda":
    pytest.skip("kernels are examined in Triton's interpreter", allow_module_level=True)
import planted  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

DEFECTS = list(planted.PLANTED)


@pytest.mark.parametrize("op", safety.OPS)
def test_op_is_safe(op: str) -> None:
    record = examine([op])
    assert record["failures"] == []
    rows = record["rows"]
    assert {row["kernel"] for row in rows} >= set(written_kernels(op))
    # no program of some sizes may have anything to do, but none is checked in vain
    for kernel in written_kernels(op):
        own = [row for row in rows if row["kernel"] == kernel]
        assert all(sum(row[name] for row in own) for name in ("loaded", "stored", "reordered"))


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_found(defect) -> None:
    found = watch(lambda: defect(False)).findings
    assert set(found) == {planted.PLANTED[defect]}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_its_repair_is_clean(defect) -> None:
    repaired = watch(lambda: defect(True))
    assert not repaired.findings
    count = repaired.counts[planted.PLANTED[defect][1]]
    programs = count.programs // count.launches
    assert count.reordered == count.launches - 1 == min(programs - 1, 2)
    assert count.stored > 0


@pytest.mark.parametrize(
    "defect", [x for x in DEFECTS if x is not planted.unwritten_rows], ids=lambda x: x.__name__
)
def test_results_do_not_show_the_defect(defect) -> None:
    plausible, right = defect(False), defect(True)
    assert all(torch.equal(plausible[name], right[name]) for name in right)


def test_a_program_may_overwrite_what_it_has_read() -> None:
    kept = {}
    assert not watch(lambda: kept.setdefault("results", planted.in_place())).findings
    assert torch.equal(kept["results"]["x"], planted.numbers(30) * 2)  # once, not in every order
    assert kept["results"]["counter"] == 2


def test_a_finding_says_who_where_and_what() -> None:
    (finding,) = watch(lambda: planted.next_head(False)).findings.values()
    assert str(finding) == (
        "next_head_kernel, q_ptr: program 0 loads element 12, outside the view of shape (5, 12) "
        "and strides (36, 1) (20 such lanes)"
    )
    (finding,) = watch(lambda: planted.running_sum(False)).findings.values()
    assert "program 1 loads element 0, which program 0 also writes" in str(finding)


def test_illegal_lanes_are_switched_off() -> None:
    x, memory = torch.ones(30), torch.zeros(64)

    def run() -> dict[str, torch.Tensor]:
        planted.store_past_end_kernel[(2,)](x, memory[:30], 30, BLOCK=16, FIXED=False)
        return {}

    assert watch(run).findings
    assert memory[:30].all() and not memory[30:].any()
    memory.fill_(7)
    run()
    assert (memory[30:] != 7).any()  # as nobody watches


def test_nothing_stays_patched() -> None:
    places = [
        (interpreter.InterpreterBuilder, "create_masked_load"),
        (interpreter.GridExecutor, "__call__"), (interpreter, "_patch_lang"),
        (torch, "empty"), (torch.Tensor, "new_empty"),
    ]  # fmt: skip
    before = [getattr(*place) for place in places]

    def fail() -> dict[str, torch.Tensor]:
        assert [getattr(*place) for place in places] != before
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        watch(fail)
    assert [getattr(*place) for place in places] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32,
                                   torch.float64, torch.int64])
def test_memory_is_poisoned_until_it_is_written(dtype: torch.dtype) -> None:
    like = torch.zeros(3, 4, dtype=dtype)
    with poisoned_allocations():
        made = [
            torch.empty(3, 4, dtype=dtype), torch.empty_strided((3, 4), (1, 3), dtype=dtype),
            torch.empty_like(like), like.new_empty(3, 4), like.new_empty_strided((3, 4), (4, 1)),
        ]  # fmt: skip
    for tensor in made:
        assert first_unwritten(tensor) == (0, 0)
        tensor[:2] = 1
        assert first_unwritten(tensor) == (2, 0)
        tensor[2] = 1
        assert first_unwritten(tensor) is None
    assert first_unwritten(torch.tensor([1.0, float("nan")])) == (1,)
    assert first_unwritten(torch.tensor([True])) is None


def test_kernels_without_a_case_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "_plan", lambda ops: [])
    failures = examine(["lastk"])["failures"]
    assert failures == [
        f"lastk: {kernel} was to be examined, but no case launched it"
        for kernel in ("lastk_backward_kernel", "lastk_forward_kernel")
    ]


def test_a_finding_becomes_a_failure_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    case = safety.cases()[0]
    object.__setattr__(case, "run", lambda inputs: planted.two_writers(False))
    monkeypatch.setattr(safety, "_plan", lambda ops: [(case, True)])
    monkeypatch.setattr(safety, "written_kernels", lambda op: [])
    record = examine(["lastk"])
    (failure,) = record["failures"]
    assert failure.startswith(f"{case.id}: two_writers_kernel, out_ptr: program 1 stores element")
    assert [row["findings"] for row in record["rows"]] == [1]
    show(record)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"failed: {failure}" in shown
    assert "two_writers_kernel 1 0 2 62 1" in shown


def test_an_unknown_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="ops must be among lastk, favor, nsa; got dense"):
        examine(["dense"])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1"):
        examine(["lastk"])

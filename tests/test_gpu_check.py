"""The check of a GPU: rehearsed end to end on the CPU, and each way in which a run can go wrong."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from attention_inputs import needs_triton

from attnopt.bench import gpu_check
from attnopt.bench.contenders import Contender, Prepared, Shape
from attnopt.bench.gpu_check import numerics, steps, sweep
from attnopt.bench.gpu_check.device import Clock, Device, Gpu
from attnopt.bench.gpu_check.sweep import PATIENCE, Sweep
from attnopt.bench.gpu_check.workers import Pool, Task
from attnopt.bench.work import Work
from attnopt.errors import UserError
from attnopt.testing import cases, written_kernels

ROOT = Path(__file__).resolve().parents[1]
pytestmark = needs_triton


def start(*command: object, path: str = "", **options) -> subprocess.Popen:
    """A Python process in the checkout, its stderr readable; Triton is not chosen yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = path + os.pathsep + environment["PATH"]
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment | options, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def sanitizer(tmp_path: Path):
    """Function that puts a compute-sanitizer of a few shell lines into a folder of the PATH."""

    def make(lines: str) -> str:
        tool = tmp_path / "bin" / "compute-sanitizer"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{lines}\n")
        tool.chmod(0o755)
        return str(tool.parent)

    return make


def test_rehearsal(tmp_path: Path, sanitizer) -> None:
    """The whole command. The sanitizer is none, but runs what it is given."""
    path = sanitizer('shift 2; "$@"; echo "========= ERROR SUMMARY: 0 errors"')
    output = tmp_path / "new folder" / "check.json"
    command = ["-m", "attnopt", "bench", "gpu-check", "--rehearse", "--output", output]
    process = start(*command, path=path)
    _, progress = process.communicate(timeout=500)
    record = json.loads(output.read_text())
    assert process.returncode == 0, progress
    assert record["complete"] and record["rehearsal"] and record["failures"] == []
    assert [(x["name"], x["status"]) for x in record["parts"]] == [
        (name, "ok") for name in gpu_check.PARTS["gpu-check"]
    ]
    assert {case["status"] for case in record["numerics"]["cases"]} == {"ok"}
    assert {case["op"] for case in record["numerics"]["cases"]} == {"lastk", "favor", "nsa"}
    assert any(case["causal"] for case in record["numerics"]["cases"])
    assert len(record["numerics"]["kernels"]) >= 18
    cells = [x for x in record["cells"] if record["contenders"][x["contender"]]["ours"]]
    assert {(x["phase"], x["N"]) for x in cells} == {
        ("fwd", 32), ("bwd", 32), ("decode", 32), ("fwd", 64)
    }  # fmt: skip
    for cell in cells:
        assert cell["status"] == "ok" and len(cell["times"]) == 2 and min(cell["times"]) > 0
        assert 0 < max(cell["errors"].values()) <= cell["limit"]
    assert any("favor_output_kernel" in cell["kernels"] for cell in cells)
    assert all(profile["rows"] for profile in record["profile"])
    assert [x["cases"] for x in record["sanitizer"]] == [1, 1]
    assert record["ceilings"]["copy_bytes_per_s"] > 0
    assert "numerics 12/12" in progress and "compute-sanitizer" not in progress


PLANTED = """
    import sys
    from attnopt.bench import gpu_check
    from attnopt.bench.gpu_check import numerics
    from attnopt.kernels.lastk import triton_forward

    own, tasks = triton_forward.lastk_forward, numerics.tasks

    def wrong(*arguments):
        out, lse = own(*arguments)
        out[:, :, -1, 0] += 0.3
        return out, lse

    triton_forward.lastk_forward = wrong
    gpu_check.PARTS = {"gpu-check": {"numerics": 1.0}}
    numerics.tasks = lambda rehearse: tasks(rehearse)[:3]
    if __name__ == "__main__":
        from attnopt.cli import main
        main()
"""


def test_a_wrong_kernel_is_found(tmp_path: Path) -> None:
    """The processes of a check import the script that was started, and so the mistake in it."""
    script, output = tmp_path / "planted.py", tmp_path / "check.json"
    script.write_text(textwrap.dedent(PLANTED))
    process = start(script, "bench", "gpu-check", "--rehearse", "--output", output,
                    TRITON_INTERPRET="1")  # fmt: skip
    _, progress = process.communicate(timeout=300)
    record = json.loads(output.read_text())
    assert process.returncode == 1, progress
    cases = record["numerics"]["cases"]
    assert [case["status"] for case in cases] == ["failed"] * 3
    assert "out is off by" in next(x["reason"] for x in cases if x["phase"] == "fwd")
    assert [len(case["rejected"]) for case in cases] == [numerics.DRAWS] * 3
    assert "failure: lastk/fwd" in progress


def test_a_cut_run_leaves_a_file(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = ["-m", "attnopt", "bench", "gpu-check", "--rehearse", "--output", output]
    process = start(*command)
    assert process.stderr is not None
    for line in process.stderr:
        if "numerics 2/" in line:
            break
    process.kill()
    process.communicate()
    record = json.loads(output.read_text())
    assert not record["complete"] and len(record["numerics"]["cases"]) >= 2
    assert record["contenders"] and record["elapsed"] > 0


def test_a_budget_too_small_skips_parts_and_says_so(tmp_path: Path, capsys) -> None:
    record = gpu_check.run(tmp_path / "check.json", budget=1.0, rehearse=True)
    assert record == json.loads((tmp_path / "check.json").read_text())
    assert {part["status"] for part in record["parts"]} == {"skipped"}
    assert record["failures"] == ["numerics: no case was found right"]
    said = capsys.readouterr().err
    assert "sweep: skipped no time left of 1 s" in said and "failure: numerics" in said


def test_what_cannot_be_checked_is_a_users_mistake(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU.*--rehearse"):
        gpu_check.run(tmp_path / "check.json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        gpu_check.run(tmp_path / "file" / "check.json", rehearse=True)


STEPS = """
    import os, time

    def fine(device, n):
        for i in range(n):
            yield {"i": i, "mode": os.environ["MODE"]}

    def fail(device):
        yield {"i": 0}
        raise ValueError("so it is")

    def die(device):
        os._exit(3)
        yield

    def hang(device):
        time.sleep(600)
        yield
"""


def test_a_crash_or_a_hang_costs_one_step(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_steps.py").write_text(textwrap.dedent(STEPS))
    monkeypatch.syspath_prepend(tmp_path)
    names = ["fine", "fail", "die", "fine", "hang", "fine"]
    tasks = [
        Task(str(i), f"own_steps:{name}", {"n": 2} if name == "fine" else {},
             seconds=1.0 if name == "hang" else 60.0)
        for i, name in enumerate(names)
    ]  # fmt: skip
    events, ends = [], {}
    pool = Pool(1, "cpu", {"MODE": "given"})
    left = pool.run(
        tasks, time.monotonic() + 60, lambda task, event: events.append((task.name, event)),
        lambda task, failure: ends.setdefault(task.name, failure),
    )  # fmt: skip
    assert left == []
    assert [ends[name] for name in ("0", "3", "5")] == [None] * 3
    assert ends["1"]["type"] == "ValueError" and "own_steps" in str(ends["1"]["traceback"])
    assert ends["2"] == {"type": "Crash", "message": "its process ended with exit code 3"}
    assert ends["4"] == {"type": "Hung", "message": "no answer within 1 s"}
    assert events[0] == ("0", {"i": 0, "mode": "given"})
    assert [name for name, _ in events] == ["0", "0", "1", "3", "3", "5", "5"]

    left = pool.run(tasks[4:], time.monotonic() + 0.5, print, lambda t, f: ends.update({t.name: f}))
    pool.close()
    assert left == tasks[5:] and ends["4"] == {"type": "Cut", "message": "no time left"}


ABOUT = {
    "dense": {"phases": ("fwd",), "ours": False},
    "flex-x": {"phases": ("fwd",), "ours": False},
    "ours": {"phases": ("fwd", "bwd"), "ours": True},
}


def test_a_group_goes_on_without_the_contender_that_broke_it() -> None:
    sweep = Sweep(ABOUT, "bfloat16", time.monotonic() + 60, rehearse=False)
    tasks = sweep.tasks()
    first = next(tasks)
    assert first.name == "fwd B=1 N=512" and first.arguments["names"] == ["dense", "ours"]
    sweep.heard(first, {"at": "dense"})
    sweep.ended(first, {"type": "Crash", "message": "exit code -11"})
    again = next(tasks)
    assert again.arguments == first.arguments | {"names": ["ours"]}
    sweep.heard(again, {"contender": "ours", **again.arguments["sizes"], "status": "ok"})
    sweep.ended(again, None)
    assert [(cell["contender"], cell["status"]) for cell in sweep.cells] == [
        ("dense", "error"), ("ours", "ok")
    ]  # fmt: skip
    assert sweep.cells[0]["reason"] == "Crash: exit code -11"
    rest = [next(tasks), *tasks]
    assert rest[0].name == "fwd B=1 N=1024"
    assert rest[-1].name == "fwd B=1 N=65536" and rest[-1].arguments["names"] == ["flex-x"]


def stand_in(name: str, prepare, reason: str | None = None) -> Contender:
    return Contender(name=name, label=name, mechanism="dense", level="op", library="attnopt",
                     prepare=prepare, missing=lambda device, dtype: reason)  # fmt: skip


def test_a_group_checks_then_times(monkeypatch) -> None:
    """What does not fit beside the others has its turn alone; what is wrong is never timed."""
    called: list[str] = []

    def prepared(name: str, error: float):
        def prepare(phase, shape, dtype, device, seed) -> Prepared:
            assert (phase, shape, dtype) == ("fwd", Shape(1, 2, 16, 32), torch.bfloat16)
            return Prepared(lambda: called.append(name), lambda: {"out": error}, 0.1, Work(3, 1e9))

        return prepare

    def crowded(*arguments) -> Prepared:
        if not called or called[-1] == "first" and called.count("first") < 6:
            raise torch.OutOfMemoryError("too much")
        return prepared("crowded", 0.01)(*arguments)

    def broken(*arguments) -> Prepared:
        raise RuntimeError("no such thing")

    known = [stand_in("first", prepared("first", 0.01)), stand_in("crowded", crowded),
             stand_in("wrong", prepared("wrong", math.nan)), stand_in("broken", broken),
             stand_in("absent", broken, "not installed")]  # fmt: skip
    monkeypatch.setattr(sweep, "contenders", lambda levels, device: known)
    sizes = {"phase": "fwd", "dtype": "bfloat16", "B": 1, "H": 2, "D": 16, "N": 32}
    names, until = [contender.name for contender in known], time.monotonic() + 60
    events = [*sweep.measure(Device.of("cpu"), sizes, names, until, 2)]
    assert [event["at"] for event in events if "at" in event] == names
    cells = {event["contender"]: event for event in events if "contender" in event}
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "first": "ok", "crowded": "ok", "wrong": "failed its check", "broken": "error",
        "absent": "not run",
    }  # fmt: skip
    assert cells["first"].items() >= (sizes | {"errors": {"out": 0.01}, "limit": 0.1}).items()
    assert len(cells["crowded"]["times"]) == 2 and cells["first"]["flops"] == 3
    assert cells["broken"]["reason"] == "RuntimeError: no such thing"
    assert "wrong" not in called and "times" not in cells["wrong"]
    late = [*sweep.measure(Device.of("cpu"), sizes, ["first"], 0.0, 2)]
    assert late[1]["status"] == "not run" and late[1]["reason"] == "no time left"


def test_what_takes_too_long_is_not_tried_at_twice_the_length() -> None:
    sweep = Sweep(ABOUT, "bfloat16", time.monotonic() + 60, rehearse=False)
    tasks = sweep.tasks()
    sizes = next(tasks).arguments["sizes"]
    sweep.heard(None, {"contender": "dense", **sizes, "status": "ok", "times": [PATIENCE / 2] * 3})
    sweep.heard(None, {"contender": "ours", **sizes, "status": "ok", "times": [PATIENCE / 9] * 3})
    assert next(tasks).arguments["names"] == ["ours"]
    assert sweep.cells[-1]["reason"] == "a call would take about 6 s"
    late = Sweep(ABOUT, "bfloat16", time.monotonic(), rehearse=False)
    assert list(late.tasks()) == late.cells == [] and late.left > 72


def test_tensors_move_with_their_strides() -> None:
    inputs = next(case for case in cases() if case.config["layout"] == "packed").make()
    moved = numerics.to_device(inputs, torch.device("cpu"))
    assert not inputs["q"].is_contiguous()
    for name, x in inputs.items():
        assert torch.equal(moved[name], x) and moved[name].stride() == x.stride()
        assert moved[name].data_ptr() != x.data_ptr()
    assert len({moved[x].untyped_storage().data_ptr() for x in "qkv"}) == 1


def test_numerics_see_a_leak_from_the_future_and_other_bits(monkeypatch) -> None:
    """Stand-ins for kernels: the mean of all keys, and one with noise."""
    case = next(case for case in cases() if (case.op, case.phase) == ("lastk", "fwd"))
    device = Device.of("cpu")

    def mean(case, inputs, backend):
        return {"out": inputs["q"] + inputs["v"].mean(2, keepdim=True)}

    def noisy(case, inputs, backend):
        return {"out": inputs["q"] + torch.rand(())}

    monkeypatch.setattr(numerics, "run", mean)
    assert numerics.is_causal(case, device) is False
    assert numerics.is_deterministic(case, device)
    monkeypatch.setattr(numerics, "run", noisy)
    assert not numerics.is_deterministic(case, device)
    wrong = numerics.complaints({
        "results": {"out": {"error": math.nan, "limit": 1.0}}, "deterministic": False,
        "causal": False,
    })  # fmt: skip
    assert len(wrong) == 3


def test_every_case_is_a_task_at_every_size() -> None:
    tasks = numerics.tasks(rehearse=False)
    assert len(tasks) == len(numerics.SIZES) * len(cases())
    assert len(numerics.tasks(rehearse=True)) == 12
    assert {op for op in numerics.OPS if written_kernels(op)} == {"lastk", "favor", "nsa"}


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', "ok"),
        ('echo "========= ERROR SUMMARY: 2 errors"; exit 1', "failed"),
        ('echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"', "failed"),
        ('echo "========= ERROR SUMMARY: 0 errors"; exit 1', "no result"),
        ("echo Device not supported; exit 1", "no result"),
        ("sleep 9", "no result"),
    ],
)  # fmt: skip
def test_the_sanitizers_verdict(lines: str, status: str, sanitizer, monkeypatch) -> None:
    monkeypatch.setenv("PATH", sanitizer(lines) + os.pathsep + os.environ["PATH"])
    found = steps.sanitize("memcheck", 1.0, rehearse=True)
    assert found["status"] == status
    record = {"kind": "scaling", "numerics": {"cases": []}, "cells": [], "sanitizer": [found]}
    assert any("memcheck" in x for x in gpu_check.failures(record)) == (status == "failed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A CUDA device of stand-ins, which take only what the originals take."""
    answers = {
        "get_device_properties": SimpleNamespace(L2_cache_size=2**25), "mem_get_info": (70, 100),
        "memory_reserved": 20, "memory_allocated": 5, "max_memory_allocated": 12,
        "get_device_capability": (7, 5), "set_device": None, "synchronize": None,
        "empty_cache": None, "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        stand_in = create_autospec(getattr(torch.cuda, name), return_value=answer)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    device = Device.of("cuda")
    assert isinstance(device, Gpu)
    return device


def test_a_gpus_memory_and_dtype(gpu: Gpu) -> None:
    assert gpu.torch_device == torch.device("cuda", 0) and gpu.cache_bytes == 2**25
    assert gpu.free_memory() == 70 + 20 - 5
    assert gpu.peak(lambda: None) == 12 - 5
    assert gpu.low_precision() == torch.float16  # before Ampere
    gpu.release()
    torch.cuda.empty_cache.assert_called_once()


def test_a_gpu_is_timed_by_its_events(gpu: Gpu, monkeypatch) -> None:
    """The GPU waits until the host has launched a round, and only its own time counts."""
    told: list = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 8.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", told.append)
    calls = [lambda: told.append("a"), lambda: told.append("b")]
    assert gpu.seconds(calls, 4, lead=1e-3)[0] == pytest.approx(2e-3)
    assert told[1:] == ["event", "a", "b", "a", "b", "event", "wait"]
    assert told[0] == pytest.approx(2e9 * 6e-3, rel=0.01)
    told.clear()
    assert Clock(gpu, calls[:1], target=0.02).round() == pytest.approx(8e-3 / 3)
    assert told.count("a") == 1 + 1 + 3

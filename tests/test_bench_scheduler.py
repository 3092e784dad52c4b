"""A scaling run: budgets, rounds that are paired, failures that are kept, processes that die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnopt.bench import scheduler, worker
from attnopt.bench.contenders import Shape
from attnopt.cli_bench import app, seconds
from attnopt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class Scripted:
    """Stands for a cell's process: takes time by a law and answers without computing."""

    log = []
    laws = {}
    broken = {}
    clock = [0.0]

    def __init__(self, contender, phase, shape, dtype, memory):
        self.name, self.phase, self.n = contender, phase, shape.N

    def cost(self):
        factor, exponent = self.laws.get(self.name, (1e-5, 1.0))
        return factor * self.n**exponent

    def ask(self, what, timeout=None):
        self.log.append((self.name, self.phase, self.n, what))
        self.clock[0] += self.cost()
        fault = self.broken.get((self.name, self.n), {})
        if what in fault:
            return fault[what]
        if what == "check":
            return {"errors": {"out": 1e-7}}
        found = {"seconds": self.cost()}
        if what == "prepare":
            found |= {"bytes": 1000 * self.n, "limit": 1e-5, "flops": 1.0, "minimal_bytes": 1.0}
        return found

    def stop(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    Scripted.log, Scripted.laws, Scripted.broken, Scripted.clock = [], {}, {}, [0.0]
    monkeypatch.setattr(scheduler, "Worker", Scripted)
    monkeypatch.setattr(scheduler, "start_server", lambda dtype: None)
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: Scripted.clock[0])
    monkeypatch.setattr("attnopt.bench.machine.ceilings", lambda *_: {})
    return Scripted


def measure(tmp_path, **options):
    settings = {"budget": 60.0, "command": "attnopt bench", "levels": ["op"], "longest": 2048}
    return scheduler.run(tmp_path / "out" / "results.json", **{**settings, **options})


def cells(record, **wanted):
    return [c for c in record["cells"] if all(c[k] == v for k, v in wanted.items())]


def test_rounds_are_timed_in_turn_before_any_check(scripted, tmp_path):
    record = measure(tmp_path, only=["lastk-5", "favor-64"], phases=["fwd"], longest=256)
    assert {c["contender"] for c in record["cells"]} == {"sdpa-flash", "lastk-5", "favor-64"}
    events = [(name, what) for name, _, _, what in scripted.log]
    assert events[:3] == [(n, "prepare") for n in ("sdpa-flash", "lastk-5", "favor-64")]
    assert [n for n, _ in events[3:9]] == [
        "sdpa-flash", "lastk-5", "favor-64", "lastk-5", "favor-64", "sdpa-flash",
    ]  # fmt: skip
    assert [what for _, what in events[-3:]] == ["check"] * 3
    assert len({len(c["times"]) for c in record["cells"]}) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == record


def test_what_costs_too_much_leaves_with_a_reason(scripted, tmp_path):
    scripted.laws = {"sdpa-math": (1e-6, 2.0), "sdpa-flash": (1e-8, 2.0)}
    record = measure(tmp_path, phases=["fwd"], budget=60.0, longest=1 << 14)
    math = cells(record, contender="sdpa-math")
    assert [c["status"] for c in math][-1] == "not run" and math[0]["status"] == "ok"
    assert "time budget" in math[-1]["reason"]
    longest = max(c["N"] for c in cells(record, contender="lastk-5", status="ok"))
    assert longest > max(c["N"] for c in math if c["status"] == "ok")
    assert record["elapsed"] < 1.3 * 60


def test_a_wrong_cell_has_no_time(scripted, tmp_path):
    scripted.broken = {("lastk-5", 512): {"check": {"errors": {"out": 1e-7, "dq": 2e-3}}}}
    record = measure(tmp_path, only=["lastk-5"], phases=["bwd"])
    (wrong,) = cells(record, contender="lastk-5", N=512)
    assert wrong["status"] == "failed its check" and "dq 0.002" in wrong["reason"]
    assert "times" not in wrong and "1e-05" in wrong["reason"]
    assert cells(record, contender="lastk-5", N=1024)[0]["status"] == "ok"


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_errors_that_are_no_numbers_fail(scripted, tmp_path, error):
    scripted.broken = {("lastk-5", 256): {"check": {"errors": {"out": error}}}}
    record = measure(tmp_path, only=["lastk-5"], phases=["fwd"], longest=256)
    assert cells(record, contender="lastk-5")[0]["status"] == "failed its check"


@pytest.mark.parametrize("step", ["prepare", "time", "check"])
def test_a_cell_that_dies_takes_nobody_with_it(scripted, tmp_path, step):
    scripted.broken = {("favor-64", 512): {step: {"error": "out of memory"}}}
    record = measure(tmp_path, only=["favor-64", "lastk-5"], phases=["fwd"])
    dead = cells(record, contender="favor-64")
    assert [c["status"] for c in dead] == ["ok", "out of memory"]
    assert {c["N"] for c in cells(record, contender="lastk-5", status="ok")} == {
        256, 512, 1024, 2048,
    }  # fmt: skip


def test_an_interrupt_keeps_what_there_is(scripted, tmp_path, monkeypatch):
    asked = Scripted.ask

    def interrupted(self, what, timeout=None):
        if self.n == 1024:
            raise KeyboardInterrupt
        return asked(self, what, timeout)

    monkeypatch.setattr(Scripted, "ask", interrupted)
    measure(tmp_path, only=["lastk-5"], phases=["fwd"])
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["interrupted"] and {c["N"] for c in kept["cells"]} == {256, 512}


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contenders are .*; got lastk"):
        measure(tmp_path, only=["lastk"])
    with pytest.raises(ValueError, match="phases are fwd, bwd, decode; got forward"):
        measure(tmp_path, phases=["forward"])


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("7", 7)])
def test_lengths_of_time(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "5 minutes", "-3s", "0", "m"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UserError, match="a time is a number with s, m or h"):
        seconds(text)


@pytest.fixture(scope="module")
def processes():
    """One thread, as in a run: the server of processes reads it when it starts."""
    os.environ["OMP_NUM_THREADS"] = "1"


def cell(name="lastk-5", phase="bwd", n=128, memory=2**31):
    return worker.Worker(name, phase, Shape(1, 2, 16, n), "float32", memory)


def test_a_process_measures_and_checks(processes):
    own = cell(n=4096)
    try:
        found = own.ask("prepare", 120)
        assert found["seconds"] > 0 and found["flops"] > 0, found
        # q, k, v and their gradients are 512 KiB each
        assert sys.platform != "linux" or 2**19 < found["bytes"] < 2**25
        assert own.ask("time", 60)["seconds"] > 0
        assert own.ask("check", 60)["errors"]["dq"] < 1e-5
    finally:
        own.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_process_that_needs_too_much_says_so(processes):
    own = cell("sdpa-math", n=8192, memory=2**28)
    try:
        assert own.ask("prepare", 120) == {"error": "out of memory"}
    finally:
        own.stop()


def test_a_process_that_dies_or_hangs_is_an_answer(processes):
    own = cell()
    assert own.ask("ready", 120) == {}
    os.kill(own._process.pid, signal.SIGTERM)
    assert "error" in own.ask("prepare", 60)
    slow = cell("sdpa-math", n=2048)
    assert slow.ask("ready", 120) == {}
    assert slow.ask("prepare", 0.001) == {"error": "took more than 0 s"}


def test_the_command_measures_and_reports(tmp_path):
    arguments = ["bench", "--budget", "90s", "--only", "lastk-5", "--level", "op", "--phase", "fwd",
                 "--longest", "512", "--output", str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "attnopt", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    assert {(c["contender"], c["N"], c["status"]) for c in record["cells"]} == {
        (name, n, "ok") for name in ("lastk-5", "sdpa-flash") for n in (256, 512)
    }
    assert record["machine"]["threads"] == 1 and record["versions"]["torch"]
    assert record["command"].startswith("attnopt bench --budget 90s")
    assert "last-5" in (tmp_path / "report.html").read_text()
    assert "report.html" in done.stdout


@pytest.mark.parametrize("failures", [[], ["a kernel is wrong"]])
@pytest.mark.parametrize("name", ["kernels", "traffic", "safety"])
def test_an_instrument_that_finds_something_exits_with_1(name, failures, tmp_path, monkeypatch):
    from importlib import import_module

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = import_module("attnopt.bench.instruments." + name.replace("kernels", "builds"))
    monkeypatch.setattr(module, "examine", lambda ops=None, **_: {"ops": ops, "failures": failures})
    monkeypatch.setattr(module, "show", lambda record, **_: print(*record["failures"]))
    path = tmp_path / "record.json"
    done = CliRunner().invoke(app, [name, "--op", "nsa", "--json", str(path)])
    assert done.exit_code == len(failures), done.output
    record = json.loads(path.read_text())
    assert record["ops"] == ["nsa"] and record["versions"]["torch"] and "commit" in record
    assert all(failure in done.output for failure in failures)


def test_the_roofline_says_what_it_was_counted_by(tmp_path):
    counted, path = ROOT / "bench" / "results" / "traffic.json", tmp_path / "predicted.json"
    done = CliRunner().invoke(app, ["roofline", str(counted), "--json", str(path)])
    assert done.exit_code == 0, done.output
    record = json.loads(path.read_text())
    assert record["counted"]["command"] == json.loads(counted.read_text())["command"]
    page = CliRunner().invoke(app, ["report", str(path)])
    assert page.exit_code == 0 and "prediction" in path.with_suffix(".html").read_text().lower()
    wrong = CliRunner().invoke(app, ["roofline", str(tmp_path / "none.json")])
    assert isinstance(wrong.exception, UserError) and "none.json" in str(wrong.exception)


def test_help_names_every_instrument():
    text = CliRunner().invoke(app, ["--help"]).output
    for name in ("kernels", "traffic", "safety", "roofline", "gpu-check", "report"):
        assert name in text

"""The demonstration: its steps in order, its cache, and what happens when a step fails.

The commands are stood in for by a script here; the real ones run in the slow test at the end.
"""

import json
import sys
import time

import pytest

from attnopt import demo
from attnopt.errors import UserError

# Stands for `python -m attnopt`: writes a part of a ready run folder, and keeps a diary.
STUB = """
import json, shutil, sys, pathlib
template, diary, *arguments = map(str, sys.argv[1:])
command, folder = arguments[0], pathlib.Path(arguments[1])
if "--output" in arguments:
    folder = pathlib.Path(arguments[arguments.index("--output") + 1])
with open(diary, "a") as file:
    print(*arguments, file=file)
parts = {"pretrain": ["history"], "distill": ["run", "history", "masks"],
         "evaluate": ["evaluation"], "generate": ["generation"]}[command]
folder.mkdir(parents=True, exist_ok=True)
for part in parts:
    shutil.copy(f"{template}/{part}.json", folder)
if command == "pretrain":
    (folder / "config.json").write_text("{}")
    (folder / "pretrain.json").write_text(json.dumps({"argv": ["attnopt", *arguments]}))
if (pathlib.Path(template) / f"fail-{command}").exists():
    sys.exit("error: no such luck")
"""


@pytest.fixture
def stage(write_run, tmp_path, monkeypatch):
    """Replace commands and cache; return (template folder, function that reads the diary)."""
    template, diary = write_run(tmp_path / "template"), tmp_path / "diary"
    (tmp_path / "stub.py").write_text(STUB)
    command = [sys.executable, str(tmp_path / "stub.py"), str(template), str(diary)]
    monkeypatch.setattr(demo, "COMMAND", command)
    monkeypatch.setattr(demo, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return template, lambda: [line.split() for line in diary.read_text().splitlines()]


def test_every_step_runs_and_one_report_compares_all(stage, tmp_path, capsys):
    page = demo.run_demo(tmp_path / "out")
    diary = stage[1]()
    assert diary[0][0] == "pretrain"
    for name in demo.STUDENTS:
        run = str(tmp_path / "out" / "runs" / name)
        timed = ["generate"] if name in demo.GENERATE else []
        assert [line[0] for line in diary if run in line] == ["distill", "evaluate", *timed]
    runs = json.loads(page.with_suffix(".json").read_text())["runs"]
    assert [run["name"] for run in runs] == list(demo.STUDENTS)
    assert {run["name"] for run in runs if run["missing"] == []} == set(demo.GENERATE)
    assert all(run["missing"] in ([], ["generation"]) for run in runs)
    shown = capsys.readouterr().out
    assert "zero-shot" in shown and "1.62 nats/token" in shown
    assert "report.html" in shown.replace("\n", "")


def test_the_teacher_is_trained_once(stage, tmp_path):
    demo.run_demo(tmp_path / "out")
    demo.run_demo(tmp_path / "out")
    assert [line[0] for line in stage[1]()].count("pretrain") == 1
    demo.run_demo(tmp_path / "out", retrain=True)
    assert [line[0] for line in stage[1]()].count("pretrain") == 2
    assert [p.name for p in (tmp_path / "cache" / "attnopt").iterdir()] == [
        demo.teacher_folder().name
    ]


def test_the_teacher_remembers_how_it_was_made(stage, tmp_path):
    demo.run_demo(tmp_path / "out")
    argv = json.loads((demo.teacher_folder() / "pretrain.json").read_text())["argv"]
    assert argv[argv.index("--output") + 1] == str(demo.teacher_folder())


def test_another_recipe_is_another_teacher(stage, monkeypatch):
    before = demo.teacher_folder()
    monkeypatch.setattr(demo, "TEACHER", [*demo.TEACHER, "--seed", "7"])
    assert demo.teacher_folder() != before


def test_a_failed_teacher_is_not_kept(stage, tmp_path):
    (stage[0] / "fail-pretrain").touch()
    with pytest.raises(UserError, match=r"train the teacher failed: no such luck .*teacher.log"):
        demo.run_demo(tmp_path / "out")
    assert not list((tmp_path / "cache" / "attnopt").iterdir())


def test_a_failed_step_ends_the_others(stage, tmp_path):
    (stage[0] / "fail-evaluate").touch()
    with pytest.raises(UserError, match="evaluate failed: no such luck"):
        demo.run_demo(tmp_path / "out")
    assert "generate" not in [line[0] for line in stage[1]()]


def test_commands_still_running_are_ended(tmp_path, monkeypatch):
    from rich.progress import Progress

    monkeypatch.setattr(demo, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    with Progress(*demo.COLUMNS, disable=True) as progress:
        chain = demo.Chain([demo.Step("sleep", [], tmp_path, tmp_path / "log")], progress)
        assert chain.advance() and chain.advance()
        start = time.perf_counter()
        chain.stop()
    assert chain.process.returncode != 0
    assert time.perf_counter() - start < 5


@pytest.mark.slow
def test_the_real_demonstration(tmp_path):
    page = demo.run_demo(tmp_path / "out")
    runs = json.loads(page.with_suffix(".json").read_text())["runs"]
    ratios = {}
    for run in runs:
        assert run["missing"] == []
        assert run["evaluation"]["control_self_only_kl"] >= 1.0
        ratios[run["label"]] = run["evaluation"]["models"]["student"]["perplexity_ratio"]
    assert ratios["last-5"] <= 1.06
    assert ratios["last-32 + 4 sinks"] <= 1.02

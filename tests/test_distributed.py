"""Training in two processes, whole models (DDP) or split ones (FSDP2), equals one process."""

import json
import os
import subprocess
import time

import psutil
import pytest
import torch
from launch import ECONOMICAL, FSDP, SUPPORT, command, torchrun
from tiny_runs import read, run, trainer_of, weights

from attnopt import LastK, convert, from_pretrained, mechanisms
from attnopt.checkpoints import newest_complete
from attnopt.errors import UserError
from attnopt.runs import load_model

COST = {"wall_seconds", "cpu_seconds", "cpu_memory_mb", "gpu_memory_mb"}
# SGD, for Adam makes a step of the rounding of a gradient that is 0.
SHARED = {"steps": 4, "eval_steps": 2, "save_steps": 2, "optim": "sgd", "learning_rate": 0.5}
SHARED |= {"logging_steps": 1, "l1_weight": 0.1, "ce_weight": 0.5, "per_device_eval_batch_size": 3}
JOBS = {
    "ddp": ({}, {"train_parameters": "all", "match_steps": 1}),
    "ddp-lora": (
        {},
        {"train_parameters": "lora", "match_steps": 1, "gradient_accumulation_steps": 2},
    ),
    "fsdp": (FSDP, {"train_parameters": "all"}),
    "fsdp-best": (  # step 1 is better than 2, and each of the others the best so far
        ECONOMICAL,
        {"train_parameters": "attention", "patience": 2, "eval_steps": 1, "save_steps": 1}
        | {"learning_rate": 1.0, "ce_weight": 0.0, "l1_weight": 0.0},
    ),
    "fsdp-lora": (FSDP, {"train_parameters": "lora", "gradient_accumulation_steps": 2}),
    "fsdp-coefficients": (
        ECONOMICAL,
        {"train_parameters": "coefficients", "coefficient_learning_rate": 0.2},
    ),
    "fsdp-bf16": (FSDP, {"train_parameters": "all", "bf16": True, "steps": 2}),
}


@pytest.fixture(scope="module")
def two(teacher, text, tmp_path_factory):
    """Folder with a run of two processes for each of JOBS, a batch of one sequence in each."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        [teacher, text, str(folder / name), fsdp, SHARED | own | {"per_device_train_batch_size": 1}]
        for name, (fsdp, own) in JOBS.items()
    ]
    done = subprocess.run(**torchrun(SUPPORT / "ranks.py", json.dumps(jobs)))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(two, teacher, text, tmp_path, name):
    options = SHARED | JOBS[name][1]
    batch = 2 * options.pop("gradient_accumulation_steps", 1)
    options["per_device_train_batch_size"] = batch
    expected = run(teacher, text, tmp_path / "one", **options)
    one, both = (read(folder / "history.json") for folder in (expected, two / name))
    close = 5e-3 if "bf16" in name else 1e-4
    rows = {row["step"]: row for row in one["rows"]}
    assert len(one["rows"]) == len(both["rows"]) > 2 and "kl" in rows[2] and "eval_kl" in rows[2]
    for a, b in zip(one["rows"], both["rows"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - COST:
            assert b[key] == pytest.approx(a[key], rel=close), (a["step"], key)
    for a, b in zip(one["coefficients"], both["coefficients"], strict=True):
        assert a["step"] == b["step"] and len(a["layers"]) == 2
        torch.testing.assert_close(
            [torch.tensor(layer["offsets"]) for layer in b["layers"].values()],
            [torch.tensor(layer["offsets"]) for layer in a["layers"].values()],
        )
    assert read(two / name / "masks.json").keys() == read(expected / "masks.json").keys()
    before = weights(teacher)
    got, wanted = (weights(folder / "student") for folder in (two / name, expected))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=close, atol=0.1 * close, msg=key)
    changed = [key for key in before if not torch.equal(before[key], got[key])]
    assert bool(changed) == ("coefficients" not in name)
    assert all((x != 0).all() for key, x in got.items() if "alpha" in key)
    assert mechanisms(from_pretrained(two / name / "student")).keys() == {0, 1}
    assert newest_complete(two / name / "checkpoints").name == f"checkpoint-{max(rows)}"


@pytest.mark.parametrize(("name", "how"), [("fsdp", "with"), ("ddp", "without")])
def test_a_run_is_resumed_as_it_was_started(two, teacher, text, tmp_path, name, how):
    student = convert(load_model(teacher), LastK(window=3))
    trainer = trainer_of(student, tmp_path, text, train_parameters="coefficients")
    trainer.is_fsdp_enabled = how == "without"
    checkpoint = two / name / "checkpoints" / "checkpoint-4"
    with pytest.raises(UserError, match=f"checkpoint-4 was written {how} FSDP: resume it in"):
        trainer._load_from_checkpoint(str(checkpoint))


def test_what_fsdp_cannot_do_is_said(teacher, text, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("attnopt.trainer.logger.warning", said.append)
    student = convert(load_model(teacher), LastK(window=3))
    trainer = trainer_of(student, tmp_path, text, train_parameters="coefficients")
    assert not said
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer._prepare_fsdp()
    assert "accelerate shards over accelerators only" in said[0] and "(cpu)" in said[0]
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match="FSDP version 1 is not supported: set fsdp_version to 2"):
        trainer._prepare_fsdp()
    trainer.args.match_steps = 1
    with pytest.raises(UserError, match="match_steps is not possible with FSDP: use DDP"):
        trainer._prepare_fsdp()


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: true
"""


def by_accelerate(folder, *arguments):
    """A command as accelerate starts it in two processes, which split the model."""
    (folder / "fsdp.yaml").write_text(ACCELERATE)
    options = ("--config_file", folder / "fsdp.yaml", "--main_process_port", 0)
    return command("accelerate.commands.launch", *options, SUPPORT / "fsdp_on_cpu.py", *arguments)


LAUNCHERS = {
    "one process": lambda folder, *arguments: command("attnopt", *arguments),
    "torchrun": lambda folder, *arguments: torchrun("-m", "attnopt", *arguments),
    "accelerate": by_accelerate,
}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_command_killed_at_any_moment_goes_on_bit_for_bit(
    launcher, train, teacher, text, tmp_path
):
    def distill(folder, *more):
        options = ["--model", teacher, "--data", text, "--output", folder, "--train", train]
        options += ["--window", 3, "--steps", 100, "--batch-size", 1, "--max-eval-tokens", 160]
        return LAUNCHERS[launcher](tmp_path, "distill", *options, *more)

    done = subprocess.run(**distill(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoints = tmp_path / "broken" / "checkpoints"
    broken = subprocess.Popen(**distill(tmp_path / "broken"))
    while not (checkpoints / "checkpoint-20" / "complete.json").exists():
        assert broken.poll() is None, broken.stderr.read()[-3000:]
        time.sleep(0.01)
    for process in [broken, *psutil.Process(broken.pid).children(recursive=True)]:
        process.kill()  # in a step, an evaluation or a save
    broken.wait()
    assert not (tmp_path / "broken" / "student").exists()
    newest = newest_complete(checkpoints)
    states = [p for p in newest.rglob("*") if p.name.startswith(("optimizer", "__0_0"))]
    os.truncate(next(p for p in states if p.is_file()), 100)
    done = subprocess.run(**distill(tmp_path / "broken", "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"skipping {newest}: it is incomplete or was truncated" in done.stderr
    expected, got = (weights(tmp_path / name / "student") for name in ("whole", "broken"))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    rows = [read(tmp_path / name / "history.json")["rows"] for name in ("whole", "broken")]
    assert [{k: v for k, v in row.items() if k not in COST} for row in rows[0]] == [
        {k: v for k, v in row.items() if k not in COST} for row in rows[1]
    ]

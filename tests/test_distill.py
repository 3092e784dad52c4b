"""The distillation trainer: what trains, what it writes, and that nothing is lost to a kill."""

import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_family, tokens
from tiny_runs import BYTES, CONTEXT, read, run, trainer_of, weights
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from attnopt import LastK, convert, from_pretrained, mechanisms
from attnopt.checkpoints import newest_complete
from attnopt.convert.families import FAMILIES
from attnopt.distill import DistillationArguments, DistillationTrainer, without_dropout
from attnopt.errors import UserError
from attnopt.runs import check_fits, load_model, load_tokenizer
from attnopt.trainer import set_trainable

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.causal])
def test_no_student_has_dropout(name):
    """Modules of dropout, and layers that call the function or leave out whole layers."""
    model = tiny_family(name, attention_dropout=0.5, dropout=0.5).train()
    x = tokens(2, 8)
    with torch.no_grad():
        first, second = without_dropout(model)(x).logits, model(x).logits
    assert torch.equal(first, second)


def test_a_run_folder_holds_what_the_others_read(teacher, text, tmp_path):
    config = LastK(window=3, sinks=1, per_head=True)
    options = {"l1_weight": 0.1, "ce_weight": 0.01, "argv": ["attnopt", "distill"]}
    folder = run(teacher, text, tmp_path / "run", config=config, **options)
    about = read(folder / "run.json")
    assert about["command"] == "distill" and about["argv"] == ["attnopt", "distill"]
    assert about["teacher"] == teacher and about["data"] == text
    assert about["attention"] == config.to_dict()
    assert about["versions"].keys() >= {"attnopt", "torch", "transformers"}
    assert about["training"]["max_steps"] == 6 and about["training"]["l1_weight"] == 0.1
    history = read(folder / "history.json")
    rows = {row["step"]: row for row in history["rows"]}
    assert sorted(rows) == [0, 2, 3, 4, 6]
    assert rows[0].keys() >= {"eval_kl", "eval_ce", "eval_perplexity", "eval_top1"}
    train_keys = {"loss", "kl", "ce", "l1", "learning_rate", "wall_seconds", "cpu_seconds"}
    assert rows[6].keys() >= train_keys | {"cpu_memory_mb", "eval_kl", "eval_teacher_perplexity"}
    last = rows[4]
    assert last["loss"] == pytest.approx(last["kl"] + 0.01 * last["ce"] + 0.1 * last["l1"], 1e-5)
    assert rows[6]["eval_kl"] < rows[0]["eval_kl"]
    assert rows[6]["wall_seconds"] > rows[2]["wall_seconds"] > 0
    assert [entry["step"] for entry in history["coefficients"]] == sorted(rows)
    offsets = torch.tensor(history["coefficients"][-1]["layers"]["1"]["offsets"])
    assert offsets.shape == (2, 3) and not torch.equal(offsets, torch.full((2, 3), 0.5))
    assert len(history["labels"]["0"]["offsets"]) == 3
    assert torch.tensor(read(folder / "masks.json")["layers"]["0"]).shape == (2, 48, 48)
    student = from_pretrained(folder / "student")
    assert mechanisms(student)[1].config == config
    assert len(load_tokenizer(folder / "student")) == 257
    assert newest_complete(folder / "checkpoints").name == "checkpoint-6"
    torch.testing.assert_close(
        weights(folder / "student"), weights(folder / "checkpoints" / "checkpoint-6")
    )


@pytest.mark.parametrize("trained", ["coefficients", "attention", "all"])
def test_only_what_is_chosen_trains(teacher, text, tmp_path, trained, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "attnopt.distill.load_model", lambda name: loaded.append(name) or load_model(name)
    )
    folder = run(teacher, text, tmp_path / "run", train_parameters=trained)
    before, after = weights(teacher), weights(folder / "student")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(loaded) == (1 if trained == "coefficients" else 2)  # or it is its own teacher
    attention = {name for name in before if ".attn." in name}
    assert len(attention) == 8
    expected = {"coefficients": set(), "attention": attention, "all": set(before)}[trained]
    assert changed == expected
    alphas = [after[name] for name in after.keys() - before.keys()]
    assert len(alphas) == 2 and all((alpha != 0).all() for alpha in alphas)


def test_a_student_with_frozen_weights_is_its_own_teacher(teacher, text, tmp_path):
    numbers = []
    for source in (None, load_model(teacher)):
        student = convert(load_model(teacher), LastK(window=3))
        options = {"train_parameters": "coefficients", "max_steps": 3}
        trainer = trainer_of(student, tmp_path, text, source, **options)
        loss = trainer.train().training_loss
        assert student.training  # teaching in between puts dropout back
        numbers.append((loss, trainer.evaluate()["eval_kl"]))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and numbers[0][1] > 0.001
    with pytest.raises(ValueError, match="a teacher is needed"):
        trainer_of(student, tmp_path, text, train_parameters="attention")


def test_a_full_window_starts_at_the_teacher(teacher, text, tmp_path):
    student = convert(load_model(teacher), LastK(window=CONTEXT))
    metrics = trainer_of(student, tmp_path, text, load_model(teacher)).evaluate()
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-6) and metrics["eval_top1"] == 1
    assert metrics["eval_perplexity"] == pytest.approx(metrics["eval_teacher_perplexity"], 1e-5)


def test_accumulated_small_batches_equal_one_large(teacher, text, tmp_path):
    students = []
    for size, steps in ((4, 1), (1, 4)):
        student = convert(load_model(teacher), LastK(window=3)).eval()
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options |= {"optim": "sgd", "max_steps": 2, "l1_weight": 1.0, "logging_steps": 1}
        trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        students.append((student.state_dict(), logs))
    (one, logs_one), (many, logs_many) = students
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, msg=name)
    for a, b in zip(logs_one, logs_many, strict=True):
        for key in ("loss", "kl", "ce", "l1", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key


def test_weights_of_a_bf16_teacher_train_in_fp32(teacher, text, tmp_path):
    load_model(teacher).bfloat16().save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    folder = run(str(tmp_path / "teacher"), text, tmp_path / "run", steps=3, bf16=True)
    trained, saved = (weights(folder / f) for f in ("checkpoints/checkpoint-3", "student"))
    assert {x.dtype for x in trained.values()} == {torch.float32}
    for name, value in trained.items():
        learns = ".attn." in name
        assert torch.equal(value, value.bfloat16().float()) != learns, name  # rounded, or not
        assert saved[name].dtype == (torch.float32 if "alpha" in name else torch.bfloat16)
        assert torch.equal(saved[name], value.to(saved[name].dtype)), name
    student = from_pretrained(folder / "student")
    assert student.dtype == torch.bfloat16 and mechanisms(student)[0].alpha.dtype == torch.float32


def test_coefficients_are_never_decayed_and_may_have_their_own_rate(teacher, text, tmp_path):
    student = convert(load_model(teacher), LastK(window=3, sinks=1))
    options = {"weight_decay": 0.1, "train_parameters": "all", "coefficient_learning_rate": 0.5}
    for rate in (None, 0.5):
        options["coefficient_learning_rate"] = rate
        trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
        groups = trainer.create_optimizer().param_groups
        own = {id(p) for m in mechanisms(student).values() for p in m.parameters()}
        assert len(own) == 4
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed and not own & decayed
        places = [(id(p), g["lr"]) for g in groups for p in g["params"]]
        assert len(places) == len(list(student.parameters()))
        assert {lr for p, lr in places if p in own} == {rate or 2e-3}
        assert {lr for p, lr in places if p not in own} == {2e-3}


def test_early_stopping_keeps_the_best(teacher, text, tmp_path):
    # the rate grows until it does harm
    options = {"learning_rate": 1.0, "warmup_steps": 40, "eval_steps": 1, "save_steps": 1}
    folder = run(teacher, text, tmp_path / "run", steps=40, patience=2, **options)
    rows = read(folder / "history.json")["rows"]
    kls = {row["step"]: row["eval_kl"] for row in rows if row["step"] > 0}
    best, last = min(kls, key=kls.get), max(kls)
    assert 1 < best == last - 2 < 38
    kept = weights(folder / "checkpoints" / f"checkpoint-{best}")
    torch.testing.assert_close(weights(folder / "student"), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_parameters": "heads"}, "train_parameters must be one of .*; got 'heads'"),
        ({"direction": "up"}, "direction must be one of"),
        ({"l1_weight": -1.0}, "l1_weight must not be negative; got -1.0"),
        ({"save_total_limit": 1}, "at least 2"),
        ({"kl_weight": 0.0}, "nothing to train: kl_weight, ce_weight and l1_weight are all 0"),
    ],
)
def test_arguments_are_checked(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), **wrong)


def test_mistakes_before_training_are_explained(teacher, text, tmp_path):
    with pytest.raises(UserError, match="no model folder /no/such/teacher"):
        run("/no/such/teacher", text, tmp_path / "a")
    with pytest.raises(UserError, match="cannot load the model someone/model: .*local folder"):
        run("someone/model", text, tmp_path / "b")
    with pytest.raises(UserError, match="longer than the model's context of 16 tokens"):
        run(teacher, text, tmp_path / "c", block_size=17)
    with pytest.raises(UserError, match="no such file"):
        run(teacher, "missing.txt", tmp_path / "d")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="257 tokens but the model only 9"):
        check_fits(model, BYTES, None)
    with pytest.raises(ValueError, match="nothing to train: the model has no coefficients"):
        set_trainable(model, "coefficients")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the output folder .*file"):
        run(teacher, text, tmp_path / "file" / "run")


def test_without_network_no_adapter_is_looked_for_on_the_hub(monkeypatch):
    """Transformers looks for one before the model, where peft is installed, and would retry."""
    monkeypatch.setattr("attnopt.runs.why_unreachable", lambda *a, **k: "no route")
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match="cannot load the model someone/model: .*local folder"):
        load_model("someone/model")
    assert not asked


def test_a_used_folder_is_not_overwritten(teacher, text, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        run(teacher, text, tmp_path)


# ---- checkpoints

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(int(sys.argv.pop()))  # sums depend on how many threads share them
from attnopt.trainer import DistillationTrainer
sys.path.insert(0, "tests/support")
from tiny_runs import run
save = DistillationTrainer._save_checkpoint

def save_and_die(self, model, trial):
    save(self, model, trial)
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

DistillationTrainer._save_checkpoint = save_and_die
teacher, text, folder, options = sys.argv[1:]
run(teacher, text, folder, **eval(options))
"""


def test_a_killed_run_goes_on_bit_for_bit(teacher, text, tmp_path, caplog):
    options = {
        "steps": 9,
        "save_total_limit": 9,
        "logging_steps": 1,
        "save_steps": 2,
        "train_parameters": "all",
    }
    options |= {"ce_weight": 0.5, "weight_decay": 0.1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(teacher, text, whole, **options)
    command = [sys.executable, "-c", KILLED, teacher, text, str(broken), repr(options)]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    torn = broken / "checkpoints" / "checkpoint-6" / "model.safetensors"
    os.truncate(torn, torn.stat().st_size // 2)
    resumed_from = []
    watch = TrainerCallback()
    watch.on_train_begin = lambda args, state, *a, **k: resumed_from.append(state.global_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.distill._stopping", lambda patience: [watch])
        run(teacher, text, broken, resume=True, **options)
    assert resumed_from == [4]
    expected, got = weights(whole / "student"), weights(broken / "student")
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    cost = ("wall_seconds", "cpu_seconds", "cpu_memory_mb", "gpu_memory_mb")
    histories = [read(folder / "history.json") for folder in (whole, broken)]
    seconds = [row["wall_seconds"] for row in histories[1]["rows"]]
    assert seconds == sorted(seconds)
    for history in histories:
        for row, key in itertools.product(history["rows"], cost):
            row.pop(key, None)
    assert histories[0] == histories[1]


def test_a_finished_run_stays_what_it_is(teacher, text, tmp_path, caplog):
    options = {"steps": 5, "eval_steps": 0.5, "save_steps": 0.5, "folder": tmp_path / "run"}
    run(teacher, text, **options)
    student, rows = weights(tmp_path / "run" / "student"), read(tmp_path / "run" / "history.json")
    run(teacher, text, resume=True, **options)
    torch.testing.assert_close(weights(tmp_path / "run" / "student"), student, rtol=0, atol=0)
    steps = [[row["step"] for row in found["rows"]] for found in (
        rows, read(tmp_path / "run" / "history.json"))]  # fmt: skip
    assert steps[0] == steps[1] and steps[0][-1] == 5
    assert "do not match" not in caplog.text  # eval_steps 0.5 and 3 are the same
    for other in ({"config": LastK(window=2)}, {"train_parameters": "all"}):
        with pytest.raises(UserError, match="holds a run with another (attention|--train), .*same"):
            run(teacher, text, resume=True, **options, **other)


def too_small_a_disk(folder):
    """The system refuses files of more than 2 kB, as it refuses more than a disk holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk_at(file):
    """/dev/full has no space left for this file."""

    def fill(folder):
        folder.mkdir()
        (folder / file).symlink_to("/dev/full")
        return lambda: None

    return fill


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (too_small_a_disk, "File too large"),
        (full_disk_at("optimizer.pt"), "file write failed|unexpected pos"),
        (full_disk_at("trainer_state.json"), "No space left on device"),
    ],
    ids=["weights", "optimizer", "state"],
)
def test_a_full_disk_leaves_the_older_checkpoints(
    teacher, text, tmp_path, monkeypatch, fill, reason
):
    save = DistillationTrainer._save_checkpoint

    def save_on_full_disk(self, model, trial):
        full = self.state.global_step == 4
        relieve = fill(Path(self.args.output_dir) / "checkpoint-4") if full else lambda: None
        try:
            save(self, model, trial)
        finally:
            relieve()

    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", save_on_full_disk)
    message = f"cannot write .*checkpoint-4: .*({reason}).* MiB free.*whole one is checkpoint-2"
    with pytest.raises(UserError, match=message):
        run(teacher, text, tmp_path / "run", save_steps=2)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "student").exists()
    monkeypatch.undo()
    assert (run(teacher, text, tmp_path / "run", resume=True) / "student").exists()

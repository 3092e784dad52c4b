"""Attention matching as a first stage: what it minimizes, what it trains, and where it ends."""

import math
import shutil

import pytest
import torch
from tiny_runs import BYTES, CONTEXT, read, run, trainer_of, weights
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from attnopt import Favor, LastK, convert, dense_attention, mechanisms
from attnopt.convert.families import attention_modules
from attnopt.data import collate, load_blocks
from attnopt.matching import evaluating, recorded, run_matched, squared_error, variance
from attnopt.runs import load_model
from attnopt.stages import stage_schedule
from attnopt.trainer import DistillationArguments

COST = {"wall_seconds", "cpu_seconds", "cpu_memory_mb", "gpu_memory_mb"}


@pytest.fixture(scope="module")
def batch(text):
    blocks = load_blocks(text, BYTES, block_size=CONTEXT, max_tokens=400)
    rows = [{"input_ids": row[: CONTEXT - 5 * i]} for i, row in enumerate(blocks["input_ids"][:3])]
    inputs = collate(rows)
    del inputs["labels"]
    return inputs


def teach(teacher, batch, layers):
    """Targets of a teacher and their variances."""
    with torch.no_grad(), recorded(teacher, layers) as targets:
        teacher(**batch)
    mask = batch["attention_mask"]
    return targets, {i: variance(target.output, mask) for i, target in targets.items()}


def test_errors_are_those_of_each_module_alone_on_the_teachers_input(teacher, batch):
    source, student = load_model(teacher), convert(load_model(teacher), LastK(window=2))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    targets, variances = teach(source, batch, mechanisms(student))
    errors = run_matched(student, student, batch, targets, variances).logits
    real = batch["attention_mask"].bool()
    expected = []
    for i, block in enumerate(student.transformer.h):
        with torch.no_grad():
            output, _ = block.attn(targets[i].hidden, attention_mask=real)
        t = targets[i].output[real]
        expected.append((output[real] - t).square().mean() / t.var(0, correction=0).mean())
    torch.testing.assert_close(errors, torch.stack(expected))
    # the first layer's input is the embedding, the second's is not what the student itself has
    with torch.no_grad(), recorded(student, (0, 1)) as own:
        student(**batch)
    assert not torch.allclose(own[1].hidden[real], targets[1].hidden[real], atol=1e-3)


def test_a_layer_that_gives_the_mean_has_error_one_at_any_scale():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for scale in (1e-3, 1.0, 1e3):
        target = scale * (torch.randn(2, 4, 8) + 5)
        mean = target[mask.bool()].mean(0).expand_as(target)
        error = squared_error(mean, target, mask) / variance(target, mask)
        assert error.item() == pytest.approx(1, rel=1e-4)
    assert variance(torch.zeros(2, 4, 8)) > 0


def test_only_converted_attention_gets_a_gradient(teacher, batch):
    source = load_model(teacher)
    student = convert(load_model(teacher), LastK(window=2), layers=[1])
    targets, variances = teach(source, batch, mechanisms(student))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = run_matched(student.train(), student, batch, targets, variances)
    hidden = 4 * student.config.hidden_size  # width of the MLP
    assert saved and not any(hidden in x.shape for x in saved)
    assert output.logits.shape == (1,) and student.training and torch.is_grad_enabled()
    quiet = run_matched(student.eval(), student, batch, targets, variances)
    assert torch.equal(output.logits, quiet.logits)  # no dropout
    output.logits.sum().backward()
    found = {name for name, p in student.named_parameters() if p.grad is not None}
    assert found == {f"transformer.h.1.attn.{n}" for n, _ in attention(student, 1)}
    assert all(p.grad.abs().sum() > 0 for _, p in attention(student, 1))


def attention(student, layer):
    return list(attention_modules(student)[layer].named_parameters())


def test_the_model_is_left_as_it_was(teacher, batch):
    student = convert(load_model(teacher), LastK(window=2))
    targets, variances = teach(load_model(teacher), batch, mechanisms(student))
    modules = list(student.modules())
    somebody_elses = student.transformer.h[0].attn.forward
    student.transformer.h[0].attn.forward = somebody_elses
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks), set(vars(m))) for m in modules]
    run_matched(student, student, batch, targets, variances)
    wrong = targets[1]._replace(hidden=targets[1].hidden[..., :5])
    with pytest.raises(RuntimeError):
        run_matched(student, student, batch, {0: targets[0], 1: wrong}, variances)
    after = [(len(m._forward_pre_hooks), len(m._forward_hooks), set(vars(m))) for m in modules]
    assert after == before and torch.is_grad_enabled()
    assert student.transformer.h[0].attn.forward is somebody_elses
    with evaluating(student.train()):
        assert not student.training
    assert student.training


def test_a_full_window_has_nothing_to_learn(teacher, batch):
    student = convert(load_model(teacher), LastK(window=CONTEXT))
    targets, variances = teach(load_model(teacher), batch, mechanisms(student))
    errors = run_matched(student, student, batch, targets, variances).logits
    assert errors.max() < 1e-9


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("trained", ["coefficients", "attention", "all"])
def test_the_stage_trains_attention_and_nothing_else(teacher, text, tmp_path, trained):
    options = {"train_parameters": trained, "match_steps": 3, "steps": 3, "weight_decay": 0.1}
    folder = run(teacher, text, tmp_path / "run", config=LastK(window=2), **options)
    before, after = weights(teacher), weights(folder / "student")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kept = {name for name in before if ".attn." in name}
    assert changed == (set() if trained == "coefficients" else kept)
    rows = read(folder / "history.json")["rows"]
    assert not any("kl" in row for row in rows)
    assert rows[-1]["match"] < rows[1]["match"] < 2 or trained == "coefficients"
    assert all(x.abs().min() > 0 for name, x in after.items() if "alpha" in name)
    assert rows[0]["eval_kl"] != rows[-1]["eval_kl"]


def test_a_student_matches_its_own_softmax(teacher, text, tmp_path):
    numbers = []
    for source in (None, load_model(teacher)):
        student = convert(load_model(teacher), LastK(window=3))
        options = {"train_parameters": "coefficients", "max_steps": 3, "match_steps": 3}
        trainer = trainer_of(student, tmp_path, text, source, **options)
        loss = trainer.train().training_loss
        numbers.append(
            [loss, *(p.detach() for m in mechanisms(student).values() for p in [m.alpha])]
        )
    torch.testing.assert_close(numbers[0], numbers[1])
    assert numbers[0][0] > 0.001 and numbers[0][1].abs().min() > 0


def test_both_stages_in_one_run(teacher, text, tmp_path):
    options = {"steps": 10, "match_steps": 4, "logging_steps": 3, "l1_weight": 0.1, "save_steps": 5}
    options |= {"match_learning_rate": 1e-2, "warmup_steps": 0.25, "save_total_limit": 9}
    folder = run(teacher, text, tmp_path / "run", **options)
    rows = {row["step"]: row for row in read(folder / "history.json")["rows"]}
    assert sorted(rows) == [0, 3, 4, 6, 9, 10]
    # the border is logged, evaluated and saved; its terms are those of one stage
    assert {s for s, row in rows.items() if "match" in row} == {3, 4}
    assert {s for s, row in rows.items() if "kl" in row} == {6, 9}
    assert {s for s, row in rows.items() if "eval_kl" in row} == {0, 3, 4, 6, 9, 10}
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert saved == {f"checkpoint-{step}" for step in (4, 5, 10)}
    for step in (3, 4):
        assert rows[step]["loss"] == pytest.approx(rows[step]["match"], rel=1e-5)
    last = rows[9]
    assert last["loss"] == pytest.approx(last["kl"] + 0.1 * last["l1"], rel=1e-5)
    training = read(folder / "run.json")["training"]
    assert training["match_steps"] == 4 and training["match_learning_rate"] == 1e-2


def test_each_stage_has_its_warm_up_and_its_cosine(tmp_path):
    options = {"learning_rate": 0.1, "match_learning_rate": 0.4, "match_steps": 4, "max_steps": 12}
    args = DistillationArguments(str(tmp_path), warmup_steps=0.25, **options)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    args.coefficient_learning_rate = groups[1]["lr"] = 0.5
    optimizer = torch.optim.SGD(groups, lr=args.learning_rate)
    schedule = stage_schedule(args, optimizer, args.max_steps)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()

    def stage(steps, warm):
        cosine = [0.5 + 0.5 * math.cos(math.pi * i / (steps - warm)) for i in range(steps - warm)]
        return [i / warm for i in range(warm)] + cosine

    shape = stage(4, 1), stage(8, 2)
    assert [r for r, _ in rates] == pytest.approx(
        [0.4 * x for x in shape[0]] + [0.1 * x for x in shape[1]]
    )
    assert [r for _, r in rates] == pytest.approx([0.5 * x for x in shape[0] + shape[1]])


def test_the_optimizer_forgets_the_stage(teacher, text, tmp_path):
    student = convert(load_model(teacher), LastK(window=3))
    options = {"max_steps": 5, "match_steps": 3, "train_parameters": "all"}
    trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
    trainer.train()
    states = trainer.optimizer.state
    assert {int(state["step"]) for state in states.values()} == {2}
    assert len(states) == len(list(student.parameters()))


@pytest.mark.parametrize("step", [2, 3, 4], ids=["within", "at the border", "after"])
def test_a_run_resumes_bit_for_bit_across_the_border(whole, teacher, text, tmp_path, step):
    whole, options = whole
    folder = tmp_path / "run"
    for done in range(1, step + 1):
        name = f"checkpoint-{done}"
        shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(whole / "history.json", folder)
    run(teacher, text, folder, resume=True, **options)
    expected, got = weights(whole / "student"), weights(folder / "student")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    rows = [read(f / "history.json")["rows"] for f in (whole, folder)]
    assert [{k: v for k, v in row.items() if k not in COST} for row in rows[0]] == [
        {k: v for k, v in row.items() if k not in COST} for row in rows[1]
    ]


@pytest.fixture(scope="module")
def whole(teacher, text, tmp_path_factory):
    """A run without a break, and its options."""
    options = {"steps": 6, "match_steps": 3, "save_steps": 1, "save_total_limit": 9}
    options |= {"logging_steps": 1, "train_parameters": "all", "weight_decay": 0.1}
    return run(teacher, text, tmp_path_factory.mktemp("whole") / "run", **options), options


def test_accumulated_small_batches_equal_one_large(teacher, text, tmp_path):
    students = []
    for size, steps in ((4, 1), (1, 4)):
        student = without_dropout(convert(load_model(teacher), LastK(window=2)))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options |= {"optim": "sgd", "max_steps": 2, "match_steps": 2, "logging_steps": 1}
        trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
        trainer.train()
        logs = [log["match"] for log in trainer.state.log_history if "loss" in log]
        students.append((student.state_dict(), torch.tensor(logs)))
    torch.testing.assert_close(students[0], students[1])


def test_activation_checkpointing_changes_nothing(teacher, text, tmp_path):
    losses = []
    for checkpointing in (False, True):
        student = convert(load_model(teacher), LastK(window=2))
        options = {"max_steps": 2, "match_steps": 2, "gradient_checkpointing": checkpointing}
        trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1] > 0


def test_patience_counts_from_the_border_on(teacher, text, tmp_path):
    # a rate of 0 gains nothing
    options = {"learning_rate": 1e-12, "match_steps": 6, "eval_steps": 1, "save_steps": 1}
    folder = run(teacher, text, tmp_path / "run", steps=20, patience=2, **options)
    assert read(folder / "history.json")["rows"][-1]["step"] == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"match_steps": -1}, "match_steps must be in 0..max_steps=9; got -1"),
        ({"match_steps": 10}, "match_steps must be in 0..max_steps=9; got 10"),
        ({"match_learning_rate": 1.0}, "no meaning with match_steps=0"),
        ({"match_learning_rate": 1.0, "match_steps": 1, "learning_rate": 0.0}, "above 0"),
        ({"redraw_every": 0}, "redraw_every must be at least 1; got 0"),
    ],
)
def test_arguments_are_checked(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), max_steps=9, **wrong)


def test_what_cannot_be_matched_is_refused(teacher, text, tmp_path):
    source, student = load_model(teacher), convert(load_model(teacher), LastK(window=2))
    with pytest.raises(ValueError, match="a teacher is needed"):
        trainer_of(student, tmp_path, text, match_steps=1, kl_weight=0.0, ce_weight=1.0)
    with pytest.raises(ValueError, match="match_steps=1 has no meaning: .* not converted"):
        options = {"match_steps": 1, "train_parameters": "all"}
        trainer_of(load_model(teacher), tmp_path, text, source, **options)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"layers and width, \(2, 16\); got \(1, 8\)"):
        trainer_of(student, tmp_path, text, other, match_steps=1)
    options = {"match_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}
    options |= {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="must be a function of the step"):
        trainer_of(student, tmp_path, text, source, **options).train()


def test_dense_attention_is_recorded_too(teacher, batch):
    student = convert(load_model(teacher), LastK(window=2))
    expected, _ = teach(load_model(teacher), batch, (0, 1))
    with dense_attention(student):
        got, _ = teach(student, batch, (0, 1))
    real = batch["attention_mask"].bool()
    for i in (0, 1):
        torch.testing.assert_close(got[i].output[real], expected[i].output[real])


@pytest.mark.parametrize(
    "config",
    [
        Favor(4, learned=True, window=2, window_block=2),
        Favor(feature_map="hedgehog", window=2, window_block=2),
    ],
    ids=["kerformer", "hedgehog"],
)
def test_features_learn_to_match(teacher, text, tmp_path, config):
    student = convert(load_model(teacher), config)
    options = {"max_steps": 40, "match_steps": 40, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = trainer_of(student, tmp_path, text, load_model(teacher), **options)
    trainer.train()
    errors = [log["match"] for log in trainer.state.log_history if "match" in log]
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])

"""Adapters on converted attention: they change nothing at first, learn, and are merged."""

import shutil
import sys

import pytest
import torch
from families import tiny_family
from safetensors.torch import load_file
from tiny_runs import CONTEXT, read, run, trainer_of, weights

import attnopt.distill as distillation
from attnopt import LastK, convert, dense_attention, from_pretrained, mechanisms
from attnopt.errors import UserError
from attnopt.lora import adapters, add_adapters, merge_adapters, without_adapters
from attnopt.runs import load_model
from attnopt.trainer import DistillationArguments, set_trainable

IDS = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 50 + 1
LORA = {"train_parameters": "lora", "lora_rank": 4}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def shake(model):
    """Give the adapters something other than zero to add."""
    with torch.no_grad():
        for parameter in (p for part in adapters(model) for p in part.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("family", "maps"),
    [
        ("gpt2", ["c_attn", "c_proj"]),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi3", ["qkv_proj", "o_proj"]),
        ("gpt_neox", ["query_key_value", "dense"]),
        ("opt", ["q_proj", "k_proj", "v_proj", "out_proj"]),
    ],
)
def test_adapters_of_every_kind_of_attention(family, maps):
    model = convert(tiny_family(family), LastK(window=3), layers=[1]).eval()
    names = set(model.state_dict())
    before = logits(model)
    add_adapters(model, 4, 8)
    set_trainable(model, "lora")
    assert torch.equal(logits(model), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    own = [name for name in trained if "lora_" not in name]
    assert own and all(".attnopt." in name and ".1." in name for name in own)
    found = sorted(name.split(".")[-4] for name in trained if "lora_A" in name)
    assert found == sorted(maps)
    assert len(trained) == len(own) + 2 * len(maps)
    torch.manual_seed(0)
    shake(model)
    learned = logits(model)
    assert not torch.allclose(learned, before, atol=1e-3)
    with without_adapters(model):
        assert torch.equal(logits(model), before)
    merge_adapters(model)
    assert set(model.state_dict()) == names and not adapters(model)
    torch.testing.assert_close(logits(model), learned, rtol=1e-4, atol=1e-4)


def test_training_leaves_the_teacher_as_it_was_bit_for_bit(teacher, text, tmp_path):
    student = convert(load_model(teacher), LastK(window=3))
    trainer = trainer_of(student, tmp_path, text, max_steps=3, learning_rate=0.05, **LORA)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    student.eval()
    with dense_attention(student), without_adapters(student):
        taught = logits(student)
    torch.testing.assert_close(taught, logits(load_model(teacher).eval()), rtol=0, atol=0)
    trainer.train()
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n or "attnopt" in n} and len(changed) == 10
    assert all(p.requires_grad == (n in changed) for n, p in student.named_parameters())
    student.eval()
    with dense_attention(student), without_adapters(student):
        assert torch.equal(logits(student), taught)


def test_the_student_of_a_run_is_a_plain_model(teacher, text, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        distillation, "load_model", lambda name: loaded.append(load_model(name)) or loaded[-1]
    )
    merged = []
    save = distillation.DistillationTrainer.save_student

    def watch(self, *args):
        self.model.eval()
        merged.append(logits(self.model))
        save(self, *args)

    monkeypatch.setattr(distillation.DistillationTrainer, "save_student", watch)
    folder = run(teacher, text, tmp_path / "run", match_steps=2, **LORA)
    assert len(loaded) == 1  # the student is its own teacher
    student = from_pretrained(folder / "student")
    torch.testing.assert_close(logits(student), merged[0], rtol=1e-4, atol=1e-5)
    assert mechanisms(student).keys() == {0, 1}
    before, after = weights(teacher), weights(folder / "student")
    assert after.keys() == before.keys() | {f"transformer.h.{i}.attn.attnopt.alpha" for i in (0, 1)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    maps = ("c_attn.weight", "c_proj.weight")
    assert changed == {name for name in before if ".attn." in name and name.endswith(maps)}
    rows = read(folder / "history.json")["rows"]
    assert "match" in rows[1] and rows[-1]["eval_kl"] < rows[0]["eval_kl"]
    training = read(folder / "run.json")["training"]
    assert training["lora_rank"] == 4 and training["lora_alpha"] == 8
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    assert {p.name for p in checkpoint.glob("*.safetensors")} == {"adapters.safetensors"}
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(checkpoint)


@pytest.fixture(scope="module")
def whole(teacher, text, tmp_path_factory):
    """A run without a break, and its options."""
    options = {"steps": 4, "save_steps": 1, "logging_steps": 1, "save_total_limit": 9, **LORA}
    return run(teacher, text, tmp_path_factory.mktemp("whole") / "run", **options), options


def broken_off(whole, folder):
    """What a run leaves that was killed after two steps."""
    for step in (1, 2):
        name = f"checkpoint-{step}"
        shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(whole / "history.json", folder)
    return folder


def test_a_run_resumes_bit_for_bit(whole, teacher, text, tmp_path):
    whole, options = whole
    folder = run(teacher, text, broken_off(whole, tmp_path / "run"), resume=True, **options)
    expected, got = weights(whole / "student"), weights(folder / "student")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    kept = ("step", "loss", "grad_norm", "eval_kl")
    rows = [read(f / "history.json")["rows"] for f in (whole, folder)]
    assert [[row.get(k) for k in kept] for row in rows[0]] == [
        [row.get(k) for k in kept] for row in rows[1]
    ]


@pytest.mark.parametrize("other", [{"lora_rank": 2}, {"layers": [1]}])
def test_other_options_do_not_resume(whole, teacher, text, tmp_path, other):
    whole, options = whole
    with pytest.raises(UserError, match="checkpoint-2 was written with other options"):
        run(teacher, text, broken_off(whole, tmp_path), resume=True, **options | other)


def test_patience_keeps_the_best_adapters(teacher, text, tmp_path):
    # the rate grows until it does harm
    options = {"learning_rate": 3.0, "warmup_steps": 40, "eval_steps": 1, "save_steps": 1}
    folder = run(teacher, text, tmp_path / "run", steps=40, patience=2, **LORA, **options)
    rows = read(folder / "history.json")["rows"]
    kls = {row["step"]: row["eval_kl"] for row in rows if row["step"] > 0}
    best, last = min(kls, key=kls.get), max(kls)
    assert 1 < best == last - 2 < 38
    kept = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "adapters.safetensors")
    student = weights(folder / "student")
    for name in (name for name in kept if "attnopt" in name):
        assert torch.equal(student[name], kept[name])
    a, b = (kept[f"transformer.h.0.attn.c_attn.lora_{x}.default.weight"] for x in "AB")
    expected = weights(teacher)["transformer.h.0.attn.c_attn.weight"] + 2 * (b @ a).T
    torch.testing.assert_close(student["transformer.h.0.attn.c_attn.weight"], expected)


def test_adapters_of_a_bf16_model_are_fp32(text, teacher, tmp_path):
    student = convert(load_model(teacher).bfloat16(), LastK(window=3))
    trainer = trainer_of(student, tmp_path, text, max_steps=2, **LORA)
    trainer.train()
    learned = {p.dtype for p in student.parameters() if p.requires_grad}
    assert learned == {torch.float32} and student.transformer.wte.weight.dtype == torch.bfloat16
    assert trainer.evaluate()["eval_kl"] > 0


def test_what_cannot_have_adapters_is_refused(teacher, text, tmp_path, monkeypatch):
    for wrong, message in (
        ({"lora_rank": 4}, "lora_rank has no meaning with train_parameters='attention'"),
        ({"lora_alpha": 4.0}, "lora_alpha has no meaning"),
        ({"train_parameters": "lora", "lora_rank": 0}, "lora_rank must be positive; got 0"),
        ({"train_parameters": "lora", "lora_alpha": -1.0}, "lora_alpha must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationArguments(str(tmp_path), **wrong)
    with pytest.raises(UserError, match="the model has none"):
        add_adapters(load_model(teacher), 4, 8)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'attnopt\[lora\]'"):
        run(teacher, text, tmp_path / "run", **LORA)

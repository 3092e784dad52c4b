"""Text that the teacher writes: drawn from its distribution, kept, resumed, mended, used."""

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_gpt2 import VOCABULARY, tiny
from tiny_runs import BYTES, run, write_teacher

from attnopt import UserError, teacher_text
from attnopt.data import is_file, load_blocks
from attnopt.demo_text import byte_tokenizer
from attnopt.evaluate import evaluate
from attnopt.generate import Sampling, continue_tokens
from attnopt.pretrain import small_gpt2
from attnopt.runs import load_model
from attnopt.samples import sample_run
from attnopt.teacher_text import DEFAULT_TOKENS, TeacherText, fingerprint, parse, sample_texts

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 16
ASKED = TeacherText()
PROMPTS = torch.arange(40)[:, None] + torch.arange(2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnopt"


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return small_gpt2(BYTES, layers=1, width=16, heads=2, context=LENGTH)


def draw(teacher, asked=ASKED, count=96, **options):
    options = {"length": LENGTH, "prompts": PROMPTS, **options}
    return sample_texts(teacher, BYTES, asked, count=count, **options)


def test_specs():
    cut = Sampling(temperature=0.5, top_k=3, top_p=0.9)
    for spec, expected in {
        "teacher": TeacherText(DEFAULT_TOKENS),
        "teacher:2M": TeacherText(2_000_000),
        "teacher:1.5k": TeacherText(1500),
        "teacher:demo": TeacherText(prompts="demo"),
        "teacher:300:seed=4:a/b:c": TeacherText(300, seed=4, prompts="a/b:c"),
        "teacher:temperature=0.5:top_k=3:top_p=0.9:7": TeacherText(7, cut),
        "teachers": None,
        "demo": None,
    }.items():
        assert parse(spec) == expected, spec
    for spec, message in {
        "teacher:0": "at least one token",
        "teacher:teacher:1k": "prompts of text",
        "teacher:length=4": "length is not among temperature, top_k, top_p, seed",
        "teacher:top_k=many": "top_k must be a number; got 'many'",
        "teacher:temperature=0": "temperature must be positive",
        "teacher:top_k=-1": "top_k must be at least 1",
        "teacher:top_p=1.5": r"top_p must lie in \(0, 1\]",
    }.items():
        with pytest.raises(UserError, match=message):
            parse(spec)
    assert is_file("teacher:2M:text.txt") and not is_file("teacher:2M") and not is_file("teacher")


def frequencies(model, sampling, draws=6000):
    made = continue_tokens(model, torch.full((draws, 1), 7), 1, sampling=sampling)
    return torch.bincount(made[:, 0], minlength=VOCABULARY) / draws


@pytest.mark.parametrize("own", [{}, {"top_k": 1, "suppress_tokens": [*range(0, 60, 2)]}])
def test_tokens_are_drawn_from_the_models_distribution(own):
    model = tiny()
    model.generation_config.update(**own)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[7]])).logits[0, -1].double()
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_k=5), Sampling(top_p=0.6)):
        p = (logits / sampling.temperature).softmax(-1)
        ranked, order = p.sort(descending=True)
        kept = (ranked.cumsum(0) - ranked < sampling.top_p) & (
            torch.arange(VOCABULARY) < (sampling.top_k or VOCABULARY)
        )
        p = torch.zeros_like(p).index_put_((order,), ranked * kept)
        p /= p.sum()
        got = frequencies(model, sampling)
        assert (got[p == 0] == 0).all()
        assert ((got - p).abs() < 5 * (p * (1 - p) / 6000).sqrt() + 1e-9).all(), sampling
    assert model.generation_config.top_k == own.get("top_k", model.generation_config.top_k)


def test_the_end_of_a_text_ends_nothing():
    model = tiny(eos_token_id=5)
    made = continue_tokens(model.train(), PROMPTS, 40, seed=1)
    after = [row[row.index(5) + 1 :] for row in made.tolist() if 5 in row[:30]]
    assert made.shape == (40, 40) and len(after) > 3
    assert all(len({*row}) > 3 for row in after)  # not padding
    assert model.training and model.generation_config.eos_token_id == 5
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(continue_tokens(model, PROMPTS, 40, seed=1), made)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(continue_tokens(model, PROMPTS, 40, seed=2), made)


def test_texts_begin_with_prompts_and_are_kept(teacher, cache, monkeypatch):
    texts = draw(teacher)
    assert texts.shape == (96, LENGTH) and texts.dtype == torch.int32
    first = [tuple(x) for x in texts[:40, :2].tolist()]
    assert sorted(first) == sorted(map(tuple, PROMPTS.tolist())) and first != sorted(first)
    assert [tuple(x) for x in texts[40:80, :2].tolist()] == first  # and from the start again
    assert len(texts[:, 2:].unique(dim=0)) == 96
    others = [
        draw(teacher, replace(ASKED, seed=1)),
        draw(teacher, replace(ASKED, sampling=Sampling(top_k=4))),
        draw(teacher, part="held-out"),
        draw(small_gpt2(BYTES, layers=1, width=16, heads=2, context=LENGTH)),
    ]
    assert all(not torch.equal(other, texts) for other in others)
    assert len(list(cache.iterdir())) == 4  # parts share a folder
    monkeypatch.setattr(teacher_text, "continue_tokens", None)
    assert torch.equal(draw(teacher), texts)
    assert torch.equal(draw(teacher, count=50), texts[:50])
    with pytest.raises(TypeError):
        draw(teacher, count=97)


def test_texts_that_begin_with_nothing(teacher):
    words = byte_tokenizer()

    def first():
        return sample_texts(teacher, words, ASKED, count=96, length=LENGTH)[:, 0]

    words.bos_token = "!"
    assert words.bos_token_id == 0 and (first() == 0).all()
    words.bos_token = None
    assert (first() == words.eos_token_id).all()
    words.eos_token = None
    assert len(first().unique()) > 60 and first().max() < len(words)
    with pytest.raises(UserError, match="blocks longer than its prompts; got 2"):
        draw(teacher, length=2)


def test_the_fingerprint_is_that_of_weights_and_settings(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    assert fingerprint(load_model(tmp_path)) == fingerprint(teacher)
    other = load_model(tmp_path)
    with torch.no_grad():
        other.transformer.ln_f.bias[3] += 1e-6
    assert fingerprint(other) != fingerprint(teacher)
    assert fingerprint(load_model(tmp_path).bfloat16()) != fingerprint(teacher)
    other = load_model(tmp_path)
    other.config.activation_function = "relu"
    assert fingerprint(other) != fingerprint(teacher)


# Draws three shards, and is killed when half of the second one's file is written.
KILLED = """
import os, pathlib, signal, sys
from attnopt import runs, teacher_text
import torch
whole, seen = teacher_text.save_file, []
def half(tensors, path, metadata):
    whole(tensors, path, metadata)
    seen.append(path)
    if len(seen) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
teacher_text.save_file = half
folder, length = sys.argv[1], int(sys.argv[2])
prompts = torch.arange(40)[:, None] + torch.arange(2)
torch.set_num_threads(1)
teacher_text.sample_texts(runs.load_model(folder), runs.load_tokenizer(folder),
    teacher_text.TeacherText(), count=96, length=length, prompts=prompts)
"""


def test_after_a_kill_the_rest_is_the_same(teacher, cache, tmp_path, monkeypatch):
    teacher.save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "teacher"), str(LENGTH)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = cache.iterdir()
    assert [path.name for path in folder.glob("train-*")] == ["train-000000.safetensors"]
    written = load_file(folder / "train-000000.safetensors")["input_ids"]
    made = []

    def counting(*args, **kwargs):
        made.append(continue_tokens(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(teacher_text, "continue_tokens", counting)
    resumed = draw(teacher)
    assert len(made) == 2
    assert torch.equal(resumed[:32], written)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert torch.equal(draw(teacher), resumed)
    assert len(made) == 5


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "other"])
def test_a_damaged_shard_is_drawn_again(teacher, cache, harm, caplog):
    texts = draw(teacher)
    path = sorted(cache.glob("*/train-*"))[1]
    held = path.read_bytes()
    harmed = {
        "flip": held[:-1] + bytes([held[-1] ^ 1]),
        "truncate": held[:-7],
        "empty": b"",
        "other": path.with_name("train-000000.safetensors").read_bytes()[:40],
    }
    path.write_bytes(harmed[harm])
    assert torch.equal(draw(teacher), texts)
    assert path.read_bytes() == held
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(path) in warning and "damaged" in warning


def test_a_cache_that_cannot_be_written(teacher, cache, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_text, "save_file", full)
    with pytest.raises(UserError, match=r"train-000000.*: No space left on device .*MiB free"):
        draw(teacher)
    assert not list(cache.glob("*/*train*"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to .*teacher-text-"):
        draw(teacher)


class _Stop(Exception):
    pass


def test_processes_share_the_work(teacher, cache, monkeypatch, tmp_path):
    def stop():
        raise _Stop

    texts = draw(teacher, count=128)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setattr(torch.distributed, "barrier", stop)
    for rank in (1, 0):
        monkeypatch.setattr(teacher_text, "_place", lambda rank=rank: (rank, 2))
        with pytest.raises(_Stop):
            draw(teacher, count=128)
        names = sorted(p.name for p in (tmp_path / "shared").rglob("train-*"))
        assert len(names) == {1: 2, 0: 4}[rank]
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    assert torch.equal(draw(teacher, count=128), texts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another disk"))
    assert torch.equal(draw(teacher, count=128), texts)


def test_blocks_of_each_split(teacher, text):
    def blocks(spec, split="train", **options):
        options = {"teacher": teacher, "block_size": LENGTH, **options}
        return load_blocks(spec, BYTES, split=split, **options)

    ids = blocks(f"teacher:1k:{text}").with_format("torch")["input_ids"][:]
    assert ids.shape == (1000 // LENGTH, LENGTH)
    real = {tuple(row[:2]) for row in blocks(text)["input_ids"]}
    assert {tuple(row[:2].tolist()) for row in ids} <= real
    for split in ("validation", "test"):
        expected = blocks(text, split, teacher=None)["input_ids"][:]
        assert blocks(f"teacher:1k:{text}", split, teacher=None)["input_ids"][:] == expected
    assert blocks(f"teacher:1k:{text}", max_tokens=70)["input_ids"][:] == ids[:4].tolist()
    held_out = blocks("teacher:1k", "validation")["input_ids"][:]
    assert len(held_out) == 100 // LENGTH
    assert held_out == blocks("teacher:1k", "test")["input_ids"][:]
    assert held_out != blocks("teacher:1k")["input_ids"][: len(held_out)]
    own = blocks("teacher:1k", "validation", validation=text)
    assert own["input_ids"][:] == blocks(text, "test")["input_ids"][:]
    with pytest.raises(UserError, match="there is no teacher here"):
        blocks("teacher:1k", teacher=None)


@pytest.mark.parametrize("prompts", ["", ":text"])
def test_a_student_learns_from_it_and_is_evaluated(text, tmp_path, prompts):
    folder = write_teacher(tmp_path / "teacher")
    spec = f"teacher:1k{prompts and f':{text}'}"
    done = run(folder, spec, tmp_path / "run", steps=2, train_parameters="coefficients")
    assert json.loads((done / "run.json").read_text())["data"] == spec
    result = evaluate(done)
    assert result["models"]["student"]["kl"] > 0
    if prompts:
        assert (result["data"], result["split"]) == (text, "validation")
        expected = load_blocks(text, BYTES, block_size=LENGTH, split="validation")
        assert result["tokens"] == len(expected) * LENGTH
    else:
        assert (result["data"], result["tokens"]) == (spec, 100 // LENGTH * LENGTH)
        with pytest.raises(UserError, match="--stride is for text in one piece"):
            evaluate(done, stride=4)
    assert len(sample_run(done, max_new_tokens=2)) > 0

"""`attnopt generate`: prompts given or held out, the student alone or beside its teacher."""

import json

import pytest

from attnopt import LastK, convert
from attnopt.demo_text import byte_tokenizer
from attnopt.errors import UserError
from attnopt.pretrain import small_gpt2
from attnopt.samples import sample_run

TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained teacher and student."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = byte_tokenizer()
    teacher = small_gpt2(tokenizer, layers=1, width=16, heads=2, context=64)
    teacher.save_pretrained(folder / "teacher")
    convert(teacher, LastK(window=3)).save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT * 100)
    about = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt")}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_prompts_are_continued(run):
    samples = sample_run(run, ["The quick", "lazy"], max_new_tokens=5)
    assert [sample["prompt"] for sample in samples] == ["The quick", "lazy"]
    assert all(0 < len(sample["student"].encode("utf-8", "replace")) for sample in samples)
    assert "teacher" not in samples[0]
    assert not (run / "generation.json").exists()
    assert samples == sample_run(run, ["The quick", "lazy"], max_new_tokens=5)
    other = sample_run(run, ["The quick", "lazy"], max_new_tokens=5, seed=1)
    assert samples != other


def test_comparing_writes_the_file_that_reports_read(run):
    samples = sample_run(run, compare=True)
    written = json.loads((run / "generation.json").read_text())
    assert written["samples"] == samples and len(samples) == 3
    assert written["settings"]["max_new_tokens"] == 16  # a quarter of the context
    assert {row["model"] for row in written["timing"]} == {"teacher", "student"}


def test_held_out_prompts_begin_and_end_with_whole_words(run):
    for sample in sample_run(run, max_new_tokens=1):
        words = sample["prompt"].split()
        assert words and set(words) <= set(TEXT.split()), sample["prompt"]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder: its run.json cannot be read"):
        sample_run(tmp_path)


def test_a_prompt_that_does_not_fit(run):
    with pytest.raises(UserError, match="exceeds the model's context of 64"):
        sample_run(run, ["x" * 60], max_new_tokens=10)

"""Every source of text ends up as blocks of its own tokens, and every mistake as one line."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoTokenizer

from attnopt import data
from attnopt.data import HELD_OUT_FRACTION, collate, is_file, load_blocks
from attnopt.demo_text import _documents, _held_out, byte_tokenizer, docstring_documents
from attnopt.errors import UserError
from attnopt.hub import why_unreachable

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BYTES = byte_tokenizer()
LINES = "".join(f"line {i}, of {i * i} words \n" + "\n" * (i % 3) for i in range(200))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return str(path)


def tokens(blocks):
    return [token for row in blocks["input_ids"] for token in row]


def text_of(blocks):
    return BYTES.decode(tokens(blocks))


def test_a_text_file_keeps_every_character(text_file):
    blocks = load_blocks(text_file, BYTES, block_size=16, split="test")
    assert len(blocks) == len(LINES) // 16
    assert text_of(blocks) == LINES[: len(blocks) * 16]


def test_the_end_of_a_file_is_held_out(text_file):
    train, held_out = (
        load_blocks(text_file, BYTES, block_size=16, split=split)
        for split in ("train", "validation")
    )
    count = len(train) + len(held_out)
    assert len(held_out) == round(HELD_OUT_FRACTION * count)
    assert text_of(train) + text_of(held_out) == LINES[: count * 16]


def test_a_validation_file_leaves_all_of_the_other_to_training(text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x" * 64)
    options = {"block_size": 16, "validation": str(other)}
    assert text_of(load_blocks(text_file, BYTES, split="validation", **options)) == "x" * 64
    train = load_blocks(text_file, BYTES, split="train", **options)
    assert text_of(train) == LINES[: len(train) * 16]
    assert len(train) == len(LINES) // 16


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_of_tables_are_documents(tmp_path, ending):
    rows = [{"id": i, "title": "t", "body": f"doc {i}\n"} for i in range(5)]
    path = tmp_path / f"rows{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    blocks = load_blocks(str(path), BYTES, block_size=7, split="test", text_column="body")
    assert text_of(blocks) == "".join(row["body"] + BYTES.eos_token for row in rows)
    with pytest.raises(UserError, match="--text-column; columns of strings are: title, body"):
        load_blocks(str(path), BYTES, block_size=7)
    with pytest.raises(UserError, match="columns of strings are: title, body"):
        load_blocks(str(path), BYTES, block_size=7, text_column="id")


def test_a_chosen_number_of_tokens_is_a_seeded_choice_in_order(text_file):
    def chosen(seed, size=160):
        options = {"split": "test", "max_tokens": size, "seed": seed}
        return [tuple(r) for r in load_blocks(text_file, BYTES, block_size=16, **options)[:][
            "input_ids"
        ]]  # fmt: skip

    everything = chosen(0, size=10**9)
    assert len(chosen(0)) == 10
    assert chosen(0) == chosen(0) != chosen(1)
    places = [everything.index(block) for block in chosen(1)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.txt", "no such file .supported endings: .txt, .jsonl, .parquet"),
        ("folder/missing.parquet", "no such file"),
        ("table.csv", "no such file"),
        ("{tmp}/table.csv", "not a kind of file.*supported are files ending in .txt, .jsonl"),
        ("{tmp}", "this is a folder"),
        ("{tmp}/broken.jsonl", "cannot be read as .jsonl"),
        ("{tmp}/empty.txt", "the file is empty"),
        ("{tmp}/short.txt", "less than one block of 16 tokens"),
    ],
)
def test_unusable_paths_are_explained_in_one_line(tmp_path, spec, message):
    for name, content in {"table.csv": "a,b", "broken.jsonl": "{", "short.txt": "word"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=message) as caught:
        load_blocks(spec.format(tmp=tmp_path), BYTES, block_size=16)
    assert "\n" not in str(caught.value)


def test_block_size_and_split_are_checked(text_file):
    with pytest.raises(UserError, match="at least 1 token; got 0"):
        load_blocks(text_file, BYTES, block_size=0)
    with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
        load_blocks(text_file, BYTES, block_size=8, split="dev")


def test_offline_a_hub_set_fails_at_once_and_names_the_way_out():
    start = time.perf_counter()
    with pytest.raises(UserError, match="a local file works without network: --data PATH"):
        load_blocks("wikitext-2", BYTES, block_size=16)
    assert time.perf_counter() - start < 5


def test_without_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("attnopt.hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr(data, "load_dataset", lambda *a: pytest.fail("would retry for 23 s"))
    with pytest.raises(UserError, match="no such file, and the Hub cannot be reached .Name or"):
        load_blocks("someone/something", BYTES, block_size=16)


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_the_hub_is_asked_once_and_its_answer_told(monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answers = []

    def ask(self, name, timeout):
        assert name == "a/b" and timeout < 10
        if error := answers.pop():
            raise error

    monkeypatch.setattr(f"attnopt.hub.HfApi.{kind}_info", ask)
    for error, message in (
        (RepositoryNotFoundError, f"--flag a/b: neither a path here nor a {kind} on the Hub"),
        (GatedRepoError, f"--flag a/b: this {kind} on the Hub asks for a login first"),
    ):
        answers.append(error.__new__(error))
        with pytest.raises(UserError, match=message):
            why_unreachable(kind, "a/b", flag="--flag")
    answers += [None, ConnectionError("no\nroute")]
    assert why_unreachable(kind, "a/b", flag="--flag") == "no route"
    assert why_unreachable(kind, "a/b", flag="--flag") is None and not answers


@pytest.fixture
def hub(monkeypatch):
    """Pretend that the Hub has one set, and return the calls made for it."""
    calls, splits = [], {}

    def load(name, config):
        calls.append((name, config))
        return DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in splits.items()})

    monkeypatch.setattr("attnopt.data.why_unreachable", lambda *a, **k: None)
    monkeypatch.setattr(data, "load_dataset", load)
    return calls, splits


def test_wikitext_is_lines_and_has_splits(hub):
    calls, splits = hub
    splits.update(train=["a\n", "\n", "b\n"] * 8, validation=["v\n"] * 8, test=["t\n"] * 8)
    for split, start in {"train": "a\n\nb\n", "validation": "v\nv\n", "test": "t\nt\n"}.items():
        assert text_of(load_blocks("wikitext-103", BYTES, block_size=5, split=split)).startswith(
            start
        )
    assert set(calls) == {("Salesforce/wikitext", "wikitext-103-raw-v1")}


def test_hub_sets_without_splits_give_their_end_to_validation(hub):
    calls, splits = hub
    splits.update(train=[f"document {i:3d}" for i in range(100)])
    options = {"tokenizer": BYTES, "block_size": 13}
    train = load_blocks("org/name:config", split="train", **options)
    held_out = load_blocks("org/name:config", split="validation", **options)
    assert calls[0] == ("org/name", "config")
    assert (len(train), len(held_out)) == (90, 10)
    assert text_of(held_out).startswith("document  90<|endoftext|>")
    assert tokens(load_blocks("org/name", split="test", **options)) == tokens(held_out)
    splits.update(dev=["held out 123"] * 3)
    assert len(load_blocks("org/name", split="train", **options)) == 100
    assert text_of(load_blocks("org/name", split="test", **options)).startswith("held out 123")


def test_what_counts_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").touch()
    for spec in ("a.txt", "x/y.jsonl", "imdb", "./x", "/x/y/z", "a b", "table.csv"):
        assert is_file(spec), spec
    for spec in ("demo", "wikitext-2", "ag_news", "org/name", "org/name.v2", "org/name:config"):
        assert not is_file(spec), spec


def test_demo_documents_are_the_same_everywhere_and_split_by_document():
    train, held_out = docstring_documents("train"), docstring_documents("validation")
    assert docstring_documents("test") == held_out
    assert not set(train) & set(held_out)
    size = sum(map(len, train))
    assert size > 1_000_000 and 0.02 < sum(map(len, held_out)) / size < 0.1
    names = [name for name, _ in _documents() if not name.startswith("topic ")]
    assert names == sorted(names) and len(names) > 100
    # a choice by name alone: not by Python's hash, which differs from process to process
    assert [name for name in ("os.py", "ast.py", "cmd.py", "codecs.py") if _held_out(name)] == [
        "codecs.py"
    ]


def test_a_python_without_its_sources_is_told_so(monkeypatch):
    monkeypatch.setattr("attnopt.demo_text._documents", lambda: ())
    with pytest.raises(UserError, match="pass --data PATH"):
        docstring_documents("train")


def test_the_byte_tokenizer_is_exact_and_loads_like_any_other(tmp_path):
    text = "naïve \t'tis  a test,\n\n✓ 𝔘 don't <|endoftext|>\x00\x7f"
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (BYTES, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 257
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.replace("<|endoftext|>", "!").encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == 256


def test_collate_pads_only_what_differs():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 1]}])
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 1]]))
    assert torch.equal(batch["labels"], batch["input_ids"])
    batch = collate([{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1]}, {"input_ids": [8, 9]}])
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, 9, -100]]


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data beside the checkout")
def test_wikitext_files_with_gpt2s_tokenizer():
    from attnopt.runs import load_tokenizer

    tokenizer = load_tokenizer(SHARED / "gpt2-tokenizer")
    assert len(tokenizer) == 50257
    path = SHARED / "wikitext-2" / "valid.txt"
    blocks = load_blocks(str(path), tokenizer, block_size=256, split="test")
    text = tokenizer.decode(tokens(blocks))
    assert path.read_text(encoding="utf-8").startswith(text)
    assert 200_000 < len(blocks) * 256 < 300_000

"""Packed blocks of text: where documents begin, and training and evaluation that respect it."""

import json
import math

import pytest
import torch
from small_gpt2 import tiny
from small_llama import tiny_llama
from tiny_runs import BYTES, CONTEXT, read, run, trainer_of

from attnopt import NSA, Favor, LastK, calibrate, convert, dense_attention, mechanisms
from attnopt.data import collate, load_blocks
from attnopt.evaluate import compare, evaluate
from attnopt.losses import head_input
from attnopt.runs import load_model

# documents shorter and longer than a block
TEXTS = ["abc", "d", "", "efghijklmnopqrstuvwxyz" * 2, "0123456789", "?!"] * 12


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(path)


def beginnings(blocks):
    """The text of each block, cut where positions restart."""
    found = []
    for ids, positions in zip(blocks["input_ids"], blocks["position_ids"], strict=True):
        starts = [t for t, position in enumerate(positions) if position == 0]
        parts = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        assert positions == [t for part in parts for t in range(len(part))]
        found.append([BYTES.decode(part) for part in parts])
    return found


def test_rows_of_tables_are_documents_and_blocks_are_the_same(rows):
    options = {"block_size": CONTEXT, "split": "test"}
    plain, packed = (load_blocks(rows, BYTES, packed=p, **options) for p in (False, True))
    assert plain["input_ids"][:] == packed["input_ids"][:]
    assert plain.column_names == ["input_ids"]
    end = BYTES.eos_token
    stream = [text + end for text in TEXTS]
    blocks = beginnings(packed)
    assert blocks[0] == [f"abc{end}", f"d{end}", end, "efghijklm"]  # 4 + 2 + 1 + 9 of 16 tokens
    assert blocks[1] == ["nopqrstuvwxyzefg"]  # goes on, and counts anew
    # every document is there, in order, cut at the borders of blocks only
    joined = [part for block in blocks for part in block]
    assert "".join(joined) == "".join(stream)[: len("".join(joined))]
    whole = [part for block in blocks for part in block[1:-1]]
    assert whole and set(whole) <= set(stream)


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\ntwo\n\n \nthree\n\nfour\n", ["one\ntwo\n\n \n", "three\n\n", "four\n"]),
        ("\n\none\n\ntwo\n", ["\n\n", "one\n\n", "two\n"]),
        (
            " \n = Title = \n \n word \n \n = = Part = = \n \n more \n \n = B = \n \n x \n = 3 = ",
            [
                " \n",
                " = Title = \n \n word \n \n = = Part = = \n \n more \n \n",
                " = B = \n \n x \n = 3 = ",
            ],
        ),
    ],
    ids=["blank-lines", "blank-first", "wikitext"],
)
def test_documents_of_lines(tmp_path, text, documents):
    path = tmp_path / "text.txt"
    path.write_text(text)
    blocks = load_blocks(str(path), BYTES, block_size=len(text), split="test", packed=True)
    assert beginnings(blocks) == [documents]


def test_collate_predicts_no_document_from_another():
    packed = [
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 3]},
    ]
    batch = collate(packed)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [row["position_ids"] for row in packed]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 2, 3, 4]]
    with pytest.raises(ValueError, match="must be of one length"):
        collate([packed[0], {"input_ids": [5], "position_ids": [0]}])


LENGTHS = (7, 1, 11, 5)


@pytest.mark.parametrize("make", [tiny, tiny_llama])
@pytest.mark.parametrize("training", [False, True])
def test_a_dense_teacher_keeps_documents_apart(make, training):
    """With caches on by default, which keep transformers from looking for documents."""
    teacher = make().train(training)
    assert teacher.config.use_cache
    dense = convert(make(), LastK(3)).train(training)
    ids = torch.randint(1, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    for module in (*teacher.modules(), *dense.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    alone = [head_input(teacher, teacher, input_ids=part).hidden for part in ids.split(LENGTHS, 1)]
    packed = head_input(teacher, teacher, input_ids=ids, position_ids=positions).hidden
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)
    with dense_attention(dense):
        own = head_input(dense, dense, input_ids=ids, position_ids=positions).hidden
    torch.testing.assert_close(own, packed, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("term", ["kl", "ce", "match"])
def test_the_loss_is_that_of_the_documents(teacher, rows, tmp_path, term):
    """A mean over tokens, for the CE over those that are predicted, and its gradients too."""
    source = load_model(teacher)
    student = load_model(teacher)
    if term != "ce":  # by which dense models train, too
        convert(student, {0: LastK(3, sinks=1), 1: Favor(8, seed=0)})
    weights = {"kl_weight": float(term == "kl"), "ce_weight": float(term != "kl")}
    options = {"match_steps": int(term == "match"), "train_parameters": "all", **weights}
    trainer = trainer_of(student, tmp_path, rows, teacher=source, packed=True, **options)
    student.config.use_cache = True  # which Trainer has set to False
    batch = collate([trainer.train_dataset[i] for i in range(3)])
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    documents = batch["input_ids"].flatten().tensor_split(starts[1:])
    assert len(documents) > 5
    packed = trainer.compute_loss(trainer.model, batch)
    packed.backward()
    found = [p.grad for p in student.parameters()]
    student.zero_grad(set_to_none=True)
    counts = torch.tensor([len(document) - (term == "ce") for document in documents])
    total = 0.0
    for document, share in zip(documents, (counts / counts.sum()).tolist(), strict=True):
        own = collate([{"input_ids": document.tolist()}])
        loss = trainer.compute_loss(trainer.model, own) * share
        loss.backward()
        total += loss.item()
    assert packed.item() == pytest.approx(total, rel=1e-4)
    for ours, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-3)


def test_evaluation_counts_what_the_documents_count(teacher, rows):
    source = load_model(teacher)
    models = {"student": convert(load_model(teacher), LastK(2))}
    blocks = load_blocks(rows, BYTES, block_size=CONTEXT, split="test", packed=True)
    blocks = blocks.select(range(5))
    packed = compare(source, models, blocks)["student"]
    parts = []
    for ids, positions in zip(blocks["input_ids"], blocks["position_ids"], strict=True):
        starts = [t for t, position in enumerate(positions) if position == 0]
        parts += [p.tolist() for p in torch.tensor(ids).tensor_split(starts[1:])]
    apart = [
        (len(part), compare(source, models, [{"input_ids": part}])["student"]) for part in parts
    ]
    kl = sum(n * found["kl"] for n, found in apart) / sum(n for n, _ in apart)
    ce = sum((n - 1) * found["ce"] for n, found in apart) / sum(n - 1 for n, _ in apart)
    assert packed["kl"] == pytest.approx(kl, rel=1e-4)
    assert packed["ce"] == pytest.approx(ce, rel=1e-4)


@pytest.mark.parametrize("config", [
    Favor(8, feature_map="hedgehog", window=2, window_block=2),
    NSA("gates", 2, num_selected=3, window=2),
], ids=["features", "branches"])  # fmt: skip
def test_calibration_measures_within_documents(config):
    models = [convert(tiny(), config) for _ in range(2)]
    ids = torch.randint(1, 61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = calibrate(models[0], {"input_ids": ids, "position_ids": positions})
    apart = calibrate(models[1], [{"input_ids": part} for part in ids.split(LENGTHS, 1)])
    assert packed.keys() == apart.keys() and packed
    for index, gates in packed.items():
        torch.testing.assert_close(gates, apart[index], atol=1e-4, rtol=1e-4)


def test_a_whole_run_learns_and_is_evaluated_on_the_same_documents(teacher, rows, tmp_path):
    folder = run(teacher, rows, tmp_path / "run", packed=True, steps=12, learning_rate=5e-3)
    assert read(folder / "run.json")["packed"] is True
    history = read(folder / "history.json")["rows"]
    evaluated = [row["eval_kl"] for row in history if "eval_kl" in row]
    assert evaluated[-1] < evaluated[0]
    found = evaluate(folder)["models"]["student"]
    student = load_model(folder / "student")
    scores = {}
    for packed in (True, False):
        blocks = load_blocks(rows, BYTES, block_size=CONTEXT, split="validation", packed=packed)
        scores[packed] = compare(load_model(teacher), {"student": student}, blocks)["student"]
    assert found == pytest.approx(scores[True], rel=1e-5)
    assert not math.isclose(scores[True]["kl"], scores[False]["kl"], rel_tol=1e-3)
    assert len(mechanisms(student)) == 2

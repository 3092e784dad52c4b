"""Evaluation and generation: numbers against their definitions, controls, texts and timings."""

import copy
import json

import pytest
import torch
from squares import write_squares
from transformers import DynamicCache

from attnopt import Favor, LastK, UserError, convert
from attnopt.data import load_blocks
from attnopt.demo_text import byte_tokenizer
from attnopt.distill import distill
from attnopt.evaluate import compare, evaluate, evaluate_models, tally, windows
from attnopt.generate import cache_bytes, compare_generation, generate_samples, time_generation
from attnopt.metrics import by_position, position_ends
from attnopt.pretrain import small_gpt2
from attnopt.runs import load_model

BYTES = byte_tokenizer()
CONTEXT = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("text") / "text.txt", 120)


@pytest.fixture
def teacher():
    """A random model whose attention matters."""
    torch.manual_seed(0)
    model = small_gpt2(BYTES, layers=2, width=16, heads=2, context=CONTEXT).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(6)
            block.attn.c_proj.weight.mul_(6)
    return model


@pytest.fixture
def run(teacher, text, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    options = {"max_steps": 4, "learning_rate": 1e-3, "disable_tqdm": True, "max_eval_tokens": 48}
    return distill(tmp_path / "teacher", LastK(window=3), text, tmp_path / "run", **options)


def blocks_of(text, **options):
    return load_blocks(text, BYTES, block_size=CONTEXT, **{"split": "test", **options})


def log_probabilities(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits.log_softmax(-1)


def test_numbers_are_those_of_whole_logits(teacher, text):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    blocks = blocks_of(text).select(range(11))
    ids = torch.tensor(blocks["input_ids"][:])
    log_p, log_q = log_probabilities(teacher, ids), log_probabilities(student, ids)
    ce, teacher_ce = (-x[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() for x in (log_q, log_p))
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(),
        "ce": ce,
        "perplexity": torch.tensor(ce).exp().item(),
        "perplexity_ratio": torch.tensor(ce - teacher_ce).exp().item(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
    }
    assert expected["kl"] > 0.01 and expected["top1_agreement"] < 1
    for batch_size in (1, 4, 64):
        got = compare(teacher, {"it": student, "same": teacher}, blocks, batch_size=batch_size)
        assert got["it"] == pytest.approx(expected, rel=1e-4)
        assert got["same"]["kl"] == got["same"]["reverse_kl"] == 0
        assert got["same"]["perplexity_ratio"] == got["same"]["top1_agreement"] == 1


def test_the_control_is_a_teacher_whose_tokens_see_only_themselves(teacher, text):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    blocks = blocks_of(text).select(range(3))
    got = evaluate_models(teacher, student, blocks)
    ids = torch.tensor(blocks["input_ids"][:])
    places = torch.arange(CONTEXT).repeat(3)[:, None]  # every token as a text of its own
    alone = log_probabilities(teacher, ids.reshape(-1, 1), position_ids=places)
    log_p = log_probabilities(teacher, ids).flatten(0, 1)
    expected = (log_p.exp() * (log_p - alone[:, 0])).sum(-1).mean().item()
    assert got["control_self_only_kl"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.5 and got["conclusive"] and got["warning"] is None
    assert got["tokens"] == 3 * CONTEXT
    assert got["models"]["zero-shot"] == got["models"]["student"]


def test_a_teacher_without_attention_supports_no_conclusion(teacher, text):
    with torch.no_grad():
        for block in teacher.transformer.h:
            block.attn.c_proj.weight.mul_(1e-3)
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    got = evaluate_models(teacher, student, blocks_of(text).select(range(3)))
    assert got["models"]["student"]["perplexity_ratio"] == pytest.approx(1, abs=0.05)  # "perfect"
    assert not got["conclusive"] and "draw no conclusion" in got["warning"]
    with pytest.raises(UserError, match="the student is not a converted model"):
        evaluate_models(student, teacher, blocks_of(text))


def test_loss_by_position(teacher, text):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    blocks = blocks_of(text).select(range(5))
    ids = torch.tensor(blocks["input_ids"][:])
    log_p, log_q = log_probabilities(teacher, ids), log_probabilities(student, ids)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)  # [T]
    ce = -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(0)
    got = evaluate_models(teacher, student, blocks)["by_position"]
    assert got["ends"] == [1, 2, 4, 8, 16, CONTEXT]
    assert set(got["models"]) == {"teacher", "zero-shot", "student"}
    found = got["models"]["student"]
    edges = [0, *got["ends"]]
    for i, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        assert found["kl"][i] == pytest.approx(kl[first:end].mean().item(), rel=1e-4, abs=1e-6)
        assert found["ce"][i] == pytest.approx(ce[first:end].mean().item(), rel=1e-4)
    assert found["kl"][0] == pytest.approx(0, abs=1e-6) and max(found["kl"]) > 0.01
    # rows of unequal length
    ragged = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, (24, 3, 9, 9, 1), strict=True)]
    _, counts = tally(teacher, {"it": student}, ragged)["it"]
    assert counts[:, 0].tolist() == [5] + [4] * 2 + [3] * 6 + [1] * 15
    assert counts[:, 1].tolist() == [4] * 2 + [3] * 6 + [1] * 15 + [0]
    # rows that hold two texts each
    places = [*range(12)] * 2
    packed = [{"input_ids": row.tolist(), "position_ids": places} for row in ids]
    _, counts = tally(teacher, {"it": student}, packed)["it"]
    assert counts[:, 0].tolist() == [10] * 12 + [0] * 12
    assert counts[:, 1].tolist() == [10] * 11 + [0] * 13
    empty = by_position(torch.ones(8, 5), torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 5))
    assert empty["kl"] == empty["ce"] == [1, 1, 2, None]
    assert [position_ends(n) for n in (2, 4, 17, 18)] == [
        [2], [1, 2, 4], [1, 2, 4, 8, 17], [1, 2, 4, 8, 16, 18],
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 5, 12, CONTEXT])
def test_perplexity_with_a_stride(teacher, text, stride):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    blocks = blocks_of(text).select(range(3))
    ids = torch.tensor(blocks["input_ids"][:]).flatten()
    count = len(ids)
    expected = {"teacher": [], "student": []}
    for target in range(1, count):  # token by token, from the first window that reaches it
        start = max(0, -(-(target - CONTEXT + 1) // stride) * stride)
        if start == target:
            continue  # nothing before it: never with a stride below the context
        assert target - start >= min(target, CONTEXT - stride)
        window = ids[start : start + CONTEXT][None]
        for name, model in (("teacher", teacher), ("student", student)):
            log_p = log_probabilities(model, window)
            expected[name].append(-log_p[0, target - start - 1, ids[target]].item())
    got = evaluate_models(teacher, student, blocks, stride=stride)
    strided = got["strided"]
    assert strided["stride"] == stride and strided["tokens"] == len(expected["teacher"])
    assert len(expected["teacher"]) == count - (3 if stride == CONTEXT else 1)
    means = {name: sum(losses) / len(losses) for name, losses in expected.items()}
    for name, ce in means.items():
        assert strided["models"][name]["ce"] == pytest.approx(ce, rel=1e-5)
        if stride == CONTEXT:
            assert strided["models"][name]["ce"] == pytest.approx(got["models"][name]["ce"])
    ratio = torch.tensor(means["student"] - means["teacher"]).exp().item()
    assert strided["models"]["student"]["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_windows():
    rows = windows(range(10), 4, 3)
    assert [row["input_ids"] for row in rows] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [row["labels"] for row in rows] == [
        [0, 1, 2, 3], [-100, 4, 5, 6], [-100, 7, 8, 9],
    ]  # fmt: skip
    assert windows(range(5), 4, 2)[-1] == {"input_ids": [2, 3, 4], "labels": [-100, -100, 4]}
    for stride in (0, 5):
        with pytest.raises(UserError, match="between 1 and the block size, 4; got"):
            windows(range(10), 4, stride)


def test_everything_at_once(run, text):
    result = evaluate(run, text=True, stride=6, max_tokens=100)
    assert result == json.loads((run / "evaluation.json").read_text())
    first = blocks_of(text, split="validation").select(range(4))
    assert result["tokens"] == 96 and result["strided"]["tokens"] == 95
    plain = evaluate_models(
        *(load_model(run.parent / name) for name in ("teacher", "run/student")), first
    )
    assert result["models"]["student"] == pytest.approx(plain["models"]["student"], rel=1e-5)
    for part in ("text", "strided", "by_position"):
        assert set(result[part]["models"]) == {"teacher", "zero-shot", "student"}
    assert evaluate(run, block_size=12)["by_position"]["ends"][-1] == 12
    with pytest.raises(UserError, match="longer than the model's context of 24"):
        evaluate(run, block_size=25)
    with pytest.raises(UserError, match="--stride must lie .* the block size, 24; got 0"):
        evaluate(run, stride=0)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"packed": True}))
    with pytest.raises(UserError, match="--stride is for text in one piece"):
        evaluate(run, stride=6)
    assert not {"text", "strided"} & set(evaluate(run))


def test_a_run_is_evaluated_on_what_it_has_not_seen(run, text, tmp_path):
    result = evaluate(run)
    assert result == json.loads((run / "evaluation.json").read_text())
    assert result["data"] == text and result["split"] == "validation"
    assert result["tokens"] == len(blocks_of(text, split="validation")) * CONTEXT
    assert set(result["models"]) == {"teacher", "zero-shot", "student"}
    models = result["models"]
    assert 0 < models["student"]["kl"] < models["zero-shot"]["kl"]
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox. " * 20)
    result = evaluate(run, data=str(other), block_size=12, max_tokens=60)
    assert result["split"] == "test" and result["tokens"] == 60


def test_a_student_alone_needs_teacher_and_data(run, text, tmp_path):
    alone = {"teacher": tmp_path / "teacher", "data": text}
    assert evaluate(run / "student", **alone)["split"] == "test"
    for missing in alone:
        given = {name: value for name, value in alone.items() if name != missing}
        with pytest.raises(UserError, match="pass --teacher and --data"):
            evaluate(run / "student", **given)
    with pytest.raises(UserError, match="no model folder"):
        evaluate(run, teacher="./nothing")
    (run / "student").rename(run / "elsewhere")
    with pytest.raises(UserError, match="has no student yet: .* --resume"):
        evaluate(run)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*run.json"):
        evaluate(run)


def test_samples_are_seeded_prompt_by_prompt(teacher):
    settings = {"max_new_tokens": 12, "seed": 3}
    prompts = ["one", "and two"]
    texts = generate_samples(teacher, BYTES, prompts, **settings)
    state = torch.random.get_rng_state()
    assert generate_samples(teacher, BYTES, prompts[::-1], **settings) == texts[::-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate_samples(teacher, BYTES, prompts, max_new_tokens=12, seed=4) != texts
    greedy = generate_samples(teacher, BYTES, ["one"], top_k=1, **settings)
    for changed in ({"seed": 4}, {"temperature": 5.0}):
        assert generate_samples(teacher, BYTES, ["one"], top_k=1, **settings | changed) == greedy
    ids = BYTES("one", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(12):
            step = teacher(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], dim=-1)
            if step.item() == BYTES.eos_token_id:
                break
    assert greedy == [BYTES.decode(ids[0, 3:], skip_special_tokens=True)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "at least one token; got an empty one"), ("x" * 20, "20 tokens; with 5 new ones")],
)
def test_prompts_must_fit(teacher, prompt, message):
    with pytest.raises(UserError, match=message):
        generate_samples(teacher, BYTES, [prompt], max_new_tokens=5)


def test_timing_counts_the_memory_of_the_cache(teacher):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    prompt = torch.tensor([[65]])
    dense, band = (time_generation(m, [4, 8, 16], prompt=prompt) for m in (teacher, student))
    assert [row["new_tokens"] for row in dense] == [4, 8, 16]
    assert all(row["seconds"] > 0 for row in dense + band)
    # keys and values, 2 layers of 16 fp32 numbers; the last token made is not in the cache
    assert [row["cache_bytes"] for row in dense] == [n * 2 * 2 * 16 * 4 for n in (4, 8, 16)]
    assert len({row["cache_bytes"] for row in band}) == 1
    assert band[0]["cache_bytes"] <= 4 * 2 * 2 * 16 * 4


def test_shared_memory_is_counted_once():
    cache = DynamicCache()
    whole = torch.zeros(1, 1, 8, 4)
    cache.update(whole, whole, 0)
    layer = cache.layers[0]
    layer.keys, layer.values = whole[:, :, :2], whole[:, :, 2:]
    assert cache_bytes(cache) == 8 * 4 * 4


def test_teacher_and_student_side_by_side(teacher, tmp_path):
    student = convert(copy.deepcopy(teacher), LastK(window=3))
    settings = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 20, "seed": 1}
    prompts = ["ab", "cde"]
    got = compare_generation(teacher, student, BYTES, prompts, output=tmp_path, **settings)
    assert got == json.loads((tmp_path / "generation.json").read_text())
    assert got["settings"] == settings
    for model, name in ((teacher, "teacher"), (student, "student")):
        texts = generate_samples(model, BYTES, prompts, **settings)
        assert [sample[name] for sample in got["samples"]] == texts
    assert [sample["prompt"] for sample in got["samples"]] == prompts
    timed = [(row["model"], row["new_tokens"]) for row in got["timing"]]
    assert timed == [("teacher", 16), ("student", 16)]


def test_zero_shot_has_the_features_that_training_began_with(teacher, text, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    BYTES.save_pretrained(tmp_path / "teacher")
    config = Favor(num_features=4, feature_map="exp", window=2, window_block=4)
    options = {"learning_rate": 0.0, "disable_tqdm": True, "max_eval_tokens": 48}
    run = distill(tmp_path / "teacher", config, text, tmp_path / "run", max_steps=1, **options)
    torch.manual_seed(1)
    numbers = evaluate(run)["models"]
    assert numbers["zero-shot"]["kl"] == numbers["student"]["kl"] > 0
    (run / "start" / "mechanisms.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the start of the run"):
        evaluate(run)

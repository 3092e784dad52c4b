"""Measures of text against texts whose values are known, and intervals against known ones."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_gpt2 import tiny, tokens

from attnopt.demo_text import byte_tokenizer
from attnopt.generate import Sampling
from attnopt.report.page import MEASURES
from attnopt.text_metrics import (
    compare_text,
    distinct,
    interval,
    loop,
    measure,
    repetition,
    self_bleu,
    words,
)

FOX = "the quick brown fox jumps over the lazy dog".split()


def mean(values):
    return sum(values) / len(values)


def test_words():
    assert words("It's 3 pm:\n\tgo!") == ["It", "'", "s", "3", "pm", ":", "go", "!"]
    assert words(" \n") == []


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["abab"], 1, 2 / 4),
        (["abab"], 2, 2 / 3),  # ab ba ab
        (["abab", "abcd"], 2, 4 / 6),  # ab ba bc cd
        (["aaaa", "aaaa"], 3, 1 / 4),
        (["abc", "de", ""], 1, 1.0),
        (["ab", "c"], 3, 0.0),
    ],
)
def test_distinct(texts, n, expected):
    assert mean(distinct(texts, n)) == pytest.approx(expected)


def test_repetition():
    assert repetition("abcdabcd") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(FOX) == repetition("abc") == repetition("") == 0
    assert repetition("a" * 13) == pytest.approx(9 / 10)
    assert repetition("abab", n=2) == pytest.approx(1 / 3)


def test_loop():
    assert loop("xyabababz") == pytest.approx(6 / 9)
    assert loop("xyababaz") == pytest.approx(5 / 8)  # two and a half times
    assert loop("abcabc") == loop("aaa") == 1
    assert loop(FOX) == loop("") == loop("abcab") == 0
    assert loop("aabcdbcdbcde") == pytest.approx(9 / 12)


def bleu(text, references):
    """The definition: counts clipped by the reference that has most, one added above unigrams."""
    logs = []
    for n in range(1, 5):
        counts = [
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (text, *references)
        ]
        matched = sum(min(x, max(c[gram] for c in counts[1:])) for gram, x in counts[0].items())
        added = n > 1
        if matched + added == 0:
            return 0.0
        logs.append(math.log((matched + added) / (counts[0].total() + added)))
    closest = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
    return math.exp(min(0, 1 - closest / len(text)) + mean(logs))


def test_the_definition_of_bleu():
    # by hand: 5, 3, 1 and 0 of the 6, 5, 4 and 3 n-grams; no brevity penalty
    text, reference = "the cat sat on the mat".split(), "the cat is on the mat".split()
    expected = (5 / 6 * (3 + 1) / (5 + 1) * (1 + 1) / (4 + 1) * 1 / (3 + 1)) ** (1 / 4)
    assert bleu(text, [reference]) == pytest.approx(expected)
    # counts are clipped by the reference that has most of them, here two of seven
    expected = (2 / 7 * 1 / 7 * 1 / 6 * 1 / 5) ** (1 / 4)
    seven = ["the"] * 7
    assert bleu(seven, [reference, "a cat on the mat".split()]) == pytest.approx(expected)
    # three of nine words, all of them right: only the brevity penalty (no 4-grams count as 1/1)
    assert bleu(FOX[:3], [FOX]) == pytest.approx(math.exp(1 - 9 / 3))
    assert bleu(FOX[:3], [FOX, FOX[:5], FOX[:1]]) == pytest.approx(1)  # the shorter of two as close
    assert bleu(FOX, [FOX]) == pytest.approx(1)
    assert bleu(FOX, ["completely other words".split()]) == 0


def definition(texts):
    """Self-BLEU: each text against all others."""
    return mean([bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)])


def test_self_bleu():
    assert mean(self_bleu([FOX] * 3)) == pytest.approx(1)
    assert mean(self_bleu(["abc", "def", "ghij"])) == 0
    assert self_bleu([FOX]) == [0] and mean(self_bleu(["", "", FOX])) == 0
    # by hand: 5, 3, 1 and 0 of 6, 5, 4 and 3, both ways
    pair = ["the cat sat on the mat".split(), "the cat is on the mat".split()]
    assert mean(self_bleu(pair)) == pytest.approx((5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4))
    generator = np.random.default_rng(0)
    for count in (2, 3, 9):
        texts = [list(generator.integers(0, 4, n)) for n in generator.integers(1, 12, count)]
        values = self_bleu(texts)
        assert mean(values) == pytest.approx(definition(texts))
        if count > 2:  # the values are those of the texts without each one
            without = [definition(texts[:i] + texts[i + 1 :]) for i in range(count)]
            expected = [mean(values) + (count - 1) * (mean(without) - x) for x in without]
            assert values == pytest.approx(expected)


def test_measures_tell_loops_from_text():
    generator = np.random.default_rng(0)
    varied = [list(generator.integers(0, 1000, 40).astype(str)) for _ in range(20)]
    looping = [text[:4] * 10 for text in varied]
    alike = [varied[0][:-1] + [str(i)] for i in range(20)]
    good, loops, same = measure(varied), measure(looping), measure(alike)
    assert set(good) == set(MEASURES) - {"nll"}
    assert good["repetition"]["value"] < 0.01 and good["loop"]["value"] < 0.1
    assert loops["repetition"]["value"] == pytest.approx(1 - 4 / 37)
    assert loops["loop"]["value"] == 1 and loops["self_bleu"]["value"] < 0.2
    assert same["self_bleu"]["value"] > 0.9 > 0.2 > good["self_bleu"]["value"]
    assert same["repetition"]["value"] < 0.01 and same["distinct_2"]["value"] < 0.2
    assert good["distinct_2"]["value"] > 0.99 and loops["distinct_2"]["value"] < 0.2


def test_intervals_of_means():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = generator.exponential(2.0, 100)
        got = interval(values)
        assert got["value"] == pytest.approx(values.mean())
        width = 2 * 1.96 * values.std() / 10
        assert got["high"] - got["low"] == pytest.approx(width, rel=0.2)
        covered += got["low"] <= 2.0 <= got["high"]
    assert 180 <= covered <= 199  # of 200, at 95 %
    assert interval([3.0] * 5) == {"value": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.parametrize("values", [lambda texts: distinct(texts, 2), self_bleu])
def test_intervals_cover_what_other_texts_have(values):
    generator = np.random.default_rng(2)
    p = 1 / np.arange(1, 301)
    rounds = [generator.choice(300, (40, 40), p=p / p.sum()).tolist() for _ in range(60)]
    found = [interval(values(texts)) for texts in rounds]
    truth = mean([f["value"] for f in found])
    spread = np.std([f["value"] for f in found])
    assert sum(f["low"] <= truth <= f["high"] for f in found) >= 53  # of 60, at 95 %
    # and none is so wide that it says nothing: at most twice what the values' own spread says
    assert np.mean([f["high"] - f["low"] for f in found]) < 2 * 2 * 1.96 * spread


def test_models_are_compared_on_the_same_prompts():
    teacher, other, words_of = tiny(), tiny(seed=1), byte_tokenizer()
    blocks = Dataset.from_dict({"input_ids": tokens(5, 24).tolist()})
    models = {"teacher": teacher, "student": other, "same": teacher}
    got = compare_text(teacher, models, words_of, blocks, count=12, batch_size=5)
    measured = got["models"]
    assert got["settings"] == {
        "continuations": 12, "prompt_tokens": 6, "new_tokens": 12, "seed": 0,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    assert set(measured) == set(models) and set(measured["student"]) == set(MEASURES)
    assert measured["same"] == measured["teacher"] != measured["student"]
    nll = [measured[name]["nll"] for name in ("teacher", "student")]
    assert nll[0]["high"] < nll[1]["low"]
    assert [s["prompt"] for s in got["samples"]] == words_of.batch_decode(tokens(5, 24)[:3, :6])
    assert all(s["same"] == s["teacher"] != s["student"] for s in got["samples"])
    cold = compare_text(teacher, models, words_of, blocks, count=12, sampling=Sampling(top_k=1))
    assert cold["models"]["teacher"]["nll"]["value"] < nll[0]["value"]


def test_the_likelihood_is_the_teachers(monkeypatch):
    teacher = tiny()
    rows = tokens(3, 24)
    blocks = Dataset.from_dict({"input_ids": rows.tolist()})
    monkeypatch.setattr(
        "attnopt.text_metrics.continue_tokens", lambda model, prompts, count, **_: rows[:, 6:18]
    )
    got = compare_text(teacher, {"it": tiny(seed=1)}, byte_tokenizer(), blocks, count=3)
    with torch.no_grad():
        logits = teacher(input_ids=rows[:, :18]).logits.log_softmax(-1)
    nll = -logits[:, 5:17].gather(-1, rows[:, 6:18, None]).mean()
    assert got["models"]["it"]["nll"]["value"] == pytest.approx(nll.item(), rel=1e-5)

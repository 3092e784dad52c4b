"""Measures of generated text: how likely the teacher finds it, how varied it is, how it repeats.

Words are what `words` makes of a text: runs of letters and digits, and every other sign by itself.
A language written without spaces gives few and long ones; its numbers compare with one another,
not with those of other texts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from heapq import nlargest
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnopt.generate import UNTRUNCATED, Sampling, continue_tokens
from attnopt.losses import head_input
from attnopt.metrics import row_metrics

CONTINUATIONS = 128
SHOWN = 3  # texts that are kept beside the numbers
_ORDERS = range(1, 5)  # of the n-grams in BLEU
_DRAWS = 1000

Words = Sequence[str]


def compare_text(
    teacher: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    blocks: Dataset,
    *,
    count: int = CONTINUATIONS,
    sampling: Sampling = UNTRUNCATED,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Let every model continue the same prompts; return measures of what they wrote.

    A prompt is the first quarter of a block, and its continuation as long again as half the block,
    128 tokens at most; where there are fewer blocks than `count`, prompts are used again. Sampled
    as `attnopt.generate.continue_tokens` does, in batches, with the same seeds for every model.

    Returns {"settings", "models", "samples"}: per model and measure {"value", "low", "high"}, a
    95 % interval over continuations; samples as in generation.json, with every model's text.
    """
    length = len(blocks[0]["input_ids"])
    start, new = max(1, length // 4), min(128, max(1, length // 2))
    rows = blocks.with_format("torch")["input_ids"][:count][:, :start]
    prompts = rows[torch.arange(count) % len(rows)]
    measured, texts = {}, {}
    for name, model in models.items():
        made = torch.cat([
            continue_tokens(model, part, new, sampling=sampling, seed=seed + i)
            for i, part in enumerate(tqdm(prompts.split(batch_size), desc=f"Text of the {name}"))
        ])  # fmt: skip
        texts[name] = tokenizer.batch_decode(made, skip_special_tokens=True)
        nll = _nll(teacher, torch.cat([prompts, made], dim=1), start, batch_size)
        measured[name] = {"nll": interval(nll), **measure([words(text) for text in texts[name]])}
    begun = tokenizer.batch_decode(rows[:SHOWN])
    samples = [
        {"prompt": text, **{name: made[i] for name, made in texts.items()}}
        for i, text in enumerate(begun)
    ]
    settings = {"continuations": count, "prompt_tokens": start, "new_tokens": new, "seed": seed}
    return {"settings": settings | asdict(sampling), "models": measured, "samples": samples}


def measure(texts: Sequence[Words]) -> dict[str, dict[str, float]]:
    """Return all measures of some texts but their likelihood, with their intervals."""
    found = {f"distinct_{n}": interval(distinct(texts, n)) for n in (1, 2, 3)}
    each = {"repetition": repetition, "loop": loop}
    found |= {name: interval([of(text) for text in texts]) for name, of in each.items()}
    return found | {"self_bleu": interval(self_bleu(texts))}


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, and every other sign by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


def distinct(texts: Sequence[Words], n: int) -> list[float]:
    """Return pseudo-values whose mean is the share of different n-grams among all of the texts.

    Li et al. 2016, section 5.3 (distinct-n).
    """
    grams = [Counter(_ngrams(text, n)) for text in texts]
    users = Counter(gram for own in grams for gram in own)
    own_only = np.array([sum(users[gram] == 1 for gram in own) for own in grams])
    lengths = np.array([own.total() for own in grams])
    share = len(users) / max(1, lengths.sum())
    others = (len(users) - own_only) / np.maximum(1, lengths.sum() - lengths)
    return _pseudo_values(share, others)


def repetition(text: Words, n: int = 4) -> float:
    """Return the share of a text's n-grams that occurred in it before, 0 for a shorter text.

    Welleck et al. 2020, section 6 (seq-rep-n).
    """
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop(text: Words) -> float:
    """Return the share of a text that its longest loop takes: a phrase said twice or more in a row.

    A loop of period p goes on while each word equals the one p before it.
    """
    longest = 0
    for period in range(1, len(text) // 2 + 1):
        same = 0
        for i in range(period, len(text)):
            same = same + 1 if text[i] == text[i - period] else 0
            if same >= period:
                longest = max(longest, same + period)
    return longest / len(text) if text else 0.0


def self_bleu(texts: Sequence[Words]) -> list[float]:
    """Return pseudo-values whose mean is self-BLEU: high where the texts are alike.

    Self-BLEU (Zhu et al. 2018, section 3) is the mean BLEU-4 of a text with all others as its
    references (Papineni et al. 2002, section 2.3). As single texts need it, one is added to matches
    and count of every order but the first (Lin and Och 2004, section 4). The brevity penalty takes
    the reference closest in length, of two the shorter one.
    """
    count = len(texts)
    matched, lost = np.zeros((count, len(_ORDERS))), np.zeros((count, count, len(_ORDERS)))
    for order, n in enumerate(_ORDERS):
        users = defaultdict(list)
        for i, text in enumerate(texts):
            for gram, times in Counter(_ngrams(text, n)).items():
                users[gram].append((times, i))
        for held in users.values():
            most = nlargest(3, held)
            for times, i in held:
                first, second = [*((x, j) for x, j in most if j != i), (0, 0), (0, 0)][:2]
                matched[i, order] += min(times, first[0])
                lost[i, first[1], order] += min(times, first[0]) - min(times, second[0])
    lengths = np.array([len(text) for text in texts])
    nearest = np.array([_nearest(lengths, i) for i in range(count)]).reshape(count, 2)
    closest = np.repeat(lengths[nearest[:, :1]], count, axis=1)
    closest[np.arange(count), nearest[:, 0]] = lengths[nearest[:, 1]]  # where that one is left out
    whole = _bleu(matched, lengths, lengths[nearest[:, 0]])
    without = _bleu(matched[:, None] - lost, lengths[:, None], closest)  # [text, left out]
    np.fill_diagonal(without, 0.0)
    return _pseudo_values(whole.mean(), without.sum(0) / max(1, count - 1))


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return {"value", "low", "high"}: the mean and its 95 % bootstrap interval (percentiles)."""
    each = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(each), (_DRAWS, len(each)))
    low, high = np.percentile(each[drawn].mean(axis=1), [2.5, 97.5])
    return {"value": float(each.mean()), "low": float(low), "high": float(high)}


def _pseudo_values(whole: float, without: np.ndarray) -> list[float]:
    """Jackknife pseudo-values, shifted so that their mean is the value of all texts.

    without [N]: the value of all texts but one. Resampling the texts themselves would say what each
    says once more, and so count as alike what is the same text (Efron and Tibshirani 1993, ch. 11).
    """
    return (whole + (len(without) - 1) * (without.mean() - without)).tolist()


def _bleu(matched: np.ndarray, length: np.ndarray, closest: np.ndarray) -> np.ndarray:
    # matches [..., orders] of texts of a length [...] with references of which one is closest
    added = np.arange(len(_ORDERS)) > 0
    total = np.maximum(0, length[..., None] - np.arange(len(_ORDERS)))
    precisions = (matched + added) / np.maximum(1, total + added)
    brevity = np.minimum(1.0, np.exp(1 - closest / np.maximum(1, length)))
    return brevity * precisions.prod(-1) ** (1 / len(_ORDERS))


def _nearest(lengths: np.ndarray, i: int) -> list[int]:
    """The two other texts closest in length to text i, or i itself where there is none."""
    others = [j for j in range(len(lengths)) if j != i]
    return [*sorted(others, key=lambda j: (abs(lengths[j] - lengths[i]), lengths[j])), i, i][:2]


def _ngrams(text: Words, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(n)), strict=False))


def _nll(teacher: PreTrainedModel, ids: Tensor, start: int, batch_size: int) -> list[float]:
    """The teacher's mean NLL of the tokens from `start` on, for each row of ids [B, T]."""
    found = []
    for part in ids.to(teacher.device).split(batch_size):
        labels = part.clone()
        labels[:, :start] = -100
        sums, counts = row_metrics(head_input(teacher, teacher, input_ids=part), None, labels)
        found += (sums[:, 2] / counts[:, 1]).tolist()
    return found

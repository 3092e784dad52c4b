"""How far a student is from its teacher, token by token, from the inputs of their output heads."""

import math

import torch
from torch import Tensor

from attnopt.losses import HeadInput, shifted_labels

# Columns of the sums that row_metrics returns, all of them sums over tokens.
COLUMNS = ("kl", "reverse_kl", "ce", "teacher_ce", "agreement")


@torch.no_grad()
def row_metrics(
    student: HeadInput, teacher: HeadInput | None, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sums [B, 5] (COLUMNS) and counts [B, 2] of real tokens and of tokens with a label.

    student, teacher: their HeadInput with hidden [B, T, E], at the same positions. labels
    [B, T]: the tokens themselves, -100 where none is predicted. mask [B, T], nonzero = real.
    KLs are KL(teacher||student) and KL(student||teacher) in nats; agreement counts the positions
    where both find the same token most likely. Without a teacher all but ce is NaN. Logits exist
    for a chunk of tokens at a time.
    """
    following = shifted_labels(labels, mask)
    real = torch.ones_like(labels) if mask is None else mask
    counts = torch.stack([real != 0, following >= 0])  # [2, B, T]
    columns = torch.full((labels.numel(), len(COLUMNS)), math.nan, device=labels.device)
    for tokens, logits in student.chunks():
        target = following.flatten()[tokens, None].clamp(min=0)
        log_q = logits.log_softmax(-1)
        columns[tokens, 2] = -log_q.gather(-1, target)[:, 0].to(columns)
        if teacher is not None:
            columns[tokens] = _compare(log_q, teacher.logits(tokens).log_softmax(-1), target)
    counted = counts[[0, 0, 1, 1, 0]].permute(1, 2, 0)  # [B, T, 5]
    columns = columns.view(counted.shape).masked_fill(~counted, 0.0)
    return columns.sum(1), counts.sum(-1).T.float()


def _compare(log_q: Tensor, log_p: Tensor, target: Tensor) -> Tensor:
    # log-probabilities [n, V] of student and teacher, target [n, 1]; returns [n, 5]
    log_ratio = log_p - log_q
    columns = [
        (log_p.exp() * log_ratio).sum(-1),
        -(log_q.exp() * log_ratio).sum(-1),
        -log_q.gather(-1, target)[:, 0],
        -log_p.gather(-1, target)[:, 0],
        log_q.argmax(-1) == log_p.argmax(-1),
    ]
    return torch.stack([column.float() for column in columns], dim=-1)


def summarize(sums: Tensor, counts: Tensor) -> dict[str, float]:
    """Return the means over tokens of row_metrics' sums [R, 5] and counts [R, 2].

    kl, reverse_kl, ce and teacher_ce in nats per token; perplexity, teacher_perplexity and
    perplexity_ratio (student by teacher); top1 in 0..1. What needs a teacher is left out without.
    """
    totals = sums.double().sum(0)
    tokens, labeled = counts.double().sum(0).clamp(min=1).tolist()
    kl, reverse_kl, ce, teacher_ce, agreement = totals.tolist()
    ce, teacher_ce = ce / labeled, teacher_ce / labeled
    means = {
        "kl": kl / tokens,
        "reverse_kl": reverse_kl / tokens,
        "ce": ce,
        "teacher_ce": teacher_ce,
        "perplexity": math.exp(ce),
        "teacher_perplexity": math.exp(teacher_ce),
        "perplexity_ratio": math.exp(ce - teacher_ce),
        "top1": agreement / tokens,
    }
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}

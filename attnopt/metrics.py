"""How far a student is from its teacher, token by token, from the inputs of their output heads."""

import math

import torch
from torch import Tensor

from attnopt.losses import HeadInput, shifted_labels

# Columns of what token_metrics returns for each token, and row_metrics as sums over them.
COLUMNS = ("kl", "reverse_kl", "ce", "teacher_ce", "agreement")


def row_metrics(
    student: HeadInput, teacher: HeadInput | None, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sums [B, 5] and counts [B, 2] over the tokens of token_metrics, which see."""
    columns, counts = token_metrics(student, teacher, labels, mask)
    return columns.sum(1), counts.sum(1)


@torch.no_grad()
def token_metrics(
    student: HeadInput, teacher: HeadInput | None, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return columns [B, T, 5] (COLUMNS), 0 where not counted, and counts [B, T, 2] of 0 and 1.

    The counts are those of real tokens, and of tokens with a label.
    student, teacher: their HeadInput with hidden [B, T, E], at the same positions. labels
    [B, T]: the tokens themselves, -100 where none is predicted. mask [B, T], nonzero = real.
    KLs are KL(teacher||student) and KL(student||teacher) in nats; agreement counts the positions
    where both find the same token most likely. Without a teacher all but ce is NaN. Logits exist
    for a chunk of tokens at a time.
    """
    following = shifted_labels(labels, mask)
    real = torch.ones_like(labels) if mask is None else mask
    counts = torch.stack([real != 0, following >= 0], dim=-1)  # [B, T, 2]
    columns = torch.full((labels.numel(), len(COLUMNS)), math.nan, device=labels.device)
    for tokens, logits in student.chunks():
        target = following.flatten()[tokens, None].clamp(min=0)
        log_q = logits.log_softmax(-1)
        columns[tokens, 2] = -log_q.gather(-1, target)[:, 0].to(columns)
        if teacher is not None:
            columns[tokens] = _compare(log_q, teacher.logits(tokens).log_softmax(-1), target)
    counted = counts[..., [0, 0, 1, 1, 0]]
    return columns.view(counted.shape).masked_fill(~counted, 0.0), counts.float()


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


def add_positions(
    sums: Tensor, counts: Tensor, found: tuple[Tensor, Tensor], positions: Tensor
) -> None:
    """Add token_metrics, [B, T, 5] and [B, T, 2], to sums [P, 5] and counts [P, 2] by position.

    positions [B, T] int64 are places within the text, 0 to P - 1.
    """
    for total, new in zip((sums, counts), found, strict=True):
        total.index_add_(0, positions.flatten(), new.flatten(0, 1).to(total))


def by_position(sums: Tensor, counts: Tensor) -> dict[str, list[float | None]]:
    """Return kl and ce, means over the positions of each of `position_ends`, None without tokens.

    sums [P, 5] and counts [P, 2] by position, as add_positions makes them.
    """
    found: dict[str, list[float | None]] = {"kl": [], "ce": []}
    first = 0
    for end in position_ends(len(sums)):
        means = summarize(sums[first:end], counts[first:end])
        tokens, labeled = counts[first:end].sum(0).tolist()
        found["kl"].append(means["kl"] if tokens else None)
        found["ce"].append(means["ce"] if labeled else None)
        first = end
    return found


def position_ends(context: int) -> list[int]:
    """Return 1, 2, 4, ... and the context: how many tokens a prediction had to go by, at most.

    The last position, whose next token nobody knows, never stands alone.
    """
    ends = [2**i for i in range(context.bit_length())]
    return [*(end for end in ends if end < context - 1), context]

"""What distillation minimizes, computed a few tokens at a time inside the model's forward pass.

With z the student's logits at position t, z' the teacher's at the same t, T the temperature,
q = softmax(z / T), p = softmax(z' / T) and y the token at t + 1:

    forward   T^2 KL(p || q)      d/dz = T (p's mass moved to q's) = T (q - p)
    reverse   T^2 KL(q || p)      d/dz = T q (log q - log p - KL(q || p))
    CE        -log softmax(z)[y]  d/dz = softmax(z) - onehot(y)

Logits over a large vocabulary are the largest tensors of a training step, so they never exist as
a whole: for each chunk of tokens the logits are made, turned into their gradient and multiplied
into the gradients of hidden states and head, all in the forward pass. This happens in place of
the output head (`head_computes`), inside the model's own forward: a wrapper around the model
(DDP, FSDP, autocast) sees an ordinary forward pass that uses an ordinary parameter.

Letters: B rows, T positions, N = B T tokens, E width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from attnopt.modules import forward_as

Direction = Literal["forward", "reverse"]
DIRECTIONS = ("forward", "reverse")
# Logits that exist at a time: 16 MiB in fp32, and a handful of tensors of that size. For GPT-2's
# head and 2,048 tokens the loss then takes 0.41 GiB, of which 0.15 are the head's gradient; with
# whole logits it takes 1.93 GiB.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Objective:
    """The weights of the terms, and how teacher and student are compared.

    direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher). The
    temperature softens both sides of the KL, which is multiplied by its square (Hinton et al.
    2015, section 2.1), and leaves the cross-entropy alone.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    direction: Direction = "forward"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}; got {self.direction!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        for name in ("kl_weight", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")


class HeadInput(NamedTuple):
    """What a model gives to its output head, and the head: logits are hidden @ weight.T + bias."""

    hidden: Tensor  # [..., E]
    weight: Tensor  # [V, E]
    bias: Tensor | None  # [V]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (tokens, their logits [n, V]) for all tokens in turn, without gradient."""
        count, step = self.hidden[..., 0].numel(), max(1, CHUNK_ELEMENTS // len(self.weight))
        for start in range(0, count, step):
            tokens = slice(start, start + step)
            yield tokens, self.logits(tokens)

    @torch.no_grad()
    def logits(self, tokens: slice) -> Tensor:
        """Return the logits [n, V] of some of the N tokens in fp32, or float64 for float64."""
        hidden = self.hidden.flatten(0, -2)[tokens].to(self.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, self.weight, self.bias)
        return logits.to(_accumulator(logits.dtype))


class TokenLosses(NamedTuple):
    """The loss [] with its gradient, and the two terms as means over tokens [] without weights."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


@contextmanager
def head_computes(model: PreTrainedModel, function: Callable[[HeadInput], Any]) -> Iterator[None]:
    """Inside, the model's forward returns function(HeadInput) in the place of its logits.

    Raises ValueError for a model whose output head is not one linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the output head must be a torch.nn.Linear; got {type(head).__name__}")
    with forward_as(head, lambda hidden: function(HeadInput(hidden, head.weight, head.bias))):
        yield


def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError if the model does anything to its logits after the output head.

    Such a model (soft-capped or scaled logits) would be trained on the wrong distribution.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    marker = torch.tensor([0.5, -3.0, 70.0], device=model.device)
    with torch.no_grad(), head_computes(model, lambda _: marker):
        logits = model(input_ids=ids).logits
    if not torch.equal(logits, marker):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output head; supported are "
            "models whose logits are those of one linear layer"
        )


def head_input(model: nn.Module, unwrapped: PreTrainedModel, **inputs: Tensor) -> HeadInput:
    """Run the model on inputs, without gradient, as far as its output head.

    It makes no cache: with one, transformers would not look for packed documents.
    """
    with torch.no_grad(), head_computes(unwrapped, lambda given: given):
        return model(**inputs, use_cache=False).logits


def shifted_labels(labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return [B, T]: at t the label of t + 1, -100 where either is padding or there is none."""
    if mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    return following if mask is None else following.masked_fill(mask == 0, -100)


def token_losses(
    student: HeadInput,
    teacher: HeadInput | None,
    labels: Tensor,
    mask: Tensor | None,
    objective: Objective,
) -> TokenLosses:
    """Return the objective's loss over [B, T] tokens, aligned: student at t, teacher at t.

    labels [B, T] int64 are the tokens themselves (-100: not predicted) and are shifted here.
    mask [B, T], nonzero = real, leaves padding out of both terms. The KL is a mean over real
    tokens, the cross-entropy over tokens with a label. Without a teacher the KL is zero.
    """
    following = shifted_labels(labels, mask).flatten()
    real = (torch.ones_like(labels) if mask is None else mask).flatten() != 0
    if teacher is not None and teacher.weight.shape[0] != student.weight.shape[0]:
        raise ValueError(
            "teacher and student need one vocabulary; the teacher's head has "
            f"{teacher.weight.shape[0]} tokens, the student's {student.weight.shape[0]}"
        )
    dtype = _matmul_dtype(student.hidden)
    counted = torch.stack([real, following >= 0]).to(_accumulator(student.hidden.dtype))
    shares = counted / counted.sum(-1, keepdim=True).clamp(min=1)
    if teacher is not None:
        teacher = _cast(teacher, dtype)
    hidden, weight, bias = student
    return TokenLosses(
        *_ChunkedLoss.apply(hidden, weight, bias, teacher, following, shares, objective, dtype)
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: HeadInput | None,
        labels: Tensor,
        shares: Tensor,
        objective: Objective,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # hidden [B, T, E], weight [V, E]; labels [N] shifted, shares [2, N] of KL and CE
        inputs, wanted = (hidden, weight, bias), ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(x, dtype=_accumulator(x.dtype)) if x is not None and want else None
            for x, want in zip(inputs, wanted, strict=True)
        ]
        student = _cast(HeadInput(*inputs), dtype)
        sums = torch.zeros(2, dtype=_accumulator(hidden.dtype), device=hidden.device)
        for tokens, logits in student.chunks():
            target = None if teacher is None else teacher.logits(tokens)
            share = shares[:, tokens, None].to(logits)
            sums += _terms(logits, target, labels[tokens, None], share, objective)
            if any(wanted):  # logits [n, V] now hold their gradient
                _add_linear_grads(grads, student, tokens, logits)
        rounded = (
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in zip(grads, inputs, strict=True)
        )
        ctx.save_for_backward(*rounded)
        kl, ce = sums.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return objective.kl_weight * kl + objective.ce_weight * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward finds its saved tensors changed, and raises.
        return *(g if g is None else g.mul_(grad) for g in ctx.saved_tensors), *[None] * 5


def _terms(
    logits: Tensor, target: Tensor | None, labels: Tensor, share: Tensor, objective: Objective
) -> Tensor:
    # logits, target [n, V]; labels [n, 1]; share [2, n, 1]. Returns the sums [2] of KL and CE, and
    # leaves in logits the gradient of their weighted sum.
    kl_share, ce_share = share
    temperature, labels = objective.temperature, labels.clamp(min=0)
    log_q = logits.log_softmax(-1)
    ce = -(log_q.gather(-1, labels) * ce_share).sum()
    scale = objective.ce_weight * ce_share
    gradient = log_q.exp().mul_(scale) if objective.ce_weight else torch.zeros_like(logits)
    if objective.ce_weight:
        gradient.scatter_add_(-1, labels, -scale)
    if target is None:
        logits.copy_(gradient)
        return torch.stack([torch.zeros_like(ce), ce])
    if temperature != 1:
        log_q = (logits / temperature).log_softmax(-1)
    log_p = (target / temperature).log_softmax(-1)
    q, p, log_ratio = log_q.exp(), log_p.exp(), log_p.sub_(log_q)  # log(p / q)
    if objective.direction == "forward":
        kl = (p * log_ratio).sum(-1, keepdim=True)
        slope = q.sub_(p)
    else:
        kl = -(q * log_ratio).sum(-1, keepdim=True)
        slope = log_ratio.add_(kl).mul_(q).neg_()
    torch.addcmul(gradient, slope, objective.kl_weight * temperature * kl_share, out=logits)
    return torch.stack([temperature**2 * (kl * kl_share).sum(), ce])


def _add_linear_grads(
    grads: list[Tensor | None], student: HeadInput, tokens: slice, slope: Tensor
) -> None:
    # slope [n, V]: of the loss by the logits of these tokens
    slope = slope.to(student.weight.dtype)
    hidden_grad, weight_grad, bias_grad = grads
    if hidden_grad is not None:
        hidden_grad.flatten(0, -2)[tokens] = slope @ student.weight
    if weight_grad is not None:
        hidden = student.hidden.flatten(0, -2)[tokens].to(slope.dtype)
        if slope.dtype == weight_grad.dtype:  # no second [V, E] in memory
            weight_grad.addmm_(slope.T, hidden)
        else:
            weight_grad += slope.T @ hidden
    if bias_grad is not None:
        bias_grad += slope.sum(0)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(head: HeadInput, dtype: torch.dtype) -> HeadInput:
    # hidden is cast chunk by chunk
    bias = None if head.bias is None else head.bias.to(dtype)
    return HeadInput(head.hidden, head.weight.to(dtype), bias)

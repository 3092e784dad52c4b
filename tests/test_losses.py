"""The chunked losses against plain autograd in float64, and what they are for: memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from attnopt import losses
from attnopt.data import collate
from attnopt.losses import (
    HeadInput,
    Objective,
    check_head,
    head_computes,
    head_input,
    shifted_labels,
    token_losses,
)
from attnopt.metrics import row_metrics, summarize

ROOT = Path(__file__).resolve().parents[1]
B, T, E, V = 2, 9, 5, 11
OBJECTIVES = [
    Objective(),
    Objective(direction="reverse"),
    Objective(kl_weight=0.7, ce_weight=0.3, temperature=2.5),
    Objective(kl_weight=0.7, ce_weight=0.3, temperature=0.5, direction="reverse"),
    Objective(kl_weight=0.0, ce_weight=2.0),
]


def drawn(dtype=torch.float64, bias=True):
    """A student and a teacher of another width; row 0 is padded on the left, row 1 on the right."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    student = HeadInput(normal(B, T, E), normal(V, E), normal(V) if bias else None)
    teacher = HeadInput(normal(B, T, E + 2), normal(V, E + 2), None)
    labels = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, :2] = mask[1, 6:] = 0
    for x in student:
        x is None or x.requires_grad_()
    return student, teacher, labels, mask


def logits(head):
    return F.linear(*head)


def naive(student, teacher, labels, mask, objective):
    """The definition, from whole logits and position by position; returns loss, kl, ce."""
    t = objective.temperature
    log_q = (logits(student) / t).log_softmax(-1)
    log_p = (logits(teacher) / t).log_softmax(-1)
    if objective.direction == "forward":
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
    kl = t**2 * per_token[mask != 0].mean()
    log_s = logits(student).log_softmax(-1)
    pairs = [
        -log_s[b, i, labels[b, i + 1]]
        for b in range(B)
        for i in range(T - 1)
        if mask[b, i] and mask[b, i + 1]
    ]
    ce = torch.stack(pairs).mean()
    return objective.kl_weight * kl + objective.ce_weight * ce, kl, ce


@pytest.mark.parametrize("chunk", [V, 4 * V, 10**6], ids=["1", "4", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(monkeypatch, objective, chunk):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    student, teacher, labels, mask = drawn()
    expected = naive(student, teacher, labels, mask, objective)
    got = token_losses(student, teacher, labels, mask, objective)
    torch.testing.assert_close(tuple(got), expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(3 * got.loss, student)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(3 * expected[0], student), rtol=1e-11, atol=1e-12
    )
    assert not (got.kl.requires_grad or got.ce.requires_grad)


def test_without_a_teacher_only_cross_entropy_is_left():
    student, teacher, labels, mask = drawn()
    objective = Objective(kl_weight=1.0, ce_weight=0.5)
    got = token_losses(student, None, labels, mask, objective)
    _, _, ce = naive(student, teacher, labels, mask, objective)
    torch.testing.assert_close(tuple(got), (0.5 * ce, torch.zeros_like(ce), ce))


def test_cross_entropy_is_that_of_transformers():
    model = tiny_gpt2()
    ids = torch.randint(0, V, (B, T))
    expected = model(input_ids=ids, labels=ids).loss
    with head_computes(model, lambda h: token_losses(h, None, ids, None, Objective(0.0, 1.0))):
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got.loss, expected)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_teacher_one_position_off_is_noticed(shift):
    student, _, labels, mask = drawn()
    same = HeadInput(*(None if x is None else x.detach() for x in student))
    assert token_losses(student, same, labels, mask, Objective()).loss.abs() < 1e-12
    off = same._replace(hidden=same.hidden.roll(shift, dims=1))
    assert token_losses(student, off, labels, mask, Objective()).loss > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_has_neither_value_nor_gradient(objective):
    student, teacher, labels, mask = drawn()
    before = token_losses(student, teacher, labels, mask, objective)
    (gradient,) = torch.autograd.grad(before.loss, student.hidden)
    assert (gradient[mask == 0] == 0).all()
    with torch.no_grad():
        student.hidden[mask == 0] = 100.0
        teacher.hidden[mask == 0] = -100.0
        labels[mask == 0] = 3
    torch.testing.assert_close(token_losses(student, teacher, labels, mask, objective), before)


def test_labels_move_one_to_the_left_and_padding_drops_out():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shifted_labels(labels).tolist() == [[2, 3, 4, -100], [6, 7, 8, -100]]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert shifted_labels(labels, mask).tolist() == [[-100, 3, 4, -100], [6, 7, -100, -100]]


def test_frozen_inputs_cost_no_gradient_and_a_second_backward_is_refused():
    student, teacher, labels, mask = drawn()
    frozen = student._replace(weight=student.weight.detach(), bias=None)
    loss = token_losses(frozen, teacher, labels, mask, Objective()).loss
    loss.backward(retain_graph=True)
    assert frozen.weight.grad is None and student.hidden.grad is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_multiplies_in_bfloat16_and_keeps_gradients_in_the_parameters_dtype():
    student, teacher, labels, mask = drawn(torch.float32)
    exact = token_losses(student, teacher, labels, mask, Objective()).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_losses(student, teacher, labels, mask, Objective()).loss
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() < 0.02 * exact
    for x, gradient in zip(student, torch.autograd.grad(rounded, student), strict=True):
        assert gradient.dtype == x.dtype


def test_vocabularies_must_agree():
    student, teacher, labels, mask = drawn()
    shorter = teacher._replace(weight=teacher.weight[:-1])
    with pytest.raises(ValueError, match="one vocabulary; the teacher's head has 10 tokens.* 11"):
        token_losses(student, shorter, labels, mask, Objective())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"direction": "sideways"}, "'forward', 'reverse'.; got 'sideways'"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive; got nan"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative; got -1.0"),
        ({"ce_weight": float("nan")}, "ce_weight must not be negative; got nan"),
    ],
)
def test_objectives_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)


def tiny_gpt2(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **changes)).eval()


def test_the_models_own_forward_reaches_the_head():
    model = tiny_gpt2()
    ids = torch.randint(0, V, (B, T))
    expected = model(input_ids=ids).logits
    with pytest.raises(KeyError), head_computes(model, lambda head: {}["broken"]):
        model(input_ids=ids)
    torch.testing.assert_close(logits(head_input(model, model, input_ids=ids)), expected)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_models_that_change_their_logits_are_refused():
    class Scaled(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits / 2
            return outputs

    check_head(model := tiny_gpt2())
    with pytest.raises(ValueError, match="Scaled changes its logits after the output head"):
        check_head(Scaled(model.config))
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="must be a torch.nn.Linear; got Sequential"):
        check_head(model)


@pytest.mark.parametrize("chunk", [V, 10**6])
def test_metrics_are_those_of_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    student, teacher, labels, mask = drawn()
    got = summarize(*row_metrics(student, teacher, labels, mask))
    _, kl, ce = naive(student, teacher, labels, mask, Objective(1.0, 1.0))
    reverse = naive(student, teacher, labels, mask, Objective(direction="reverse"))[1]
    teacher_ce = naive(teacher, student, labels, mask, Objective(0.0, 1.0))[2]
    agree = logits(student).argmax(-1) == logits(teacher).argmax(-1)
    expected = {
        "kl": kl,
        "reverse_kl": reverse,
        "ce": ce,
        "teacher_ce": teacher_ce,
        "perplexity": ce.exp(),
        "teacher_perplexity": teacher_ce.exp(),
        "perplexity_ratio": (ce - teacher_ce).exp(),
        "top1": agree[mask != 0].double().mean(),
    }
    assert got == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)


def test_metrics_of_rows_add_up_over_batches_of_any_size():
    student, teacher, labels, mask = drawn()
    together = row_metrics(student, teacher, labels, mask)
    rows = [
        row_metrics(
            student._replace(hidden=student.hidden[b, None]),
            teacher._replace(hidden=teacher.hidden[b, None]),
            labels[b, None],
            mask[b, None],
        )
        for b in range(B)
    ]
    torch.testing.assert_close(tuple(map(torch.cat, zip(*rows, strict=True))), together)
    alone = summarize(*row_metrics(student, None, labels, mask))
    assert set(alone) == {"ce", "perplexity"}


MEMORY = """
import sys, resource, torch
import torch.nn.functional as F
from attnopt.losses import HeadInput, Objective, token_losses
tokens, vocabulary, width = 2048, 50257, 16
hidden, taught = (torch.randn(1, tokens, width, requires_grad=r) for r in (True, False))
weight = torch.randn(vocabulary, width, requires_grad=True)
labels = torch.zeros(1, tokens, dtype=torch.long)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
if sys.argv[1] == "chunked":
    student, teacher = HeadInput(hidden, weight, None), HeadInput(taught, weight.detach(), None)
    token_losses(student, teacher, labels, None, Objective()).loss.backward()
else:
    log_q = F.linear(hidden, weight).log_softmax(-1)
    log_p = F.linear(taught, weight.detach()).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_large_vocabulary_does_not_multiply_memory():
    command = [sys.executable, "-c", MEMORY, "chunked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # GiB; whole logits alone are 0.38, and the naive loss takes 1.9
    assert float(done.stdout) < 0.35


def test_collate_and_losses_agree_on_padding():
    model = tiny_gpt2()
    rows = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7, 8]}]
    batch = collate(rows)
    labels = batch.pop("labels")
    student = head_input(model, model, **batch)
    got = token_losses(student, None, labels, batch["attention_mask"], Objective(0.0, 1.0))
    sums = [
        F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        for ids in (torch.tensor([row["input_ids"]]) for row in rows)
    ]
    torch.testing.assert_close(got.ce, torch.stack(sums).sum() / 6)

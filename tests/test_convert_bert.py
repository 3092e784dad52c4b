"""A trained BERT whose attention is replaced and which is not trained again: the zero-shot swap.

Its rows repeat three tokens, and masked ones have to be found three places away: it needs sharp
attention in both directions.
"""

import copy

import pytest
import torch
from families import VOCABULARY, tiny_family, tokens
from torch.nn.functional import cross_entropy

from attnopt import Favor, LastK, calibrate, convert, dense_attention, mechanisms

MASK, LENGTH, ROWS = VOCABULARY - 1, 24, 32


def batch(seed):
    """Rows of three tokens over and over, one in five masked: (input ids, labels)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, MASK, (ROWS, 3), generator=generator).repeat(1, LENGTH // 3)
    masked = torch.rand(ROWS, LENGTH, generator=generator) < 0.2
    return text.masked_fill(masked, MASK), text.masked_fill(~masked, -100)


@pytest.fixture(scope="module")
def bert():
    model = tiny_family("bert", initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        ids, labels = batch(step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_after(bert, config):
    """Nats per masked token of new rows, of a copy that is converted without any training."""
    ids, labels = batch(10_000)
    model = copy.deepcopy(bert) if config is None else convert(copy.deepcopy(bert), config)
    return cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).item()


def test_zero_shot_swap(bert):
    dense = loss_after(bert, None)
    alone = loss_after(bert, LastK(1))
    assert dense < 0.2 and alone > 4  # it has learned to attend
    assert abs(loss_after(bert, LastK(LENGTH)) - dense) < 1e-4
    lost = [loss_after(bert, Favor(count, seed=0)) - dense for count in (16, 128, 1024)]
    assert lost[0] > 2 * lost[1] > 4 * lost[2] and lost[2] < 0.1  # converges with its features
    assert loss_after(bert, {0: Favor(1024, seed=0)}) - dense < 0.1  # layer 1 stays softmax


@torch.no_grad()
def test_a_token_sees_both_neighbors(bert):
    model, x = convert(copy.deepcopy(bert), LastK(3)), tokens(1, LENGTH)
    before = model.bert(x).last_hidden_state
    changed = x.clone()
    changed[:, 12] = MASK - changed[:, 12]
    moved = (model.bert(changed).last_hidden_state - before).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [*range(8, 17)]  # two layers, two to either side


@torch.no_grad()
def test_dense_attention_and_calibration(bert):
    ids, _ = batch(0)
    model = convert(copy.deepcopy(bert), Favor(8, seed=0))
    with dense_attention(model):
        assert torch.equal(model(ids).logits, bert(ids).logits)
    assert calibrate(model, ids) == {}  # features in both directions have no gate
    assert list(mechanisms(model)) == [0, 1]

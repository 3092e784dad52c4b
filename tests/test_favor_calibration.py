"""Calibrating gates: against far masses added up key by key, and what must stay as it was."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_gpt2 import LENGTH, assert_same, snapshot, tiny, tokens

from attnopt import Favor, LastK, calibrate, convert, mechanisms, revert


def phi(x, mechanism):
    """Features of one vector x [D] for head h, written out from their definition."""
    config = mechanism.config

    def of(h):
        if config.feature_map == "taylor":
            return torch.cat([torch.ones(1), x, torch.outer(x, x).flatten() / math.sqrt(2)])
        dots = mechanism.projection[h].double() @ x
        if config.feature_map == "favor":
            return torch.exp(dots - x @ x / 2) / math.sqrt(len(dots))
        if config.feature_map == "hedgehog":
            return torch.softmax(dots, 0)
        return torch.exp(dots) if config.feature_map == "exp" else dots.clamp_min(0) + 1e-3

    return of


def measured(model, layer, ids, mask):
    """The gates of a layer, one query, one head and one key at a time, from the dense model."""
    mechanism, config = mechanisms(model)[layer], mechanisms(model)[layer].config
    seen = []
    dense = revert(copy.deepcopy(model)).double()
    hook = dense.transformer.h[layer].attn.c_attn.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    dense(ids, attention_mask=mask, position_ids=positions)
    hook.remove()
    heads = dense.config.n_head
    dim = dense.config.n_embd // heads
    sums, count = torch.zeros(heads), 0
    for row, real in zip(seen[0], mask, strict=True):
        qkv = row[real == 1].reshape(-1, 3, heads, dim) / dim**0.25
        for p in range(len(qkv)):
            far = max(0, p - config.window + 1) // config.window_block * config.window_block
            if not far:
                continue
            count += 1
            for h in range(heads):
                q = qkv[p, 0, h]
                true = sum(torch.exp(q @ qkv[j, 1, h]) for j in range(far))
                of = phi(q, mechanism)(h)
                features = sum(of @ phi(qkv[j, 1, h], mechanism)(h) for j in range(far))
                sums[h] += (true / features).log()
    return sums / count


GATED = {
    "favor": Favor(12, window=3, window_block=2, gate=True),
    "hedgehog": Favor(feature_map="hedgehog", window=4, window_block=3),
    "exp": Favor(6, feature_map="exp", window=1, window_block=2),
    "relu": Favor(6, feature_map="relu", window=5, window_block=1),
    "taylor": Favor(feature_map="taylor", window=2, window_block=4),
}


@pytest.mark.parametrize("name", GATED)
def test_calibration_measures_the_far_mass(name):
    model = convert(tiny(n_embd=16), {0: LastK(2), 1: GATED[name]})
    x = tokens(2, 12)
    mask = torch.ones_like(x)
    mask[0, :4] = mask[1, 9:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": x, "attention_mask": mask, "position_ids": positions, "labels": x}
    with torch.no_grad():
        expected = measured(model, 1, x, mask).float()
    found = calibrate(model, batch)
    assert list(found) == [1]
    gate = mechanisms(model)[1].log_gate
    torch.testing.assert_close(gate.detach(), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(found[1], gate) and isinstance(gate, torch.nn.Parameter)


def test_calibration_averages_over_rows_with_far_tokens():
    """Padded rows count as they would alone, batches as their rows, and gates start anywhere."""
    model = convert(tiny(), GATED["hedgehog"], layers=[1])
    x = tokens(3)
    whole = calibrate(model, x)[1]
    with torch.no_grad():
        mechanisms(model)[1].log_gate.fill_(100.0)
    torch.testing.assert_close(calibrate(model, list(x.split(1)))[1], whole)
    rows = [calibrate(model, x[:1])[1], calibrate(model, x[:1, : LENGTH // 2])[1]]
    mask = torch.ones_like(x[:2])
    mask[1, : LENGTH // 2] = 0
    padded = torch.stack([x[0], x[0].roll(LENGTH // 2)])
    both = {"input_ids": padded, "attention_mask": mask}
    both["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    config = GATED["hedgehog"]
    counts = [
        sum(p - config.window + 1 >= config.window_block for p in range(n))
        for n in (LENGTH, LENGTH // 2)
    ]
    expected = (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts)
    torch.testing.assert_close(calibrate(model, both)[1], expected)


def test_calibration_leaves_the_rest_alone():
    model = convert(tiny(), {0: GATED["hedgehog"], 1: LastK(2), 2: Favor(8, window=2)}).train()
    before = snapshot(model)
    found = calibrate(model, tokens())
    after = snapshot(model)
    name = "transformer.h.0.attn.attnopt.log_gate"
    assert list(found) == [0] and not torch.equal(before[0].pop(name), after[0].pop(name))
    assert_same(before, after)
    assert model.training and all("forward" not in vars(m) for m in mechanisms(model).values())


def test_calibration_needs_far_tokens():
    model = convert(tiny(), Favor(feature_map="hedgehog", window=LENGTH))
    before = snapshot(model)
    assert calibrate(model, tokens()) == {}
    assert_same(before, snapshot(model))
    assert calibrate(convert(tiny(), LastK(3)), tokens()) == {}
    with pytest.raises(ValueError, match="that attnopt.convert has converted"):
        calibrate(tiny(), tokens())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])


def test_calibrated_features_are_closer_to_softmax():
    model, x = tiny(initializer_range=0.1), tokens(4)
    before = F.log_softmax(model(x).logits, -1)
    convert(model, Favor(feature_map="hedgehog", window=3, window_block=1))
    with torch.no_grad():
        for mechanism in mechanisms(model).values():
            mechanism.log_gate.zero_()

    def divergence():
        logits = F.log_softmax(model(x).logits, -1)
        return F.kl_div(logits, before, log_target=True, reduction="sum").item()

    plain = divergence()
    calibrate(model, tokens(4, seed=1))
    assert divergence() < plain / 3

"""Calibrating NSA's gates: against branches by their definition, and what must stay as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_gpt2 import assert_same, snapshot, tiny, tokens
from small_llama import tiny_llama

from attnopt import NSA, Favor, LastK, calibrate, convert, mechanisms
from attnopt.attention.nsa.gauge import GATE_BOUNDS, bounded_least_squares
from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.reference import nsa_reference

LENGTH = 30
LOW, HIGH = GATE_BOUNDS
CONFIGS = {
    "paper": NSA("gates", 4, 4, 2, 3, 6, 1, 1),
    "narrow": NSA("gates", 3, num_selected=2, window=2, sink_blocks=1, local_blocks=1),
    "no-forced": NSA("gates", 2, 6, 3, 1, 4, 0, 0),
}


def padded(batch=2):
    """Inputs of which the first row lacks its first tokens, the second its last."""
    ids = tokens(batch, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 25:] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": ids}


def normal_equations(model, layer, batch):
    """Products of branches [H, 3, 3], and of them and softmax [H, 3], row by row in float64."""
    seen, mechanism = [], mechanisms(model)[layer]
    model = copy.deepcopy(model).double()
    captured = mechanisms(model)[layer]
    for m in mechanisms(model).values():  # the dense model, layer by layer

        def dense(q, k, v, *, key_mask, scale, own=m, **others):
            out = torch.zeros_like(q)
            for row in range(len(q)):
                real = key_mask[row].nonzero()[:, 0]
                parts = [x[row : row + 1, :, real] for x in (q, k, v)]
                softmax = F.scaled_dot_product_attention(
                    *parts, is_causal=True, scale=scale, enable_gqa=True
                )
                out[row : row + 1, :, real] = softmax
                if own is captured:
                    seen.append((*parts, scale, softmax))
            return out

        m.forward = dense
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    model(**inputs, use_cache=False)
    options = mechanism.config.to_dict()
    for name in ("mechanism", "compression", "regime", "backend"):
        options.pop(name)
    sizes = {name: options[name] for name in ("compress_block", "compress_stride")}
    products, targets = 0.0, 0.0
    for q, k, v, scale, softmax in seen:
        pooled = [mean_compress(x, **sizes) for x in (k, v)]
        branches = []
        for gate in torch.eye(3, dtype=torch.float64):
            gates = gate.expand(*q.shape[:3], 3)
            branches.append(nsa_reference(q, k, v, *pooled, gates=gates, scale=scale, **options))
        x = torch.stack(branches, 1)[0].transpose(0, 1).flatten(2)  # [H, 3, N D]
        products = products + x @ x.mT
        targets = targets + (x @ softmax[0].flatten(1).unsqueeze(2))[..., 0]
    return products, targets


def assert_optimal(gates, products, targets):
    """The conditions of a minimum in a box: no slope inside, only slopes outwards at its sides."""
    slope = (products @ gates.double().unsqueeze(2))[..., 0] - targets
    slope = slope / products.diagonal(dim1=1, dim2=2)
    assert (gates >= LOW).all() and (gates <= HIGH).all()
    assert (slope[gates > LOW + 1e-6] < 1e-4).all() and (slope[gates < HIGH - 1e-6] > -1e-4).all()


@pytest.mark.parametrize("make", [tiny, tiny_llama])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_gates_come_closest_to_softmax(make, name):
    model, batch = convert(make(), {0: LastK(2), 1: CONFIGS[name]}), padded()
    expected = normal_equations(model, 1, batch)
    found = calibrate(model, batch)
    assert list(found) == [1] and found[1].shape == (4, 3)
    assert_optimal(found[1], *expected)
    hidden = torch.randn(1, 2, 32)
    gates = mechanisms(model)[1].gates(hidden)
    torch.testing.assert_close(gates, found[1][:, None].expand(1, -1, 2, -1))


def test_least_squares_in_a_box():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, 3, generator=generator, dtype=torch.float64)
    x[..., 2] = 0.9 * x[..., 1] + 0.2 * x[..., 2]
    wanted = torch.rand(200, 3, 1, generator=generator, dtype=torch.float64) * 2 - 0.5
    y = x @ wanted + 0.1 * torch.randn(200, 40, 1, generator=generator, dtype=torch.float64)
    products, targets = x.mT @ x, (x.mT @ y)[..., 0]
    gates = bounded_least_squares(products, targets, LOW, HIGH)
    assert_optimal(gates, products, targets)
    free = torch.linalg.lstsq(x, y).solution[..., 0]
    inside = ((free > LOW) & (free < HIGH)).all(1)
    assert 10 < inside.sum() < 190
    torch.testing.assert_close(gates[inside], free[inside], atol=1e-4, rtol=1e-4)

    def loss(g):
        return (x @ g.unsqueeze(2) - y).square().sum((1, 2))

    clipped = free.clamp(LOW, HIGH)
    assert (loss(gates) <= loss(clipped) + 1e-4).all()
    assert loss(gates).sum() < 0.9 * loss(clipped).sum()


def test_branches_that_are_the_same_share():
    model = convert(tiny(), NSA("gates", 4, num_selected=8, window=LENGTH))
    for gates in calibrate(model, tokens(2, LENGTH)).values():
        torch.testing.assert_close(gates[:, 1:], torch.full((4, 2), 0.5), atol=0.03, rtol=0)
        assert (gates[:, 0] < 0.02).all()


def test_a_branch_that_sees_nothing_keeps_a_third():
    model = convert(tiny(), NSA("gates", 32, num_selected=3, window=4))
    found = calibrate(model, tokens(2, 20))
    assert all((gates[:, 0] == 1 / 3).all() for gates in found.values())
    assert all((gates[:, 1] > 0.9).all() for gates in found.values())


def test_calibration_adds_up_and_forgets():
    """Batches count as their rows, padding not at all, and gates start anywhere."""
    model = convert(tiny(), CONFIGS["paper"])
    batch = padded()
    del batch["labels"]
    whole = calibrate(model, batch)
    again = calibrate(model, batch)
    for mechanism in mechanisms(model).values():
        torch.nn.init.normal_(mechanism.gate.weight)
    rows = calibrate(model, [{k: x[i : i + 1] for k, x in batch.items()} for i in range(2)])
    alone = calibrate(model, [tokens(2, LENGTH)[:1, 7:], tokens(2, LENGTH)[1:, :25]])
    for index, gates in whole.items():
        assert torch.equal(again[index], gates)
        torch.testing.assert_close(rows[index], gates, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[index], gates, atol=1e-4, rtol=1e-3)


def test_calibration_leaves_the_rest_alone():
    features = Favor(8, window=2, window_block=2, gate=True)
    configs = {0: CONFIGS["narrow"], 1: NSA(select_block=4), 2: features}
    model = convert(tiny(), configs).train()
    before = snapshot(model)
    found = calibrate(model, tokens())
    after = snapshot(model)
    assert list(found) == [0, 2] and found[2].shape == (4,)
    for name in ("0.attn.attnopt.gate.bias", "2.attn.attnopt.log_gate"):
        kept, new = (state[0].pop(f"transformer.h.{name}") for state in (before, after))
        assert not torch.equal(kept, new)
    assert_same(before, after)
    assert model.training and all("forward" not in vars(m) for m in mechanisms(model).values())
    assert calibrate(convert(tiny(), NSA()), tokens()) == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrated_gates_are_closer_to_softmax(name):
    model, x = tiny(initializer_range=0.1), tokens(4, LENGTH)
    before = F.log_softmax(model(x).logits, -1)
    convert(model, CONFIGS[name])

    def divergence():
        logits = F.log_softmax(model(x).logits, -1)
        return F.kl_div(logits, before, log_target=True, reduction="sum").item()

    plain = divergence()
    calibrate(model, tokens(4, LENGTH, seed=1))
    assert divergence() < 0.8 * plain


def test_distillation_calibrates_gates(monkeypatch):
    """Where it calibrates those of features; one merged softmax has none."""
    import attnopt.distill as module

    blocks = [{"input_ids": row.tolist()} for row in tokens(3, LENGTH)]
    model = convert(tiny(), CONFIGS["paper"])
    module._calibrate(model, blocks, 0)
    gates = [m.gates(torch.zeros(1, 1, 32)) for m in mechanisms(model).values()]
    expected = calibrate(model, tokens(3, LENGTH))
    for ours, theirs in zip(gates, expected.values(), strict=True):
        torch.testing.assert_close(ours[0, :, 0], theirs, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("it has no gates"))
    module._calibrate(convert(tiny(), NSA()), blocks, 0)

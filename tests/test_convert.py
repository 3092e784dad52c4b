"""Converting GPT-2 in place: what changes, what must not, and how to go back."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from small_gpt2 import LENGTH, MIXED, VOCABULARY, assert_same, snapshot, tiny, tokens
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from attnopt import (
    Every,
    First,
    LastK,
    Masks,
    NthLast,
    Window,
    convert,
    dense_attention,
    mechanisms,
    revert,
)

WIDE = [
    LastK(LENGTH),
    LastK(LENGTH, sinks=4),
    LastK(1024, sinks=4, per_head=True),
    Masks([Window(LENGTH)]),
    Masks([NthLast(n) for n in range(LENGTH)]),
    Masks([Every()]),
    Masks([Every(), First(3)]),
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False, "initializer_range": 0.1},
    ],
    ids=["plain", "layer-scaled", "unscaled"],
)
def test_wide_masks_leave_the_logits(options, implementation):
    model = tiny(attn_implementation=implementation, **options)
    x = tokens()
    before = model(x).logits
    for config in WIDE:
        convert(model, config)
        difference = (model(x).logits - before).abs().max()
        revert(model)
        assert difference <= 1e-5, config


@pytest.mark.parametrize("mechanism", [LastK(3), MIXED], ids=["all", "mixed"])
def test_base_weights_keep_names_and_bits(mechanism):
    model = tiny()
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    weights, _ = snapshot(model)
    convert(model, mechanism)
    state = model.state_dict()
    assert set(state) - set(weights) == {n for n in state if ".attn.attnopt." in n} != set()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert all(p.data_ptr() == storages.get(n, p.data_ptr()) for n, p in model.named_parameters())
    c_attn = model.transformer.h[0].attn.c_attn
    assert type(c_attn).__name__ == "Conv1D" and c_attn.weight.shape == (32, 96)


def test_narrow_masks_change_the_logits():
    model, x = tiny(), tokens()
    before = model(x).logits
    assert (convert(model, LastK(3))(x).logits - before).abs().max() > 0.1


def test_layers_are_chosen_one_by_one():
    x = tokens()
    for layers in ([1], range(2), (0, 2)):
        model = convert(tiny(), LastK(3), layers=layers)
        assert list(mechanisms(model)) == list(layers)
        per_layer = convert(tiny(), {index: LastK(3) for index in layers})
        assert torch.equal(model(x).logits, per_layer(x).logits)
    mixed = convert(tiny(), MIXED)
    assert [type(m.config) for m in mechanisms(mixed).values()] == [LastK, Masks]
    assert set(mixed.config.attnopt) == {"0", "2"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_layers_stay_softmax(implementation):
    """Only layer 2 is converted, to something equal to softmax: so all must equal the original."""
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model = tiny(attn_implementation=implementation)
    inputs = {"attention_mask": mask, "position_ids": positions}
    before, chunked = model(x, **inputs).logits, in_chunks(model, x, mask, positions)
    convert(model, LastK(LENGTH), layers=[2])
    for ours, theirs in (
        (model(x, **inputs).logits, before),
        (in_chunks(model, x, mask, positions), chunked),
    ):
        torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], atol=1e-5, rtol=0)


def in_chunks(model, x, mask, positions, sizes=(9, 1, 14)):
    cache, end, logits = DynamicCache(), 0, []
    for size in sizes:
        begin, end = end, end + size
        logits.append(
            model(
                x[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            ).logits
        )
    return torch.cat(logits, 1)


@pytest.mark.parametrize("config", [LastK(3, sinks=2, init="random"), MIXED, Masks()], ids=str)
def test_padding_changes_nothing(config):
    model = convert(tiny(), config)
    x, real = tokens(3), [LENGTH, 15, 1]
    left, right = torch.zeros_like(x), torch.zeros_like(x)
    for row, count in enumerate(real):
        left[row, LENGTH - count :] = right[row, :count] = 1
    padded = {
        "left": (torch.stack([r.roll(LENGTH - n) for r, n in zip(x, real, strict=True)]), left),
        "right": (x, right),
    }
    for ids, mask in padded.values():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, count in enumerate(real):
            alone = model(x[row : row + 1, :count]).logits[0]
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_token_sees_the_future(backend):
    """Changing what follows t leaves the logits up to t as they are, bit for bit."""
    if backend == "triton":
        from attnopt.testing import force_triton

        context = force_triton()
        mechanism = {0: LastK(3, sinks=2, init="random"), 1: Masks(init="random")}
    else:
        context = nullcontext()
        mechanism = {**MIXED, 1: Masks(init="random")}
    model, x = convert(tiny(), mechanism), tokens(1)
    with context, torch.no_grad():
        before = model(x).logits
        for t in (0, 7, LENGTH - 2):
            changed = x.clone()
            changed[:, t + 1 :] = VOCABULARY - 1 - changed[:, t + 1 :]
            after = model(changed).logits
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_labels_give_the_loss_of_the_shifted_tokens():
    model, x = convert(tiny(), LastK(3)), tokens()
    out = model(x, labels=x)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for mechanism in mechanisms(model).values():
        assert mechanism.alpha.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    gradients = []
    for checkpointing in (False, True):
        model = convert(tiny(embd_pdrop=0, resid_pdrop=0), MIXED)
        with torch.no_grad():  # random alphas are drawn after tiny() has set the seed
            for mechanism in mechanisms(model).values():
                mechanism.reset_parameters(torch.Generator().manual_seed(1))
        model.train()
        model.transformer.h[1].attn.attn_dropout.p = 0.0  # it stays softmax
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(x, attention_mask=mask, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_compiles_into_one_graph():
    model, x = convert(tiny(), MIXED), tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x, attention_mask=mask).logits[mask == 1].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(compiled(x).logits, model(x).logits)


def test_dense_attention_is_the_original():
    teacher = tiny(attn_implementation="eager")
    x = tokens()
    before = teacher(x, output_attentions=True)
    student = convert(copy.deepcopy(teacher), LastK(2))
    narrow = student(x).logits
    with dense_attention(student) as same:
        assert same is student
        out = student(x, output_attentions=True)
        assert torch.equal(out.logits, before.logits)
        assert torch.equal(out.attentions[1], before.attentions[1])
        with dense_attention(student):
            pass
        assert torch.equal(student(x).logits, before.logits)
        generated = student.generate(x[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(student(x).logits, narrow)
    assert torch.equal(generated, teacher.generate(x[:1], max_new_tokens=5, do_sample=False))
    with pytest.raises(RuntimeError, match="stop"), dense_attention(student):
        raise RuntimeError("stop")
    assert torch.equal(student(x).logits, narrow)


def test_a_cache_of_the_mechanism_is_refused_under_dense_attention():
    model, x = convert(tiny(), LastK(2)), tokens()
    cache = model.make_cache()
    model(x, past_key_values=cache)
    with dense_attention(model), pytest.raises(ValueError, match="does not serve dense attention"):
        model(x[:, :1], past_key_values=cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_revert_restores_everything(implementation):
    model, x = tiny(attn_implementation=implementation, attn_pdrop=0.25), tokens()
    before, logits = snapshot(model), model(x).logits
    for config in (LastK(2, sinks=1), MIXED):
        convert(model, config)
        assert revert(model) is model
        assert_same(before, snapshot(model))
        assert torch.equal(model(x).logits, logits)


def test_models_that_share_a_config_are_left_alone():
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    teacher, student = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    before = snapshot(teacher)
    convert(student, LastK(2))
    assert_same(before, snapshot(teacher))
    assert config.model_type == "gpt2" and student.config is not config


def test_attention_dropout_is_off_on_converted_layers(caplog):
    model = tiny(attn_pdrop=0.5, resid_pdrop=0, embd_pdrop=0)
    with caplog.at_level("INFO", logger="attnopt"):
        convert(model, LastK(3), layers=[0, 2])
    assert len(caplog.records) == 1 and "[0.5], is 0" in caplog.text
    blocks = model.transformer.h
    assert [block.attn.attn_dropout.p for block in blocks] == [0.0, 0.5, 0.0]
    model.train()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)  # layer 1 still drops
    blocks[0].attn.attn_dropout.p = 0.1
    with pytest.raises(ValueError, match="layer 0: converted attention has no dropout"):
        model(tokens())
    revert(model)
    assert [block.attn.attn_dropout.p for block in blocks] == [0.5] * 3


def test_copies_are_independent():
    model, x = convert(tiny(), MIXED), tokens()
    logits = model(x).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x).logits, logits)
        revert(twin)
        assert torch.equal(model(x).logits, logits)
        assert (twin(x).logits - logits).abs().max() > 0.1

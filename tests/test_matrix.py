"""Every family of models with every mechanism: what conversion keeps, and what it must give.

The best known families meet each mechanism by itself, the others all of them, one per layer, with a
last layer that stays softmax.
"""

import copy
from functools import cache

import pytest
import torch
from families import (
    LENGTH,
    MECHANISMS,
    VOCABULARY,
    converted,
    mechanisms_of,
    mixed,
    padded,
    tiny_family,
    tokens,
)
from generation import assert_equal, decode, prompts
from small_gpt2 import assert_same, snapshot
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from attnopt import (
    LastK,
    convert,
    dense_attention,
    from_pretrained,
    mechanisms,
    revert,
)
from attnopt.convert.families import FAMILIES

ALONE = (
    "gpt2 bert llama mistral qwen2 qwen3 gpt_neox opt phi3 olmo2 gpt_bigcode"
).split()

DECODERS = [name for name, family in FAMILIES.items() if family.causal]


CELLS = [(name, kind) for name in FAMILIES if name in ALONE for kind in mechanisms_of(name)]
CELLS += [(name, "mixed") for name in FAMILIES]
CELLS_OF_DECODERS = [cell for cell in CELLS if cell[0] in DECODERS]
cells = pytest.mark.parametrize(("name", "kind"), CELLS)
decoders = pytest.mark.parametrize(("name", "kind"), CELLS_OF_DECODERS)


@cache
def original(name, layers=2):
    return tiny_family(name, layers=layers)


def cell(name, kind, **options):
    """A fresh converted model, and what it was."""
    if kind != "mixed":
        base = tiny_family(name, **options) if options else original(name)
        return converted(base, MECHANISMS[kind]), base
    layers = len(mixed(name)) + 1
    base = tiny_family(name, layers=layers, **options) if options else original(name, layers)
    return converted(base, mixed(name)), base


@cells
@torch.no_grad()
def test_weights_stay_and_revert_restores(name, kind):
    model, base = cell(name, kind)
    x, (weights, _) = tokens(), snapshot(base)
    state = model.state_dict()
    added = {key for key in state if ".attnopt." in key}
    assert set(state) - added == set(weights) and mechanisms(model)
    assert all(torch.equal(state[key], tensor) for key, tensor in weights.items())
    logits = base(x).logits
    assert (model(x).logits - logits).abs().max() > 1e-3 * logits.abs().max()
    with dense_attention(model):
        assert torch.equal(model(x).logits, logits)
    revert(model)
    assert_same(snapshot(base), snapshot(model))
    assert torch.equal(model(x).logits, logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_wide_band_leaves_the_logits(name):
    base = original(name)
    scale = base(tokens()).logits.abs().max()
    _, batches = padded()
    inputs = [{"input_ids": tokens()}, *batches.values()]
    expected = [base(**given).logits for given in inputs]
    for layers in ([0, 1], [1]):  # layer 0 stays softmax
        model = convert(copy.deepcopy(base), LastK(LENGTH, sinks=3), layers)
        for given, logits in zip(inputs, expected, strict=True):
            mask = given.get("attention_mask", torch.ones_like(given["input_ids"])) == 1
            error = (model(**given).logits - logits)[mask].abs().max()
            assert error <= 4e-6 * scale


@cells
@torch.no_grad()
def test_saves_and_loads(name, kind, tmp_path):
    model, _ = cell(name, kind)
    x = tokens()
    logits = model(x).logits
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if FAMILIES[name].causal else AutoModelForMaskedLM
    for load in (from_pretrained, auto.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model) and not loaded.training
        assert torch.equal(loaded(x).logits, logits)
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        loaded = half.state_dict()[key]
        if ".attnopt." in key:
            assert torch.equal(loaded, tensor)
        elif loaded.dtype == torch.bfloat16:  # some models keep a few tensors in fp32
            assert torch.equal(loaded, tensor.bfloat16())
    error = (half(x).logits - logits).float()
    bound = 0.2 if hasattr(model.config, "num_experts_per_tok") else 0.05  # another expert may win
    assert error.square().mean() < bound * logits.square().mean()


@cells
@torch.no_grad()
def test_padding_changes_nothing(name, kind):
    model, _ = cell(name, kind)
    rows, batches = padded()
    for inputs in batches.values():
        logits = model(**inputs).logits
        for row, mask, alone in zip(logits, inputs["attention_mask"], rows, strict=True):
            positions = torch.arange(alone.shape[1])[None]
            expected = model(alone, position_ids=positions).logits[0]
            torch.testing.assert_close(row[mask == 1], expected, atol=5e-5, rtol=1e-4)


@cells
def test_gradient_checkpointing_gives_the_same_gradients(name, kind):
    start, _ = cell(name, kind)
    _, batches = padded()
    inputs = batches["left"]
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(start).train()  # without dropout; centroids move in training
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = model(**inputs, use_cache=False).logits
        logits[inputs["attention_mask"] == 1].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert {n for n in gradients[0] if ".attnopt." in n} == {
        n for n, _ in model.named_parameters() if ".attnopt." in n
    }
    assert gradients[0].keys() == gradients[1].keys()
    for key, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], plain, atol=1e-5, rtol=1e-4)


@cells
@torch.no_grad()
def test_only_attention_dropout_is_off(name, kind):
    model, base = cell(name, kind, attention_dropout=0.5)
    x = tokens()
    all_converted = len(mechanisms(model)) == base.config.num_hidden_layers
    evaluated = model(x).logits
    model.train()
    trained = model(x).logits
    assert torch.equal(trained, evaluated) == (all_converted or _dropout_free(name))
    assert trained.isfinite().all()
    revert(model)
    assert torch.equal(model(x).logits, model(x).logits) == _dropout_free(name)


def _dropout_free(name):
    return name == "ernie4_5"  # has none on its attention weights


@pytest.mark.parametrize(
    "name",
    [n if n in (*ALONE, "mixtral") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_compiles_into_one_graph(name):
    """All mechanisms and a softmax layer at once; compiling is what takes time."""
    model, _ = cell(name, "mixed")
    _, batches = padded()
    inputs = batches["left"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        with torch.set_grad_enabled(name in ("gpt2", "llama", "bert")):
            logits = run(**inputs, use_cache=False).logits[inputs["attention_mask"] == 1]
        if logits.requires_grad:
            model.zero_grad()
            logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@decoders
@torch.no_grad()
def test_no_token_sees_the_future(name, kind):
    model, _ = cell(name, kind)
    x = tokens(1)
    before = model(x).logits
    for t in (0, 7, LENGTH - 2):
        changed = x.clone()
        changed[:, t + 1 :] = VOCABULARY - 1 - changed[:, t + 1 :]
        after = model(changed).logits
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-5, rtol=1e-5)
        assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().max() > 1e-3


@decoders
@torch.no_grad()
def test_generates_the_same_with_every_cache(name, kind):
    model, _ = cell(name, kind)
    inputs = prompts([5, 0, 11])
    settings = {"max_new_tokens": 6}
    expected = decode(model, inputs, use_cache=False, **settings)
    alone = decode(model, {key: value[:1, 5:] for key, value in inputs.items()}, **settings)
    assert_equal(alone, [x[:1] for x in expected])
    assert_equal(decode(model, inputs, **settings), expected)
    assert_equal(decode(model, inputs, past_key_values=DynamicCache(), **settings), expected)
    assert_equal(decode(model, inputs, prefill_chunk_size=5, **settings), expected)
    sampled = []
    for cached in (True, False):
        torch.manual_seed(3)
        sampled.append(decode(model, inputs, do_sample=True, use_cache=cached, **settings))
    assert_equal(*sampled)
    beams = [decode(model, inputs, num_beams=2, use_cache=c, **settings) for c in (True, False)]
    assert torch.equal(beams[0][0], beams[1][0])

"""What convert and converted models refuse, each with an error that says what would do."""

import sys

import pytest
import torch
from families import tiny_config, tiny_family
from small_gpt2 import LENGTH, assert_same, snapshot, tiny, tokens
from torch import nn
from transformers import (
    AutoModel,
    DynamicCache,
    GPT2Config,
    GPT2DoubleHeadsModel,
    StaticCache,
)

from attnopt import NSA, LastK, convert, dense_attention, revert


def stock(name, **options):
    return AutoModel.from_config(tiny_config(name, **options))


@pytest.mark.parametrize(
    ("make", "config", "layers", "message"),
    [
        (
            lambda: tiny_family("mistral", sliding_window=4096),
            LastK(),
            None,
            "attends to the last 4096 tokens (sliding_window)",
        ),
        (
            lambda: tiny_family("qwen2", use_sliding_window=True, max_window_layers=1),
            LastK(),
            None,
            "layers of sliding_attention; load it with use_sliding_window=False",
        ),
        (lambda: stock("gemma2"), LastK(), None, "cannot convert Gemma2Model (model_type"),
        (lambda: stock("gemma2"), LastK(), None, "caps its attention scores (softcapping)"),
        (lambda: stock("olmo3"), LastK(), None, "sliding windows"),
        (lambda: stock("bloom"), LastK(), None, "lets nobody replace the attention function"),
        (lambda: stock("albert"), LastK(), None, "its layers share one attention module"),
        (lambda: stock("nanochat"), LastK(), None, "starcoder2, xlm-roberta, xlm-roberta-xl; got"),
        (
            lambda: GPT2DoubleHeadsModel(tiny().config),
            LastK(),
            None,
            "can convert GPT2ForQuestionAnswering, GPT2ForSequenceClassification, "
            "GPT2ForTokenClassification, GPT2LMHeadModel, GPT2Model; got GPT2DoubleHeadsModel",
        ),
        (lambda: tiny_family("llama", is_causal=False), LastK(), None, "of llama is causal; its"),
        (lambda: nn.Linear(2, 2), LastK(), None, "got Linear"),
        (lambda: tiny(add_cross_attention=True), LastK(), None, "cross-attention"),
        (lambda: tiny(output_attentions=True), LastK(), None, "unset output_attentions"),
        (lambda: convert(tiny(), LastK()), LastK(), None, "already converted"),
        (tiny, LastK(), [3], "a layer index must be an integer in 0..2; got 3"),
        (tiny, LastK(), [-1], "in 0..2; got -1"),
        (tiny, {0: LastK(), 7: LastK()}, None, "in 0..2; got 7"),
        (tiny, {"0": LastK()}, None, "in 0..2; got '0'"),
        (tiny, LastK(), [], "no layer to convert"),
        (tiny, LastK(), 1, "layers must be a list of layer indices; got 1"),
        (tiny, {}, None, "no layer to convert"),
        (tiny, {0: LastK()}, [0], "not both"),
        (tiny, "lastk", None, "Routing; got 'lastk'"),
        (tiny, {0: LastK(), 1: None}, None, "Routing; got None"),
    ],
)
def test_a_refused_model_is_untouched(make, config, layers, message):
    model = make()
    before = None if isinstance(model, nn.Linear) else snapshot(model)
    with pytest.raises(ValueError) as error:
        convert(model, config, layers)
    assert message in str(error.value)
    if before:
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("call", [revert, lambda model: dense_attention(model).__enter__()])
@pytest.mark.parametrize("make", [tiny, lambda: nn.Linear(2, 2)])
def test_only_converted_models(call, make):
    with pytest.raises(ValueError, match="expected a model that attnopt.convert has converted"):
        call(make())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "got the shape (2, 1, 24, 24)"),
        ({"attention_mask": torch.ones(2, LENGTH - 1)}, "0 in the cache and 24 new"),
        ({"attention_mask": torch.ones(2, LENGTH + 1)}, "0 in the cache and 24 new"),
        ({"output_attentions": True}, "output_attentions=True is not possible"),
        (
            {"past_key_values": StaticCache(GPT2Config(n_layer=3), max_cache_len=32)},
            "got StaticCache with StaticLayer",
        ),
        (
            {"past_key_values": DynamicCache(config=GPT2Config(n_layer=3, sliding_window=4))},
            "got DynamicCache with DynamicSlidingWindowLayer",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_refuses_inputs(inputs, message):
    model = convert(tiny(), LastK(3), layers=[1])
    with pytest.raises(ValueError) as error:
        model(tokens(), **inputs)
    assert message in str(error.value)
    embeds = model.transformer.wte(tokens())
    with pytest.raises(ValueError) as error:
        model(inputs_embeds=embeds, **inputs)
    assert message in str(error.value)


def test_refuses_other_mask_patterns():
    model = convert(tiny(), LastK(3))
    model.config.is_causal = False
    with pytest.raises(ValueError, match="is causal; got the mask pattern bidirectional"):
        model(tokens())
    encoder = convert(tiny_family("bert"), LastK(3))
    encoder.config.is_decoder = True
    with pytest.raises(ValueError, match="in both directions; got the mask pattern causal"):
        encoder(tokens())


@torch.no_grad()
def test_a_window_can_be_given_up_before_conversion():
    model, x = tiny_family("mistral", sliding_window=64), tokens()
    expected = model(x).logits
    model.config.sliding_window = None
    convert(model, LastK(LENGTH), [0])
    torch.testing.assert_close(model(x).logits, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [[0], [1]])
def test_refuses_a_window_that_comes_after_conversion(layers):
    model = convert(tiny_family("mistral"), LastK(3), layers)
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match="have no sliding_window of their own; got 8"):
        model(tokens(), use_cache=False)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 3, 32)}, "have no cross-attention"),
        ({"past_key_values": DynamicCache()}, "it takes no past_key_values"),
    ],
)
def test_an_encoder_refuses_what_decoders_take(inputs, message):
    model = convert(tiny_family("bert"), LastK(3))
    with pytest.raises(ValueError, match=message):
        model.bert(tokens(), **inputs)
    with pytest.raises(ValueError, match="both directions: it has no cache"):
        model.make_cache()


def test_a_causal_mechanism_is_refused_for_an_encoder():
    model = tiny_family("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="NSA is causal, but this model attends in both"):
        convert(model, NSA())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "option", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}]
)
def test_a_scale_that_transformers_would_not_pass_on_is_refused(option):
    model = tiny(**option)
    for block in model.transformer.h:
        del block.attn.scaling  # as in transformers 5.0
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not tell attention functions the scale"):
        convert(model, LastK())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gpt2", "ALL_ATTENTION_FUNCTIONS"),
        ("gpt2", "create_causal_mask"),
        ("bert", "create_bidirectional_mask"),
    ],
)
def test_model_code_that_would_go_its_own_way_is_refused(name, missing, monkeypatch):
    model = tiny_family(name)
    monkeypatch.delattr(sys.modules[type(model).__module__], missing)  # as in transformers 5.0
    with pytest.raises(ValueError, match=f"code of {name} in this version of transformers lets"):
        convert(model, LastK())

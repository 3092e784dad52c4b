"""What convert and converted models refuse, each with an error that says what would do."""

import pytest
import torch
from small_gpt2 import LENGTH, assert_same, snapshot, tiny, tokens
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from attnopt import LastK, convert, dense_attention, revert


def mistral():
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


@pytest.mark.parametrize(
    ("make", "config", "layers", "message"),
    [
        (mistral, LastK(), None, "LlamaForCausalLM ('llama'); got MistralForCausalLM"),
        (lambda: tiny().transformer, LastK(), None, "got GPT2Model (model_type 'gpt2')"),
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
        (tiny, "lastk", None, "must be one of LastK, Masks, Favor, NSA; got 'lastk'"),
        (tiny, {0: LastK(), 1: None}, None, "must be one of LastK, Masks, Favor, NSA; got None"),
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
        ({"position_ids": torch.arange(LENGTH)[None] % 10}, "packed sequences"),
        ({"position_ids": torch.arange(LENGTH)[None] % 10, "use_cache": False}, "packed sequences"),
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
    with pytest.raises(ValueError, match="causal; got the mask pattern bidirectional"):
        model(tokens())


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

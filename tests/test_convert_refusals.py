"""What convert and converted models refuse, each with an error that says what would do."""

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from attnopt import LastK, convert, dense_attention, revert

LENGTH, VOCABULARY = 24, 61


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
        **options,
    }
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


def tokens(batch=2, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def snapshot(model):
    """Everything that convert may touch: names and bits of weights, class, config, hooks."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [*model.modules()]
    return weights, {
        "class": type(model),
        "config": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "dropouts": [m.p for m in modules if isinstance(m, nn.Dropout)],
        "hooks": [len(m._forward_pre_hooks) for m in modules],
        "attributes": sorted(model.__dict__),
    }


def assert_same(before, after):
    assert before[1] == after[1]
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
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
        (llama, LastK(), None, "can convert: GPT2LMHeadModel ('gpt2'); got LlamaForCausalLM"),
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
        (tiny, {}, None, "no layer to convert"),
        (tiny, {0: LastK()}, [0], "not both"),
        (tiny, "lastk", None, "must be one of LastK, Masks; got 'lastk'"),
        (tiny, {0: LastK(), 1: None}, None, "must be one of LastK, Masks; got None"),
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

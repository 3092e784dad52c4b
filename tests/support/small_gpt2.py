"""A small GPT-2 for tests, some tokens for it, and what a conversion could have changed in it."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from attnopt import Every, First, LastK, Masks

LENGTH, VOCABULARY = 24, 61
MIXED = {0: LastK(4, sinks=2, init="random"), 2: Masks([Every(), First(2)], init="random")}


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

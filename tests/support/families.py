"""A tiny random model of every family that converts, what to convert it to, and some inputs."""

import copy
from functools import cache

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

from attnopt import NSA, Favor, LastK, Linformer, Routing, convert, mechanisms
from attnopt.convert.families import FAMILIES

VOCABULARY, LENGTH, WIDTH = 61, 18, 32

MECHANISMS = {
    "lastk": LastK(4, sinks=2, init="random"),
    "favor-window": Favor(8, window=4, window_block=2, seed=0),
    "favor": Favor(8, seed=0),
    "nsa": NSA(select_block=4, num_selected=1, window=4),
    "nsa-gates": NSA("gates", 4, window=4, compression="weighted"),
    "routing": Routing(num_clusters=2, window=4),
    "linformer": Linformer(projected_length=8, max_length=2 * LENGTH),
}
_BOTH_WAYS = ("lastk", "favor", "linformer")

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"moe_intermediate_size": 16, "norm_topk_prob": True}

# Beyond that: names of their own, and the traps that a family has.
_OWN = {
    "bitnet": {"head_dim": 8},
    "cohere": {"logit_scale": 1.0},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "eurobert": {"head_dim": 8},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "granitemoe": {"attention_multiplier": 0.2, **_MOE},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "mixtral": {"sliding_window": None, **_MOE},
    "ministral3": {"sliding_window": None, "head_dim": 8},
    "olmo": {"clip_qkv": 2.0},
    "olmoe": _MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "phimoe": {
        "sliding_window": None,
        "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
        **_MOE,
    },
    "qwen2": {"use_sliding_window": False, "sliding_window": 8},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 8, **_MOE},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1, 0]},
    "starcoder2": {"sliding_window": None},
}
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_OTHER_DROPOUT = ("hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop")
_OTHER_DROPOUT += ("dropout", "residual_dropout", "embedding_dropout")


def tiny_config(name, *, layers=2, attention_dropout=0.0, dropout=0.0, **options):
    """The config of a tiny model; 4 heads, with 2 key/value heads where the family can have fewer.

    Set before the config is made, for some derive others from what they get.
    """
    cls = CONFIG_MAPPING[name]
    known, renamed = cls().to_dict(), getattr(cls, "attribute_map", {})
    settings = {
        **_COMMON,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        **dict.fromkeys(_ATTENTION_DROPOUT, attention_dropout),
        **dict.fromkeys(_OTHER_DROPOUT, dropout),
        **_OWN.get(name, {}),
        **options,
    }
    settings = {renamed.get(key, key): value for key, value in settings.items()}
    return cls(**{key: value for key, value in settings.items() if key in known or key in options})


def tiny_family(name, *, auto=None, seed=0, **options):
    """A language model of a family, or what another Auto class makes of its config."""
    if auto is None:
        auto = AutoModelForCausalLM if FAMILIES[name].causal else AutoModelForMaskedLM
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(name, **options)).eval()
    with torch.no_grad():  # norms and biases start alike everywhere, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mechanisms_of(name):
    """Names of the mechanisms that a family can have."""
    if FAMILIES[name].causal:
        return [kind for kind in MECHANISMS if kind != "linformer"]
    return [*_BOTH_WAYS]


def mixed(name):
    """Most mechanisms of a family at once, one per layer; one layer more stays softmax."""
    return dict(enumerate(MECHANISMS[kind] for kind in mechanisms_of(name) if kind != "nsa"))


def converted(base, config):
    """A converted copy of a model, its mechanisms' parameters moved as training would."""
    torch.manual_seed(1)
    model = convert(copy.deepcopy(base), config)
    with torch.no_grad():
        for mechanism in mechanisms(model).values():
            for parameter in mechanism.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(batch=2, length=LENGTH, seed=0):
    """Random ids `[batch, length]` without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@cache
def padded(real=(LENGTH, 11, 1)):
    """Two batches of rows of these lengths, padded left and right, and the rows by themselves."""
    x = tokens(len(real))
    rows = [row[None, :count] for row, count in zip(x, real, strict=True)]
    batches = {}
    for side in ("left", "right"):
        ids, mask = torch.zeros_like(x), torch.zeros_like(x)
        for row, count in enumerate(real):
            part = slice(LENGTH - count, None) if side == "left" else slice(count)
            ids[row, part], mask[row, part] = x[row, :count], 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        batches[side] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return rows, batches

"""Which models can be converted, as data, and why others cannot.

A family is all classes of one `model_type`: language models and classifiers share their attention.
Adding a family is one entry in `FAMILIES`; the matrix of the tests takes all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

NAME = "attnopt"  # of the attention function, of a config's entry, of the submodules


@dataclass(frozen=True)
class Family:
    """Where one kind of model keeps what conversion touches.

    Args:
        model_type: transformers' name of the family.
        attention: path of the attention modules from the backbone; the star is the layer.
        dropout: path of the dropout probability of attention weights from the attention module.
        backbone: path from the base model of what every head gives its inputs to.
        causal: False for models that attend in both directions.
        packs: whether its layers hand keyword arguments on, by which they learn of documents.
        dense_packs: whether transformers' own attention keeps the documents of a packed row apart.
    """

    model_type: str
    attention: str = "layers.*.self_attn"
    dropout: str = "attention_dropout"
    backbone: str = ""
    causal: bool = True
    packs: bool = True
    dense_packs: bool = True


_DECODERS = (
    "apertus arcee bitnet cohere ernie4_5 gemma glm glm4 granite granitemoe helium "
    "hunyuan_v1_dense jais2 llama ministral3 mistral mixtral olmo olmo2 olmoe phi phi3 phimoe "
    "qwen2 qwen3 qwen3_moe seed_oss smollm3 starcoder2"
).split()
_ENCODERS = (
    "bert camembert data2vec-text electra ernie roberta roberta-prelayernorm xlm-roberta "
    "xlm-roberta-xl"
).split()

FAMILIES = {
    family.model_type: family
    for family in (
        *(Family(name) for name in _DECODERS),
        Family("biogpt", dropout="dropout", dense_packs=False),
        Family("gpt2", "h.*.attn", "attn_dropout.p"),
        Family("gpt_bigcode", "h.*.attn", "attn_dropout"),
        Family("gpt_neox", "layers.*.attention"),
        Family("nemotron", packs=False),
        Family("opt", dropout="dropout", backbone="decoder", dense_packs=False),
        Family("stablelm", packs=False),
        *(
            Family(
                name, "encoder.layer.*.attention.self", "dropout.p", causal=False, dense_packs=False
            )
            for name in _ENCODERS
        ),
        Family(
            "distilbert",
            "transformer.layer.*.attention",
            "dropout.p",
            causal=False,
            dense_packs=False,
        ),
        Family("eurobert", causal=False, dense_packs=False),
    )
    if family.model_type in CONFIG_MAPPING  # older versions of transformers lack some
}

_REASONS = {
    "its layers attend within sliding windows, or some do": (
        "cohere2 exaone4 gemma3 gemma3_text ministral modernbert modernbert-decoder olmo3 cwm"
    ),
    "it caps its attention scores (softcapping)": "gemma2 vaultgemma",
    "its softmax has learned sinks (s_aux)": "gpt_oss",
    "its scores have a bias of relative positions": "deberta deberta-v2 mpnet mt5 t5 umt5",
    "it has cross-attention": "bart blenderbot m2m_100 marian mbart pegasus whisper",
    "its layers share one attention module": "albert",
    "its model code lets nobody replace the attention function": (
        "big_bird bloom codegen convbert falcon gpt_neo gptj megatron-bert mpt rembert roformer "
        "xglm xlnet"
    ),
    "it has layers without attention": "bamba falcon_h1 jamba mamba mamba2 nemotron_h qwen3_next",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

# The classes of a family, by the Auto class that loads them.
_HEADS = {
    transformers.AutoModel: transformers.MODEL_MAPPING,
    transformers.AutoModelForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.AutoModelForMaskedLM: transformers.MODEL_FOR_MASKED_LM_MAPPING,
    transformers.AutoModelForSequenceClassification: (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ),
    transformers.AutoModelForTokenClassification: (
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    ),
    transformers.AutoModelForQuestionAnswering: transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


@cache
def heads(family: Family) -> dict[Any, type[PreTrainedModel]]:
    """The model classes of a family, by the Auto class that loads each; imports their file."""
    config = CONFIG_MAPPING[family.model_type]
    # of an encoder that would be its use as a decoder
    other = "AutoModelForMaskedLM" if family.causal else "AutoModelForCausalLM"
    return {
        auto: mapping[config]
        for auto, mapping in _HEADS.items()
        if auto.__name__ != other and config in mapping
    }


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's config, converted or not."""
    return FAMILIES[config.model_type.removeprefix(f"{NAME}_")]


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """What every head of a model, converted or not, gives its inputs to."""
    return model.base_model.get_submodule(family_of(model.config).backbone)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a model, converted or not, in layer order."""
    layers, _, name = family_of(model.config).attention.partition(".*.")
    stack: Any = backbone_of(model).get_submodule(layers)
    return [layer.get_submodule(name) for layer in stack]


def describe(model: Any) -> str:
    """Class and model_type, for messages."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {kind!r})" if kind else type(model).__name__


def check_convertible(model: Any) -> None:
    """Refuse a model that would be wrong after conversion.

    Args:
        model: anything.

    Raises:
        ValueError: no class of a known family, or an option of its config that its attention
            would lose; the message says which.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in REFUSED:
        raise ValueError(f"cannot convert {describe(model)}: {REFUSED[kind]}")
    if kind not in FAMILIES:
        valid = ", ".join(sorted(FAMILIES))
        raise ValueError(f"can convert models of the types {valid}; got {describe(model)}")
    family = FAMILIES[kind]
    if type(model) not in heads(family).values():
        raise ValueError(f"can convert {_names(heads(family).values())}; got {describe(model)}")
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ValueError("cannot convert a model with cross-attention (add_cross_attention=True)")
    if getattr(config, "is_causal", family.causal) != family.causal or (
        not family.causal and getattr(config, "is_decoder", False)
    ):
        direction = "causal" if family.causal else "in both directions"
        raise ValueError(
            f"converted attention of {kind} is {direction}; its config asks for the other "
            "(is_causal, is_decoder)"
        )
    if config.output_attentions:
        raise ValueError("converted attention never forms its weights; unset output_attentions")
    _check_windows(config)
    _check_version(model, family)


def _check_version(model: PreTrainedModel, family: Family) -> None:
    """Refuse model code of older versions of transformers, which would go its own way."""
    module = attention_modules(model)[0]
    code = sys.modules[type(module).__module__]
    mask = "create_causal_mask" if family.causal else "create_bidirectional_mask"
    if not (hasattr(code, "ALL_ATTENTION_FUNCTIONS") and hasattr(code, mask)):
        raise ValueError(
            f"the code of {family.model_type} in this version of transformers lets nobody replace "
            "its attention or masks; a newer one does"
        )
    config = model.config
    by_layer = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    own_scale = by_layer or not getattr(config, "scale_attn_weights", True)
    if own_scale and not hasattr(module, "scaling"):
        raise ValueError(
            "this version of transformers does not tell attention functions the scale that "
            "scale_attn_by_inverse_layer_idx and scale_attn_weights ask for; a newer one does"
        )


def _check_windows(config: PreTrainedConfig) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"cannot convert a model with layers of {', '.join(sorted(kinds))}; load it with "
            "use_sliding_window=False, if your texts are never longer than its window"
        )
    if window := getattr(config, "sliding_window", None):
        raise ValueError(
            f"the model attends to the last {window} tokens (sliding_window), which converted "
            "layers and those that stay softmax would not; if your texts are never longer, set "
            "model.config.sliding_window = None first"
        )


def _names(classes: Iterable[type]) -> str:
    return ", ".join(sorted({cls.__name__ for cls in classes}))

"""Which models can be converted, and the classes that converted models have.

A converted model is a `ConvertedModel` mixed into its original class, with a `model_type` of its
own, so that a saved model cannot be mistaken for the original. Adding a model family is one entry
in `FAMILIES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from attnopt.attention import Config, build_mechanism, config_from_dict
from attnopt.attention.base import AttentionMechanism
from attnopt.attention.cache import MechanismCache
from attnopt.convert.interface import NAME, check_inputs, pass_context

logger = logging.getLogger(__name__)

if TYPE_CHECKING:

    class _AnyModel(PreTrainedModel, GenerationMixin): ...
else:
    _AnyModel = object


@dataclass(frozen=True)
class Family:
    """How to convert one kind of model."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    attention: Callable[[Any], list[nn.Module]]  # of the backbone, in layer order
    dropout: Callable[[Any], tuple[Any, str]]  # on attention weights: its owner, its attribute

    @property
    def name(self) -> str:
        """The original `model_type`."""
        return self.config.model_type


FAMILIES = {
    family.name: family
    for family in (
        Family(
            GPT2Config,
            GPT2LMHeadModel,
            attention=lambda backbone: [block.attn for block in backbone.h],
            dropout=lambda attn: (attn.attn_dropout, "p"),
        ),
        Family(
            LlamaConfig,
            LlamaForCausalLM,
            attention=lambda backbone: [layer.self_attn for layer in backbone.layers],
            dropout=lambda attn: (attn, "attention_dropout"),
        ),
    )
}


class ConvertedModel(_AnyModel):
    """Mixed into a model class: builds the mechanisms its config names, and their caches.

    Args:
        config: a config with the entry `attnopt`, as `convert` writes it.
        *args: for the model class.
        **kwargs: for the model class.

    Raises:
        ValueError: a config without that entry.
    """

    dense_implementation = "sdpa"  # what runs under dense_attention
    _keep_in_fp32_modules_strict = {NAME}
    _attnopt_hooks: list[RemovableHandle]
    _attnopt_dropouts: dict[int, float]  # what attach replaced, by layer

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        layers = getattr(config, NAME, None)
        if not layers:
            raise ValueError(
                f"{type(self).__name__} needs a config with the entry {NAME!r}; make one with "
                "attnopt.convert(model, ...) or load one with attnopt.from_pretrained"
            )
        if config._attn_implementation is None:
            config._attn_implementation = NAME
        super().__init__(config, *args, **kwargs)
        configs = {int(index): config_from_dict(entry) for index, entry in layers.items()}
        attach(self, build(self, configs))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def initialize_weights(self) -> None:
        """Initialize what no checkpoint has filled, mechanisms included."""
        super().initialize_weights()
        for mechanism in mechanisms(self).values():
            held = (*mechanism.parameters(), *mechanism.buffers())
            if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in held):
                mechanism.reset_parameters()

    def make_cache(self) -> MechanismCache:
        """An empty cache that keeps, layer by layer, no more than decoding needs.

        Returns:
            What `forward` and `generate` take as `past_key_values`.
        """
        own = mechanisms(self)
        count = len(attention_modules(self))
        return MechanismCache(
            [own[i].make_cache_layer() if i in own else DynamicLayer() for i in range(count)]
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kind = generation_config.cache_implementation
        converted = self.config._attn_implementation == NAME
        if converted and kind not in (None, "dynamic", "offloaded", "quantized"):
            raise ValueError(
                "cache_implementation must be left out (the mechanism's own cache), 'dynamic', "
                f"'offloaded' or 'quantized'; got {kind!r}"
            )
        # Assisted decoding takes tokens back, which needs the full keys of transformers' own cache.
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if (
            not converted
            or kind is not None
            or assisted
            or generation_config.is_assistant
            or generation_config.use_cache is False
            or model_kwargs.get("past_key_values") is not None
        ):
            stock: Any = super()
            return stock._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        model_kwargs["past_key_values"] = self.make_cache()


def _config_class(family: Family) -> type[PreTrainedConfig]:
    name, model_type = f"Attnopt{family.config.__name__}", f"{NAME}_{family.name}"
    cls = type(name, (family.config,), {"model_type": model_type, "__module__": __name__})
    AutoConfig.register(model_type, cls, exist_ok=True)
    return cls


def _model_class(family: Family) -> type[ConvertedModel]:
    name, config = f"Attnopt{family.model.__name__}", CONFIGS[family.name]
    bases = (ConvertedModel, family.model)
    cls = type(name, bases, {"config_class": config, "__module__": __name__})
    AutoModelForCausalLM.register(config, cls, exist_ok=True)
    return cls


CONFIGS = {name: _config_class(family) for name, family in FAMILIES.items()}
MODELS = {name: _model_class(family) for name, family in FAMILIES.items()}
# pickle looks classes up by name in their module
globals().update({cls.__name__: cls for cls in (*CONFIGS.values(), *MODELS.values())})


def mechanisms(model: nn.Module) -> dict[int, AttentionMechanism]:
    """The mechanisms of a model, wrapped or not.

    Args:
        model: any module.

    Returns:
        Layer index to mechanism, in layer order; empty for a model without.
    """
    found = [module for module in model.modules() if isinstance(module, AttentionMechanism)]
    return {m.layer_idx: m for m in sorted(found, key=lambda m: m.layer_idx)}


def describe(model: Any) -> str:
    """Class and model_type, for messages."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {kind!r})" if kind else type(model).__name__


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model, converted or not."""
    return next(family for family in FAMILIES.values() if isinstance(model, family.model))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a model, converted or not, in layer order."""
    return family_of(model).attention(model.base_model)


def build(model: PreTrainedModel, configs: Mapping[int, Config]) -> dict[int, AttentionMechanism]:
    """New mechanisms for these layers, each on the device of its layer."""
    modules = attention_modules(model)
    heads = model.config.num_attention_heads
    built = {}
    for index, config in configs.items():
        with next(modules[index].parameters()).device:
            built[index] = build_mechanism(
                config,
                num_heads=heads,
                num_kv_heads=getattr(model.config, "num_key_value_heads", heads),
                head_dim=getattr(model.config, "head_dim", model.config.hidden_size // heads),
                hidden_size=model.config.hidden_size,
                layer_idx=index,
            )
    return built


def attach(model: ConvertedModel, built: Mapping[int, AttentionMechanism]) -> None:
    """Put the mechanisms and the hooks in place, and attention dropout out of the way."""
    family, modules = family_of(model), attention_modules(model)
    model._attnopt_hooks = [
        model.base_model.register_forward_pre_hook(check_inputs, with_kwargs=True)
    ]
    model._attnopt_dropouts = {}
    for index, mechanism in built.items():
        module = modules[index]
        owner, name = family.dropout(module)
        model._attnopt_dropouts[index] = getattr(owner, name)
        setattr(owner, name, 0.0)
        setattr(module, NAME, mechanism.train(module.training))
        model._attnopt_hooks.append(
            module.register_forward_pre_hook(pass_context, with_kwargs=True)
        )
    if replaced := sorted({p for p in model._attnopt_dropouts.values() if p}):
        logger.info("dropout on attention weights, %s, is 0 on converted layers", replaced)


def detach(model: ConvertedModel) -> None:
    """Undo `attach`."""
    family, modules = family_of(model), attention_modules(model)
    for handle in model._attnopt_hooks:
        handle.remove()
    for index, p in model._attnopt_dropouts.items():
        owner, name = family.dropout(modules[index])
        setattr(owner, name, p)
        delattr(modules[index], NAME)
    for name in ("_attnopt_hooks", "_attnopt_dropouts"):
        delattr(model, name)

"""The classes that converted models have, and how mechanisms get into them and out again.

A converted model is a `ConvertedModel` mixed into its original class, with a `model_type` of its
own, so that a saved model cannot be mistaken for the original. The configs are registered with
transformers at import, the models of a family when one of its configs is first made: that reads
their file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation.configuration_utils import GenerationMode

from attnopt.attention import Config, build_mechanism, config_from_dict
from attnopt.attention.base import AttentionMechanism
from attnopt.attention.cache import MechanismCache
from attnopt.convert.families import (
    FAMILIES,
    NAME,
    Family,
    attention_modules,
    backbone_of,
    family_of,
    heads,
)
from attnopt.convert.interface import check_inputs, pass_context

logger = logging.getLogger(__name__)

if TYPE_CHECKING:

    class _AnyModel(PreTrainedModel, GenerationMixin): ...
else:
    _AnyModel = object


class ConvertedModel(_AnyModel):
    """Mixed into a model class: builds the mechanisms its config names, and their caches.

    Args:
        config: a config with the entry `attnopt`, as `convert` writes it.
        *args: for the model class.
        **kwargs: for the model class.

    Raises:
        ValueError: a config without that entry.
    """

    original: type[PreTrainedModel]  # the class before conversion
    dense_implementation = "sdpa"  # what runs under dense_attention
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
        backbone = self.base_model
        if backbone is not self and isinstance(backbone, ConvertedModel):
            # some classes make their backbone by AutoModel, which reads this config, too
            detach(backbone)
            backbone.__class__ = backbone.original
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

        Raises:
            ValueError: a model that attends in both directions.
        """
        if not family_of(self.config).causal:
            raise ValueError(f"{type(self).__name__} attends in both directions: it has no cache")
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
    parent = CONFIG_MAPPING[family.model_type]

    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_classes(family)  # whoever has a config may ask the Auto classes for its model
        parent.__init__(self, *args, **kwargs)

    name, model_type = f"Attnopt{parent.__name__}", f"{NAME}_{family.model_type}"
    entries = {"model_type": model_type, "__module__": __name__, "__init__": __init__}
    cls = type(name, (parent,), entries)
    AutoConfig.register(model_type, cls, exist_ok=True)
    return cls


CONFIGS = {name: _config_class(family) for name, family in FAMILIES.items()}
# pickle looks classes up by name in their module
globals().update({cls.__name__: cls for cls in CONFIGS.values()})


@cache
def model_classes(family: Family) -> dict[type[PreTrainedModel], type[ConvertedModel]]:
    """The converted class of every model class of a family; registers them with the Auto classes.

    Args:
        family: which one; its file is imported.

    Returns:
        Original class to converted class.
    """
    config = CONFIGS[family.model_type]
    made: dict[type[PreTrainedModel], type[ConvertedModel]] = {}
    for auto, original in heads(family).items():
        entries = {"original": original, "config_class": config, "__module__": __name__}
        made[original] = type(f"Attnopt{original.__name__}", (ConvertedModel, original), entries)
        auto.register(config, made[original], exist_ok=True)
    # Where checkpoints hold other tensors than the model, they are split and merged on the way.
    if (mapping := get_checkpoint_conversion_mapping(family.model_type)) is not None:
        register_checkpoint_conversion_mapping(config.model_type, mapping, overwrite=True)
    return made


def __getattr__(name: str) -> Any:
    """The converted class of that name, for pickle."""
    original = getattr(transformers, name.removeprefix("Attnopt"), None)
    if name.startswith("Attnopt") and (config := getattr(original, "config_class", None)):
        family = FAMILIES.get(config.model_type)
        if family is not None and original in model_classes(family):
            return model_classes(family)[original]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def mechanisms(model: nn.Module) -> dict[int, AttentionMechanism]:
    """The mechanisms of a model, wrapped or not.

    Args:
        model: any module.

    Returns:
        Layer index to mechanism, in layer order; empty for a model without.
    """
    found = [module for module in model.modules() if isinstance(module, AttentionMechanism)]
    return {m.layer_idx: m for m in sorted(found, key=lambda m: m.layer_idx)}


def build(model: PreTrainedModel, configs: Mapping[int, Config]) -> dict[int, AttentionMechanism]:
    """New mechanisms for these layers, each on the device of its layer."""
    modules = attention_modules(model)
    heads = model.config.num_attention_heads
    built = {}
    for index, config in configs.items():
        module = modules[index]
        with next(module.parameters()).device:
            built[index] = build_mechanism(
                config,
                num_heads=heads,
                num_kv_heads=heads // getattr(module, "num_key_value_groups", 1),
                head_dim=getattr(model.config, "head_dim", None)
                or model.config.hidden_size // heads,
                hidden_size=model.config.hidden_size,
                layer_idx=index,
                causal=family_of(model.config).causal,
            )
    return built


def attach(model: ConvertedModel, built: Mapping[int, AttentionMechanism]) -> None:
    """Put the mechanisms and the hooks in place, and attention dropout out of the way."""
    family, modules = family_of(model.config), attention_modules(model)
    model._attnopt_hooks = [
        backbone_of(model).register_forward_pre_hook(check_inputs, with_kwargs=True)
    ]
    model._attnopt_dropouts = {}
    for index, mechanism in built.items():
        module = modules[index]
        owner, name = _dropout(family, module)
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
    family, modules = family_of(model.config), attention_modules(model)
    for handle in model._attnopt_hooks:
        handle.remove()
    for index, p in model._attnopt_dropouts.items():
        owner, name = _dropout(family, modules[index])
        setattr(owner, name, p)
        delattr(modules[index], NAME)
    for name in ("_attnopt_hooks", "_attnopt_dropouts"):
        delattr(model, name)


def _dropout(family: Family, module: nn.Module) -> tuple[Any, str]:
    """Owner and attribute of the dropout probability of attention weights."""
    owner, _, name = family.dropout.rpartition(".")
    return module.get_submodule(owner), name

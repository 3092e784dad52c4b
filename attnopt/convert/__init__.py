"""Replace the attention of a pretrained model in place, and save, load and undo that.

Each converted attention module gets a submodule `attnopt` with what the mechanism learns; all base
weights keep their names and bits. Which models: `attnopt.convert.families`. Their classes:
`attnopt.convert.models`. What transformers then calls: `attnopt.convert.interface`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from attnopt.attention import Config
from attnopt.convert.families import (
    FAMILIES,
    attention_modules,
    check_convertible,
    describe,
    family_of,
)
from attnopt.convert.interface import NAME
from attnopt.convert.models import (
    CONFIGS,
    ConvertedModel,
    attach,
    build,
    detach,
    mechanisms,
    model_classes,
)

__all__ = ["convert", "dense_attention", "from_pretrained", "mechanisms", "revert"]


def convert(
    model: PreTrainedModel,
    config: Config | Mapping[int, Config],
    layers: Iterable[int] | None = None,
) -> PreTrainedModel:
    """Replace the attention of some or all layers; the base weights stay as they are.

    Dropout on attention weights, which fused kernels do not have, is set to 0 on these layers.
    An error leaves the model untouched.

    Args:
        model: a language model or classifier of one of the `FAMILIES`, or its backbone.
        config: one config for all converted layers, or one per layer index.
        layers: indices of the layers to convert, all by default; the others keep softmax.

    Returns:
        The same object, converted.

    Raises:
        ValueError: a model or option that is not supported, a layer that does not exist, or a
            model that is already converted.
    """
    if isinstance(model, ConvertedModel):
        raise ValueError("the model is already converted; attnopt.revert(model) comes first")
    check_convertible(model)
    family = family_of(model.config)
    configs = _per_layer(config, layers, len(attention_modules(model)))
    built = build(model, configs)
    dense = model.config._attn_implementation
    new_config = copy.deepcopy(model.config)
    new_config.__class__ = CONFIGS[family.model_type]
    vars(new_config).pop("model_type", None)  # configs from disk hold it: the class's counts
    setattr(new_config, NAME, {str(index): configs[index].to_dict() for index in sorted(configs)})
    new_config._attn_implementation = NAME
    _set_config(model, new_config)
    model.__class__ = model_classes(family)[type(model)]
    converted = _check_converted(model)
    converted.dense_implementation = dense
    attach(converted, built)
    return converted


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`: softmax attention again, with the base weights as they are now.

    Args:
        model: a converted model.

    Returns:
        The same object, of its original class.

    Raises:
        ValueError: a model that is not converted.
    """
    converted = _check_converted(model)
    detach(converted)
    config = copy.deepcopy(converted.config)
    config.__class__ = type(config).__base__
    vars(config).pop("model_type", None)
    delattr(config, NAME)
    config._attn_implementation = converted.dense_implementation
    if config.architectures == [type(converted).__name__]:
        config.architectures = [converted.original.__name__]
    _set_config(converted, config)
    converted.__dict__.pop("dense_implementation", None)
    model.__class__ = converted.original
    return model


def from_pretrained(path_or_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a converted model from a folder or Hub id that its `save_pretrained` wrote.

    Args:
        path_or_id: the folder or id.
        **kwargs: for transformers' `from_pretrained`, such as dtype.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        ValueError: a path that holds no model, or one that is not converted.
    """
    path = Path(path_or_id, kwargs.get("subfolder", ""))
    if path.is_dir() and not (path / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise ValueError(f"{path} is not a model folder: it holds no config.json, but {held}")
    if path.is_file():
        raise ValueError(f"{path} is a file; expected the folder that save_pretrained wrote")
    named = str(path_or_id)
    if not path.exists() and (named.startswith(("/", ".")) or named.count("/") > 1):
        raise ValueError(f"there is no model folder {path}")
    data, _ = PreTrainedConfig.get_config_dict(named, **kwargs)
    kind = data.get("model_type")
    family = FAMILIES.get(str(kind).removeprefix(f"{NAME}_"))
    if family is None or kind == family.model_type:
        raise ValueError(
            f"{named} is not a converted model (model_type {NAME}_...): its model_type is "
            f"{kind!r}; load it with transformers, then call attnopt.convert"
        )
    classes = {cls.__name__: cls for cls in model_classes(family).values()}
    wanted = (data.get("architectures") or [None])[0]
    if wanted not in classes:
        raise ValueError(
            f"{named} must name in its architectures one of {', '.join(classes)}; got {wanted!r}"
        )
    return classes[wanted].from_pretrained(named, **kwargs)


@contextmanager
def dense_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within this context a converted model runs with its original softmax attention.

    Its weights are the same, so a model with frozen base weights is its own teacher. Where
    gradients are wanted, run backward within the context too.

    Args:
        model: a converted model.

    Yields:
        The same model.

    Raises:
        ValueError: a model that is not converted.
    """
    converted = _check_converted(model)
    before = converted.config._attn_implementation
    converted.set_attn_implementation(converted.dense_implementation)
    try:
        yield converted
    finally:
        converted.set_attn_implementation(before)


def _check_converted(model: Any) -> ConvertedModel:
    if not isinstance(model, ConvertedModel):
        raise ValueError(
            f"expected a model that attnopt.convert has converted; got {describe(model)}"
        )
    return model


def _per_layer(
    config: Config | Mapping[int, Config], layers: Iterable[int] | None, count: int
) -> dict[int, Config]:
    """One config for each layer to convert."""
    if isinstance(config, Mapping):
        if layers is not None:
            raise ValueError("give layers or a config per layer, not both")
        configs = dict(config)
    elif isinstance(layers, int):
        raise ValueError(f"layers must be a list of layer indices; got {layers!r}")
    else:
        configs = {index: config for index in (range(count) if layers is None else layers)}
    if not configs:
        raise ValueError("no layer to convert; leave out layers to convert all of them")
    for index in configs:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(f"a layer index must be an integer in 0..{count - 1}; got {index!r}")
    return configs


def _set_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give the model and its parts a config of their own; another model may share the old one."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            setattr(module, "config", config)  # noqa: B010 - a Module's attributes have no type

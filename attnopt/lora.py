"""Low-rank adapters on converted attention, by peft, which is an optional extra.

A linear map W of an attention module becomes W + (alpha / rank) B A with A [rank, in] and
B [out, rank], B zero at first (Hu et al. 2021, section 4.1). W stays frozen, so the student without
its adapters, under softmax, is the teacher: no second model is in memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attnopt.attention.base import AttentionMechanism
from attnopt.convert import mechanisms
from attnopt.convert.families import attention_modules
from attnopt.errors import UserError
from attnopt.modules import forward_as

_FILE = "adapters.safetensors"


def add_adapters(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Put adapters on every linear map of the converted attention modules, in place.

    They are fp32, whatever the model is, and change nothing at first.

    Args:
        model: a converted model.
        rank: of the adapters.
        alpha: their scale is alpha / rank.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"adapters need peft: pip install 'attnopt[lora]' (the error was: {error})"
        ) from error
    modules = attention_modules(model)
    maps = [
        child
        for index in mechanisms(model)
        for child in modules[index].children()
        if isinstance(child, nn.Linear | Conv1D)
    ]
    if not maps:
        raise UserError("adapters belong on converted attention: the model has none")
    config: Any = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [name for name, module in model.named_modules() if module in maps],
        "fan_in_fan_out": isinstance(maps[0], Conv1D),
    }
    inject_adapter_in_model(LoraConfig(**config), model)
    for module in adapters(model):
        module.float()


def adapters(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the adapters' parameters."""
    return [part for layer in _adapted(model).values() for part in (layer.lora_A, layer.lora_B)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters, with the bits of its base weights."""
    # peft's own switch takes requires_grad from the adapters too, under the wrappers' eyes.
    with ExitStack() as stack:
        for layer in _adapted(model).values():
            stack.enter_context(forward_as(layer, layer.base_layer.__call__))
        yield


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters to the base weights and remove them: a plain converted model again."""
    for name, layer in _adapted(model).items():
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    vars(model).pop("peft_config", None)


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write adapters and mechanisms, all that differs from the teacher, to a file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in _learned(model).items()}, folder / _FILE)


def load_adapters(model: nn.Module, folder: Path) -> bool:
    """Read what `save_adapters` wrote; return whether there was such a file.

    Raises UserError where the file is that of other adapters or mechanisms.
    """
    if not (folder / _FILE).is_file():
        return False
    state = load_file(folder / _FILE)
    held, wanted = ({n: x.shape for n, x in found.items()} for found in (state, _learned(model)))
    if held != wanted:
        raise UserError(f"{folder} was written with other options: other adapters or attention")
    model.load_state_dict(state, strict=False)
    return True


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """What adapters and mechanisms hold, by name."""
    own = [name for name, m in model.named_modules() if isinstance(m, AttentionMechanism)]
    own += [f"{name}.lora_{side}" for name in _adapted(model) for side in "AB"]
    prefixes = tuple(f"{name}." for name in own)
    return {name: x for name, x in model.state_dict().items() if name.startswith(prefixes)}


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Name to peft's layer, for each map that has an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}

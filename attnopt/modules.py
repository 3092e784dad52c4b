"""What the training code does with modules from outside: another forward, gathered parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Result = TypeVar("Result")


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes `function` in the place of its own forward; its hooks stay.

    Args:
        module: any module.
        function: takes what the module's forward takes.
    """
    attributes = vars(module)
    before = {k: v for k, v in attributes.items() if k == "forward"}  # somebody else's wrapper
    attributes["forward"] = function
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)


def with_whole_parameters(module: AnyModule, function: Callable[[AnyModule], Result]) -> Result:
    """Return function(module), computed with whole parameters where FSDP has split them.

    Outside a forward pass each process holds its part alone. They are gathered from all processes,
    each of which must call this. Gradients arrive at the parts.

    Args:
        module: sharded or not.
        function: of the module; must neither keep nor change its parameters.
    """
    whole: dict[str, Tensor] = {
        f"module.{name}": parameter.full_tensor()
        for name, parameter in module.named_parameters()
        if hasattr(parameter, "full_tensor")
    }
    if not whole:
        return function(module)
    return torch.func.functional_call(_Call(module, function), whole, ())


class _Call(nn.Module):
    """A module whose forward is a function of another."""

    def __init__(self, module: nn.Module, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self) -> Any:
        return self.function(self.module)

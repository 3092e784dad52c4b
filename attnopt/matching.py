"""Layer-wise attention matching: a first stage of distillation, before that of the logits.

Every converted attention module gets the hidden states that the teacher's module got, and learns to
give the output that the teacher's gave. With t_l and s_l the outputs of layer l, teacher and
student, on the same input, and var_l the teacher's variance there:

    loss = mean over l of  mean over tokens and width of (s_l - t_l)^2 / var_l

A layer that knows nothing and gives the teacher's mean has the error 1, whatever its scale. No
gradient crosses a layer, so what is between the attention modules is not trained and not kept for
a backward pass.

Source: attention transfer before end-to-end training is that of Hedgehog (Zhang, Bhatia et al.
2024, there of the weights) and LoLCATs (Zhang, Arora et al. 2024, of the outputs).

Letters: B rows, T positions, E width, L converted layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from attnopt.convert.families import attention_modules, backbone_of
from attnopt.losses import head_computes
from attnopt.modules import forward_as

# The variances are those on this many training sequences: fixed, so that neither the size of a
# batch nor the number of processes changes the loss.
VARIANCE_ROWS = 8
# Of the teacher's output; below it a layer gives nothing that could be matched.
_SMALLEST_VARIANCE = 1e-12


class Target(NamedTuple):
    """What a teacher's attention module got and gave, both [B, T, E] without gradient."""

    hidden: Tensor
    output: Tensor


@contextmanager
def recorded(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Target]]:
    """Inside, a forward pass of the model leaves the Target of each of these layers in the yield.

    Args:
        model: the teacher, or a student that runs under `dense_attention`.
        layers: indices of the layers.

    Yields:
        Layer index to Target, filled by the forward pass.
    """
    modules = attention_modules(model)
    targets: dict[int, Target] = {}

    def record_as(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            targets[index] = Target(hidden.detach(), output[0].detach())

        return record

    with ExitStack() as stack:
        for index in layers:
            hook = modules[index].register_forward_hook(record_as(index), with_kwargs=True)
            stack.callback(hook.remove)
        yield targets


def run_matched(
    model: nn.Module,
    student: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    targets: Mapping[int, Target],
    variances: Mapping[int, Tensor],
) -> ModelOutput:
    """Run the student on the teacher's hidden states; its logits are the errors of its layers.

    The whole model runs, so that what wraps it sees a forward pass, but only its converted
    attention modules build a graph. It runs in evaluation mode, without dropout.

    Args:
        model: the student as it is wrapped.
        student: the same, unwrapped.
        inputs: of the forward pass, on which the targets were recorded.
        targets: of every converted layer.
        variances: of the teacher's output by layer, each [].

    Returns:
        The model's output, with `logits` [L] the squared errors by the variances, in layer order.
    """
    modules, mask = attention_modules(student), inputs.get("attention_mask")
    errors: dict[int, Tensor] = {}

    def give(target: Target) -> Callable[..., tuple]:
        def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
            name, values = "hidden_states", dict(kwargs)
            own = args[0] if args else values.pop(name)
            hidden = target.hidden.to(own.dtype)
            return ((hidden, *args[1:]), values) if args else ((), {**values, name: hidden})

        return replace

    def compare(index: int) -> Callable[..., None]:
        def collect(module: nn.Module, args: tuple, output: Any) -> None:
            with torch.enable_grad():
                error = squared_error(output[0], targets[index].output, mask)
                errors[index] = error / variances[index]

        return collect

    with ExitStack() as stack:
        stack.enter_context(evaluating(student))
        stack.enter_context(_forward_under(backbone_of(student), torch.no_grad))
        for index, target in targets.items():
            module = modules[index]
            stack.enter_context(_forward_under(module, torch.enable_grad))
            before = module.register_forward_pre_hook(give(target), with_kwargs=True, prepend=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(compare(index)).remove)
        collected = head_computes(student, lambda _: torch.stack([errors[i] for i in targets]))
        stack.enter_context(collected)
        return model(**inputs)


def squared_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens and width of (output - target)^2, in fp32 or float64.

    Args:
        output: [B, T, E].
        target: [B, T, E].
        mask: [B, T], 0 where there is padding.

    Returns:
        A scalar.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    return _token_mean((output.to(wide) - target.to(wide)).square().mean(-1), mask)


@torch.no_grad()
def variance(target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Variance of [B, T, E] over its real tokens, averaged over the width; a scalar above 0."""
    wide = target.to(torch.promote_types(target.dtype, torch.float32))
    mean = _token_mean(wide, mask)  # [E]
    return squared_error(wide, mean.expand_as(wide), mask).clamp_min(_SMALLEST_VARIANCE)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, ...] averaged over the real tokens."""
    values = values.flatten(0, 1)
    if mask is None:
        return values.mean(0)
    weights = mask.flatten().to(values.dtype)
    return torch.tensordot(weights, values, 1) / weights.sum()


@contextmanager
def _forward_under(module: nn.Module, context: Callable[[], Any]) -> Iterator[None]:
    """Inside, the module's own forward, without its hooks, runs under a context of its own."""
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    with forward_as(module, wrapped):
        yield

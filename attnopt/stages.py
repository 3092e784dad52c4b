"""What training does at certain steps: the two stages, and new random features now and then."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)

from attnopt.attention.favor.module import redraw

if TYPE_CHECKING:
    from attnopt.arguments import DistillationArguments


def stage_schedule(
    args: "DistillationArguments", optimizer: torch.optim.Optimizer, steps: int
) -> LambdaLR:
    """The schedule of `lr_scheduler_type` twice, once for each stage, with its own warm-up.

    Args:
        args: with `match_steps` and `match_learning_rate`, which is that of every group but the
            one of `coefficient_learning_rate`.
        optimizer: whose rates are those of the second stage.
        steps: of both stages.

    Returns:
        The scheduler.

    Raises:
        ValueError: a schedule that is no function of the step.
    """
    border = args.match_steps
    first, second = (_factor(args, count) for count in (border, steps - border))
    rate = args.match_learning_rate
    ratio = 1.0 if rate is None else rate / args.learning_rate
    ratios = [ratio] * len(optimizer.param_groups)
    if args.coefficient_learning_rate is not None:
        ratios[-1] = 1.0

    def staged(ratio: float) -> Callable[[int], float]:
        return lambda step: ratio * first(step) if step < border else second(step - border)

    return LambdaLR(optimizer, [staged(ratio) for ratio in ratios])


class StageBorder(TrainerCallback):
    """Ends the matching stage: its last step is logged, evaluated and saved, and the optimizer
    forgets it, because its averages are those of the gradients of another loss.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for what happens after the last step of the stage."""
        if state.global_step == args.match_steps:
            control.should_log = True
            control.should_evaluate |= args.eval_strategy == "steps"
            control.should_save |= args.save_strategy == "steps"

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Empty the optimizer before the first step of the next stage, resumed there or not."""
        if state.global_step == args.match_steps > 0 and optimizer is not None:
            optimizer.state.clear()


class Redraw(TrainerCallback):
    """Draws all random features anew every `redraw_every` steps.

    The draw depends on seed and step alone, and comes before the step: a checkpoint holds the
    features that its weights were trained with, and a run resumed from it draws as the first did.
    """

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Draw, if the step is one for it."""
        step, every = state.global_step, getattr(args, "redraw_every", None)
        if model is not None and every and step and step % every == 0:
            seed = random.Random(f"{args.seed} {step}").getrandbits(32)
            redraw(model, torch.Generator().manual_seed(seed))


class Patience(EarlyStoppingCallback):
    """Stops after so many evaluations without gain, which it does not count while matching."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, once the second stage has begun."""
        if state.global_step > args.match_steps:
            super().on_evaluate(args, state, control, **kwargs)


def _factor(args: "DistillationArguments", steps: int) -> Callable[[int], float]:
    """Step to learning rate over its peak, for one stage of so many steps."""
    stand_in = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            "with match_steps the lr_scheduler_type must be a function of the step; got "
            f"{args.lr_scheduler_type}"
        )
    return schedule.lr_lambdas[0]

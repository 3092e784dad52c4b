"""The Trainer that distills: transformers' own, with a teacher in its loss and its evaluation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import ModelOutput

from attnopt.attention.base import AttentionMechanism
from attnopt.checkpoints import WRITE_ERRORS, discard, mark_complete
from attnopt.convert import dense_attention, mechanisms
from attnopt.data import collate
from attnopt.errors import UserError
from attnopt.history import ProgressBar
from attnopt.losses import (
    Direction,
    HeadInput,
    Objective,
    TokenLosses,
    check_head,
    head_computes,
    head_input,
    token_losses,
)
from attnopt.matching import (
    VARIANCE_ROWS,
    Target,
    evaluating,
    recorded,
    run_matched,
    variance,
)
from attnopt.metrics import row_metrics, summarize
from attnopt.stages import Redraw, StageBorder, stage_schedule

TRAINABLE = ("coefficients", "attention", "all")
# Weight decay pulls to zero, which means nothing for these parameters of a mechanism.
_NEVER_DECAYED = re.compile(r"alpha|gate|position")


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with the distillation objective; see `attnopt.losses.Objective`.

    The first `match_steps` of all `max_steps` match the attention layer by layer (see
    `attnopt.matching`), the others train the objective. The learning rate follows a cosine after a
    warm-up, in each of these stages. The best checkpoint is the one with the
    lowest validation KL, or cross-entropy where no KL is trained, and is never rotated away.
    """

    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of next-token cross-entropy."})
    l1_weight: float = field(default=0.0, metadata={"help": "Weight of the L1 of coefficients."})
    direction: Direction = field(
        default="forward", metadata={"help": "forward: KL(teacher||student)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Softens both sides of the KL."})
    train_parameters: str = field(
        default="attention",
        metadata={"help": "coefficients, attention (of converted layers) or all."},
    )
    coefficient_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the coefficients, if not the same."}
    )
    match_steps: int = field(
        default=0, metadata={"help": "How many of the steps match the attention, at first."}
    )
    match_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of those steps, if not the same."}
    )
    redraw_every: int | None = field(
        default=None, metadata={"help": "Draw random features anew after so many steps."}
    )
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "See TrainingArguments."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share of them."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "See TrainingArguments."})
    logging_steps: float = field(default=10, metadata={"help": "See TrainingArguments."})
    save_total_limit: int | None = field(default=2, metadata={"help": "See TrainingArguments."})
    report_to: Any = field(default="none", metadata={"help": "See TrainingArguments."})

    def __post_init__(self) -> None:
        self.objective()
        if self.train_parameters not in TRAINABLE:
            raise ValueError(
                f"train_parameters must be one of {TRAINABLE}; got {self.train_parameters!r}"
            )
        if not self.l1_weight >= 0:
            raise ValueError(f"l1_weight must not be negative; got {self.l1_weight}")
        self._check_stages()
        if self.save_total_limit == 1:
            raise ValueError("save_total_limit must be at least 2: a torn checkpoint needs another")
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "kl" if self.kl_weight else "ce"
            self.greater_is_better = False
        # said explicitly, because transformers otherwise refuses bf16 without an accelerator
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        super().__post_init__()

    def _check_stages(self) -> None:
        if self.match_steps < 0 or 0 < self.max_steps < self.match_steps:
            raise ValueError(
                f"match_steps must be in 0..max_steps={self.max_steps}; got {self.match_steps}"
            )
        if self.match_learning_rate is not None:
            if not self.match_steps:
                raise ValueError("match_learning_rate has no meaning with match_steps=0")
            if not self.learning_rate > 0:
                raise ValueError(
                    "match_learning_rate needs a learning_rate above 0 (for match_steps alone, "
                    f"set max_steps to as many); got {self.learning_rate}"
                )
        if self.redraw_every is not None and self.redraw_every < 1:
            raise ValueError(f"redraw_every must be at least 1; got {self.redraw_every}")

    def objective(self) -> Objective:
        """Return the objective; raises ValueError for values it refuses."""
        return Objective(self.kl_weight, self.ce_weight, self.direction, self.temperature)


class DistillationTrainer(Trainer):
    """Trains a converted model to give the teacher's distribution at every position.

    model: the student. Which of its parameters train is set here (`train_parameters`).
    teacher: a second model, frozen here and run in evaluation mode. None where only coefficients
    train: then the student under its original softmax attention is the teacher, and there is no
    second model in memory. None, too, with kl_weight 0: plain language modelling.

    Raises ValueError for a missing teacher, another vocabulary or an unsupported output head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: DistillationArguments,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise UserError(
                "several GPUs in one process are not supported: start one process per GPU with "
                "torchrun -m attnopt, or choose one with CUDA_VISIBLE_DEVICES"
            )
        set_trainable(model, args.train_parameters)
        for checked in (model, teacher):
            if checked is not None:
                check_head(checked)
        _check_learns(model, teacher, args)
        wanted = args.kl_weight > 0 or args.match_steps > 0
        if teacher is None and wanted and args.train_parameters != "coefficients":
            raise ValueError(
                "a teacher is needed: the student can teach itself only while its base weights "
                f"are frozen (train_parameters='coefficients'; got {args.train_parameters!r})"
            )
        if args.match_steps and args.train_parameters == "all":
            args.ddp_find_unused_parameters = True  # matching uses those of attention alone
        super().__init__(
            model=model, args=args, data_collator=collate, compute_metrics=_summary, **kwargs
        )
        if args.match_steps and self.is_fsdp_enabled:
            raise UserError("match_steps is not possible with FSDP: use DDP, or leave it out")
        self.objective = args.objective()
        self.model_accepts_loss_kwargs = False  # else the loss grows with accumulation steps
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        if self.teacher is not None:
            self.teacher.to(args.device)
        self._terms: dict[str, list[Tensor]] = {}  # of the loss, since the last log
        self._variances: dict[int, Tensor] | None = None  # of the teacher's attention, by layer
        self.add_callback(StageBorder)
        if args.redraw_every is not None:
            self.add_callback(Redraw)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        self.remove_callback(PrinterCallback)

    # ---- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return the loss of this batch, a mean over its tokens.

        It is the error of the attention modules for the first `match_steps`, then the weighted sum
        of KL, cross-entropy and L1.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self.state.global_step < self.args.match_steps:
            outputs = self._match(model, inputs)
            loss = outputs.logits.mean()
            terms = {"match": loss.detach()}
        else:
            outputs, terms = self._imitate(model, inputs, labels)
            loss = outputs.logits.loss
            if weighed := _with_coefficients(self._student()):
                l1 = torch.stack([m.l1_penalty() for m in weighed]).mean()
                loss = loss + self.args.l1_weight * l1
                terms["l1"] = l1.detach()
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def _imitate(
        self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor
    ) -> tuple[ModelOutput, dict[str, Tensor]]:
        """The student's output with TokenLosses for logits, and its terms by name."""
        teacher, mask = self._teach(model, inputs), inputs.get("attention_mask")

        def head(student: HeadInput) -> TokenLosses:
            return token_losses(student, teacher, labels, mask, self.objective)

        with head_computes(self._student(), head):
            outputs = model(**inputs)
        losses: TokenLosses = outputs.logits
        terms = {"ce": losses.ce} if teacher is None else {"kl": losses.kl, "ce": losses.ce}
        return outputs, terms

    def _match(self, model: nn.Module, inputs: dict[str, Tensor]) -> ModelOutput:
        """The student's output with the errors of its layers for logits."""
        if self._variances is None:
            rows = self._prepare_inputs(collate(list(islice(self.train_dataset, VARIANCE_ROWS))))
            del rows["labels"]
            targets, mask = self._attention_of_teacher(model, rows), rows.get("attention_mask")
            self._variances = {i: variance(target.output, mask) for i, target in targets.items()}
        targets = self._attention_of_teacher(model, inputs)
        return run_matched(model, self._student(), inputs, targets, self._variances)

    def _attention_of_teacher(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> dict[int, Target]:
        student = self._student()
        source = student if self.teacher is None else self.teacher
        with recorded(source, mechanisms(student)) as targets:
            self._run_teacher(model, inputs)
        return targets

    def _teach(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> HeadInput | None:
        alone = self.objective.kl_weight == 0 or not mechanisms(self._student())
        return None if self.teacher is None and alone else self._run_teacher(model, inputs)

    def _run_teacher(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> HeadInput:
        if self.teacher is not None:
            with self.accelerator.autocast():
                return head_input(self.teacher, self.teacher, **inputs)
        student = self._student()
        with evaluating(student), dense_attention(student):
            return head_input(model, student, **inputs)

    def _student(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss, averaged since the last log, to the loss."""
        if "loss" in logs:
            for name, values in self._terms.items():
                mean = torch.stack(values).mean()
                logs[name] = self.accelerator.reduce(mean, "mean").item()
            self._terms = {}
        super().log(logs, start_time)

    # ---- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return (None, sums [B, 5], counts [B, 2]) of `attnopt.metrics` in the place of logits."""
        inputs = self._prepare_inputs(inputs)
        labels, mask = inputs.pop("labels"), inputs.get("attention_mask")
        teacher = self._teach(model, inputs)
        student = head_input(model, self._student(), **inputs)
        return None, *row_metrics(student, teacher, labels, mask)

    # ---- optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave out the coefficients, gates and position embeddings of mechanisms."""
        kept = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, AttentionMechanism)
            for parameter, _ in module.named_parameters()
            if _NEVER_DECAYED.search(parameter)
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Give the coefficients a parameter group of their own, if they have their own rate."""
        made, rate = self.optimizer is None, self.args.coefficient_learning_rate
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and rate is not None:
            own = [p for m in mechanisms(self.model).values() for p in m.parameters()]
            moved = {id(p) for p in own}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Give each stage a schedule of its own."""
        if self.lr_scheduler is None and self.args.match_steps:
            self.lr_scheduler = stage_schedule(self.args, self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except WRITE_ERRORS as error:
            raise discard(folder, error) from error


def set_trainable(model: PreTrainedModel, parameters: str) -> None:
    """Freeze all but "coefficients", "attention" (of converted layers, with them) or "all".

    Raises ValueError when nothing is left to train.
    """
    own = [(name, m) for name, m in model.named_modules() if isinstance(m, AttentionMechanism)]
    if parameters == "all":
        trained: list[nn.Module] = [model]
    elif parameters == "attention":
        trained = [model.get_submodule(name.rpartition(".")[0]) for name, _ in own]
    else:
        trained = [mechanism for _, mechanism in own]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        why = "its mechanisms learn nothing by themselves" if own else "convert it first"
        raise ValueError(f"nothing to train: the model has no {parameters}; {why}")


def _with_coefficients(model: nn.Module) -> list[AttentionMechanism]:
    return [mechanism for mechanism in mechanisms(model).values() if mechanism.coefficients()]


def _check_learns(
    model: PreTrainedModel, teacher: PreTrainedModel | None, args: DistillationArguments
) -> None:
    """Raise ValueError for what the arguments ask of a model that has nothing of the kind."""
    if args.l1_weight > 0 and not _with_coefficients(model):
        raise ValueError(
            f"l1_weight={args.l1_weight} has no meaning: the model's attention has no coefficients"
        )
    if args.redraw_every and not any(
        getattr(mechanism, "is_random", False) for mechanism in mechanisms(model).values()
    ):
        raise ValueError(
            f"redraw_every={args.redraw_every} has no meaning: no layer has random features"
        )
    if args.match_steps and not mechanisms(model):
        raise ValueError(
            f"match_steps={args.match_steps} has no meaning: the model is not converted"
        )
    if args.match_steps and teacher is not None:
        shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (teacher, model)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "match_steps needs a teacher of the student's layers and width, "
                f"{shapes[1]}; got {shapes[0]}"
            )


def _summary(prediction: EvalPrediction) -> dict[str, float]:
    sums, counts = (torch.from_numpy(np.asarray(x)) for x in tuple(prediction)[:2])
    return summarize(sums, counts)

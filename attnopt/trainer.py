"""The Trainer that distills: transformers' own, with a teacher in its loss and its evaluation."""

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import ModelOutput, logging

from attnopt.arguments import OWN_TEACHER, DistillationArguments
from attnopt.attention.base import AttentionMechanism
from attnopt.checkpoints import WRITE_ERRORS, discard, mark_complete, write_folder
from attnopt.convert import dense_attention, mechanisms
from attnopt.data import collate
from attnopt.errors import UserError
from attnopt.history import ProgressBar
from attnopt.lora import (
    adapters,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
    without_adapters,
)
from attnopt.losses import (
    HeadInput,
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
from attnopt.modules import with_whole_parameters
from attnopt.stages import Redraw, StageBorder, stage_schedule

logger = logging.get_logger(__name__)

# Weight decay pulls to zero, which means nothing for these parameters of a mechanism.
_NEVER_DECAYED = re.compile(r"alpha|gate|position")


class DistillationTrainer(Trainer):
    """Trains a converted model to give the teacher's distribution at every position.

    model: the student. Which of its parameters train is set here (`train_parameters`).
    teacher: a second model, frozen here and run in evaluation mode. None where only coefficients
    or adapters train: then the student without them, under its original softmax attention, is the
    teacher, and there is no second model in memory. None, too, with kl_weight 0: plain language
    modeling.

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
        if args.lora_rank and args.lora_alpha:  # both are set where adapters train
            add_adapters(model, args.lora_rank, args.lora_alpha)
        set_trainable(model, args.train_parameters)
        for checked in (model, teacher):
            if checked is not None:
                check_head(checked)
        _check_learns(model, teacher, args)
        wanted = args.kl_weight > 0 or args.match_steps > 0
        if teacher is None and wanted and args.train_parameters not in OWN_TEACHER:
            raise ValueError(
                "a teacher is needed: the student can teach itself only while its base weights "
                f"are frozen (train_parameters in {OWN_TEACHER}; got {args.train_parameters!r})"
            )
        if args.match_steps and args.train_parameters == "all":
            args.ddp_find_unused_parameters = True  # matching uses those of attention alone
        super().__init__(
            model=model, args=args, data_collator=collate, compute_metrics=_summary, **kwargs
        )
        self._prepare_fsdp()
        self.objective = args.objective()
        self.model_accepts_loss_kwargs = False  # else the loss grows with accumulation steps
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        if self.teacher is not None and self.is_fsdp_enabled:
            self.teacher = fsdp2_prepare_model(self.accelerator, self.teacher)
        elif self.teacher is not None:
            self.teacher.to(args.device)
        self._terms: dict[str, list[Tensor]] = {}  # of the loss, since the last log
        self._variances: dict[int, Tensor] | None = None  # of the teacher's attention, by layer
        self.add_callback(StageBorder)
        if args.redraw_every is not None:
            self.add_callback(Redraw)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        self.remove_callback(PrinterCallback)

    def _prepare_fsdp(self) -> None:
        """Refuse what FSDP cannot do here, and say where it is not what was asked for.

        Its own mixed precision rounds all parameters, those of mechanisms too, and the losses: it
        gives way to autocast, as everywhere else.
        """
        if not self.is_fsdp_enabled:
            if self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
                logger.warning(
                    "FSDP was asked for, but accelerate shards over accelerators only: on these "
                    f"devices ({self.args.device.type}) every process holds the whole model (DDP)"
                )
            return
        if self.args.match_steps:
            raise UserError("match_steps is not possible with FSDP: use DDP, or leave it out")
        if not self.accelerator.is_fsdp2:
            raise UserError("FSDP version 1 is not supported: set fsdp_version to 2")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

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
                penalties = [with_whole_parameters(m, lambda m: m.l1_penalty()) for m in weighed]
                l1 = torch.stack(penalties).mean()
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
            outputs = model(**inputs, use_cache=False)
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
            return head_input(self.teacher, self.teacher, **inputs)
        student = self._student()
        with evaluating(student), dense_attention(student), without_adapters(student):
            return head_input(model, student, **inputs)

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        """Autocast for all of compute_loss: accelerate wraps neither the teacher nor FSDP in it."""
        return self.accelerator.autocast()

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
        with self.compute_loss_context_manager():
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; where adapters train, only them and the mechanisms.

        The rest is the teacher's then, and what is saved cannot be taken for a whole model. FSDP
        has files of its own to go on from.
        """
        if not adapters(self.model):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save and not self.is_fsdp_enabled:
            save_adapters(self.model, Path(output_dir or self.args.output_dir))

    def save_student(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the trained student to a folder as a model of its own; all processes call this.

        Its weights, but for those of mechanisms, become `dtype`, and adapters are merged into
        them, so this ends the training.
        """
        student, state = self._student(), None
        merge_adapters(student)
        own = {id(p) for m in mechanisms(student).values() for p in m.parameters()}
        cast = {name: p for name, p in student.named_parameters() if id(p) not in own}
        for parameter in cast.values():
            parameter.data = parameter.data.to(dtype)
        if self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model)  # whole, on the first process
            for tied in student.all_tied_weights_keys:  # gathered once more, so no longer shared
                state.pop(tied, None)
            state |= {name: x.to(dtype) for name, x in state.items() if name in cast}
        if self.args.should_save:
            write_folder(folder, lambda path: self._save(str(path), state_dict=state))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        sharded = any(folder.glob("pytorch_model_fsdp*"))
        if sharded != self.is_fsdp_enabled:
            how = "with" if sharded else "without"
            raise UserError(f"{folder} was written {how} FSDP: resume it in the same way")
        if not load_adapters(self._student(), folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_adapters(self._student(), Path(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)  # or the best one is not known to be there
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except WRITE_ERRORS as error:
            raise discard(folder, error) from error


def set_trainable(model: PreTrainedModel, parameters: str) -> None:
    """Freeze all but "coefficients", "attention" (of converted layers, with them) or "all"; with
    "lora" all but the coefficients and the adapters that the model has.

    Raises ValueError when nothing is left to train.
    """
    own = [(name, m) for name, m in model.named_modules() if isinstance(m, AttentionMechanism)]
    if parameters == "all":
        trained: list[nn.Module] = [model]
    elif parameters == "attention":
        trained = [model.get_submodule(name.rpartition(".")[0]) for name, _ in own]
    else:
        trained = [mechanism for _, mechanism in own]
        trained += adapters(model) if parameters == "lora" else []
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

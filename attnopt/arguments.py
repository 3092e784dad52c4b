"""Settings of a distillation: transformers' own, with the objective and its stages."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from attnopt.losses import Direction, Objective

TRAINABLE = ("coefficients", "lora", "attention", "all")
# Of these, what leaves the base weights alone: the student is its own teacher.
OWN_TEACHER = ("coefficients", "lora")


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
        metadata={"help": "coefficients, lora, attention (of converted layers) or all."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Of the adapters, where they train: 8 if not given."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Their scale is alpha / rank; twice the rank if not given."}
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
        self._check_adapters()
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
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if self.max_steps > 0 and value and value < 1:  # as the Trainer does, and compares
                setattr(self, name, math.ceil(value * self.max_steps))

    def _check_adapters(self) -> None:
        given = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        for name, value in given.items():
            if value is not None and self.train_parameters != "lora":
                raise ValueError(
                    f"{name} has no meaning with train_parameters={self.train_parameters!r}"
                )
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        if self.train_parameters == "lora":
            self.lora_rank = self.lora_rank or 8
            self.lora_alpha = self.lora_alpha or 2 * self.lora_rank

    def _check_stages(self) -> None:
        terms = self.kl_weight + self.ce_weight + self.l1_weight
        if terms == 0 and not 0 < self.max_steps == self.match_steps:
            raise ValueError("nothing to train: kl_weight, ce_weight and l1_weight are all 0")
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

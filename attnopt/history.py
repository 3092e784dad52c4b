"""What a training run leaves behind while it runs: history.json, and a progress bar."""

import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from attnopt.checkpoints import write_json
from attnopt.convert import mechanisms
from attnopt.modules import with_whole_parameters

_TRAINING_KEYS = ("loss", "match", "kl", "ce", "l1", "learning_rate", "grad_norm")
_EVALUATION_KEYS = ("kl", "ce", "perplexity", "top1", "teacher_perplexity")
KEYS = (*_TRAINING_KEYS, *(f"eval_{key}" for key in _EVALUATION_KEYS))
SNAPSHOTS = 100  # of the coefficients, at most, however long the run
_MIB = 2**20


class History(TrainerCallback):
    """Writes history.json at every log: one row per step, and the coefficients of every layer
    at up to SNAPSHOTS + 1 steps.

    A row of the matching stage has "match", the mean error of the layers (`attnopt.matching`), in
    the place of the terms of the objective. Times count from the start of training, over all its
    resumptions; memory is in MiB, that of the GPU the peak so far. A resumed run drops the rows
    after the checkpoint it starts from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.coefficients: list[dict[str, Any]] = []
        self._wall = self._cpu = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the rows of the run that is resumed, and start the clocks."""
        if state.global_step > 0 and self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows, self.coefficients = (
                [row for row in before[key] if row["step"] <= state.global_step]
                for key in ("rows", "coefficients")
            )
        last = self.rows[-1] if self.rows else {}
        self._wall = time.perf_counter() - last.get("wall_seconds", 0.0)
        self._cpu = time.process_time() - last.get("cpu_seconds", 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what is known to the row of this step."""
        known = {key: value for key, value in (logs or {}).items() if key in KEYS}
        if not known:
            return
        coefficients = _coefficients(model)  # FSDP gathers them, with the help of all processes
        if not state.is_world_process_zero:
            return
        if not self.rows or self.rows[-1]["step"] != state.global_step:
            self.rows.append({"step": state.global_step})
            self._snapshot(state, coefficients)
        self.rows[-1].update(known, **self._cost())
        labels = {str(i): names for i, m in _mechanisms(model).items() if (names := m.labels())}
        content = {"rows": self.rows, "coefficients": self.coefficients, "labels": labels}
        write_json(self.path, content)

    def _snapshot(self, state: TrainerState, coefficients: dict[str, Any]) -> None:
        last = self.coefficients[-1]["step"] if self.coefficients else -math.inf
        due = state.global_step - last >= state.max_steps / SNAPSHOTS
        if due or state.global_step == state.max_steps:
            self.coefficients.append({"step": state.global_step, "layers": coefficients})

    def _cost(self) -> dict[str, float]:
        cost = {
            "wall_seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "cpu_memory_mb": psutil.Process().memory_info().rss / _MIB,
        }
        if torch.cuda.is_available():
            cost["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / _MIB
        return cost


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, with the newest numbers beside it instead of lines of them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses, and the validation numbers once there are any."""
        shown = ("loss", "eval_kl", "eval_perplexity")
        if self.training_bar is not None:
            self._shown.update({k: f"{v:.4g}" for k, v in (logs or {}).items() if k in shown})
            self.training_bar.set_postfix(self._shown)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; a resumed run starts where it was."""
        self._shown: dict[str, str] = {}
        super().on_train_begin(args, state, control, **kwargs)


def _mechanisms(model: nn.Module | None) -> dict[int, Any]:
    return {} if model is None else mechanisms(model)


def _coefficients(model: nn.Module | None) -> dict[str, dict[str, list]]:
    found = {
        index: with_whole_parameters(mechanism, lambda m: m.coefficients())
        for index, mechanism in _mechanisms(model).items()
    }
    return {
        str(index): {kind: values.detach().float().tolist() for kind, values in named.items()}
        for index, named in found.items()
        if named
    }

"""Distillation from start to end: a converted copy of a model learns to give the same answers."""

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, set_seed

from attnopt.arguments import OWN_TEACHER
from attnopt.attention import Config
from attnopt.calibration import calibrate
from attnopt.checkpoints import prepare_folder, read_json, write_json
from attnopt.convert import convert, mechanisms
from attnopt.data import Split, collate, load_blocks
from attnopt.errors import UserError
from attnopt.history import History
from attnopt.modules import with_whole_parameters
from attnopt.runs import (
    check_fits,
    finish_distributed,
    load_model,
    load_tokenizer,
    save_start,
    train,
    training_settings,
    versions,
)
from attnopt.stages import Patience
from attnopt.teacher_text import parse
from attnopt.trainer import DistillationArguments, DistillationTrainer

__all__ = ["DistillationArguments", "DistillationTrainer", "distill"]

# What distill() passes to TrainingArguments unless told otherwise; fractions are of all steps.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "max_steps": 1000,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "eval_on_start": True,
    "save_strategy": "steps",
    "save_steps": 0.1,
}
MASK_LENGTH = 48  # of the heatmaps in masks.json
CALIBRATION_ROWS = 8  # training sequences that gates and centroids are measured on


def distill(
    teacher: str | Path,
    config: Config | Mapping[int, Config],
    data: str,
    output: str | Path,
    *,
    layers: Iterable[int] | None = None,
    tokenizer: str | Path | None = None,
    block_size: int | None = None,
    text_column: str | None = None,
    validation: str | None = None,
    max_train_tokens: int | None = None,
    max_eval_tokens: int | None = 16_384,
    packed: bool = False,
    patience: int | None = None,
    resume: bool = False,
    argv: list[str] | None = None,
    **training: Any,
) -> Path:
    """Convert a copy of the teacher, distill it, and return the run folder with the result.

    teacher: folder or Hub id of a model that `attnopt.convert` supports.
    config, layers: as for `attnopt.convert`. data, text_column, validation, packed: as for
    `attnopt.data.load_blocks`. tokenizer: folder or id, the teacher's own by default.
    block_size: tokens of a training sequence, by default the context up to 1024.
    patience: stop after this many evaluations without improvement, and keep the best student.
    resume: go on from the newest whole checkpoint, bit for bit as if there had been no break, as
    long as the number of threads and processes is the same. (The first mean that is logged then
    begins at the checkpoint.)
    argv: the command to record, by default this process's.
    training: fields of DistillationArguments; DEFAULTS holds what differs from its own defaults.
    max_steps counts those of `match_steps` too, which come first.

    Gates, between a window and features or of NSA's branches, and the centroids of routing start
    where `attnopt.calibrate` puts them on a few training sequences. Dropout is 0 in the student:
    its noise would be part of what the teacher is to explain. Weights that train are fp32 and are
    saved in the teacher's dtype. The folder gets run.json, history.json, masks.json, start/ (the
    mechanisms before training), checkpoints/ and student/.

    Raises UserError for what the user can mend, before training where that is possible.
    """
    output = Path(output)
    _check_unused(output, resume)
    args = _arguments(prepare_folder(output / "checkpoints"), training, patience)
    set_seed(args.seed)
    student, words = load_model(teacher), load_tokenizer(tokenizer or teacher)
    source = None if args.train_parameters in OWN_TEACHER else load_model(teacher)
    about: dict[str, Any] = {
        "data": data,
        "text_column": text_column,
        "validation": validation,
        "block_size": check_fits(student, words, block_size),
        "packed": packed,
    }
    writer = student.to(args.device) if parse(data) else student  # what it writes, it writes dense
    train_blocks = _blocks(about, words, "train", args.seed, max_train_tokens, writer)
    eval_blocks = _blocks(about, words, "validation", args.seed, max_eval_tokens, writer)
    dtype, student = student.dtype, without_dropout(convert(student, config, layers))
    if source is not None:
        student.float()  # bf16 weights would round most of their updates away
    trainer = DistillationTrainer(
        student,
        args,
        teacher=source,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=words,
        callbacks=[History(output / "history.json"), *_stopping(patience)],
    )
    about |= {
        "command": "distill",
        "argv": list(sys.argv if argv is None else argv),
        "versions": versions(),
        "teacher": str(Path(teacher).resolve()) if Path(teacher).exists() else str(teacher),
        "attention": _describe(student),
        "training": training_settings(args)
        | {"bf16": trainer.accelerator.mixed_precision == "bf16"},  # the launcher's word counts too
    }
    _check_continues(output, about)
    if trainer.is_world_process_zero():
        write_json(output / "run.json", about)
    _calibrate(student, trainer.train_dataset, args.seed)
    if trainer.is_world_process_zero():
        save_start(student, output / "start")
    train(trainer, resume)
    masks = mask_heatmaps(student)
    trainer.save_student(output / "student", dtype)
    if trainer.is_world_process_zero():
        write_json(output / "masks.json", masks)
    finish_distributed()
    return output


def mask_heatmaps(model: PreTrainedModel, length: int = MASK_LENGTH) -> dict[str, Any]:
    """Return {"layers": {layer: m_ij as lists [1 or H, length, length]}}, rounded to 4 digits.

    Layers whose mechanism puts no mask on softmax are left out.
    """
    matrices = {
        str(i): with_whole_parameters(m, lambda m: m.mask_matrix(length))
        for i, m in mechanisms(model).items()
    }
    rounded = {
        i: (m.detach().double().cpu() * 1e4).round() / 1e4
        for i, m in matrices.items()
        if m is not None
    }
    return {"layers": {i: m.tolist() for i, m in rounded.items()}}


def _calibrate(student: PreTrainedModel, blocks: Dataset, seed: int) -> None:
    if any(m.make_gauge() is not None for m in mechanisms(student).values()):
        count = min(CALIBRATION_ROWS, len(blocks))
        chosen = sorted(random.Random(seed).sample(range(len(blocks)), count))
        calibrate(student, [collate([blocks[i]]) for i in chosen])


def _check_unused(output: Path, resume: bool) -> None:
    if (output / "run.json").exists() and not resume:
        raise UserError(
            f"{output} already holds a run: continue it with --resume, or choose another folder"
        )


def _check_continues(output: Path, about: Mapping[str, Any]) -> None:
    """Raise UserError where a run to go on with has other mechanisms or learns something else."""
    before = read_json(output / "run.json")
    if not before:
        return
    for name, was, now in (
        ("attention", before["attention"], about["attention"]),
        ("--train", *(run["training"]["train_parameters"] for run in (before, about))),
    ):
        if was != json.loads(json.dumps(now)):
            raise UserError(
                f"{output} holds a run with another {name}, {was}; got {now}: choose another "
                "folder, or the same options"
            )


def _arguments(
    folder: Path, training: Mapping[str, Any], patience: int | None
) -> DistillationArguments:
    chosen = {**DEFAULTS, **training}
    if patience is not None:
        chosen["load_best_model_at_end"] = True
    return DistillationArguments(output_dir=str(folder), **chosen)


def _stopping(patience: int | None) -> list[Patience]:
    return [] if patience is None else [Patience(patience)]


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every probability of dropout to 0 in place, its config as it is; return the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # of layers that call the function themselves
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _blocks(
    about: Mapping[str, Any],
    words: Any,
    split: Split,
    seed: int,
    max_tokens: int | None,
    teacher: PreTrainedModel,
) -> Dataset:
    return load_blocks(
        about["data"],
        words,
        block_size=about["block_size"],
        split=split,
        text_column=about["text_column"],
        validation=about["validation"],
        seed=seed,
        max_tokens=max_tokens,
        teacher=teacher,
        packed=about["packed"],
    )


def _describe(student: PreTrainedModel) -> dict[str, Any]:
    # one config if all layers have the same, else one per converted layer
    configs = {str(i): m.config.to_dict() for i, m in mechanisms(student).items()}
    same = len(configs) == student.config.num_hidden_layers and all(
        config == configs["0"] for config in configs.values()
    )
    return configs["0"] if same else configs

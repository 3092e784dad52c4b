"""A tiny teacher on disk, and distillation of it: as a run folder, or as a trainer."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from attnopt import LastK
from attnopt.data import load_blocks
from attnopt.demo_text import byte_tokenizer
from attnopt.distill import DistillationArguments, DistillationTrainer, distill
from attnopt.pretrain import small_gpt2

BYTES = byte_tokenizer()
QUIET = {"disable_tqdm": True, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
CONTEXT = 16


def write_teacher(folder: Path) -> str:
    """Save a GPT-2 with dropout in its config, and its tokenizer; return the folder."""
    torch.manual_seed(0)
    model = small_gpt2(BYTES, layers=2, width=16, heads=2, context=CONTEXT)
    model.config.resid_pdrop = model.config.embd_pdrop = 0.5
    with torch.no_grad():  # sharper than at its start, so that attention matters
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(6)
    model.save_pretrained(folder)
    BYTES.save_pretrained(folder)
    return str(folder)


def run(teacher, text, folder, steps=6, config=None, **options):
    """Distill into a run folder."""
    options = {**QUIET, "max_steps": steps, "logging_steps": 2, "eval_steps": 3, **options}
    return distill(teacher, config or LastK(window=3), text, folder, max_eval_tokens=160, **options)


def trainer_of(student, tmp_path, text, teacher=None, packed=False, **options):
    """A trainer on a text that saves nothing."""
    arguments = {**QUIET, "max_steps": 1, "save_strategy": "no", **options}
    blocks = load_blocks(text, BYTES, block_size=CONTEXT, max_tokens=400, packed=packed)
    return DistillationTrainer(
        student,
        DistillationArguments(output_dir=str(tmp_path), **arguments),
        teacher=teacher,
        train_dataset=blocks,
        eval_dataset=blocks,
    )


def read(path):
    """What a JSON file holds."""
    return json.loads(Path(path).read_text())


def weights(folder):
    """The weights in a model's folder, by name."""
    return load_file(Path(folder) / "model.safetensors")

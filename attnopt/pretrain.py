"""A small GPT-2 of one's own: trained from scratch, to be the teacher where none can be had."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, set_seed

from attnopt.checkpoints import prepare_folder, write_json
from attnopt.data import Split, load_blocks
from attnopt.demo_text import byte_tokenizer
from attnopt.errors import UserError
from attnopt.history import History
from attnopt.runs import finish_distributed, load_tokenizer, train, training_settings, versions
from attnopt.trainer import DistillationArguments, DistillationTrainer

# AdamW, constant after the warm-up and linear to zero over the second half.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "warmup_steps": 100,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "no",
}


def pretrain(
    data: str,
    output: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 256,
    steps: int = 2000,
    text_column: str | None = None,
    validation: str | None = None,
    max_eval_tokens: int | None = 16_384,
    packed: bool = False,
    resume: bool = False,
    argv: list[str] | None = None,
    **training: Any,
) -> Path:
    """Train a GPT-2 from scratch and return the folder with the model and its tokenizer.

    data, text_column, validation, packed: as for `attnopt.data.load_blocks`. tokenizer: "bytes",
    or the folder or Hub id of a tokenizer. layers, width, heads, context: the model's shape; heads
    divide the width. training: fields of TrainingArguments; DEFAULTS holds the recipe.

    Beside the model lie pretrain.json, history.json and, with save_strategy, checkpoints/.

    Raises UserError for what the user can mend, before training where that is possible.
    """
    output = Path(output)
    if (output / "config.json").exists():
        raise UserError(f"{output} already holds a model: choose another folder")
    if width % heads:
        raise UserError(f"--heads must divide --width; got {heads} heads and a width of {width}")
    words = byte_tokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer)
    prepare_folder(output / "checkpoints")
    schedule = {
        "max_steps": steps,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 2, "decay_type": "linear"},
    }
    args = DistillationArguments(
        output_dir=str(output / "checkpoints"),
        kl_weight=0.0,
        ce_weight=1.0,
        train_parameters="all",
        **{**DEFAULTS, **schedule, **training},
    )

    def blocks(split: Split, max_tokens: int | None) -> Any:
        return load_blocks(
            data,
            words,
            block_size=context,
            split=split,
            text_column=text_column,
            validation=validation,
            max_tokens=max_tokens,
            packed=packed,
        )

    set_seed(args.seed)
    model = small_gpt2(words, layers=layers, width=width, heads=heads, context=context)
    trainer = DistillationTrainer(
        model,
        args,
        train_dataset=blocks("train", None),
        eval_dataset=blocks("validation", max_eval_tokens),
        processing_class=words,
        callbacks=[History(output / "history.json")],
    )
    train(trainer, resume)
    trainer.save_model(str(output))  # in all processes, for FSDP needs them
    if trainer.is_world_process_zero():
        record = {
            "command": "pretrain",
            "argv": list(sys.argv if argv is None else argv),
            "versions": versions(),
            "data": data,
            "packed": packed,
            "parameters": model.num_parameters(),
            "training": training_settings(args),
        }
        write_json(output / "pretrain.json", record)
    finish_distributed()
    return output


def small_gpt2(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, heads: int, context: int
) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights that starts to use attention early.

    Position embeddings start as sinusoids of the same size as token embeddings, so that "the token
    before" is a linear function of the position from the first step on, and both start at the
    scale 1 / sqrt(width), not GPT-2's 0.02, which suits a width of 768 and more. Dropout is 0.
    Source: Vaswani et al. 2017, section 3.5 (sinusoids).
    """
    scale = width**-0.5
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one pass
        initializer_range=scale,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    rates = 10_000.0 ** -(torch.arange(0, width, 2) / width)  # [width / 2]
    angles = torch.arange(context)[:, None] * rates  # [context, width / 2]
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(waves * scale * 2**0.5)
    return model

"""What training commands have in common: models and tokenizers by name, and what they record."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2TokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import attnopt
import attnopt.convert.families  # noqa: F401  registers the converted models with AutoModel
from attnopt.checkpoints import (
    WRITE_ERRORS,
    check_model_folder,
    newest_complete,
    write_folder,
)
from attnopt.convert import mechanisms
from attnopt.errors import UserError, one_line
from attnopt.hub import why_unreachable
from attnopt.trainer import DistillationArguments, DistillationTrainer

_START = "mechanisms.safetensors"
_VERSIONED = ("torch", "transformers", "datasets", "triton")
_SETTINGS = (
    "kl_weight",
    "ce_weight",
    "l1_weight",
    "direction",
    "temperature",
    "train_parameters",
    "lora_rank",
    "lora_alpha",
    "max_steps",
    "match_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "match_learning_rate",
    "coefficient_learning_rate",
    "redraw_every",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a causal language model, converted or not, from a folder or by its id on the Hub.

    Raises UserError when there is none, or its folder is a checkpoint that was cut short.
    """
    check_model_folder(Path(name))
    return _load(AutoModelForCausalLM, name)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or a folder with GPT-2's vocab.json and merges.txt.

    Raises UserError when there is none.
    """
    path = Path(name)
    bare = (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file()
    return _load(GPT2TokenizerFast if bare else AutoTokenizer, name)


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int | None
) -> int:
    """Return the block size, by default the model's context up to 1024 tokens.

    Raises UserError where the blocks are longer than the context, or the tokenizer has tokens that
    the model does not know.
    """
    context, known = model.config.max_position_embeddings, model.get_input_embeddings().weight
    if block_size is not None and block_size > context:
        raise UserError(
            f"--block-size {block_size} is longer than the model's context of {context} tokens"
        )
    if len(tokenizer) > len(known):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {len(known)}: it is "
            "not this model's tokenizer"
        )
    return block_size or min(context, 1024)


def train(trainer: DistillationTrainer, resume: bool) -> None:
    """Train from the start, or from the newest whole checkpoint, and evaluate at the end.

    From that of the last step the Trainer would go one step too far: then from the one before.
    """
    args = trainer.args
    last = args.max_steps if args.max_steps > 0 else None
    found = newest_complete(Path(args.output_dir), below=last) if resume else None
    if found is not None:
        args.eval_on_start = False  # done before, and early stopping counts evaluations
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_ce" in log]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()


def save_start(model: PreTrainedModel, folder: Path) -> None:
    """Keep what the mechanisms of a converted model are before training, in a folder."""
    state = {
        f"{index}.{name}": value.contiguous()
        for index, mechanism in mechanisms(model).items()
        for name, value in mechanism.state_dict().items()
    }
    write_folder(folder, lambda path: save_file(state, path / _START))


def restore_start(model: PreTrainedModel, folder: Path) -> None:
    """Put back what `save_start` kept, into a model converted in the same way.

    Raises UserError for a folder that cannot be read, or belongs to another kind of model.
    """
    try:
        state = load_file(folder / _START)
        for index, mechanism in mechanisms(model).items():
            own = {name: state[f"{index}.{name}"] for name in mechanism.state_dict()}
            mechanism.load_state_dict(own)
    except (*WRITE_ERRORS, KeyError) as error:
        raise UserError(f"cannot read the start of the run, {folder}: {error}") from error


def finish_distributed() -> None:
    """Wait for all ranks and leave the process group.

    Without leaving, some ranks of a finished run exit with an error; without waiting, a rank that
    is done early can hang while its last collective is being torn down.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == "gloo":
        # The thread that ends gloo's own barrier needs the GIL, with which the end of the group
        # waits for that thread: now and then for ever. This barrier has no thread.
        torch.distributed.monitored_barrier()
    else:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def versions() -> dict[str, str]:
    """Return the versions of this package and of those it computes with."""
    found = {"attnopt": attnopt.__version__}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def training_settings(args: DistillationArguments) -> dict[str, Any]:
    """Return the training arguments that make the experiment, as JSON types."""
    chosen = args.to_dict()
    return {name: chosen[name] for name in _SETTINGS if chosen[name] is not None}


def _load(cls: Any, name: str | Path) -> Any:
    kind = "tokenizer" if "Tokenizer" in cls.__name__ else "model"
    local = Path(name).exists()
    if not local and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise UserError(f"there is no {kind} folder {name}")
    # Without network only what was downloaded before can be had, and then at once.
    offline = not local and why_unreachable("model", str(name), flag=f"--{kind}") is not None
    options: dict[str, Any] = {"local_files_only": offline}
    if kind == "model":  # where peft is installed its adapters are looked for first
        options["adapter_kwargs"] = {"local_files_only": offline}
    try:
        return cls.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        hint = "; the Hub cannot be reached, so name a local folder" if offline else ""
        raise UserError(f"cannot load the {kind} {name}: {one_line(error)}{hint}") from error

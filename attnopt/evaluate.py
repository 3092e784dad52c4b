"""How close a student comes to its teacher on held-out text, beside two controls.

The controls say what the numbers are worth: "zero-shot" is the converted teacher before any
training, and the self-only KL is the distance of the teacher from itself when every token sees
nothing but itself. A teacher that hardly uses attention has a small one, and then every student
looks perfect.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from attnopt.attention import LastK
from attnopt.checkpoints import read_json, write_json
from attnopt.convert import convert, mechanisms
from attnopt.data import Split, collate, is_file, load_blocks
from attnopt.errors import UserError
from attnopt.losses import head_input
from attnopt.metrics import row_metrics, summarize
from attnopt.runs import check_fits, load_model, load_tokenizer, restore_start

# Below this the teacher does not use attention enough to conclude anything from its students.
MINIMUM_SELF_ONLY_KL = 0.5
_REPORTED = {
    "kl": "kl",
    "reverse_kl": "reverse_kl",
    "ce": "ce",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity_ratio",
    "top1": "top1_agreement",
}

logger = logging.get_logger(__name__)


def compare(
    teacher: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    blocks: Dataset,
    *,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Return for each model, by name, its numbers against the teacher on these blocks.

    kl is KL(teacher||model), reverse_kl KL(model||teacher), ce the cross-entropy, all in nats per
    token; perplexity, perplexity_ratio (model by teacher); top1_agreement in 0..1. One pass over
    the text: the teacher runs once per batch, and logits exist for a few tokens at a time.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in models}
    for model in (teacher, *models.values()):
        model.eval()
    for start in tqdm(range(0, len(blocks), batch_size), desc="Evaluating", unit="batch"):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        batch = {name: x.to(teacher.device) for name, x in collate(rows).items()}
        labels, mask = batch.pop("labels"), batch.get("attention_mask")
        target = head_input(teacher, teacher, **batch)
        for name, model in models.items():
            given = target if model is teacher else head_input(model, model, **batch)
            found[name].append(row_metrics(given, target, labels, mask))
    means = {n: summarize(*map(torch.cat, zip(*pairs, strict=True))) for n, pairs in found.items()}
    return {n: {shown: m[key] for key, shown in _REPORTED.items()} for n, m in means.items()}


def evaluate(
    student: str | Path,
    *,
    teacher: str | Path | None = None,
    data: str | None = None,
    text_column: str | None = None,
    block_size: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare teacher, converted teacher and student on held-out text; return evaluation.json.

    student: a run folder, which gets evaluation.json and knows its teacher and data; or the folder
    of a converted model, with teacher and data given. data: by default the run's own, of which
    the test split is used, or the validation split where it is the file that was trained on. Any
    other file is used whole.

    Raises UserError for what cannot be loaded, and for a missing teacher or data.
    """
    run = Path(student)
    about = read_json(run / "run.json") or {}
    teacher, data = teacher or about.get("teacher"), data or about.get("data")
    if teacher is None or data is None:
        raise UserError(f"{student} is not a run folder (no run.json): pass --teacher and --data")
    if about and not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet: finish it with attnopt distill --resume")
    own = data == about.get("data")
    split: Split = "validation" if own and is_file(data) else "test"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, source = (
        load_model(path).to(device) for path in (run / "student" if about else run, teacher)
    )
    tokenizer = load_tokenizer(run / "student" if about else run)
    blocks = load_blocks(
        data,
        tokenizer,
        block_size=check_fits(model, tokenizer, block_size or about.get("block_size")),
        split=split,
        text_column=text_column or (about.get("text_column") if own else None),
        validation=about.get("validation") if own else None,
        seed=seed,
        max_tokens=max_tokens,
    )
    start = run / "start"
    torch.manual_seed(about.get("training", {}).get("seed", seed))
    result = evaluate_models(
        source, model, blocks, start=start if start.is_dir() else None, batch_size=batch_size
    )
    result = {"data": data, "split": split, **result}
    if about:
        write_json(run / "evaluation.json", result)
    return result


def evaluate_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    blocks: Dataset,
    *,
    start: Path | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compare loaded models: the body of evaluation.json, with both controls.

    start: a run's folder with the mechanisms as they were before training; by default they are
    made anew from the student's configs.

    Raises UserError for a student that is not converted.
    """
    configs = {index: mechanism.config for index, mechanism in mechanisms(student).items()}
    if not configs:
        raise UserError("the student is not a converted model: nothing to compare")
    zero_shot = convert(copy.deepcopy(teacher), configs)
    if start is not None:
        restore_start(zero_shot, start)
    models = {
        "teacher": teacher,
        "zero-shot": zero_shot,
        "student": student,
        "self-only": convert(copy.deepcopy(teacher), LastK(window=1)),
    }
    numbers = compare(teacher, models, blocks, batch_size=batch_size)
    control = numbers.pop("self-only")["kl"]
    warning = None
    if control < MINIMUM_SELF_ONLY_KL:
        warning = (
            f"the teacher hardly uses attention: its self-only KL is {control:.2f} nats per token, "
            f"below {MINIMUM_SELF_ONLY_KL}; draw no conclusion from these numbers"
        )
        logger.warning(warning)
    return {
        "tokens": sum(len(row) for row in blocks["input_ids"]),
        "control_self_only_kl": control,
        "conclusive": warning is None,
        "warning": warning,
        "models": numbers,
    }

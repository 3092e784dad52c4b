"""How close a student comes to its teacher on held-out text, beside two controls.

The controls say what the numbers are worth: "zero-shot" is the converted teacher before any
training, and the self-only KL is the distance of the teacher from itself when every token sees
nothing but itself. A teacher that hardly uses attention has a small one, and then every student
looks perfect.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from attnopt.attention import LastK
from attnopt.checkpoints import read_json, write_json
from attnopt.convert import convert, mechanisms
from attnopt.data import Split, collate, is_file, load_blocks
from attnopt.errors import UserError
from attnopt.losses import head_input
from attnopt.metrics import (
    COLUMNS,
    add_positions,
    by_position,
    position_ends,
    summarize,
    token_metrics,
)
from attnopt.runs import check_fits, load_model, load_tokenizer, restore_start
from attnopt.teacher_text import parse
from attnopt.text_metrics import compare_text

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
STRIDED = ("ce", "perplexity", "perplexity_ratio")

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
    token; perplexity, perplexity_ratio (model by teacher); top1_agreement in 0..1.
    """
    return {n: _scores(t) for n, t in tally(teacher, models, blocks, batch_size=batch_size).items()}


def tally(
    teacher: PreTrainedModel,
    models: Mapping[str, PreTrainedModel],
    rows: Dataset | Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each model what token_metrics counts, summed by position: [P, 5] and [P, 2].

    rows: as for `attnopt.data.collate`, none longer than the first. One pass over the text: the
    teacher runs once per batch, and logits exist for a few tokens at a time.
    """
    context, device = len(rows[0]["input_ids"]), teacher.device
    zeros = torch.zeros(context, len(COLUMNS) + 2, device=device, dtype=torch.float64)
    found = {name: (zeros[:, :-2].clone(), zeros[:, -2:].clone()) for name in models}
    for model in (teacher, *models.values()):
        model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc="Evaluating", unit="batch"):
        chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = {name: x.to(device) for name, x in collate(chosen).items()}
        labels, mask = batch.pop("labels"), batch.get("attention_mask")
        places = batch.get("position_ids", torch.arange(labels.shape[1], device=device))
        target = head_input(teacher, teacher, **batch)
        for name, model in models.items():
            given = target if model is teacher else head_input(model, model, **batch)
            new = token_metrics(given, target, labels, mask)
            add_positions(*found[name], new, places.expand_as(labels))
    return found


def windows(tokens: Sequence[int], context: int, stride: int) -> list[dict[str, list[int]]]:
    """Return rows of up to `context` tokens, `stride` apart, that predict each token once.

    Labels are -100 where an earlier window predicts the token: but for the first window each has
    at least context - stride tokens before it. With a stride of the context these are blocks, of
    which none predicts its first token. As in the documentation of transformers ("Perplexity of
    fixed-length models").

    Raises UserError for a stride that leaves tokens out.
    """
    if not 1 <= stride <= context:
        raise UserError(f"--stride must lie between 1 and the block size, {context}; got {stride}")
    rows, seen = [], 0
    for start in range(0, len(tokens), stride):
        ids = list(tokens[start : start + context])
        rows.append({"input_ids": ids, "labels": [-100] * (seen - start) + ids[seen - start :]})
        seen = start + len(ids)
        if seen == len(tokens):
            break
    return rows


def evaluate(
    student: str | Path,
    *,
    teacher: str | Path | None = None,
    data: str | None = None,
    text_column: str | None = None,
    block_size: int | None = None,
    max_tokens: int | None = None,
    text: bool = False,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare teacher, converted teacher and student on held-out text; return evaluation.json.

    student: a run folder, which gets evaluation.json and knows its teacher and data; or the folder
    of a converted model, with teacher and data given. data: by default the run's own, of which
    the test split is used, or the validation split where it is the file that was trained on. Any
    other file is used whole. Text that the teacher wrote for training is no measure of its own:
    where it had prompts, those of their text that were held out are used.
    Documents are packed where they were in training.
    block_size: the run's own by default; longer where the positions of the model allow.
    text: compare what the models write, too (`attnopt.text_metrics`). stride: add the perplexity
    of overlapping windows so many tokens apart (`windows`); max_tokens are then the first ones.

    Raises UserError for what cannot be loaded, and for a missing teacher or data.
    """
    run = Path(student)
    about = read_json(run / "run.json") or {}
    teacher, data = teacher or about.get("teacher"), data or about.get("data")
    if teacher is None or data is None:
        raise UserError(f"{student} is not a run folder (no run.json): pass --teacher and --data")
    if about and not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet: finish it with attnopt distill --resume")
    asked = parse(data)
    if stride and asked is not None and asked.prompts is None:
        raise UserError("--stride is for text in one piece: the teacher writes many short ones")
    own = data == about.get("data")
    split: Split = "validation" if own and is_file(data) else "test"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, source = (
        load_model(path).to(device) for path in (run / "student" if about else run, teacher)
    )
    tokenizer = load_tokenizer(run / "student" if about else run)
    size = check_fits(model, tokenizer, block_size or about.get("block_size"))
    blocks = load_blocks(
        data,
        tokenizer,
        block_size=size,
        split=split,
        text_column=text_column or (about.get("text_column") if own else None),
        validation=about.get("validation") if own else None,
        seed=seed,
        max_tokens=None if stride else max_tokens,
        teacher=source,
        packed=about.get("packed", False),
    )
    if stride and max_tokens:
        blocks = blocks.select(range(min(len(blocks), max(1, max_tokens // size))))
    start = run / "start"
    torch.manual_seed(about.get("training", {}).get("seed", seed))
    result = evaluate_models(
        source,
        model,
        blocks,
        start=start if start.is_dir() else None,
        writer=tokenizer if text else None,
        stride=stride,
        batch_size=batch_size,
    )
    read = data if asked is None or asked.prompts is None else asked.prompts
    result = {"data": read, "split": split, **result}
    if about:
        write_json(run / "evaluation.json", result)
    return result


def evaluate_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    blocks: Dataset,
    *,
    start: Path | None = None,
    writer: PreTrainedTokenizerBase | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compare loaded models: the body of evaluation.json, with both controls.

    start: a run's folder with the mechanisms as they were before training; by default they are
    made anew from the student's configs. writer: the tokenizer, to compare what the models write.
    stride: as for `evaluate`.

    Raises UserError for a student that is not converted, and for a stride that does not fit.
    """
    configs = {index: mechanism.config for index, mechanism in mechanisms(student).items()}
    if not configs:
        raise UserError("the student is not a converted model: nothing to compare")
    rows = _stream(blocks, stride) if stride is not None else []
    zero_shot = convert(copy.deepcopy(teacher), configs)
    if start is not None:
        restore_start(zero_shot, start)
    models = {
        "teacher": teacher,
        "zero-shot": zero_shot,
        "student": student,
        "self-only": convert(copy.deepcopy(teacher), LastK(window=1)),
    }
    tallies = tally(teacher, models, blocks, batch_size=batch_size)
    numbers = {name: _scores(found) for name, found in tallies.items()}
    control = numbers.pop("self-only")["kl"]
    del models["self-only"]
    warning = None
    if control < MINIMUM_SELF_ONLY_KL:
        warning = (
            f"the teacher hardly uses attention: its self-only KL is {control:.2f} nats per token, "
            f"below {MINIMUM_SELF_ONLY_KL}; draw no conclusion from these numbers"
        )
        logger.warning(warning)
    result: dict[str, Any] = {
        "tokens": sum(len(row) for row in blocks["input_ids"]),
        "control_self_only_kl": control,
        "conclusive": warning is None,
        "warning": warning,
        "models": numbers,
        "by_position": {
            "ends": position_ends(len(blocks[0]["input_ids"])),
            "models": {name: by_position(*tallies[name]) for name in models},
        },
    }
    if rows:
        strided = tally(teacher, models, rows, batch_size=batch_size)
        result["strided"] = {
            "stride": stride,
            "tokens": round(strided["teacher"][1][:, 1].sum().item()),
            # the others count tokens in several windows
            "models": {
                name: {k: v for k, v in _scores(found).items() if k in STRIDED}
                for name, found in strided.items()
            },
        }
    if writer is not None:
        result["text"] = compare_text(teacher, models, writer, blocks)
    return result


def _stream(blocks: Dataset, stride: int) -> list[dict[str, list[int]]]:
    if "position_ids" in blocks.column_names:
        raise UserError("--stride is for text in one piece: these blocks are of packed documents")
    ids = blocks["input_ids"][:]
    return windows([token for row in ids for token in row], len(ids[0]), stride)


def _scores(found: tuple[Tensor, Tensor]) -> dict[str, float]:
    means = summarize(*found)
    return {shown: means[key] for key, shown in _REPORTED.items()}

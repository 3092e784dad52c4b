"""Continuations by a run's student, alone or beside its teacher, from prompts given or held out."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnopt.data import load_blocks
from attnopt.errors import UserError
from attnopt.generate import TEMPERATURE, TOP_K, compare_generation, generate_samples
from attnopt.runs import load_model, load_tokenizer
from attnopt.teacher_text import parse

# Without prompts: the beginnings of this many held-out blocks, each this share of a block.
HELD_OUT_PROMPTS = 3
PROMPT_SHARE = 4


def sample_run(
    run: Path,
    prompts: Sequence[str] = (),
    *,
    compare: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Continue prompts and return [{"prompt", "student"}], with "teacher" too if compared.

    run: a folder of `attnopt distill`; comparing writes its generation.json, with timings.
    prompts: by default the beginnings of held-out texts of the run's own data.
    max_new_tokens: by default a quarter of what it was trained on, 100 at most.

    Raises UserError for a folder that is no run, and for prompts that do not fit.
    """
    try:
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a run folder: its run.json cannot be read") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, tokenizer = load_model(run / "student").to(device), load_tokenizer(run / "student")
    context = min(student.config.max_position_embeddings, about.get("block_size") or 1024)
    teacher = None
    if compare or (not prompts and parse(about["data"])):
        teacher = load_model(about["teacher"]).to(device)
    prompts = list(prompts) or held_out_prompts(about, tokenizer, context, teacher)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or min(100, context // 4),
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
    }
    if not compare:
        texts = generate_samples(student.eval(), tokenizer, prompts, **settings)
        return [{"prompt": p, "student": t} for p, t in zip(prompts, texts, strict=True)]
    assert teacher is not None
    made = compare_generation(teacher, student, tokenizer, prompts, output=run, **settings)
    return made["samples"]


def held_out_prompts(
    about: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    teacher: PreTrainedModel | None = None,
) -> list[str]:
    """Return the beginnings of some held-out blocks of the data that a run.json names.

    Words that the borders of a block cut in two are left out. teacher: for data that it writes.
    """
    blocks = load_blocks(
        about["data"],
        tokenizer,
        block_size=max(1, context // PROMPT_SHARE),
        split="validation",
        text_column=about.get("text_column"),
        validation=about.get("validation"),
        max_tokens=HELD_OUT_PROMPTS * context // PROMPT_SHARE,
        teacher=teacher,
    )
    texts = [tokenizer.decode(row) for row in blocks["input_ids"][:HELD_OUT_PROMPTS]]
    return [re.sub(r"^\S*\s+|\s+\S*$", "", text) or text for text in texts]

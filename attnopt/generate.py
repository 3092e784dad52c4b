"""Text, time and memory of generation: teacher and student side by side."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer

from attnopt.checkpoints import write_json
from attnopt.convert import mechanisms
from attnopt.errors import UserError

TEMPERATURE, TOP_K = 0.7, 50


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; as it stands, from the model's distribution itself.

    temperature divides the logits; top_k keeps the k most likely tokens (0: all), top_p the most
    likely that together reach that probability (Holtzman et al. 2020, section 3.1).

    Raises ValueError for a setting that draws nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}")


UNTRUNCATED = Sampling()


def continue_tokens(
    model: PreTrainedModel,
    prompts: Tensor,
    count: int,
    *,
    sampling: Sampling = UNTRUNCATED,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Return the next `count` tokens [B, count] int64 of prompts [B, T], on the CPU.

    What a model's own generation_config says of sampling is left aside, and a token that ends a
    text is one like any other: the model goes on with the next text, as it read them in training.
    The same seed and batch give the same tokens; the global random state is left as it was.
    """
    own, training = model.generation_config, model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # Not an argument of generate: what is None there would be filled in from the model's own.
        model.generation_config = GenerationConfig()
        model.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            made = model.generate(
                prompts.to(model.device),
                attention_mask=torch.ones_like(prompts).to(model.device),
                max_new_tokens=count,
                do_sample=True,
                streamer=streamer,
                **asdict(sampling),
            )
    finally:
        model.generation_config = own
        model.train(training)
    return made[:, prompts.shape[1] :].cpu()


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    seed: int = 0,
) -> list[str]:
    """Return one sampled continuation per prompt, without the prompt.

    Each prompt starts from the same seed, so its text does not depend on the others.

    Raises UserError for a prompt that is empty or leaves no room in the model's context.
    """
    texts = []
    for prompt in tqdm(prompts, desc="Generating", unit="text", leave=False):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        _check_room(model, prompt, ids, max_new_tokens)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def time_generation(
    model: PreTrainedModel, lengths: Sequence[int], *, prompt: Tensor
) -> list[dict[str, float]]:
    """Time greedy decoding after a prompt [1, T], for each number of new tokens.

    Returns per length {"new_tokens", "seconds", "cache_bytes"}; the cache is the model's own, its
    bytes those of the memory it holds at the end. One short run before warms up.
    """
    rows = []
    for count in (2, *lengths):
        cache = model.make_cache() if mechanisms(model) else DynamicCache()
        _synchronize(model)
        start = time.perf_counter()
        model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            past_key_values=cache,
            pad_token_id=0,
        )
        _synchronize(model)
        seconds = time.perf_counter() - start
        rows.append({"new_tokens": count, "seconds": seconds, "cache_bytes": cache_bytes(cache)})
    return rows[1:]


def cache_bytes(cache: Cache) -> int:
    """Return the memory that a cache's tensors keep alive, in bytes, shared storage once."""
    tensors = [x for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def compare_generation(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    seed: int = 0,
    output: Path | None = None,
) -> dict[str, Any]:
    """Return generation.json: both models' texts for the same prompts and seed, and their timing.

    Output lengths double from 16 up to what the context allows. output: a run folder that gets
    the file.

    Raises UserError as generate_samples does.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed
    }  # fmt: skip
    models = {"teacher": teacher.eval(), "student": student.eval()}
    texts = {
        name: generate_samples(model, tokenizer, prompts, **settings)
        for name, model in models.items()
    }
    prompt = tokenizer(prompts[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    room = min(student.config.max_position_embeddings - prompt.shape[1], 512)
    lengths = [16 * 2**i for i in range(6) if 16 * 2**i <= room] or [room]
    timing = [
        {"model": name, **row}
        for name, model in models.items()
        for row in time_generation(model, lengths, prompt=prompt)
    ]
    samples = [
        {"prompt": prompt, "teacher": old, "student": new}
        for prompt, old, new in zip(prompts, texts["teacher"], texts["student"], strict=True)
    ]
    result = {"settings": settings, "samples": samples, "timing": timing}
    if output is not None:
        write_json(output / "generation.json", result)
    return result


def _check_room(model: PreTrainedModel, prompt: str, ids: Tensor, new: int) -> None:
    context, count = model.config.max_position_embeddings, ids.shape[1]
    if count == 0:
        raise UserError("a prompt must hold at least one token; got an empty one")
    if count + new > context:
        raise UserError(
            f"the prompt {prompt[:40]!r} has {count} tokens; with {new} new ones it exceeds the "
            f"model's context of {context}"
        )


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

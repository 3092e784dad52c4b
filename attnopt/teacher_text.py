"""Text that the teacher writes itself: samples of it as training data, kept on disk.

By the chain rule the KL between teacher P and student Q as distributions of whole texts x is

    KL(P || Q) = E_{x ~ P} sum_t KL(P(. | x_<t) || Q(. | x_<t)),

so that the mean KL over texts drawn from the teacher, at temperature 1 and without truncation, is
an unbiased estimate of it: that is why this is the default. Colder or truncated samples read
better, and weigh contexts that the teacher itself would visit less often.

Texts are drawn in shards, each from its own seed: what is there after a kill is kept, and the
rest comes out as if there had been none. Only token ids are stored, nothing is decoded on the way.
"""

import hashlib
import json
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer
from transformers.utils import logging

from attnopt.checkpoints import (
    WRITE_ERRORS,
    cache_folder,
    cannot_write,
    prepare_folder,
    write_json,
)
from attnopt.errors import UserError
from attnopt.generate import UNTRUNCATED, Sampling, continue_tokens

SYNTAX = "teacher[:TOKENS][:temperature=T][:top_k=K][:top_p=P][:seed=S][:PROMPTS]"
DEFAULT_TOKENS = 1_000_000
SHARD_TEXTS = 32  # drawn as one batch
PROMPT_SHARE = 8  # a prompt is this share of its block
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "seed": int}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TeacherText:
    """What a data spec of the form SYNTAX asks for.

    tokens of training text; prompts: a data spec, None for texts that begin with nothing.
    """

    tokens: int = DEFAULT_TOKENS
    sampling: Sampling = UNTRUNCATED
    seed: int = 0
    prompts: str | None = None


def parse(spec: str) -> TeacherText | None:
    """Return what a data spec asks of the teacher, None for one that does not begin with it.

    Raises UserError for a setting that is unknown or out of its range.
    """
    head, *fields = spec.split(":")
    if head != "teacher":
        return None
    tokens, settings = DEFAULT_TOKENS, dict[str, Any]()
    while fields:
        if amount := _AMOUNT.fullmatch(fields[0]):
            tokens = round(float(amount[1]) * _FACTORS[amount[2]])
        elif setting := re.fullmatch(r"(\w+)=(.*)", fields[0]):
            settings[setting[1]] = _value(spec, *setting.groups())
        else:
            break
        fields.pop(0)
    prompts = ":".join(fields) or None
    if tokens < 1 or (prompts and prompts.split(":")[0] == "teacher"):
        raise UserError(f"--data {spec}: expected {SYNTAX}, at least one token and prompts of text")
    seed = settings.pop("seed", 0)
    try:
        return TeacherText(tokens, Sampling(**settings), seed, prompts)
    except ValueError as error:
        raise UserError(f"--data {spec}: {error}") from error


def sample_texts(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: TeacherText,
    *,
    count: int,
    length: int,
    part: str = "train",
    prompts: Tensor | None = None,
) -> Tensor:
    """Return texts [count, length] int32 drawn from the teacher, from the cache where they are.

    The first texts are the same for every count. part: "train" and others are drawn apart.
    prompts [n, T] int64, T < length: beginnings, taken in a random order and again from the start
    where more texts are wanted; without, a text begins with the tokenizer's first token (BOS, or
    EOS), or a random one where it has neither. Several processes share the work.

    Raises UserError where the cache cannot be written.
    """
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if prompts is None and ends:
        prompts = torch.tensor([[ends[0]]])
    if length <= (1 if prompts is None else prompts.shape[1]):
        raise UserError(f"text of the teacher needs blocks longer than its prompts; got {length}")
    key = {
        "teacher": fingerprint(teacher),
        "vocabulary": len(tokenizer),
        "prompts": None if prompts is None else _digest(prompts),
        "shape": [SHARD_TEXTS, length],
        "sampling": asdict(asked.sampling),
        "seed": asked.seed,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = prepare_folder(cache_folder() / f"teacher-text-{name}")
    write_json(folder / "about.json", key)
    shards = range(-(-count // SHARD_TEXTS))
    paths = [folder / f"{part}-{i:06}.safetensors" for i in shards]
    rank, world = _place()
    lacking = sum(not path.exists() for path in paths[rank::world])
    with _Bar(lacking * SHARD_TEXTS * length, shown=rank == 0) as bar:

        def shard(i: int) -> Tensor:
            found = _read(paths[i], (SHARD_TEXTS, length))
            if found is None:
                found = _sample(teacher, len(tokenizer), asked, f"{part}/{i}", length, prompts, bar)
                _write(paths[i], found)
            return found

        made = {i: shard(i) for i in shards[rank::world]}
        if world > 1:
            torch.distributed.barrier()
        # Of other processes: what lies on another machine's disk is drawn here again.
        texts = torch.cat([made[i] if i in made else shard(i) for i in shards])
    return texts[:count]


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights and of the settings that it computes with."""
    config = model.config.to_dict()
    for where_from in ("_name_or_path", "transformers_version"):
        config.pop(where_from, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {_digest(value)}".encode())
    return digest.hexdigest()


class _Bar(BaseStreamer):
    """A progress bar over tokens, fed by generation; there is none where nothing is to be drawn."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = tqdm(
            total=total,
            desc="Teacher's text",
            unit=" tokens",
            unit_scale=True,
            disable=not (total and shown),
        )

    def put(self, value: Tensor) -> None:
        self.bar.update(value.numel())

    def end(self) -> None:
        """Called after each batch: the bar goes on."""

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _sample(
    teacher: PreTrainedModel,
    vocabulary: int,
    asked: TeacherText,
    place: str,
    length: int,
    prompts: Tensor | None,
    bar: _Bar,
) -> Tensor:
    # one shard [SHARD_TEXTS, length]; place, "part/index", makes its seed
    seed = int.from_bytes(hashlib.sha256(f"{asked.seed}/{place}".encode()).digest()[:7], "big")
    if prompts is None:
        generator = torch.Generator().manual_seed(seed)
        begun = torch.randint(vocabulary, (SHARD_TEXTS, 1), generator=generator)
    else:
        first = int(place.rpartition("/")[2]) * SHARD_TEXTS
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(asked.seed))
        begun = prompts[order[torch.arange(first, first + SHARD_TEXTS) % len(prompts)]]
    made = continue_tokens(
        teacher,
        begun,
        length - begun.shape[1],
        sampling=asked.sampling,
        seed=seed,
        streamer=bar,
    )
    return torch.cat([begun, made], dim=1).int()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """What a shard holds, None (with a warning) where that is not what was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            ids, written = file.get_tensor("input_ids"), (file.metadata() or {}).get("sha256")
        if ids.shape == shape and written == _digest(ids):
            return ids
        reason = "its content is not what was written"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    logger.warning(f"drawing the texts in {path} again, for the file is damaged: {reason}")
    return None


def _write(path: Path, ids: Tensor) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file({"input_ids": ids}, temporary, metadata={"sha256": _digest(ids)})
        temporary.replace(path)
    except WRITE_ERRORS as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(value.shape)).encode())
    digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _value(spec: str, name: str, value: str) -> float:
    if name not in _SETTINGS:
        raise UserError(f"--data {spec}: {name} is not among {', '.join(_SETTINGS)}")
    try:
        return _SETTINGS[name](value)
    except ValueError as error:
        raise UserError(f"--data {spec}: {name} must be a number; got {value!r}") from error


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

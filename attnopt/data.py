"""Text as blocks of tokens: the demo, WikiText, a file, a text set on the Hub, or the teacher's.

Every source ends up the same way: rows of text are tokenized, their tokens laid end to end, and
the long sequence cut into blocks of equal length. What is left over at the end is dropped. Packed
blocks know where their documents begin, which then never see each other.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Value, load_dataset
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnopt.demo_text import docstring_documents
from attnopt.errors import UserError, one_line
from attnopt.hub import why_unreachable
from attnopt.teacher_text import PROMPT_SHARE, TeacherText, parse, sample_texts

Split = Literal["train", "validation", "test"]
_Share = Literal["all", "head", "tail"]  # which part of the blocks belongs to the split
SPLITS = ("train", "validation", "test")
# Cut from the end of a source that has no validation split of its own.
HELD_OUT_FRACTION = 0.1
WIKITEXT = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
# File ending -> (builder of the datasets library, its options).
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"keep_linebreaks": True}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_VALIDATION = ("validation", "valid", "dev", "val")
_SPLIT_NAMES = {"train": ("train",), "validation": _VALIDATION, "test": ("test", *_VALIDATION)}
# Of an article in WikiText; those within an article have more signs.
_HEADING = re.compile(r" = .*[^=] = \s*")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class _Source:
    rows: Dataset  # one column of text
    documents: bool  # rows are documents (an end-of-text token follows each), not lines of one
    share: _Share


def load_blocks(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    split: Split = "train",
    text_column: str | None = None,
    validation: str | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    teacher: PreTrainedModel | None = None,
    packed: bool = False,
) -> Dataset:
    """Return the blocks of one split: a Dataset whose column "input_ids" is [block_size] int32.

    spec: "demo", "wikitext-2", "wikitext-103", a file (.txt, .jsonl, .parquet), or the id of a
    text set on the Hub, with ":config" after it where it has several. A file wins over an id.
    `attnopt.teacher_text.SYNTAX` is text that `teacher` writes, each block one text; with prompts
    (one of the specs above) only the train split is, and the others are those of the prompts' text,
    so that numbers on them compare with those of any other run.
    split: a file is "train" up to its last tenth of blocks, "validation" in that tenth, and
    "test" as a whole: testing on a file means a file that training never saw. The demo's test
    split is its validation split. Sets on the Hub use their own splits, and where they have no
    validation split the last tenth of train.
    text_column: of .jsonl, .parquet and Hub sets; "text", or the only column of strings, if None.
    validation: a second file, used whole for "validation"; then all of `spec` is "train".
    seed, max_tokens: keep a random choice of at most this many tokens' worth of blocks, in order.
    packed: add "position_ids" [block_size] int32, which restart at 0 with every document and every
    block, so that no token sees another document. The blocks are the same. Rows of .jsonl, .parquet
    and Hub sets are documents. Of lines (.txt, WikiText) articles are, that begin with a level-one
    heading of WikiText, " = Title = " between blank lines; and without any what those separate. Of
    text that the teacher writes every block is one document as it is.

    Raises UserError when the source cannot be read or holds less than one block.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if block_size < 1:
        raise UserError(f"the block size must be at least 1 token; got {block_size}")
    asked = parse(spec)
    if asked is not None:
        settings = {"text_column": text_column, "validation": validation}
        if split == "train" or (asked.prompts is None and not (validation and split != "test")):
            return _written(asked, tokenizer, teacher, block_size, split, max_tokens, settings)
        spec = asked.prompts or spec
    source = _open(spec, split, text_column, validation)
    rows = _tokenize(source, tokenizer)
    begins = _beginnings(source, rows) if packed else None
    blocks = _cut(rows.flatten().cast(pa.int32()), block_size, begins)
    held_out = max(1, round(HELD_OUT_FRACTION * len(blocks)))
    if source.share == "head":
        blocks = blocks.select(range(len(blocks) - held_out))
    elif source.share == "tail":
        blocks = blocks.select(range(len(blocks) - held_out, len(blocks)))
    if max_tokens is not None and (keep := max(1, max_tokens // block_size)) < len(blocks):
        blocks = blocks.select(sorted(random.Random(seed).sample(range(len(blocks)), keep)))
    if len(blocks) == 0:
        raise UserError(
            f"--data {spec} holds too little text for its {split} split: less than one block of "
            f"{block_size} tokens; pass a smaller --block-size or more text"
        )
    return blocks


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows of "input_ids" to {"input_ids", "labels"} [B, T] int64, padding on the right.

    "attention_mask" [B, T] is there only when rows differ in length, and labels are -100 where it
    is 0. Rows may bring their own "attention_mask" or "labels". The "position_ids" of packed rows
    [B, T] are passed on; then labels are -100 where they are 0: what a document begins with does
    not follow from the one before it.

    Raises ValueError for packed rows of different lengths.
    """
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[i, :count] = torch.as_tensor(row["input_ids"])
        mask[i, :count] = torch.as_tensor(row.get("attention_mask", 1))
        labels[i, :count] = torch.as_tensor(row.get("labels", row["input_ids"]))
    labels.masked_fill_(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels}
    if "position_ids" in rows[0]:
        if not mask.all():
            raise ValueError("packed rows (with position_ids) must be of one length, unpadded")
        positions = torch.as_tensor([list(row["position_ids"]) for row in rows])
        batch |= {"position_ids": positions, "labels": labels.masked_fill(positions == 0, -100)}
    return batch if bool(mask.all()) else {**batch, "attention_mask": mask}


def is_file(spec: str) -> bool:
    """Return whether a data spec names a local file rather than the demo or a set on the Hub.

    Of text written by the teacher it says so of the prompts.
    """
    asked = parse(spec)
    if asked is not None:
        return asked.prompts is not None and is_file(asked.prompts)
    if spec == "demo" or spec in WIKITEXT:
        return False
    looks = Path(spec).suffix in FILE_BUILDERS or ("." in spec and "/" not in spec)
    return looks or not _HUB_ID.fullmatch(spec) or Path(spec).expanduser().exists()


def _written(
    asked: TeacherText,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    block_size: int,
    split: Split,
    max_tokens: int | None,
    settings: dict[str, Any],
) -> Dataset:
    if teacher is None:
        raise UserError("text of the teacher is for `attnopt distill`: there is no teacher here")
    prompts, tokens = None, asked.tokens
    if split != "train":
        tokens = max(1, round(HELD_OUT_FRACTION * tokens))
    if asked.prompts is not None:
        source = load_blocks(asked.prompts, tokenizer, block_size=block_size, **settings)
        length = max(1, block_size // PROMPT_SHARE)
        prompts = source.with_format("torch")["input_ids"][:][:, :length]
    texts = sample_texts(
        teacher,
        tokenizer,
        asked,
        count=max(1, min(tokens, max_tokens or tokens) // block_size),
        length=block_size,
        part="train" if split == "train" else "held-out",
        prompts=prompts,
    )
    return _cut(pa.array(texts.flatten().numpy()), block_size)


def _open(spec: str, split: Split, column: str | None, validation: str | None) -> _Source:
    if validation is not None and split == "validation":
        return _open_file(validation, "all", column)
    if is_file(spec):
        head: _Share = "head" if validation is None else "all"
        shares: dict[str, _Share] = {"train": head, "validation": "tail", "test": "all"}
        return _open_file(spec, shares[split], column)
    if spec == "demo":
        return _Source(Dataset.from_dict({"text": docstring_documents(split)}), True, "all")
    return _open_hub(spec, split, column, cut=validation is None)


def _open_file(spec: str, share: _Share, column: str | None) -> _Source:
    path, endings = Path(spec).expanduser(), ", ".join(FILE_BUILDERS)
    if not path.exists():
        raise UserError(f"--data {spec}: there is no such file (supported endings: {endings})")
    if path.suffix not in FILE_BUILDERS or not path.is_file():
        kind = "a folder" if path.is_dir() else "not a kind of file that can be read"
        raise UserError(f"--data {spec}: this is {kind}; supported are files ending in {endings}")
    if path.stat().st_size == 0:
        raise UserError(f"--data {spec}: the file is empty")
    builder, options = FILE_BUILDERS[path.suffix]
    try:
        rows = load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # the builders wrap what went wrong in errors of many kinds
        cause = error.__cause__ or error
        raise UserError(
            f"--data {spec}: cannot be read as {path.suffix}: {one_line(cause)}"
        ) from error
    is_text = path.suffix == ".txt"
    return _Source(_text_column(rows, spec, "text" if is_text else column), not is_text, share)


def _open_hub(spec: str, split: Split, column: str | None, cut: bool) -> _Source:
    splits = _load_from_hub(spec)
    has_validation = any(name in splits for name in _SPLIT_NAMES["validation"])
    own = next((name for name in _SPLIT_NAMES[split] if name in splits), None)
    if own is None and "train" not in splits:
        raise UserError(f"--data {spec} has no {split} split; it has {', '.join(splits)}")
    share: _Share = "tail" if own is None else "all"
    if split == "train" and cut and not has_validation:
        share = "head"
    rows = _text_column(splits[own or "train"], spec, column)
    return _Source(rows, spec not in WIKITEXT, share)


def _load_from_hub(spec: str) -> DatasetDict:
    name, _, config = WIKITEXT.get(spec, spec).partition(":")
    local = "a local file works without network: --data PATH (.txt, .jsonl or .parquet)"
    reason = why_unreachable("dataset", name, flag="--data")
    if reason is not None and not constants.HF_HUB_OFFLINE:
        raise UserError(
            f"--data {spec}: no such file, and the Hub cannot be reached ({reason}); {local}; "
            "or set HF_HUB_OFFLINE=1 to use a copy downloaded before"
        )
    try:
        return load_dataset(name, config or None)
    except Exception as error:  # anything from a missing configuration to no cached copy
        raise UserError(f"--data {spec}: cannot be loaded: {one_line(error)}; {local}") from error


def _text_column(rows: Dataset, spec: str, column: str | None) -> Dataset:
    strings = [n for n, f in rows.features.items() if f in (Value("string"), Value("large_string"))]
    if column is None:
        column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column not in strings:
        raise UserError(
            f"--data {spec}: name its column of text with --text-column; columns of strings are: "
            f"{', '.join(strings) or 'none'}"
        )
    rows = rows.select_columns(column)
    return rows if column == "text" else rows.rename_column(column, "text")


def _tokenize(source: _Source, tokenizer: PreTrainedTokenizerBase) -> pa.ListArray:
    """The tokens of each row."""
    eos = tokenizer.eos_token_id
    end = [eos] if source.documents and eos is not None else []

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch["text"]]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*ids, *end] for ids in encoded]}

    tokens = source.rows.map(
        encode, batched=True, remove_columns=source.rows.column_names, desc="Tokenizing"
    )
    if len(tokens) == 0:
        return pa.array([], pa.list_(pa.int32()))
    return tokens.with_format("arrow")["input_ids"][:].combine_chunks()


def _beginnings(source: _Source, rows: pa.ListArray) -> np.ndarray:
    """Places in the sequence of all tokens where documents begin, ascending, int64."""
    lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False).astype(np.int64)
    places = np.cumsum(lengths) - lengths  # of each row's first token
    if source.documents:
        return places
    lines = [line or "" for line in source.rows["text"]]
    blank = [True, *(not line.strip() for line in lines), True]  # line i at i + 1
    begins = [
        _HEADING.fullmatch(line) is not None and blank[i] and blank[i + 2]
        for i, line in enumerate(lines)
    ]
    if not any(begins):
        begins = [blank[i] and not blank[i + 1] for i in range(len(lines))]
    return places[np.asarray(begins, dtype=bool)]


def _cut(tokens: pa.Array, block_size: int, begins: np.ndarray | None = None) -> Dataset:
    count = len(tokens) // block_size * block_size
    columns = {"input_ids": tokens.slice(0, count)}
    if begins is not None:
        latest = np.zeros(count, np.int32)  # the last place at or before a token where one begins
        for places in (begins[begins < count], np.arange(0, count, block_size)):
            latest[places] = places
        np.maximum.accumulate(latest, out=latest)
        columns["position_ids"] = pa.array(np.arange(count, dtype=np.int32) - latest)
    blocks = [pa.FixedSizeListArray.from_arrays(values, block_size) for values in columns.values()]
    return Dataset(pa.table(dict(zip(columns, blocks, strict=True))))

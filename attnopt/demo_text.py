"""Text that every Python install carries: the docstrings of the standard library, read as bytes.

The demonstration needs real prose without a download, and a tokenizer without one. Both are here:
``docstring_documents`` walks the standard library's source files, and ``byte_tokenizer`` has one
token per byte and one that ends a document.
"""

import ast
import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnopt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Not part of every installation, or not prose.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib"})
_HELD_OUT_SHARE = 20  # one document in twenty is held out


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with 257 tokens: the 256 bytes of UTF-8, then end of text.

    It saves and loads like any other (``save_pretrained``, ``AutoTokenizer.from_pretrained``).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def docstring_documents(split: str) -> list[str]:
    """Return the docstrings of one split, one document per module, in a fixed order.

    split: "train", or "validation" (the same as "test"): one module in twenty, chosen by a hash
    of its name, so that the choice is the same on every machine.

    Raises UserError where Python was installed without the source of its standard library.
    """
    documents = _documents()
    if not documents:
        raise UserError(
            "--data demo reads the source files of Python's standard library, and this Python "
            "has none: pass --data PATH (.txt, .jsonl or .parquet) instead"
        )
    wanted = split != "train"
    return [text for name, text in documents if _held_out(name) == wanted]


def _held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_SHARE == 0


@functools.cache  # three seconds of parsing, and both splits need all of it
def _documents() -> tuple[tuple[str, str], ...]:
    return tuple(_modules())


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()  # many methods repeat their parent's docstring
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and (text := _docstrings(path, seen)):
            yield relative.as_posix(), text
    # The language reference that help() prints: one document per topic.
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            yield f"topic {topic}", text.strip() + "\n"


def _docstrings(path: Path, seen: set[str]) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""  # files that are not meant to be parsed, such as templates
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text not in seen:
                seen.add(text)
                parts.append(text.strip() + "\n\n")
    return "".join(parts)

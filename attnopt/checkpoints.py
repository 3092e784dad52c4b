"""Checkpoints that are either whole or not taken for one, and files that are never half written.

A checkpoint folder is whole once it holds `complete.json`, written last and by renaming: it lists
the folder's files with their sizes. A folder without it, or whose files have other sizes, was cut
short by a kill, a full disk or a copy that broke off, and is passed over.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from attnopt.errors import UserError

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# What a failed write raises: the system, torch.save and safetensors each have their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)

logger = logging.get_logger(__name__)


def cache_folder() -> Path:
    """Where this package keeps what it would rather not make twice; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnopt"


def prepare_folder(folder: Path) -> Path:
    """Create a folder and return it; raise UserError where nothing can be written in it."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"attnopt")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that path holds either its old content or all of the new one.

    Raises UserError when the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, None where there is no file.

    Raises UserError for a file that cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder under a temporary name, then put it in the place of `folder`.

    Raises UserError, with the old folder as it was, when that fails.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(folder, error) from error


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint whole, after all of its files have reached the disk."""
    sizes = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write_json(checkpoint / MARKER, sizes)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint folder holds every byte that was written to it."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def newest_complete(folder: Path, below: int | None = None) -> Path | None:
    """Return the newest whole checkpoint-N of a folder, with a warning for each newer torn one.

    below: take only those with N below it.
    """
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    for step, checkpoint in sorted(found, reverse=True):
        if below is not None and step >= below:
            continue
        if is_complete(checkpoint):
            return checkpoint
        logger.warning(f"skipping {checkpoint}: it is incomplete or was truncated")
    return None


def check_model_folder(folder: Path) -> None:
    """Raise UserError for a checkpoint-N that is not whole, before a model is loaded from it."""
    if _NAME.fullmatch(folder.name) and folder.is_dir() and not is_complete(folder):
        raise UserError(f"the checkpoint {folder} is incomplete or was truncated; use another")


def discard(checkpoint: Path, error: Exception) -> UserError:
    """Remove a checkpoint whose writing failed; return the error to raise instead."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    older = newest_complete(checkpoint.parent)
    hint = f"; the last whole one is {older.name}" if older is not None else ""
    message = cannot_write(checkpoint, error)
    return UserError(f"{message}{hint}")


def cannot_write(path: Path, error: Exception) -> UserError:
    """Return the error to raise where a file could not be written, with the space left there."""
    reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    try:
        free = shutil.disk_usage(path.parent).free / 2**20
    except OSError:
        return UserError(f"cannot write {path}: {reason}")
    return UserError(f"cannot write {path}: {reason} ({free:.0f} MiB free on that disk)")

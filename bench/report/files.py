"""Results files as the report reads them: JSON whose every key that a page needs is there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnopt.bench.growth import SETTING
from attnopt.errors import UserError

FORMAT = 1
CELL = (*SETTING, "N", "contender", "status")
TIMED = ("times", "bytes", "errors", "limit", "flops", "minimal_bytes")
CONTENDER = ("label", "mechanism", "level", "ours", "library", "version", "partner", "note")
PREDICTED = ("op", *SETTING, "N", "chip", "seconds", "bound", "dense_seconds")
# Kind of a file -> its lists of rows with the keys that each row needs.
ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "scaling": {"cells": CELL},
    "gpu-check": {"cells": CELL, "sanitizer": ("tool", "status"), "parts": ("name", "status")},
    "roofline": {"rows": PREDICTED},
}


def read_results(path: Path) -> dict[str, Any]:
    """Read one results file and check that what the report needs is there.

    Args:
        path: a JSON file of the kind "scaling", "gpu-check" or "roofline".

    Returns:
        The record.

    Raises:
        UserError: the file cannot be read, is no JSON, is of another kind or lacks a key.
    """
    record = _load(path)
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in ROWS:
        expected = ", ".join(ROWS)
        raise UserError(f"{path}: key 'kind' must be one of {expected}; got {kind!r}")
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: key 'format' must be {FORMAT}, got {record.get('format')!r}")
    for key, needed in ROWS[kind].items():
        _rows(record, key, needed, path)
    if kind == "gpu-check":
        _rows(_member(record, "numerics", dict, path), "cases", ("case", "status"), path)
    if kind == "roofline":
        _member(record, "assumptions", dict, path)
        _check_numbers(record["rows"], ("seconds", "dense_seconds"), "rows", path)
        return record
    for key in ("machine", "versions", "contenders"):
        _member(record, key, dict, path)
    _needs(record["machine"], ("device", "name"), "machine", path)
    for name, about in record["contenders"].items():
        _needs(about, CONTENDER, f"contenders.{name}", path)
    _check_cells(record, path)
    return record


def _load(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} must hold one JSON object, got a {type(record).__name__}")
    return record


def _member(record: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    if not isinstance(record.get(key), kind):
        what = "an object" if kind is dict else "a list"
        raise UserError(f"{path}: key {key!r} must be {what}, got {record.get(key)!r:.60}")
    return record[key]


def _needs(row: Any, keys: Sequence[str], where: str, path: Path) -> None:
    lost = [key for key in keys if not isinstance(row, dict) or key not in row]
    if lost:
        raise UserError(f"{path}: {where} has no key {lost[0]!r}")


def _rows(record: Mapping[str, Any], key: str, needed: Sequence[str], path: Path) -> None:
    for i, row in enumerate(_member(record, key, list, path)):
        _needs(row, needed, f"{key}[{i}]", path)


def _check_numbers(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], where: str, path: Path
) -> None:
    for i, row in enumerate(rows):
        for key in keys:
            values = row[key] if isinstance(row[key], list) else [row[key]]
            if not values or not all(_is_positive(value) for value in values):
                raise UserError(
                    f"{path}: {where}[{i}].{key} must be positive seconds, got {row[key]!r:.60}"
                )


def _check_cells(record: Mapping[str, Any], path: Path) -> None:
    timed, seen = [], set()
    for i, cell in enumerate(record["cells"]):
        if cell["contender"] not in record["contenders"]:
            name = cell["contender"]
            raise UserError(f"{path}: cells[{i}].contender {name!r} is not among 'contenders'")
        key = tuple(str(cell[k]) for k in ("contender", *SETTING, "N"))
        if key in seen:
            raise UserError(f"{path}: cells[{i}] repeats the cell of {' '.join(key)}")
        seen.add(key)
        if cell["status"] == "ok":
            _needs(cell, TIMED, f"cells[{i}]", path)
            timed.append(cell)
    _check_numbers(timed, ("times",), "timed cells", path)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0

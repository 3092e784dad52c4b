"""Which Triton kernels there are, read from the sources: what tools must not miss."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path


def written_kernels(op: str) -> list[str]:
    """Names of the kernels of an op, sorted: functions of `triton_*.py` that end in `_kernel`.

    Args:
        op: "lastk", "favor" or "nsa".
    """
    spec = find_spec(f"attnopt.kernels.{op}")
    assert spec is not None and spec.origin is not None
    return sorted(
        node.name
        for path in Path(spec.origin).parent.glob("triton_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    )

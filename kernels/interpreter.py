"""Triton's interpreter, which runs kernels on CPU tensors: made exact for bfloat16, and faster.

The interpreter keeps bf16 values as raw 16-bit integers. It multiplies those integers in `dot`, and
truncates where hardware rounds to nearest even (seen in Triton 3.6 and 3.9). Here both are exact.

It also replaces the functions of `triton.language` anew at every call of a device function, which
takes a third of its time. Here it does so once per launch and module.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np


@functools.cache
def prepare_interpreter() -> None:
    """Make the interpreter multiply and round bfloat16 as hardware does; once per process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    builder.create_dot = _exact_dot(builder.create_dot, tl, handle)
    builder.cast_impl = _exact_cast(builder.cast_impl, tl, handle)
    _patch_once_per_launch(interpreter)


def _patch_once_per_launch(interpreter: Any) -> None:
    """Spare the patches of `triton.language` that are in place already."""
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function):  # noqa: ANN001
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(module)
        scope = patch(function)
        restore = scope.restore

        def restore_and_forget():  # of a launch; scopes of device functions are not restored
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once


def _bits_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_to_bits(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _exact_dot(create_dot, tl: ModuleType, handle):  # noqa: ANN001
    @functools.wraps(create_dot)
    def repaired(self, a, b, *rest):  # noqa: ANN001, ANN002
        def widen(x):  # noqa: ANN001
            is_bf16 = x.dtype.scalar == tl.bfloat16
            return handle(_bits_to_float(x.data), tl.float32) if is_bf16 else x

        return create_dot(self, widen(a), widen(b), *rest)

    return repaired


def _exact_cast(cast_impl, tl: ModuleType, handle):  # noqa: ANN001
    @functools.wraps(cast_impl)
    def repaired(self, src, dst_type):  # noqa: ANN001
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast_impl(self, handle(_bits_to_float(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            values = np.asarray(src.data, dtype=np.float32)
            return handle(_float_to_bits(values), target)
        return cast_impl(self, src, dst_type)

    return repaired

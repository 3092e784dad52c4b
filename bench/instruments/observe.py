"""Watch kernels run in Triton's interpreter: launches, programs, loads, stores, dots, exponentials.

    with observing(observer):
        case.run(case.make())

An observer is a subclass of `Observer` that overrides what it wants to hear. Triton must have been
imported with `TRITON_INTERPRET=1`, and ops must launch Triton (`attnopt.testing.force_triton`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

Index = tuple[int, int, int]  # of a program in its grid


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its arguments by name (tensors on the CPU) and its grid."""

    kernel: str
    arguments: dict[str, Any]
    grid: Index


@dataclass(frozen=True)
class Access:
    """A load or store of one tile.

    Attributes:
        addresses: byte addresses of all lanes, uint64.
        mask: which lanes are active, same shape.
        itemsize: bytes of a lane.
    """

    addresses: np.ndarray
    mask: np.ndarray
    itemsize: int

    def active(self) -> np.ndarray:
        """Addresses of the active lanes, flat."""
        return self.addresses[self.mask]


class Observer:
    """Hears what happens; every method does nothing here. Loads and stores come before they run.

    Where a method may return something, that happens instead; None changes nothing.
    """

    def tensor(self, name: str, tensor: Tensor) -> Any:
        """A tensor argument of the launch that follows; returns what the kernel gets for it."""
        return tensor

    def launch_begins(self, launch: Launch) -> None:
        """A kernel is launched; its programs follow."""

    def program_begins(self, index: Index) -> Index | None:
        """The next program of the launch starts; may return the index of another."""

    def load(self, access: Access) -> Access | None:
        """A tile is about to be loaded; may return other addresses and lanes."""

    def store(self, access: Access, value: np.ndarray) -> Access | None:
        """A tile is about to be stored; may return other addresses and lanes."""

    def atomic(self, access: Access, floating: bool) -> Access | None:
        """A tile is about to be updated atomically; may return other addresses and lanes."""

    def dot(self, rows: int, columns: int, inner: int) -> None:
        """A matrix product `[rows, inner] @ [inner, columns]`."""

    def exponentials(self, count: int) -> None:
        """`exp` or `exp2` of so many numbers."""

    def launch_ends(self) -> bool | None:
        """All programs of the launch have run; True runs it once more, from `tensor` on."""


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """Let `observer` hear every launch inside this context."""
    from triton.runtime import interpreter

    from attnopt.kernels.interpreter import prepare_interpreter

    prepare_interpreter()  # before the hooks, so that they lie on top of it
    builder = interpreter.InterpreterBuilder
    in_programs = _program_hooks(observer, interpreter.TensorHandle)
    hooks = {(builder, name): hook for name, hook in in_programs.items()}
    hooks |= _launch_hooks(observer, interpreter)
    originals = {place: getattr(*place) for place in hooks}
    try:
        for (owner, name), hook in hooks.items():
            setattr(owner, name, hook(originals[owner, name]))
        yield observer
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def _launch_hooks(observer: Observer, interpreter: ModuleType) -> dict[tuple[Any, str], Callable]:
    """Where the interpreter launches -> what wraps the original."""
    current: dict[str, Any] = {}

    def launch(original: Callable) -> Callable:
        def hooked(own, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003
            current["kernel"] = own.fn.__name__
            while True:
                original(own, *args, **kwargs)
                if not observer.launch_ends():
                    return

        return hooked

    def host_arguments(original: Callable) -> Callable:
        def swap(name, value):  # noqa: ANN001
            return observer.tensor(name, value) if isinstance(value, Tensor) else value

        def hooked(own, args, kwargs):  # noqa: ANN001
            args, kwargs = original(own, args, kwargs)
            current["arguments"] = inspect.getcallargs(own.fn, *args, **kwargs)
            names = inspect.signature(own.fn).parameters
            return (
                [swap(name, value) for name, value in zip(names, args, strict=False)],
                {name: swap(name, value) for name, value in kwargs.items()},
            )

        return hooked

    def grid(original: Callable) -> Callable:
        def hooked(own, *sizes):  # noqa: ANN001, ANN002
            original(own, *sizes)
            observer.launch_begins(Launch(current["kernel"], current["arguments"], sizes))

        return hooked

    return {
        (interpreter.GridExecutor, "__call__"): launch,
        (interpreter.GridExecutor, "_init_args_hst"): host_arguments,
        (interpreter.InterpreterBuilder, "set_grid_dim"): grid,
    }


def _access(pointers, mask: np.ndarray) -> Access:  # noqa: ANN001
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    active = np.asarray(mask).astype(bool)
    return Access(np.broadcast_to(pointers.data, active.shape), active, itemsize)


def _program_hooks(observer: Observer, handle: type) -> dict[str, Callable]:
    """Name of a method of the interpreter's builder -> what wraps the original."""

    spare = np.zeros(1, np.uint64)

    def moved(access: Access | None, pointers, mask):  # noqa: ANN001
        if access is None:
            return pointers, mask
        return handle(access.addresses, pointers.dtype), handle(access.mask, mask.dtype)

    def load(original: Callable) -> Callable:
        def hooked(own, pointers, mask, *rest):  # noqa: ANN001, ANN002
            access = observer.load(_access(pointers, mask.data))
            return original(own, *moved(access, pointers, mask), *rest)

        return hooked

    def store(original: Callable) -> Callable:
        def hooked(own, pointers, value, mask, *rest):  # noqa: ANN001, ANN002
            access = observer.store(_access(pointers, mask.data), value.data)
            pointers, mask = moved(access, pointers, mask)
            return original(own, pointers, value, mask, *rest)

        return hooked

    def update(original: Callable) -> Callable:
        def hooked(own, kind, pointers, value, mask, *rest):  # noqa: ANN001, ANN002
            floating = pointers.get_element_ty().is_floating()
            access = observer.atomic(_access(pointers, mask.data), floating)
            pointers, mask = moved(access, pointers, mask)
            return original(own, kind, pointers, value, mask, *rest)

        return hooked

    def exchange(original: Callable) -> Callable:
        def hooked(own, pointers, *rest):  # noqa: ANN001, ANN002
            everywhere = np.ones_like(pointers.data, bool)
            floating = pointers.get_element_ty().is_floating()
            access = observer.atomic(_access(pointers, everywhere), floating)
            if access is not None:  # it takes no mask: the other lanes meet in a spare place
                places = np.where(access.mask, access.addresses, np.uint64(spare.ctypes.data))
                pointers = handle(places, pointers.dtype)
            return original(own, pointers, *rest)

        return hooked

    def dot(original: Callable) -> Callable:
        def hooked(own, a, b, *rest):  # noqa: ANN001, ANN002
            observer.dot(a.data.shape[-2], b.data.shape[-1], a.data.shape[-1])
            return original(own, a, b, *rest)

        return hooked

    def exponential(original: Callable) -> Callable:
        def hooked(own, arg):  # noqa: ANN001
            observer.exponentials(np.asarray(arg.data).size)
            return original(own, arg)

        return hooked

    def program(original: Callable) -> Callable:
        def hooked(own, *index):  # noqa: ANN001, ANN002
            other = observer.program_begins(index)
            return original(own, *(index if other is None else other))

        return hooked

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": update,
        "create_atomic_cas": exchange,
        "create_dot": dot,
        "create_exp": exponential,
        "create_exp2": exponential,
        "set_grid_idx": program,
    }

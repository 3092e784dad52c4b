"""Count what kernels move and compute while they run in Triton's interpreter.

    with force_triton(), counting() as traffic:
        op(...)
    traffic.kernels["favor_states_kernel"].tensors["k_ptr"].program_loaded

Addresses belong to the tensor arguments of a launch: where several views share a storage (q, k and
v of one projection), to the view that has an element there. PyTorch operations between launches are
counted too, under the name `PYTORCH`: each as one pass over its inputs and its results, which is
the least that it can be (a sort takes several).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.bench.instruments.observe import Access, Launch, Observer, observing

SECTOR = 32  # bytes that memory and caches hand out together
PYTORCH = "(PyTorch)"
# They move no bytes. `set_` is how the interpreter passes tensors on.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
_OVERWRITES = {"copy_", "fill_", "zero_"}  # the first argument is not read
_FILLS = {f"new_{value}" for value in ("zeros", "ones", "full")} | {
    f"{value}_like" for value in ("zeros", "ones", "full", "randn")
}  # likewise: only its shape counts


@dataclass
class Bytes:
    """Bytes of one kernel at one tensor argument, over all launches.

    Attributes:
        loaded: by every lane that is not masked.
        stored: likewise.
        program_loaded: distinct ones of each program: what comes from L2 or memory.
        program_stored: likewise.
        launch_loaded: distinct ones of each launch: what must come from memory.
        launch_stored: likewise.
        used: distinct ones of each access of a tile.
        touched: those of the sectors that each access touches.
    """

    loaded: int = 0
    stored: int = 0
    program_loaded: int = 0
    program_stored: int = 0
    launch_loaded: int = 0
    launch_stored: int = 0
    used: int = 0
    touched: int = 0


@dataclass
class Kernel:
    """What one kernel did, over all launches.

    Attributes:
        tensors: bytes by the name of the argument.
        launches: number of launches.
        programs: number of programs.
        flops: of matrix products, padding of tiles included.
        exponentials: likewise.
    """

    tensors: dict[str, Bytes] = field(default_factory=lambda: defaultdict(Bytes))
    launches: int = 0
    programs: int = 0
    flops: int = 0
    exponentials: int = 0

    def total(self, what: str) -> int:
        """Sum of one attribute of `Bytes` over the tensors."""
        return sum(getattr(tensor, what) for tensor in self.tensors.values())

    @property
    def moved(self) -> int:
        """Distinct bytes of each program, loaded and stored."""
        return self.total("program_loaded") + self.total("program_stored")

    @property
    def efficiency(self) -> float:
        """Share of the sectors' bytes that the accesses wanted; 1 where there was none."""
        touched = self.total("touched")
        return self.total("used") / touched if touched else 1.0


class _View:
    """Elements of a tensor argument, and which of them were touched."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.base, self.itemsize = name, tensor.data_ptr(), tensor.element_size()
        # the slowest dimension first, so that dividing by strides finds an element's index
        self.dims = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
        self.elements = 1 + sum(stride * (size - 1) for stride, size in self.dims)
        self.end = self.base + self.elements * self.itemsize
        self.launch = {kind: np.zeros(self.elements, bool) for kind in ("loaded", "stored")}
        self.program = {kind: np.zeros(self.elements, bool) for kind in ("loaded", "stored")}
        self.marked: list[tuple[np.ndarray, np.ndarray]] = []

    def holds(self, addresses: np.ndarray) -> bool:
        """Whether every address within the range is that of an element."""
        rest, misaligned = np.divmod(addresses - self.base, self.itemsize)
        for stride, size in self.dims:
            if stride:
                rest = rest - np.minimum(rest // stride, size - 1) * stride
        return not (rest.any() or misaligned.any())

    def mark(self, kind: str, index: np.ndarray) -> int:
        """Note distinct elements as touched; return how many are new to the program."""
        program = self.program[kind]
        fresh = index[~program[index]]
        program[fresh] = True
        self.launch[kind][fresh] = True
        self.marked.append((program, fresh))
        return fresh.size

    def next_program(self) -> None:
        """Forget what the last program touched."""
        for program, fresh in self.marked:
            program[fresh] = False
        self.marked.clear()


class Traffic(Observer):
    """Counts by kernel, in `kernels`."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = defaultdict(Kernel)
        self.launching = False
        self._views: list[_View] = []

    def launch_begins(self, launch: Launch) -> None:
        """Learn the views of the launch's tensors."""
        self.launching = True
        self._kernel = self.kernels[launch.kernel]
        self._kernel.launches += 1
        seen = set()
        for name, value in launch.arguments.items():
            if not isinstance(value, torch.Tensor) or not value.numel():
                continue
            key = value.data_ptr(), value.stride(), value.shape
            if key not in seen:  # a stand-in for what is not given, which nobody accesses
                self._views.append(_View(name, value))
            seen.add(key)

    def program_begins(self, index: tuple[int, int, int]) -> None:
        """Count it, and start its distinct bytes anew."""
        self._kernel.programs += 1
        for view in self._views:
            view.next_program()

    def load(self, access: Access) -> None:
        """Count the lanes of a load."""
        self._count("loaded", access)

    def store(self, access: Access, value: np.ndarray) -> None:
        """Count the lanes of a store."""
        self._count("stored", access)

    def atomic(self, access: Access, floating: bool) -> None:
        """Count the lanes of an update as loaded and stored."""
        self._count("loaded", access)
        self._count("stored", access)

    def dot(self, rows: int, columns: int, inner: int) -> None:
        """Count a product, a multiply-add as two."""
        self._kernel.flops += 2 * rows * columns * inner

    def exponentials(self, count: int) -> None:
        """Count them."""
        self._kernel.exponentials += count

    def launch_ends(self) -> None:
        """Sum up the distinct bytes of the launch."""
        for view in self._views:
            for kind, touched in view.launch.items():
                count = int(np.count_nonzero(touched)) * view.itemsize
                if count:
                    self._add(view.name, f"launch_{kind}", count)
        self._views.clear()
        self.launching = False

    def _count(self, kind: str, access: Access) -> None:
        addresses = access.active().astype(np.int64)
        if not addresses.size:
            return
        view, itemsize, every = self._view_of(addresses), access.itemsize, addresses.size
        addresses = _distinct(addresses)
        index = (addresses - view.base) // view.itemsize
        sectors = 1 + int(np.count_nonzero(np.diff(addresses // SECTOR)))
        self._add(view.name, kind, itemsize * every)
        self._add(view.name, f"program_{kind}", itemsize * view.mark(kind, index))
        self._add(view.name, "used", itemsize * addresses.size)
        self._add(view.name, "touched", SECTOR * sectors)

    def _add(self, tensor: str, what: str, count: int) -> None:
        record = self._kernel.tensors[tensor]
        setattr(record, what, getattr(record, what) + count)

    def _view_of(self, addresses: np.ndarray) -> _View:
        """The argument that these addresses belong to."""
        low, high = int(addresses.min()), int(addresses.max())
        fits = [view for view in self._views if view.base <= low and high < view.end]
        for some in (addresses[:1], addresses):  # one lane settles it unless elements are shared
            if len(fits) > 1:
                fits = [view for view in fits if view.holds(some)] or fits
        if not fits:
            names = ", ".join(view.name for view in self._views)
            raise ValueError(f"a kernel must access its arguments ({names}); got addresses "
                             f"{low:#x} to {high:#x}, which none of them covers")
        return fits[0]


def _distinct(addresses: np.ndarray) -> np.ndarray:
    """Sorted addresses without repetition; tiles of rows are sorted already."""
    steps = np.diff(addresses)
    if (steps > 0).all():
        return addresses
    if (steps >= 0).all():
        return addresses[np.r_[True, steps > 0]]
    return np.unique(addresses)


class _Operations(TorchDispatchMode):
    """Counts PyTorch operations outside of launches, also inside our own operators."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "attnopt":  # its Python body, so that what it calls is seen
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.traffic.launching or name in _FREE:
            return result
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if _is_tensor(x)]
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        own = [x for x in outputs if x.untyped_storage().data_ptr() not in storages]
        if not own and not func._schema.is_mutable:  # a view
            return result
        if name in _OVERWRITES | _FILLS:
            inputs = inputs[1:]
        loaded, stored = sum(map(_size, inputs)), sum(map(_size, outputs))
        kernel = self.traffic.kernels[PYTORCH]
        kernel.launches += 1
        record = kernel.tensors[name]
        for what in ("", "program_", "launch_"):
            setattr(record, f"{what}loaded", getattr(record, f"{what}loaded") + loaded)
            setattr(record, f"{what}stored", getattr(record, f"{what}stored") + stored)
        return result


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.numel() > 0


def _size(x: torch.Tensor) -> int:
    """Bytes of a tensor, what is broadcast counted once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count every launch and PyTorch operation inside this context."""
    traffic = Traffic()
    with observing(traffic), _unchecked(), _Operations(traffic):
        yield traffic


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Leave out the interpreter's check of every integer sum for overflow: a third of its time."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter_builder.options = options

"""Memory as the safety instrument sees it: addresses by argument, who touched what, poison.

Every tensor argument gets addresses of its own, 2^48 apart and far from those of real memory. An
address so says which argument it was computed from and how far from the first element it lies, and
nothing that a kernel does to it can lead into another argument. Only addresses of elements that the
argument's shape and strides hold are translated to real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

RANGE_BITS = 48  # of the addresses of one argument; real ones are shorter
POISON = 0x7FFD  # in every two bytes: NaN in any float, absurd as an integer
_POISONED = {2: POISON, 4: POISON * 0x10001, 8: POISON * 0x1000100010001}  # by bytes of an element
NOBODY, SEVERAL, ATOMIC = -1, -2, -3  # in place of a program's number
_ALLOCATORS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
    (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
)  # fmt: skip


class Argument:
    """Stands for a tensor argument of a launch and offers what the interpreter asks of a tensor.

    Attributes:
        name: of the kernel's parameter.
        tensor: the real one.
        address: of its first element, in a range of its own.
        storage: real address of its storage.
    """

    def __init__(self, name: str, tensor: Tensor, number: int) -> None:
        self.name, self.tensor, self.dtype = name, tensor, tensor.dtype
        self.itemsize = tensor.element_size()
        self.address = (number << RANGE_BITS) + (1 << (RANGE_BITS - 1))
        self.storage = tensor.untyped_storage().data_ptr()
        self._held = _held_elements(tensor)

    def data_ptr(self) -> int:
        """Address of the first element."""
        return self.address

    def untyped_storage(self) -> torch.UntypedStorage:
        """The real storage."""
        return self.tensor.untyped_storage()

    def holds(self, elements: np.ndarray) -> np.ndarray:
        """Which elements, counted from the first one, the tensor's shape and strides reach."""
        inside = elements.view(np.uint64) < self._held.size  # negative ones are huge there
        return inside & self._held.take(elements, mode="clip")

    def __str__(self) -> str:
        shape, strides = tuple(self.tensor.shape), self.tensor.stride()
        return f"the view of shape {shape} and strides {strides}"


def _held_elements(tensor: Tensor) -> np.ndarray:
    """Whether the element n behind the first one belongs to the tensor, for n up to the last."""
    if tensor.numel() == 0:
        return np.zeros(1, bool)
    shape, strides = tensor.shape, tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    held = np.zeros(last + 1, bool)
    np.lib.stride_tricks.as_strided(held, shape, strides)[...] = True
    return held


class Storage:
    """One storage during one launch: its bytes, and which programs read and wrote its elements.

    Args:
        tensor: a tensor that lies in it.
        itemsize: bytes of the largest element that an argument has there.
    """

    def __init__(self, tensor: Tensor, itemsize: int) -> None:
        self.itemsize = itemsize
        raw = torch.tensor([], dtype=torch.uint8)
        self.bytes = raw.set_(tensor.untyped_storage()).numpy()
        self._writer, self._reader = np.full((2, -(-self.bytes.size // itemsize)), NOBODY, np.int32)

    def poisoned(self, offsets: np.ndarray, itemsize: int) -> np.ndarray:
        """Which elements, at these byte offsets, hold what `poisoned_allocations` left there."""
        if itemsize not in _POISONED:
            return np.zeros(offsets.shape, bool)
        whole = self.bytes[: self.bytes.size // itemsize * itemsize].view(f"u{itemsize}")
        return whole[offsets // itemsize] == _POISONED[itemsize]

    def load(self, offsets: np.ndarray, program: int) -> tuple[np.ndarray, np.ndarray]:
        """Note a load of the elements at these byte offsets.

        Returns:
            The program whose store to each of them forbids it, and the one whose load does.
        """
        at = offsets // self.itemsize
        readers = self._reader[at]
        self._reader[at] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)
        return self._writer[at], np.full_like(readers, NOBODY)

    def store(self, offsets: np.ndarray, program: int) -> tuple[np.ndarray, np.ndarray]:
        """Note a store; returns as `load` does."""
        at = offsets // self.itemsize
        lanes = np.arange(at.size, dtype=np.int32)
        writers, readers = self._writer[at], self._reader[at]
        self._writer[at] = lanes
        meet = self._writer[at] != lanes  # two lanes of this store
        self._writer[at] = program
        readers[readers == program] = NOBODY
        return np.where(meet, program, writers), readers

    def update(self, offsets: np.ndarray, program: int) -> tuple[np.ndarray, np.ndarray]:
        """Note an atomic update, which other ones do not forbid; returns as `load` does."""
        at = offsets // self.itemsize
        writers, readers = self._writer[at], self._reader[at]
        self._writer[at] = ATOMIC
        writers[writers == ATOMIC] = NOBODY
        readers[readers == program] = NOBODY
        return writers, readers


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill with POISON what Python code allocates without writing: by `torch.empty` and its kin.

    Elements of one byte are left alone: none of their values is absurd.
    """

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args, **kwargs) -> Tensor:  # noqa: ANN002, ANN003
            tensor = allocate(*args, **kwargs)
            if tensor.element_size() in _POISONED:
                raw = torch.tensor([], dtype=torch.int16)
                raw.set_(tensor.untyped_storage()).fill_(POISON)
            return tensor

        return allocate_poisoned

    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    try:
        for owner, name, allocate in originals:
            setattr(owner, name, poisoning(allocate))
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)


def first_unwritten(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first element that is poison, or NaN that came of it; None where all is well."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    bad = tensor.isnan()
    if bits is not None:
        bad |= tensor.contiguous().view(bits) == _POISONED[tensor.element_size()]
    found = bad.nonzero()
    return tuple(found[0].tolist()) if len(found) else None

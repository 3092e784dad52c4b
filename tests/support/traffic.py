"""Bytes that Triton kernels load and store, counted in Triton's interpreter."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from triton.runtime import interpreter


@dataclass
class Bytes:
    """Bytes of one kernel: `every` lane that is not masked, and those `distinct` in a program.

    The latter is what leaves the caches: a tile that a program reads twice comes from them.
    """

    every: int = 0
    distinct: int = 0


@dataclass
class Traffic:
    """Context in which the interpreter's loads and stores are counted, by kernel in `kernels`."""

    kernels: dict[str, Bytes] = field(default_factory=lambda: defaultdict(Bytes))

    def __enter__(self) -> "Traffic":
        self._kernel, self._seen = "", defaultdict(list)
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._originals = [
            (builder, "create_masked_load", builder.create_masked_load),
            (builder, "create_masked_store", builder.create_masked_store),
            (builder, "set_grid_idx", builder.set_grid_idx),
            (executor, "__call__", executor.__call__),
        ]
        load, store, place, launch = (original for _, _, original in self._originals)

        def counted_load(own, pointers, mask, *rest):  # noqa: ANN001, ANN002
            self._count("load", pointers, mask)
            return load(own, pointers, mask, *rest)

        def counted_store(own, pointers, value, mask, *rest):  # noqa: ANN001, ANN002
            self._count("store", pointers, mask)
            return store(own, pointers, value, mask, *rest)

        def next_program(own, *index):  # noqa: ANN001, ANN002
            self._flush()
            return place(own, *index)

        def named(own, *args, **options):  # noqa: ANN001, ANN002, ANN003
            self._kernel = own.fn.__name__
            result = launch(own, *args, **options)
            self._flush()
            return result

        hooks: list[Callable] = [counted_load, counted_store, next_program, named]
        for (owner, name, _), hook in zip(self._originals, hooks, strict=True):
            setattr(owner, name, hook)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def total(self, *kernels: str) -> Bytes:
        """Sum over the kernels of these names, or over all."""
        chosen = [self.kernels[name] for name in kernels or list(self.kernels)]
        return Bytes(sum(x.every for x in chosen), sum(x.distinct for x in chosen))

    def _count(self, kind: str, pointers, mask) -> None:  # noqa: ANN001
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        self.kernels[self._kernel].every += size * addresses.size
        self._seen[kind, size].append(np.unique(addresses))

    def _flush(self) -> None:
        """End a program: what it touched counts once."""
        for (_, size), parts in self._seen.items():
            distinct = np.unique(np.concatenate(parts)).size
            self.kernels[self._kernel].distinct += size * distinct
        self._seen.clear()

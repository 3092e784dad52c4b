"""Check every load and store of the kernels that run in Triton's interpreter.

Four things are looked for; the words are those of `Finding.kind`:

    bounds, alignment   an active lane hits no element of the argument it was computed from
    unwritten           a load of memory that nobody wrote since it was allocated
    race, atomic        within a launch, an element written twice, loaded after it was written, or
                        loaded by one program and written by another; a float updated atomically
    order               other bits when the programs run in reverse or in random order

Illegal lanes are switched off, so that what follows is still checked. A launch that is clean runs
again in other orders, from the same memory. What a program wrote it may not load either: other
warps need not see it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from attnopt.bench.instruments.observe import Access, Index, Launch, Observer
from attnopt.bench.instruments.safety_memory import (
    ATOMIC,
    NOBODY,
    RANGE_BITS,
    SEVERAL,
    Argument,
    Storage,
    first_unwritten,
)


@dataclass
class Finding:
    """One thing that is wrong; `lanes` counts how often it was seen, the rest is the first time.

    Attributes:
        kind: "bounds", "alignment", "unwritten", "race", "atomic" or "order".
        kernel: its name.
        argument: name of the tensor argument.
        what: the program, the element and what is wrong with it, as a sentence.
        lanes: number of lanes.
    """

    kind: str
    kernel: str
    argument: str
    what: str
    lanes: int = 0

    def __str__(self) -> str:
        often = f" ({self.lanes:,} such lanes)" if self.lanes > 1 else ""
        return f"{self.kernel}, {self.argument}: {self.what}{often}"


@dataclass
class Count:
    """What one kernel did, over all launches; `reordered` ones repeat another in other order."""

    launches: int = 0
    reordered: int = 0
    programs: int = 0
    loaded: int = 0
    stored: int = 0


@dataclass
class _Run:
    """The launch that is on: its kernel, programs, arguments by number and their storages.

    Attributes:
        order: numbers of the programs in the order in which they run.
        later: orders in which the launch is still to run.
        before: bytes of every storage before the launch.
        after: the same after the first run.
    """

    kernel: str = ""
    grid: Index = (1, 1, 1)
    order: np.ndarray | None = None
    program: int = 0
    arguments: dict[int, Argument] = field(default_factory=dict)
    storages: dict[int, Storage] = field(default_factory=dict)
    later: list[np.ndarray] = field(default_factory=list)
    before: dict[int, np.ndarray] = field(default_factory=dict)
    after: dict[int, np.ndarray] = field(default_factory=dict)
    clean: bool = True

    def index(self, program: int) -> Index:
        """Place of a program in the grid."""
        x, y, z = np.unravel_index(program, self.grid)
        return int(x), int(y), int(z)

    def name(self, program: int) -> str:
        """A program or what stands for it, in words."""
        if program in (SEVERAL, ATOMIC):
            return "several programs" if program == SEVERAL else "an atomic update"
        index = self.index(program)
        return f"program {index if any(index[1:]) else index[0]}"


class Watch(Observer):
    """Checks every launch.

    Args:
        orders: whether to run clean launches in other orders too.
    """

    def __init__(self, orders: bool = True) -> None:
        self.orders = orders
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.counts: dict[str, Count] = defaultdict(Count)
        self._run = _Run()
        # storage -> the first kernel that got it, and as what; alive, so no address comes twice
        self._first: dict[int, tuple[str, Argument]] = {}

    def tensor(self, name: str, tensor: Tensor) -> Argument:
        """A stand-in with addresses of its own."""
        number = len(self._run.arguments) + 1
        self._run.arguments[number] = argument = Argument(name, tensor, number)
        return argument

    def launch_begins(self, launch: Launch) -> None:
        """Prepare to follow who reads and writes what."""
        run = self._run
        run.kernel, run.grid = launch.kernel, launch.grid
        sizes: dict[int, int] = defaultdict(int)
        for argument in run.arguments.values():
            sizes[argument.storage] = max(sizes[argument.storage], argument.itemsize)
            self._first.setdefault(argument.storage, (run.kernel, argument))
        for argument in run.arguments.values():
            place = argument.storage
            if place not in run.storages:
                run.storages[place] = Storage(argument.tensor, sizes[place])
        self.counts[run.kernel].launches += 1
        if run.order is not None:
            self.counts[run.kernel].reordered += 1
            return
        run.order = np.arange(np.prod(run.grid))
        if self.orders and run.order.size > 1:
            run.later = [run.order[::-1]]
            if run.order.size > 2:  # else there is no other
                run.later.append(np.random.default_rng(0).permutation(run.order))
            run.before = {place: x.bytes.copy() for place, x in run.storages.items()}

    def program_begins(self, index: Index) -> Index:
        """Replace the program by the one whose turn it is."""
        run = self._run
        assert run.order is not None
        run.program = int(run.order[np.ravel_multi_index(index, run.grid)])
        self.counts[run.kernel].programs += 1
        return run.index(run.program)

    def load(self, access: Access) -> Access:
        """Check a load."""
        self.counts[self._run.kernel].loaded += int(access.mask.sum())
        return self._check(access, "loads")

    def store(self, access: Access, value: np.ndarray) -> Access:
        """Check a store."""
        self.counts[self._run.kernel].stored += int(access.mask.sum())
        return self._check(access, "stores")

    def atomic(self, access: Access, floating: bool) -> Access:
        """Check an atomic update: of integers only."""
        return self._check(access, "updates", floating)

    def launch_ends(self) -> bool:
        """Compare memory with that after the first run, and ask for the next order."""
        run = self._run
        if run.after:
            self._compare()
        if not run.later or not run.clean:
            self._run = _Run()
            return False
        if not run.after:
            run.after = {place: x.bytes.copy() for place, x in run.storages.items()}
        for place, content in run.before.items():
            run.storages[place].bytes[...] = content
        self._run = _Run(order=run.later.pop(), later=run.later, before=run.before, after=run.after)
        return True

    def results(self, results: dict[str, Tensor]) -> None:
        """Check what an op returned: every element must have been written."""
        for name, tensor in results.items():
            index = first_unwritten(tensor.detach())
            if index is not None:
                place = tensor.untyped_storage().data_ptr()
                kernel, of = "PyTorch", name
                if place in self._first:
                    kernel, of = self._first[place][0], self._first[place][1].name
                what = f"element {list(index)} of the result {name!r} was never written, or is NaN"
                self._report("unwritten", kernel, of, what)

    def _check(self, access: Access, verb: str, floating: bool = False) -> Access:
        """Check the active lanes; return the same access at real addresses, legal lanes only."""
        lanes = access.active()
        ranges = lanes >> RANGE_BITS
        real, legal = np.zeros_like(lanes), np.zeros(lanes.shape, bool)
        for number in _distinct(ranges):
            chosen = np.flatnonzero(ranges == number)
            argument = self._run.arguments.get(int(number))
            if argument is None:
                self._say("bounds", "(unknown)", f"{verb} what no argument points to", chosen.size)
                continue
            offsets = (lanes[chosen] - np.uint64(argument.address)).view(np.int64)
            fits = self._check_place(argument, offsets, access.itemsize, verb)
            chosen, offsets = chosen[fits], offsets[fits]
            self._check_history(argument, offsets, verb, floating)
            real[chosen] = offsets.view(np.uint64) + np.uint64(argument.tensor.data_ptr())
            legal[chosen] = True
        addresses, mask = np.zeros_like(access.addresses), np.zeros_like(access.mask)
        addresses[access.mask], mask[access.mask] = real, legal
        return Access(addresses, mask, access.itemsize)

    def _check_place(self, argument: Argument, offsets: np.ndarray, itemsize: int, verb: str
                     ) -> np.ndarray:
        """Which byte offsets from the first element are those of elements."""
        elements, rest = np.divmod(offsets, argument.itemsize)
        held = argument.holds(elements)
        crooked = held & ((rest != 0) | (itemsize != argument.itemsize))
        if not held.all():
            what = f"{verb} element {elements[~held][0]}, outside {argument}"
            self._say("bounds", argument.name, what, np.count_nonzero(~held))
        if crooked.any():
            first = offsets[crooked][0]
            what = f"{verb} {itemsize} bytes from byte {first}, not an element of {argument}"
            self._say("alignment", argument.name, what, np.count_nonzero(crooked))
        return held & ~crooked

    def _check_history(self, argument: Argument, offsets: np.ndarray, verb: str, floating: bool
                       ) -> None:
        """Check legal lanes, at byte offsets, against what was done to their elements before."""
        storage = self._run.storages[argument.storage]
        places = offsets + (argument.tensor.data_ptr() - argument.storage)
        own = self._run.program
        if verb == "loads":
            writers, readers = storage.load(places, own)
        elif verb == "stores":
            writers, readers = storage.store(places, own)
        else:
            writers, readers = storage.update(places, own)
        elements = offsets // argument.itemsize
        for others, did in ((writers, "writes"), (readers, "reads")):
            bad = np.flatnonzero(others != NOBODY)
            if bad.size:
                other = int(others[bad[0]])
                who = "it" if other == own else self._run.name(other)
                what = f"{verb} element {elements[bad[0]]}, which {who} also {did}"
                self._say("race", argument.name, what, bad.size)
        if verb != "stores":
            bad = np.flatnonzero(storage.poisoned(places, argument.itemsize))
            if bad.size:
                what = f"{verb} element {elements[bad[0]]}, which nobody has written"
                self._say("unwritten", argument.name, what, bad.size)
        if floating and offsets.size:
            what = f"updates element {elements[0]} atomically: a sum of floats depends on its order"
            self._say("atomic", argument.name, what, offsets.size)

    def _compare(self) -> None:
        """Report arguments whose bits differ from those after the first run."""
        for argument in self._run.arguments.values():
            place = argument.storage
            other = np.flatnonzero(self._run.storages[place].bytes != self._run.after[place])
            if other.size:
                element = (place + int(other[0]) - argument.tensor.data_ptr()) // argument.itemsize
                what = f"element {element} has other bits when the programs run in another order"
                self._report("order", self._run.kernel, argument.name, what)

    def _say(self, kind: str, argument: str, what: str, lanes: int) -> None:
        """Report something that the program did that is on."""
        what = f"{self._run.name(self._run.program)} {what}"
        self._report(kind, self._run.kernel, argument, what, lanes)

    def _report(self, kind: str, kernel: str, argument: str, what: str, lanes: int = 1) -> None:
        key = kind, kernel, argument
        finding = self.findings.setdefault(key, Finding(*key, what))
        finding.lanes += lanes
        self._run.clean = False


def _distinct(ranges: np.ndarray) -> np.ndarray:
    """The distinct numbers; nearly always it is one."""
    if ranges.size and (ranges == ranges[0]).all():
        return ranges[:1]
    return np.unique(ranges)

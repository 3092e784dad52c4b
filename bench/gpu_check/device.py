"""Where a check runs: a GPU, or for a rehearsal the CPU with kernels in Triton's interpreter.

All that differs between the two lies here: clocks, memory, caches, and how launches are heard.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnopt.bench.memory import forget_peak, resident
from attnopt.kernels.dispatch import force_backend

Call = Callable[[], object]
Launched = dict[str, dict[str, Any]]
PROFILED = 12  # rows of a profile
QUEUE = 20  # calls that may wait on a GPU: with 30 launches each they fit its queue of 1024


class Device:
    """The CPU: one thread, kernels interpreted."""

    clock_name = "CPU seconds"
    cache_bytes = 2**12  # what timed inputs outgrow: a rehearsal rotates among some too

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    @staticmethod
    def of(device: str | torch.device) -> Device:
        """The Device of a torch device."""
        device = torch.device(device)
        return Gpu(device) if device.type == "cuda" else Device(device)

    def low_precision(self) -> torch.dtype:
        """The 16-bit dtype that the device is good at."""
        return torch.bfloat16

    def synchronize(self) -> None:
        """Wait for what was launched; raises what it ended with."""

    def free_memory(self) -> int:
        """Bytes that tensors may still take."""
        return psutil.virtual_memory().available

    def release(self) -> None:
        """Give back memory that no tensor holds."""
        gc.collect()

    def seconds(
        self, calls: Sequence[Call], count: int, lead: float = 0.0
    ) -> tuple[float, float]:
        """Time `count` calls, taking turns, one after another.

        Args:
            calls: what is timed; the same work on different data.
            count: how many of them.
            lead: what the host takes to launch one, where that is known.

        Returns:
            Seconds of the device per call, and seconds of the host to launch one.
        """
        start = time.process_time()
        for i in range(count):
            calls[i % len(calls)]()
        seconds = (time.process_time() - start) / count
        return seconds, seconds

    def peak(self, call: Call) -> int:
        """Bytes that one call needs at most, above what was allocated before."""
        forget_peak()
        before = resident("VmRSS") or 0
        call()
        return max(0, (resident("VmHWM") or 0) - before)

    def launching(self) -> AbstractContextManager:
        """Let backend="auto" run what it runs on a GPU."""
        return force_backend("triton")

    def profile(self, call: Call) -> list[dict[str, Any]]:
        """What one call spends its time on: "name", "calls" and "microseconds", longest first."""
        return _profile(call, ProfilerActivity.CPU, DeviceType.CPU, "self_cpu_time_total")

    @contextlib.contextmanager
    def hearing(self) -> Iterator[Launched]:
        """Count the launches of Triton kernels by name."""
        from triton.runtime.interpreter import GridExecutor

        heard: Launched = {}

        def hear(own, *args, **options):  # noqa: ANN001, ANN002, ANN003
            _count(heard, own.fn.__name__)
            return launch(own, *args, **options)

        launch, GridExecutor.__call__ = GridExecutor.__call__, hear
        try:
            yield heard
        finally:
            GridExecutor.__call__ = launch


class Gpu(Device):
    """A CUDA device, through torch."""

    clock_name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cuda", device.index or 0))
        torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.cache_bytes = properties.L2_cache_size

    def low_precision(self) -> torch.dtype:
        """bf16 from Ampere on; before, it has no instructions."""
        ampere = torch.cuda.get_device_capability(self.torch_device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16

    def synchronize(self) -> None:
        """Wait for what was launched; raises what it ended with."""
        torch.cuda.synchronize(self.torch_device)

    def free_memory(self) -> int:
        """Bytes that tensors may still take, those that torch keeps in reserve among them."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        reserved = torch.cuda.memory_reserved(self.torch_device)
        return free + reserved - torch.cuda.memory_allocated(self.torch_device)

    def release(self) -> None:
        """Give back memory that no tensor holds."""
        gc.collect()
        torch.cuda.empty_cache()

    def seconds(
        self, calls: Sequence[Call], count: int, lead: float = 0.0
    ) -> tuple[float, float]:
        """Time `count` calls back to back on the GPU, see Device.

        The GPU first spins until the host has launched them, so that no gap of the host counts.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        torch.cuda._sleep(int(2e9 * min(0.05, 1.5 * count * lead + 5e-5)))  # cycles
        begin.record()
        started = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        host = (time.perf_counter() - started) / count
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count, host

    def peak(self, call: Call) -> int:
        """Bytes that one call needs at most, above what was allocated before."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def launching(self) -> AbstractContextManager:
        """Let backend="auto" choose."""
        return contextlib.nullcontext()

    def profile(self, call: Call) -> list[dict[str, Any]]:
        """Kernels of one call: "name", "calls" and "microseconds", longest first."""
        return _profile(call, ProfilerActivity.CUDA, DeviceType.CUDA, "self_device_time_total")

    @contextlib.contextmanager
    def hearing(self) -> Iterator[Launched]:
        """Count the launches of Triton kernels by name, with registers and spills of each."""
        from triton.runtime.jit import JITFunction

        heard: Launched = {}

        def hear(own, *args, **options):  # noqa: ANN001, ANN002, ANN003
            kernel = launch(own, *args, **options)
            entry = _count(heard, own.fn.__name__)
            for key in ("n_regs", "n_spills"):
                entry[key] = max(entry.get(key, 0), getattr(kernel, key, None) or 0)
            return kernel

        launch, JITFunction.run = JITFunction.run, hear
        try:
            yield heard
        finally:
            JITFunction.run = launch


class Clock:
    """Times one contender in rounds of equal length, warmed up.

    Attributes:
        host_seconds: what the host took to launch a call in the last round.
    """

    def __init__(self, device: Device, calls: Sequence[Call], target: float = 5e-3) -> None:
        """Warm up, and choose how many calls fill a round of `target` seconds."""
        self._device, self._calls = device, calls
        device.seconds(calls, len(calls))
        seconds, self.host_seconds = device.seconds(calls, 1)
        self._count = min(QUEUE, max(1, math.ceil(target / max(seconds, 1e-9))))

    def round(self) -> float:
        """Seconds per call of one round."""
        seconds, self.host_seconds = self._device.seconds(
            self._calls, self._count, self.host_seconds
        )
        return seconds


def _profile(
    call: Call, activity: ProfilerActivity, kind: DeviceType, time_of: str
) -> list[dict[str, Any]]:
    with profile(activities=[activity]) as profiler:
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    found = [
        {"name": x.key[:120], "calls": x.count, "microseconds": float(getattr(x, time_of))}
        for x in profiler.key_averages() if x.device_type == kind
    ]  # fmt: skip
    return sorted(found, key=lambda row: -row["microseconds"])[:PROFILED]


def _count(heard: Launched, name: str) -> dict[str, Any]:
    entry = heard.setdefault(name, {"launches": 0})
    entry["launches"] += 1
    return entry

"""One cell of a scaling run on a CPU: a process that prepares a call and makes it when told.

A fresh process per cell keeps one contender's memory and caches from the next; several wait at the
same time, so that their calls can be timed in turn. Processes are forked from a server that has
imported torch already, which costs milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import signal
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from attnopt.bench.contenders.base import Shape
from attnopt.bench.memory import forget_peak, release_freed, resident
from attnopt.errors import UserError

AT_LEAST = 0.02  # seconds of calls behind one time
OUT_OF_MEMORY = "out of memory"
NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")
SMALL = 64  # tokens of the call that loads what is loaded once


class Worker:
    """A cell's process, as the scheduler sees it."""

    def __init__(self, contender: str, phase: str, shape: Shape, dtype: str, memory: int) -> None:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            raise UserError("attnopt bench needs a system that can fork: Linux, macOS or WSL")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["attnopt.bench.worker", "attnopt.bench.preload"])
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, contender, phase, shape, dtype, memory)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, timeout: float | None = None) -> dict[str, Any]:
        """Ask for "ready", "prepare", "time" or "check"; {"error": why} where it failed."""
        try:
            self._pipe.send(what)
            if not self._pipe.poll(timeout):
                self.stop()
                return {"error": f"took more than {timeout:.0f} s"}
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            return {"error": "killed, perhaps for its memory" if code == -signal.SIGKILL
                    else f"ended with status {code}"}

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def start_server(dtype: str) -> None:
    """Let the server import everything, so that no cell's time contains it."""
    worker = Worker("sdpa-flash", "fwd", Shape(1, 1, 64, SMALL), dtype, 2**30)
    worker.ask("ready")
    worker.stop()


def serve(pipe: Connection, contender: str, phase: str, shape: Shape, dtype: str,
          memory: int) -> None:
    """Answer what the scheduler asks, in the process of the cell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler ends its processes
    warnings.simplefilter("ignore")
    cell = _Cell(contender, phase, shape, dtype, memory)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            answer = getattr(cell, pipe.recv())
            with contextlib.redirect_stdout(io.StringIO()):
                found = _guarded(answer)
            pipe.send(found)


def _guarded(answer: Any) -> dict[str, Any]:
    try:
        return answer()
    except MemoryError:
        return {"error": OUT_OF_MEMORY}
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"error": OUT_OF_MEMORY if NO_MEMORY.search(words) else words}


class _Cell:
    def __init__(self, contender: str, phase: str, shape: Shape, dtype: str, memory: int) -> None:
        self.contender, self.phase, self.shape, self.dtype = contender, phase, shape, dtype
        self.memory, self.repeat = memory, 1

    def ready(self) -> dict[str, Any]:
        """Nothing but an answer: the server has imported everything."""
        return {}

    def prepare(self) -> dict[str, Any]:
        """Make inputs; one call on little data, then one whose memory is measured."""
        import torch

        from attnopt.bench.contenders import find

        torch.set_num_threads(1)
        contender, device = find(self.contender), torch.device("cpu")
        dtype = getattr(torch, self.dtype)
        with _limited(self.memory):
            small = Shape(self.shape.B, self.shape.H, self.shape.D, min(self.shape.N, SMALL))
            contender.prepare(self.phase, small, dtype, device).call()
            self.prepared = contender.prepare(self.phase, self.shape, dtype, device)
            release_freed()
            before = resident("VmRSS") if forget_peak() else None
            start = time.process_time()
            self.prepared.call()
            seconds = time.process_time() - start
        if self.phase != "decode" or contender.level == "op":  # else each call lengthens the cache
            self.repeat = max(1, round(AT_LEAST / max(seconds, 1e-9)))
        used = None
        if before is not None:
            used = max(0, (resident("VmHWM") or 0) - before) + self.prepared.state_bytes
        return {"seconds": seconds, "bytes": used, "limit": self.prepared.limit,
                "flops": self.prepared.work.flops, "minimal_bytes": self.prepared.work.bytes}

    def time(self) -> dict[str, Any]:
        """CPU seconds of a call, the mean over enough of them to be seen by the clock."""
        with _limited(self.memory):
            start = time.process_time()
            for _ in range(self.repeat):
                self.prepared.call()
            return {"seconds": (time.process_time() - start) / self.repeat}

    def check(self) -> dict[str, Any]:
        """Errors against the definition."""
        with _limited(self.memory):
            return {"errors": self.prepared.check()}


@contextlib.contextmanager
def _limited(extra: int) -> Iterator[None]:
    """Let the process grow by at most so many bytes, where its size can be known: on Linux."""
    try:
        import resource
    except ImportError:
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    size = resident("VmSize")
    if size is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size + extra, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)

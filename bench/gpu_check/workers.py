"""Steps of a check in processes of their own, so that a crash or a hang costs one step.

An illegal access leaves a process without its GPU, a compiler may crash, a kernel may never end:
the process is then replaced, and the other steps go on. Several processes compile in parallel.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from attnopt.bench.gpu_check.device import Device

Event = dict[str, Any]
Failure = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A step.

    Attributes:
        name: for messages.
        function: "module:function" of what runs it: a generator of JSON-able dicts, which takes a
            Device and the arguments.
        arguments: by name.
        seconds: after so many it counts as hung.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 120.0


class Pool:
    """Processes that run tasks on one device."""

    def __init__(self, size: int, device: str, environment: dict[str, str]) -> None:
        """Start nothing yet.

        Args:
            size: how many processes, at most.
            device: name of the torch device.
            environment: variables of the processes, set before Triton is imported.
        """
        self._workers = [_Worker(device, environment) for _ in range(size)]

    def run(
        self,
        tasks: Iterable[Task],
        deadline: float,
        heard: Callable[[Task, Event], None],
        ended: Callable[[Task, Failure | None], None],
        width: int | None = None,
    ) -> list[Task]:
        """Run tasks, as many at a time as there are processes.

        Args:
            tasks: taken one by one, when a process is free.
            deadline: by `time.monotonic`; then running tasks are cut.
            heard: called with each dict that a task yields.
            ended: called at the end of each task, with what went wrong: "type", "message" and
                perhaps "traceback".
            width: how many tasks at a time, if fewer than processes.

        Returns:
            The tasks that were never begun.
        """
        source, workers = iter(tasks), self._workers[:width]
        while True:
            for worker in workers:
                if worker.task is None and time.monotonic() < deadline:
                    task = next(source, None)
                    if task is None:
                        break
                    worker.begin(task, deadline)
            busy = [worker for worker in workers if worker.task is not None]
            if not busy:
                return list(source) if time.monotonic() >= deadline else []
            limit = min(worker.until for worker in busy)
            ready = wait([worker.pipe for worker in busy], max(0.0, limit - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    worker.listen(heard, ended)
                elif time.monotonic() >= worker.until:
                    worker.cut(deadline, ended)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One process and what it is at."""

    def __init__(self, device: str, environment: dict[str, str]) -> None:
        self._arguments = device, environment
        self._process: Any = None
        self.pipe: Any = None
        self.task: Task | None = None
        self.until = 0.0

    def begin(self, task: Task, deadline: float) -> None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            arguments = (theirs, *self._arguments)
            self._process = context.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
        self.task, self.until = task, min(deadline, time.monotonic() + task.seconds)
        try:
            self.pipe.send(task)
        except OSError:
            pass  # it died: `listen` will hear so

    def listen(
        self, heard: Callable[[Task, Event], None], ended: Callable[[Task, Failure | None], None]
    ) -> None:
        task = self.task
        assert task is not None
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            message = f"its process ended with exit code {self._process.exitcode}"
            self.stop()
            ended(task, {"type": "Crash", "message": message})
            return
        if kind == "event":
            heard(task, content)
            return
        self.task = None
        if content and content["device_lost"]:
            self.stop()
        ended(task, content)

    def cut(self, deadline: float, ended: Callable[[Task, Failure | None], None]) -> None:
        task = self.task
        assert task is not None
        hung = time.monotonic() < deadline
        self.stop()
        message = f"no answer within {task.seconds:.0f} s" if hung else "no time left"
        ended(task, {"type": "Hung" if hung else "Cut", "message": message})

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self.pipe.close()
        self._process = self.task = None


def _serve(pipe: Connection, name: str, environment: dict[str, str]) -> None:
    """What a process does: tasks one after another, until the pipe closes."""
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the processes share the CPU
    device: Device | None = None
    while True:
        failure = None
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            device = device or Device.of(name)
            for event in _generator(task, device):
                pipe.send(("event", event))
        except OSError:
            return  # nobody listens any more
        except Exception as error:
            failure = describe(error)
        try:
            if device is not None:
                device.release()
                device.synchronize()
        except Exception as error:  # an illegal access ends the use of a GPU by this process
            failure = (failure or describe(error)) | {"device_lost": True}
        pipe.send(("end", failure))


def _generator(task: Task, device: Device) -> Iterator[Event]:
    module, _, function = task.function.partition(":")
    return getattr(importlib.import_module(module), function)(device, **task.arguments)


def describe(error: BaseException) -> Failure:
    """Type, message and the last lines of the traceback of an exception."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {
        "type": type(error).__name__, "message": str(error)[:500], "traceback": lines[-12:],
        "device_lost": False,
    }  # fmt: skip

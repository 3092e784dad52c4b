"""The demonstration: a teacher trained here, students in its place, one report on all.

Every step is one of the commands that a user would type, in a process of its own with one thread;
the students' steps run side by side where there are two cores. The teacher is kept in the user's
cache, under a name that changes with its recipe.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from attnopt import __version__
from attnopt.checkpoints import cache_folder, prepare_folder
from attnopt.demo_recipe import EVALUATE, GENERATE, STUDENTS, TEACHER
from attnopt.errors import UserError
from attnopt.report import write_report
from attnopt.report.console import print_comparison
from attnopt.report.page import number
from attnopt.report.runs import load_runs

COMMAND = [sys.executable, "-m", "attnopt"]
POLL_SECONDS = 0.5
# Enough for the curves; the evaluation after training takes all of the held-out text.
WHILE_TRAINING = ["--max-eval-tokens", "16384"]
COLUMNS = (
    TextColumn("{task.description:<34}"),
    BarColumn(),
    TimeElapsedColumn(),
    TextColumn("{task.fields[note]}"),
)


@dataclass(frozen=True)
class Step:
    """One command: what the progress bar calls it, and the folder whose history it grows."""

    title: str
    arguments: list[str]
    folder: Path
    log: Path

    @property
    def total(self) -> int | None:
        """Optimizer steps of a training command, None for the others."""
        flags = [f for f in ("--match-steps", "--steps") if f in self.arguments]
        if not flags:
            return None
        return sum(int(self.arguments[self.arguments.index(flag) + 1]) for flag in flags)

    def done(self) -> tuple[int, str]:
        """Optimizer steps done so far, and a note on the loss."""
        try:
            row = json.loads((self.folder / "history.json").read_text())["rows"][-1]
        except (OSError, ValueError, IndexError):
            return 0, "running"
        return row["step"], f"loss {number(row['loss'], 3)}" if "loss" in row else "running"


class Chain:
    """Commands that run one after another, with one progress bar."""

    def __init__(self, steps: Sequence[Step], progress: Progress) -> None:
        self.waiting = list(steps)
        self.progress = progress
        self.process: subprocess.Popen[bytes] | None = None
        self.step: Step | None = None
        self.task: TaskID | None = None

    def advance(self) -> bool:
        """Start the next command once the last has ended; False when there is none left.

        Raises UserError when a command failed.
        """
        if self.process is None:
            if not self.waiting:
                return False
            self._start(self.waiting.pop(0))
        elif self.process.poll() is None:
            self._show()
        else:
            self._finish(self.process.returncode)
        return True

    def stop(self) -> None:
        """End the running command."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def _start(self, step: Step) -> None:
        self.step = step
        step.log.parent.mkdir(parents=True, exist_ok=True)
        single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with step.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *step.arguments],
                env=os.environ | single,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.task = self.progress.add_task(step.title, total=step.total, note="starting")

    def _show(self) -> None:
        assert self.step is not None and self.task is not None
        completed, note = (0, "running") if self.step.total is None else self.step.done()
        self.progress.update(self.task, completed=completed, note=note)

    def _finish(self, status: int) -> None:
        assert self.step is not None and self.task is not None
        if status != 0:
            lines = self.step.log.read_text(errors="replace").strip().splitlines()
            last = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
            raise UserError(f"{self.step.title} failed: {last} (all of it: {self.step.log})")
        total = self.step.total or 1
        self.progress.update(self.task, total=total, completed=total, note="done")
        self.process = None


def run_demo(output: Path, *, retrain: bool = False) -> Path:
    """Train or load the teacher, make the students, and return the path of the report.

    output: folder for report.html, report.json and runs/, one folder for each student; runs of an
    earlier demonstration there are replaced. retrain: do not use the cached teacher.

    Raises UserError when a step fails or the output cannot be written.
    """
    console = Console()
    prepare_folder(output)
    start = time.perf_counter()
    with Progress(*COLUMNS, console=console) as progress:
        teacher = teacher_folder()
        if retrain or not (teacher / "config.json").exists():
            _train_teacher(teacher, output, progress)
        else:
            console.print(f"teacher from the cache: {teacher}")
        folders = [_fresh(output / "runs" / name) for name in STUDENTS]
        _run([Chain(_train_and_evaluate(folder, teacher), progress) for folder in folders])
        # Timed, so one at a time.
        timed = [
            _step("generate", folder, str(folder), "--compare")
            for folder in folders
            if folder.name in GENERATE
        ]
        _run([Chain(timed, progress)])
    page = write_report(folders, output)
    runs = load_runs(folders)
    print_comparison([(run.label, run.evaluation) for run in runs if run.evaluation], console)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    console.print(f"{minutes} min {seconds} s. The report: [bold]{page.resolve()}[/bold]")
    return page


def teacher_folder() -> Path:
    """Where the cache keeps the teacher of this recipe, this version and this Python's texts."""
    recipe = json.dumps([TEACHER, __version__, sys.version_info[:3]], sort_keys=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return cache_folder() / f"demo-teacher-{digest}"


def _train_teacher(target: Path, output: Path, progress: Progress) -> None:
    """Train under another name and rename, so that a broken-off teacher is never taken for one."""
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
    arguments = ["pretrain", *TEACHER, *WHILE_TRAINING, "--output", str(temporary)]
    step = Step("train the teacher", arguments, temporary, output / "logs" / "teacher.log")
    try:
        _run([Chain([step], progress)])
        record = temporary / "pretrain.json"
        record.write_text(record.read_text().replace(str(temporary), str(target)))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _step(command: str, folder: Path, *options: str) -> Step:
    """A command on a run folder of the demonstration, with its log beside the runs."""
    log = folder.parent.parent / "logs" / f"{folder.name}-{command}.log"
    return Step(f"{folder.name}: {command}", [command, *options], folder, log)


def _train_and_evaluate(folder: Path, teacher: Path) -> list[Step]:
    settings = [*STUDENTS[folder.name], *WHILE_TRAINING]
    distill = ["--model", str(teacher), *settings, "--output", str(folder)]
    return [
        _step("distill", folder, *distill),
        _step("evaluate", folder, str(folder), *EVALUATE),
    ]


def _run(chains: Sequence[Chain]) -> None:
    """Advance chains, as many at a time as there are cores, until all have ended."""
    waiting = list(chains)
    running: list[Chain] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(waiting.pop(0))
            running = [chain for chain in running if chain.advance()]
            time.sleep(POLL_SECONDS)
    finally:
        for chain in running:
            chain.stop()


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder

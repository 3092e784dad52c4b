"""What of this package works on this machine, tried rather than assumed, and why the rest does not.

Every examination yields findings and none of them raises: a broken installation is what they are
for. The ops are run, forward and backward, against their definitions.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnopt.errors import one_line

State = Literal["ok", "note", "problem"]

# Relative Frobenius error of an fp32 op against float64: TF32 on a GPU stays far below it.
LIMIT = 1e-3
LOW_DISK, LOW_MEMORY = 2 * 2**30, 2 * 2**30  # bytes; below them a checkpoint or GPT-2 may not fit
OPTIONAL = {"lora": "LoRA", "peers": "comparisons in attnopt bench", "dev": "the tests"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: what it belongs to.
        name: what was looked at.
        state: "ok", "note" (works without it, or differs) or "problem".
        text: what was found, and what mends it.
    """

    section: str
    name: str
    state: State
    text: str


def examine() -> list[Finding]:
    """Look at packages, devices, every op's backends, the Hub, disks and memory.

    Returns:
        The findings, section by section.
    """
    examinations: dict[str, Callable[[], Iterator[Finding]]] = {
        "Packages": _packages,
        "Devices": _devices,
        "Ops": _ops,
        "Hub": _hub,
        "Disk and memory": _room,
    }
    found: list[Finding] = []
    for section, look in examinations.items():
        try:
            found += look()
        except Exception as error:  # a missing or broken package breaks what is built on it
            found.append(Finding(section, "all", "problem", _failure(error)))
    return found


def _packages() -> Iterator[Finding]:
    section = "Packages"
    if _version("attnopt") is None:
        text = "runs from a checkout, so what it needs is not known: pip install ."
        yield Finding(section, "attnopt", "note", text)
        return
    own = importlib.metadata.metadata("attnopt")
    yield Finding(section, "attnopt", "ok", own["Version"])
    yield _in_range(section, "Python", platform.python_version(), own["Requires-Python"])
    missing: dict[str, list[str]] = {extra: [] for extra in OPTIONAL}
    for line in importlib.metadata.requires("attnopt") or ():
        requirement = Requirement(line)
        extra = next((e for e in OPTIONAL if f'extra == "{e}"' in line), None)
        if extra is None and (requirement.marker is None or requirement.marker.evaluate()):
            version = _version(requirement.name)
            if version is None:
                needs = f"missing; pip install '{requirement.name}{requirement.specifier}'"
                yield Finding(section, requirement.name, "problem", needs)
            else:
                yield _in_range(section, requirement.name, version, requirement.specifier)
        elif extra is not None and _version(requirement.name) is None:
            missing[extra].append(requirement.name)
    for extra, names in missing.items():
        what = f"for {OPTIONAL[extra]}"
        if names:
            text = f"{what}: {', '.join(names)} missing; pip install 'attnopt[{extra}]'"
            yield Finding(section, f"[{extra}]", "note", text)
        else:
            yield Finding(section, f"[{extra}]", "ok", what)


def _in_range(section: str, name: str, version: str, wanted: SpecifierSet | str) -> Finding:
    specifier = SpecifierSet(str(wanted))
    fits = specifier.contains(Version(version), prereleases=True)
    text = version if fits else f"{version}, but {specifier} is needed"
    return Finding(section, name, "ok" if fits else "problem", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    section = "Devices"
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield Finding(section, "CPU", "ok", threads)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        new = torch.version.hip is not None or properties.major >= 8
        why = "" if new else "; below sm_80 ops run in eager PyTorch, which is faster there"
        yield Finding(section, f"GPU {index}", "ok" if new else "note", text + why)
    if torch.cuda.device_count():
        if shutil.which("cc") is None and "CC" not in os.environ:
            text = "none found: Triton needs one to launch kernels (apt install gcc, or set CC)"
            yield Finding(section, "C compiler", "problem", text)
    elif torch.version.cuda is None and torch.version.hip is None:
        yield Finding(section, "GPU", "note", "none: this torch is a CPU build; ops run eagerly")
    else:
        text = f"torch is built for CUDA {torch.version.cuda} but sees no GPU (driver? container?)"
        yield Finding(section, "GPU", "note", text)


def _ops() -> Iterator[Finding]:
    import torch

    from attnopt.kernels.dispatch import resolve_backend
    from attnopt.testing import cases

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {c.op: c for c in reversed(cases()) if c.phase == "bwd" and c.dtype == torch.float32}
    for op in sorted(chosen):
        name = f"{op}_attention"
        inputs = {key: x.to(device) for key, x in chosen[op].make().items()}
        auto = resolve_backend("auto", inputs["q"])
        yield Finding("Ops", name, "ok", f"auto runs {auto} on {device.type}")
        for backend in ("eager", "triton"):
            try:
                resolve_backend(backend, inputs["q"])
            except ValueError as error:
                yield Finding("Ops", f"  {backend}", "note", str(error))
                continue
            yield _try_op(chosen[op], inputs, backend)


def _try_op(case: Any, inputs: dict[str, Any], backend: str) -> Finding:
    from attnopt.kernels.dispatch import force_backend

    start = time.perf_counter()
    try:
        with force_backend(backend):
            found = case.run(inputs)
        expected = case.ref(inputs)
        errors = {
            key: float((x.double() - expected[key].double()).norm() / expected[key].double().norm())
            for key, x in found.items()
        }
    except Exception as error:
        return Finding("Ops", f"  {backend}", "problem", _failure(error))
    seconds, worst = time.perf_counter() - start, max(errors, key=lambda key: errors[key])
    good = all(error <= LIMIT for error in errors.values())
    text = (
        f"{'right' if good else 'WRONG'}: error {errors[worst]:.0e} against float64 ({worst}), "
        f"{seconds:.1f} s with compilation"
    )
    return Finding("Ops", f"  {backend}", "ok" if good else "problem", text)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    from attnopt.hub import why_unreachable

    reason = why_unreachable("model", "gpt2", flag="--model")
    kept = f"downloads are kept in {constants.HF_HOME}"
    if reason is None:
        yield Finding("Hub", "Hugging Face", "ok", f"reachable; {kept}")
    else:
        text = f"not reachable ({reason}): name local folders and files, or use --data demo; {kept}"
        yield Finding("Hub", "Hugging Face", "note", text)


def _room() -> Iterator[Finding]:
    from huggingface_hub import constants

    from attnopt.checkpoints import cache_folder

    section = "Disk and memory"
    folders = {
        "here": Path.cwd(),
        "attnopt's cache": cache_folder(),
        "Hub's cache": Path(constants.HF_HOME),
        "Triton's cache": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton")),
    }
    for name, folder in folders.items():
        present = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(present).free
        text = f"{free / 2**30:.0f} GiB free in {folder}"
        if not os.access(present, os.W_OK):
            yield Finding(section, name, "problem", f"{folder} cannot be written")
        elif free < LOW_DISK:
            yield Finding(section, name, "problem", f"only {text}")
        else:
            yield Finding(section, name, "ok", text)
    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB available"
    yield Finding(section, "memory", "ok" if memory.available >= LOW_MEMORY else "note", text)


def _failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print the findings as one table per section, problems in red.

    Args:
        findings: what `examine` returned.
        console: where to print, by default the terminal.
    """
    console = console or Console()
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(title=section, box=None, show_header=False, title_justify="left")
        table.add_column("name", no_wrap=True, min_width=18)
        table.add_column("state", no_wrap=True, min_width=7)
        table.add_column("text", overflow="fold")
        for finding in (f for f in findings if f.section == section):
            name, style = escape(finding.name), styles[finding.state]
            table.add_row(name, f"[{style}]{finding.state}[/]", escape(finding.text))
        console.print(table, "")

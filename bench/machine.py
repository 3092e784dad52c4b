"""What a result was measured on: the machine, versions, the commit, and what the machine can do."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import attnopt
from attnopt.bench.gpu_check.device import Device

PACKAGES = (
    "attnopt", "torch", "triton", "transformers", "numpy", "performer-pytorch",
    "native-sparse-attention-pytorch", "flash-linear-attention", "flash-attn",
)  # fmt: skip
CHECKOUT = Path(attnopt.__file__).resolve().parents[1]
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of one buffer, at most; far beyond any cache
MATMUL_ROWS = {"cpu": 1024, "cuda": 8192}
ROUNDS = 7


def record(kind: str, command: str, device: str | torch.device) -> dict[str, Any]:
    """Head of a results file.

    Args:
        kind: what the file holds, such as "scaling".
        command: the command line that makes it.
        device: where the measured tensors lie.
    """
    return {
        "kind": kind,
        "format": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
    }


def machine(device: str | torch.device) -> dict[str, Any]:
    """Name and describe the machine; of a GPU also the driver, capability, L2 and so on."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "device": device.type,
        "name": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "driver": None,
        "capability": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "memory": properties.total_memory,
            "driver": driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "processor": processor(),
            "host_memory": psutil.virtual_memory().total,
        }
    return facts


def processor() -> str:
    """Name of the processor, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the NVIDIA driver, or None where `nvidia-smi` does not tell."""
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def versions() -> dict[str, str]:
    """Versions of what is compared and of what it rests on, where installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"attnopt": attnopt.__version__, "torch": str(torch.__version__)}


def commit(folder: Path = CHECKOUT) -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" where tracked files differ.

    None where the package does not run from a checkout, or git is missing.
    """
    said = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD")
    if said is None or Path(said.splitlines()[0]).resolve() != folder.resolve():
        return None
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return said.splitlines()[1] + ("-dirty" if changed else "")


def _output(*command: str) -> str | None:
    """What a command prints, None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def ceilings(
    device: str | torch.device, dtypes: Iterable[torch.dtype], *, scale: float = 1.0
) -> dict[str, Any]:
    """Measure what the machine moves and computes: a large copy and large matrix products.

    On random data, never on zeros, which some chips multiply faster. On a CPU by one thread.

    Args:
        device: where to measure.
        dtypes: of the matrix products.
        scale: factor of the sizes; below 1 only to rehearse.

    Returns:
        "copy_bytes_per_s", bytes read plus bytes written; "matmul_flops_per_s" by dtype; and
        "how" both were measured.
    """
    here = Device.of(device)
    kind = here.torch_device.type
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(1)
    try:
        size = int(min(COPY_BYTES[kind], here.free_memory() // 8) * scale) // 4
        source = torch.randn(size, device=here.torch_device)
        target = torch.empty_like(source)
        moved = 2 * source.nbytes / _best(here, partial(target.copy_, source))
        del source, target
        rows = int(MATMUL_ROWS[kind] * scale)
        rates = {}
        for dtype in dtypes:
            a, b = (torch.randn(rows, rows, device=here.torch_device).to(dtype) for _ in range(2))
            seconds = _best(here, partial(torch.mm, a, b))
            rates[str(dtype).removeprefix("torch.")] = 2 * rows**3 / seconds
    finally:
        torch.set_num_threads(threads)
    how = (
        f"copy of {4 * size / 2**20:.0f} MiB, read + written; product of {rows} x {rows} random "
        f"matrices; {here.clock_name}, best of {ROUNDS}"
    )
    return {"copy_bytes_per_s": moved, "matmul_flops_per_s": rates, "how": how}


def _best(device: Device, call: partial) -> float:
    """Seconds of the fastest of several rounds, after one to warm up."""
    device.seconds([call], 1)
    return min(device.seconds([call], 2)[0] for _ in range(ROUNDS))

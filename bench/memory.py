"""Memory of this process, as Linux counts it; other systems do not tell."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def resident(field: str) -> int | None:
    """A line of this process's memory, bytes: VmRSS is now, VmHWM the peak; Linux has it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def release_freed() -> None:
    """Give memory that was freed back to the system, so that using it again counts."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> bool:
    """Let VmHWM count from here; whether the system allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
        return True
    return False

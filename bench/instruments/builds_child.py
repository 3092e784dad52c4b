"""Build kernels for GPUs that are not there: `python -m ...builds_child job.pickle result.json`.

A stub driver stands for the GPU and every launch only compiles, so that the package's own launchers
decide arguments, constants and tiles, on CPU tensors. The job is pickled, `[(Case, "sm_90"), ...]`;
a line is printed for each that is done. It takes a process of its own because Triton's
interpreter, once switched on, cannot be switched off.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnopt.bench.instruments.builds_sass import disassemble, resource_usage, tally
from attnopt.kernels.dispatch import force_triton
from attnopt.testing import Case

# Triton's intermediate code: a product that is left to ordinary arithmetic keeps this layout
ORDINARY = re.compile(r"\btt\.dot .*-> tensor<[^<]*#(ttg\.)?blocked")


class Builder:
    """Compiles what is launched, for the architecture that was chosen last.

    Attributes:
        arch: "sm_90" and so on.
        launched: name and build of each launch since the caller emptied it; the build is an
            exception where the compiler raised one.
    """

    def __init__(self) -> None:
        self.arch = "sm_90"
        self.launched: list[tuple[str, Any]] = []
        _zero_new_memory()
        _install_stub(lambda: int(self.arch.removeprefix("sm_")))
        self._only_compile()

    def _only_compile(self) -> None:
        """Launch nothing: compile and remember."""
        from triton.runtime.jit import JITFunction

        launched, run = self.launched, JITFunction.run

        def only_compile(kernel, *args, grid, warmup, **options):  # noqa: ANN001, ANN002, ANN003
            try:
                build = run(kernel, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # whatever the compiler says of it belongs in the record
                build = error
            launched.append((kernel.fn.__name__, build))
            return build

        JITFunction.run = only_compile

    def build(self, case: Case, arch: str) -> list[tuple[str, Any]]:
        """Name and build of each kernel that a case launches."""
        self.arch = arch
        self.launched.clear()
        with force_triton():
            case.run(case.make())
        return list(self.launched)


def _install_stub(capability: Callable[[], int]) -> None:
    """Let Triton see a GPU of this capability, read anew at each launch."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Stub(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self):
            return GPUTarget("cuda", capability(), 32)

        def get_current_device(self):
            return capability()  # Triton keeps builds by device: one device per architecture

        def get_current_stream(self, device: int = 0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            return None

        def map_python_to_cpp_type(self, kind: str):
            return "int"

    driver.set_active(Stub())


def _zero_new_memory() -> None:
    """Nothing is computed here: what kernels would have written must not index anything."""
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like  # type: ignore[assignment]
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]


def describe(build: Any) -> dict[str, Any]:
    """What Triton and `cuobjdump` say of a build; its code is counted later, with others."""
    metadata, intermediate = build.metadata, build.asm["ttir"]
    return resource_usage(build.asm["cubin"]) | {
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "columns": getattr(metadata, "tmem_size", 0) or 0,
        "dots": len(re.findall(r"\btt\.dot ", intermediate)),
        "ordinary_dots": len(ORDINARY.findall(build.asm["ttgir"])),
        "writes": len(re.findall(r"\btt\.(store|descriptor_store) ", intermediate)),
    }


def main() -> None:
    """Build what the cases reach and write one row per distinct build."""
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    warnings.simplefilter("ignore")
    builder = Builder()
    rows: dict[tuple, dict[str, Any]] = {}
    cubins: dict[tuple, bytes] = {}
    for case, arch in job:
        for kernel, build in builder.build(case, arch):
            failed = isinstance(build, Exception)
            key = (arch, f"{kernel} {build}" if failed else build.hash)
            if key not in rows:
                facts = {"error": _message(build)} if failed else describe(build)
                dtype = str(case.dtype).removeprefix("torch.")
                rows[key] = {"op": case.op, "kernel": kernel, "arch": arch, "dtype": dtype,
                             "cases": [], "hash": key[1], **facts}
                if not failed:
                    cubins[key] = build.asm["cubin"]
            if case.id not in rows[key]["cases"]:
                rows[key]["cases"].append(case.id)
        print(case.id, arch, flush=True)
    for arch in dict.fromkeys(arch for arch, _ in cubins):
        own = [key for key in cubins if key[0] == arch]
        for key, code in zip(own, disassemble([cubins[key] for key in own], arch), strict=True):
            rows[key] |= tally(code)
    Path(sys.argv[2]).write_text(json.dumps(list(rows.values())))


def _message(error: Exception) -> str:
    """The end of what the compiler said."""
    return f"{type(error).__name__}: {error}".strip()[-300:]


if __name__ == "__main__":
    main()

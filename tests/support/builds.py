"""Builds of Triton kernels for a GPU that is not there: `python builds.py sm_90 cases.json`.

A stub driver stands for the GPU and every launch only compiles, so that the package's own launchers
decide arguments, constants and tiles, on CPU tensors. Prints one JSON line per build: registers,
bytes of stack, tensor-core instructions, dots in the source. Runs without Triton's interpreter, one
architecture per process: Triton's cache does not see the target change.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCMMA)\b")


def install_stub(capability: int) -> list:
    """Put the stub in place; returns the list that builds are added to."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Stub(DriverBase):
        def __init__(self):
            pass

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            return None

        def map_python_to_cpp_type(self, kind):
            return "int"

    driver.set_active(Stub())
    built, run = [], JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        build = run(self, *args, grid=grid, warmup=True, **options)
        built.append((self.fn.__name__, build))
        return build

    JITFunction.run = only_compile
    return built


def describe(name: str, build) -> dict:
    """What the toolchain in Triton's wheel says of a build."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(build.asm["cubin"])
    try:
        usage = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        used = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
        disassemble = [str(tools / "nvdisasm"), "-c", file.name]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()
    return {
        "kernel": name, "registers": int(registers), "stack": int(stack),
        "shared": build.metadata.shared, "dots": build.asm["ttir"].count("tt.dot "),
        "tensor_cores": len(TENSOR_CORES.findall(code)),
    }  # fmt: skip


def nsa_edge(given: dict) -> None:
    """One call of NSA, forward and backward, with sizes of 1 where Triton makes them constants."""
    from attnopt.kernels.nsa import mean_compress, nsa_attention

    b, h, hkv, nq, nk, d = given["sizes"]
    dtype = getattr(torch, given["dtype"])
    q = torch.zeros(b, h, nq, d, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(b, hkv, nk, d, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(b, nk, dtype=torch.bool) if given["masked"] else None
    options = given["options"]
    size = options["select_block"]
    means = (
        mean_compress(x, compress_block=size, compress_stride=size, key_mask=mask) for x in (k, v)
    )
    gates = torch.zeros(b, h, nq, 3) if options["combine"] == "gates" else None
    out = nsa_attention(q, k, v, *means, gates=gates, key_mask=mask, **options)
    out.backward(torch.zeros_like(out))


def main() -> None:
    """Build what the cases reach."""
    from attnopt.kernels.nsa import triton_selected
    from attnopt.testing import cases, force_triton

    # nothing is computed here: what the selection leaves in memory must not index anything
    triton_selected._pack_bits = lambda chosen, blocks: chosen.new_zeros(
        *chosen.shape[:3], -(-blocks // 32)
    )
    warnings.simplefilter("ignore")
    built = install_stub(int(sys.argv[1].removeprefix("sm_")))
    known = {case.id: case for case in cases()}
    for given in json.loads(Path(sys.argv[2]).read_text()):
        built.clear()
        with force_triton():
            if isinstance(given, str):
                case = known[given]
                case.run(case.make())
            else:
                nsa_edge(given)
        for name, build in {build.hash: (name, build) for name, build in built}.values():
            label = given if isinstance(given, str) else json.dumps(given)
            print(json.dumps({"case": label, **describe(name, build)}), flush=True)


if __name__ == "__main__":
    main()

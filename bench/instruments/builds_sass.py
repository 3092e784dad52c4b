"""What a compiled kernel consists of: registers and stack, and its machine code counted.

The tools are those in Triton's wheel. `cuobjdump` gives registers and stack: what the ELF file
itself says of registers is wrong from sm_90 on. `nvdisasm` takes a quarter of a second to start,
so many kernels go through it at once: the code of each is cut out of its file and laid end to end.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
INSTRUCTION_BYTES = 16
TENSOR_CORES = {  # how the tensor cores are addressed: first part of the opcode
    "mma.sync": re.compile(r"[HIDQO]MMA"),
    "wgmma": re.compile(r"[HIQ]GMMA"),
    "tcgen05": re.compile(r"UTC[A-Z]*MMA"),
}
BULK = re.compile(r"UBLKCP|UTMA(LDG|STG)")  # copies of whole tiles: their bytes are not in the code


def tools() -> Path:
    """Folder of the tools that come with Triton."""
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = _output("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return {"registers": int(found[1]), "stack": int(found[2])}


def disassemble(cubins: Sequence[bytes], arch: str) -> list[list[str]]:
    """Opcodes of the kernel in each cubin, all built for `arch` ("sm_90")."""
    codes = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = arch.replace("sm_", "SM") + ("a" if int(arch[3:]) >= 90 else "")
        text = _output("nvdisasm", "--no-dataflow", "--binary", name, file.name)
    flat = opcodes(text)
    kernels, begin = [], 0
    for code in codes:
        end = begin + len(code) // INSTRUCTION_BYTES
        kernels.append(flat[begin:end])
        begin = end
    assert begin == len(flat), f"{begin} instructions went in, {len(flat)} came out"
    return kernels


def opcodes(text: str) -> list[str]:
    """Opcode of each instruction that nvdisasm prints, with its modifiers: "LDG.E.128"."""
    return [opcode for _, opcode in INSTRUCTION.findall(text)]


def tally(code: Sequence[str]) -> dict[str, Any]:
    """Count what matters in a kernel's opcodes.

    Returns:
        "instructions" (without padding), "local_loads" and "local_stores" (of spilled registers),
        "tensor_cores" by kind, "loads" and "stores" of global memory by bytes per thread,
        "bulk" (copies of tiles) and "traps".
    """
    parts = [opcode.split(".") for opcode in code]
    first = Counter(part[0] for part in parts)
    kinds = {
        kind: sum(count for name, count in first.items() if pattern.fullmatch(name))
        for kind, pattern in TENSOR_CORES.items()
    }
    return {
        "instructions": len(code) - first["NOP"],
        "local_loads": first["LDL"],
        "local_stores": first["STL"],
        "tensor_cores": {kind: count for kind, count in kinds.items() if count},
        "loads": _widths(parts, ("LDG", "LDGSTS")),
        "stores": _widths(parts, ("STG",)),
        "bulk": sum(count for name, count in first.items() if BULK.fullmatch(name)),
        "traps": sum(part[:2] == ["BPT", "TRAP"] for part in parts),
    }


def _widths(parts: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, int]:
    """Bytes per thread (widest first) to the number of these instructions that move so many."""
    counts = Counter(_bytes(part[1:]) for part in parts if part[0] in names)
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def _bytes(modifiers: Sequence[str]) -> int:
    """Bytes per thread by the modifier that says so; 4 without one."""
    for modifier in modifiers:
        found = re.fullmatch(r"[USF]?(8|16|32|64|128|256)", modifier)
        if found:
            return int(found[1]) // 8
    return 4


def _machine_code(cubin: bytes) -> bytes:
    """The section `.text.<kernel>` of an ELF file of 64 bits: a cubin of Triton's has one."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    found = [
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", strings + name)
    ]
    assert len(found) == 1, f"{len(found)} kernels in a cubin"
    return found[0]


def _output(tool: str, *arguments: str) -> str:
    command = [str(tools() / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""GPUs in numbers: what limits a kernel on an architecture, and what a chip can do at best.

Limits are those of the CUDA C++ Programming Guide's table of compute capabilities; rates and
bandwidths are the manufacturer's data sheets (SXM versions), which no kernel reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB  # 32-bit registers of one SM, the same on every architecture here
QUARTERS = 4  # an SM schedules warps, and gives registers, in four parts
TENSOR_COLUMNS = 512  # of tensor memory of one SM, where it has any (sm_100)


@dataclass(frozen=True)
class Arch:
    """Limits of one streaming multiprocessor (SM).

    Attributes:
        shared: bytes of shared memory.
        shared_block: bytes of it that one block may have.
        shared_reserved: bytes that the system takes in addition, per block.
        warps: resident warps of 32 threads.
        blocks: resident blocks.
    """

    shared: int
    shared_block: int
    shared_reserved: int
    warps: int
    blocks: int


ARCHS: dict[str, Arch] = {
    "sm_75": Arch(64 * KIB, 64 * KIB, 0, 32, 16),
    "sm_80": Arch(164 * KIB, 163 * KIB, KIB, 64, 32),
    "sm_86": Arch(100 * KIB, 99 * KIB, KIB, 48, 16),
    "sm_89": Arch(100 * KIB, 99 * KIB, KIB, 48, 24),
    "sm_90": Arch(228 * KIB, 227 * KIB, KIB, 64, 32),
    "sm_100": Arch(228 * KIB, 227 * KIB, KIB, 64, 32),
}


@dataclass(frozen=True)
class Chip:
    """One product.

    Attributes:
        name: as in `CHIPS`.
        arch: key of `ARCHS`.
        processors: number of SMs.
        bandwidth: bytes per second between memory and chip.
        rates: dtype of the operands to FLOP per second of dense matrix products, as our kernels
            do them: "float32" is a third of the TF32 rate (three passes), or that of ordinary
            arithmetic where there is no TF32. A dtype that the chip lacks is absent.
    """

    name: str
    arch: str
    processors: int
    bandwidth: float
    rates: dict[str, float]


def _chip(name: str, arch: str, processors: int, bandwidth: float, half: float,
          tf32: float) -> Chip:
    rates = {"float16": half, "bfloat16": half, "float32": tf32 / 3}
    return Chip(name, arch, processors, bandwidth, rates)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("T4", "sm_75", 40, 320e9, {"float16": 65e12, "float32": 8.1e12}),
        _chip("A100", "sm_80", 108, 2.039e12, 312e12, 156e12),
        _chip("H100", "sm_90", 132, 3.35e12, 989.4e12, 494.7e12),
        _chip("H200", "sm_90", 132, 4.8e12, 989.4e12, 494.7e12),
        _chip("B200", "sm_100", 148, 8e12, 2250e12, 1125e12),
    )
}


def occupancy(arch: Arch, *, warps: int, registers: int, shared: int,
              columns: int = 0) -> tuple[int, str]:
    """How many warps of a kernel are resident on an SM at a time, and what stops further blocks.

    Args:
        arch: limits of the SM.
        warps: of one block.
        registers: of one thread.
        shared: bytes of shared memory of one block.
        columns: of tensor memory (sm_100) of one block.

    Returns:
        Warps per SM (0: not even one block fits), and "registers", "shared memory",
        "tensor memory", "warps" or "blocks".
    """
    per_warp = _round_up(32 * registers, 256)
    by_registers = QUARTERS * (REGISTERS // QUARTERS // per_warp) // warps
    limits = {
        "registers": by_registers,
        "shared memory": arch.shared // max(1, _round_up(shared + arch.shared_reserved, 128)),
        "tensor memory": TENSOR_COLUMNS // max(1, columns),
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
    }
    limiter = min(limits, key=lambda name: limits[name])
    return warps * limits[limiter], limiter


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

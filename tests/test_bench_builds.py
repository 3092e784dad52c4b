"""Builds are judged right: each planted fault fails, machine code and occupancy are read right."""

import subprocess
import sys
from pathlib import Path

import pytest
from attention_inputs import needs_triton

from attnopt.bench.chips import ARCHS, occupancy
from attnopt.bench.instruments import builds
from attnopt.bench.instruments.builds_sass import opcodes, tally
from attnopt.errors import UserError
from attnopt.testing import cases

AMPERE = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR6][R2.64], !P1 ;
        /*0030*/               @P1 LDG.E.U16 R9, desc[UR6][R2.64] ;
        /*0040*/                   LDG.E R9, desc[UR6][R2.64] ;
        /*0050*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R8, R4, RZ ;
        /*0070*/                   HFMA2.MMA R12, -RZ, RZ, 0, 0 ;
        /*0080*/                   STL.64 [R1+0x8], R12 ;
        /*0090*/                   LDL.LU.64 R12, [R1+0x8] ;
        /*00a0*/             @!UP0 STG.E.64 desc[UR6][R2.64], R12 ;
        /*00b0*/                   EXIT ;
.L_x_0:
        /*00c0*/                   BRA `(.L_x_0);
        /*00d0*/                   NOP;
"""
HOPPER = """
        /*0000*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0010*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0020*/                   STG.E.U8 desc[UR6][R2.64], R12 ;
"""
BLACKWELL = """
        /*0000*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR12], idesc[UR13], !UPT ;
        /*0010*/                   UTCBAR [UR4], URZ ;
        /*0020*/                   UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR4 ;
        /*0030*/                   LDG.E.ENL2.256 R4, R8, desc[UR6][R2.64] ;
        /*0040*/                   BPT.TRAP 0x1 ;
"""  # noqa: E501


def test_ampere_code_is_counted():
    assert tally(opcodes(AMPERE)) == {
        "instructions": 13, "local_loads": 1, "local_stores": 1,
        "tensor_cores": {"mma.sync": 1}, "loads": {"16": 2, "4": 1, "2": 1},
        "stores": {"8": 1}, "bulk": 0, "traps": 0,
    }  # fmt: skip


def test_hopper_and_blackwell_code_is_counted():
    hopper, blackwell = tally(opcodes(HOPPER)), tally(opcodes(BLACKWELL))
    assert (hopper["tensor_cores"], hopper["bulk"], hopper["stores"]) == ({"wgmma": 1}, 1, {"1": 1})
    assert blackwell["tensor_cores"] == {"tcgen05": 1}
    assert (blackwell["loads"], blackwell["traps"]) == ({"32": 1}, 1)


@pytest.mark.parametrize(("arch", "block", "expected"), [
    # 128 registers x 32 = 4,096 of 65,536: 16 warps
    ("sm_80", dict(warps=4, registers=128, shared=0), (16, "registers")),
    # 136 x 32 = 4,352: three in each quarter of 16,384, not fifteen in all
    ("sm_80", dict(warps=4, registers=136, shared=0), (12, "registers")),
    # 32 + 1 KiB of 228: six blocks
    ("sm_90", dict(warps=4, registers=64, shared=32 * 1024), (24, "shared memory")),
    # nothing is reserved on sm_75: two blocks of 32 KiB in 64
    ("sm_75", dict(warps=4, registers=32, shared=32 * 1024), (8, "shared memory")),
    ("sm_86", dict(warps=2, registers=24, shared=0), (32, "blocks")),
    ("sm_80", dict(warps=8, registers=16, shared=0), (64, "warps")),
    ("sm_100", dict(warps=4, registers=32, shared=0, columns=256), (8, "tensor memory")),
    # sixteen warps of 255 registers need twice what there is
    ("sm_90", dict(warps=16, registers=255, shared=0), (0, "registers")),
])  # fmt: skip
def test_occupancy(arch, block, expected):
    assert occupancy(ARCHS[arch], **block) == expected


@pytest.fixture(scope="module")
def record():
    """What the instrument says of planted kernels and of one of ours."""
    from planted_builds import planted_cases

    ours = [c for c in cases() if c.op == "lastk" and c.phase == "fwd" and c.dtype.itemsize == 2]
    return builds.examine(archs=["sm_90"], cases=[*planted_cases(), ours[0]])


@needs_triton
@pytest.mark.parametrize(("kernel", "complaint"), [
    ("ordinary_kernel", "expected tensor cores for every dot; got 2 dots, 1 in ordinary"),
    ("spilling_kernel", "expected at most 32 bytes of stack; got"),
    ("hoarding_kernel", "expected at most 227 KiB of shared memory; got 512"),
    ("refused_kernel", "does not build: "),
])  # fmt: skip
def test_a_planted_fault_fails(record, kernel, complaint):
    own = [failure for failure in record["failures"] if failure.startswith(kernel)]
    assert len(own) == 1 and complaint in own[0], record["failures"]


@needs_triton
def test_what_is_healthy_passes(record):
    for kernel in ("healthy_kernel", "lastk_forward_kernel"):
        (row,) = [row for row in record["rows"] if row["kernel"] == kernel]
        assert row["faults"] == [] and row["tensor_cores"]["wgmma"] >= row["dots"] > 0
        assert int(next(iter(row["loads"]))) == 16 and row["stores"]
    assert len(record["failures"]) == 4


@needs_triton
def test_the_tables_fit_and_end_with_the_failures(record, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    builds.show(record)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert all(f"{name} " in printed for name in ("lastk_forward", "healthy", "spilling"))
    assert printed.index("6 cases") < printed.index("FAILED ordinary_kernel")


@needs_triton
def test_code_that_became_a_trap_fails():
    import torch
    from planted_builds import planted, trapped_kernel

    case = planted(trapped_kernel, torch.bfloat16, 256, N=64, num_warps=8, num_stages=1)
    failures = builds.examine(archs=["sm_100"], cases=[case])["failures"]
    assert any("expected code that stores results; got 3 instr" in text for text in failures)
    assert any("not one block of 8 warps fits an SM: tensor memory" in text for text in failures)


SOUND = {
    "op": "lastk", "kernel": "lastk_forward_kernel", "arch": "sm_100", "dtype": "bfloat16",
    "cases": ["one"], "registers": 128, "stack": 0, "shared": 0, "warps": 4, "columns": 0,
    "dots": 2, "ordinary_dots": 0, "writes": 1, "instructions": 900, "local_loads": 0,
    "local_stores": 0, "tensor_cores": {"tcgen05": 2}, "loads": {"16": 4}, "stores": {"16": 2},
    "bulk": 0, "traps": 0, "occupancy": {"warps": 16, "of": 64, "by": "registers"},
}  # fmt: skip


@pytest.mark.parametrize(("change", "complaint"), [
    ({}, None),
    ({"stack": 32, "local_loads": 8}, None),
    ({"stack": 40, "local_loads": 9, "local_stores": 9}, "got 40, 9 stores and 9 loads"),
    ({"registers": 32, "stack": 12000}, "ptxas gave up: 32 registers, 12,000 bytes"),
    ({"stores": {}, "instructions": 7, "traps": 1}, "got 7 instructions, none of which does"),
    ({"stores": {}, "bulk": 1}, None),
    ({"tensor_cores": {"tcgen05": 1}}, "2 dots, 0 in ordinary arithmetic, and 1 instr"),
    ({"occupancy": {"warps": 0, "of": 64, "by": "registers"}}, "block of 4 warps fits an SM: regi"),
])  # fmt: skip
def test_every_gate(change, complaint, monkeypatch):
    monkeypatch.setattr(builds, "_build", lambda chosen, archs: [SOUND | change])
    failures = builds.examine(archs=["sm_100"], cases=[])["failures"]
    assert len(failures) == (complaint is not None)
    assert complaint is None or complaint in failures[0]


def test_a_kernel_that_no_case_reaches_fails(monkeypatch):
    monkeypatch.setattr(builds, "_build", lambda chosen, archs: [dict(SOUND)])
    (failure,) = builds.examine(ops=["lastk"], archs=["sm_100"])["failures"]
    assert failure.startswith("lastk_backward_kernel (sm_100): no case launches it")


def test_the_default_cases_hold_every_op_in_16_bit_and_in_fp32():
    found = {(case.op, case.dtype.itemsize) for case in builds.default_cases()}
    assert found == {(op, size) for op in builds.OPS for size in (2, 4)}
    assert {case.op for case in builds.default_cases(["favor"])} == {"favor"}


@pytest.mark.parametrize("wrong", [{"ops": ["lask"]}, {"archs": ["sm_91"]}])
def test_what_is_not_known_is_refused(wrong):
    with pytest.raises(UserError, match="must be one of .*; got '(lask|sm_91)'"):
        builds.examine(**wrong)


def test_importing_loads_no_triton():
    root = Path(__file__).resolve().parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import attnopt.bench.instruments.builds"
        "; assert not {'triton', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

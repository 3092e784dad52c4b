"""The cases that tools enumerate: right on every backend, complete, and reaching every kernel."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from attention_inputs import BACKENDS, DEVICE, launching, needs_triton

from attnopt.testing import Case, cases, force_triton

CASES = cases()
OPS = ("lastk", "favor", "nsa")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("op", OPS)
def test_cases_cover_every_phase(op: str) -> None:
    own = [case for case in CASES if case.op == op]
    assert {case.phase for case in own} == {"fwd", "bwd", "decode"}
    assert {case.dtype for case in own} == set(TOLERANCE)


def test_ids_are_distinct() -> None:
    assert {case.op for case in CASES} == set(OPS)
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, backend: str) -> None:
    inputs = case.make()
    again = case.make().values()
    assert all(torch.equal(x, y) for x, y in zip(inputs.values(), again, strict=True))
    exact = case.ref(inputs)
    with launching(backend):
        actual = case.run({name: x.to(DEVICE) for name, x in inputs.items()})
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        error = (actual[name].double().cpu() - expected).abs().max()
        assert error <= TOLERANCE[case.dtype] * max(1, expected.abs().max()), (name, float(error))


@pytest.mark.parametrize(("letter", "op"), [("T", "lastk"), ("M", "favor"), ("K", "nsa")])
def test_sizes_can_be_replaced(letter: str, op: str) -> None:
    sizes = {letter: 8, "N": 300}
    if op == "nsa":
        sizes |= {"L": 8, "P": 8}
    own = [case for case in cases(sizes) if case.op == op]
    assert all(case.shape[letter] == 8 and case.shape["N"] == 300 for case in own)
    others = [case for case in cases(sizes) if case.op != op]
    assert all(letter not in case.shape for case in others)


def test_an_unknown_letter_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes takes the letters B, .*; got X"):
        cases({"X": 1})


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="launches are recorded in the interpreter")
@pytest.mark.parametrize(("op", "count"), [("lastk", 2), ("favor", 7), ("nsa", 13)])
def test_cases_reach_every_kernel(op: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    spec = find_spec(f"attnopt.kernels.{op}")
    assert spec is not None and spec.origin is not None
    written = {
        node.name
        for path in Path(spec.origin).parent.glob("triton_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    launched, run = set(), interpreter.GridExecutor.__call__

    def remember(self, *args, **options) -> None:  # noqa: ANN001, ANN002, ANN003
        launched.add(self.fn.__name__)
        if self.fn.__name__ == "select_kernel":  # others index with what it finds
            run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", remember)
    with force_triton():
        for case in CASES:
            if case.op == op:
                case.run(case.make())
    assert written <= launched  # NSA with gates launches the band of lastk too
    assert len(written) == count

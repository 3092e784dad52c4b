"""The cases of FAVOR+ that tools enumerate: right, complete, and as frugal as the plan says."""

import ast
from pathlib import Path

import pytest
import torch
from attention_inputs import BACKENDS, DEVICE, launching, needs_triton

from attnopt.kernels.favor import favor_attention, op, orthogonal_projection, plan
from attnopt.testing import Case, cases, force_triton

FAVOR = [case for case in cases() if case.op == "favor"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_cases_cover_every_phase() -> None:
    assert {case.phase for case in FAVOR} == {"fwd", "bwd", "decode"}
    assert {case.dtype for case in FAVOR} == set(TOLERANCE)
    assert len({case.id for case in FAVOR}) == len(FAVOR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FAVOR, ids=lambda case: case.id)
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


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize("window", [0, 33])
def test_traffic_is_what_the_plan_says(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a program counted once: tokens, states between segments, and the projection."""
    from traffic import Traffic

    n, d, m, segments = 1024, 64, 64, 2
    monkeypatch.setattr(plan, "segments_override", segments)
    rng = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=rng).bfloat16() for _ in range(4))
    rows = orthogonal_projection(m, d, generator=rng)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with force_triton():
        with Traffic() as forward:
            out = favor_attention(*leaves, rows, window=window)
        with Traffic() as backward:
            torch.autograd.grad(out, leaves, grad)
    tensor, state, references = 2 * n * d, 4 * (m * d + 2 * m), 4 * m * (n // 32 + 1)
    expected = 6 * tensor + 4 * n  # k and v twice, and the log-sum-exp
    expected += (4 * segments + 1) * state + 2 * segments * 2 * m * d + references
    found = forward.total()
    assert abs(found.distinct / expected - 1) < 0.03
    assert found.distinct <= (1.9 if window == 0 else 1.95) * 4 * tensor
    assert backward.total().distinct <= 2.1 * 8 * tensor
    assert (found.every > 1.2 * found.distinct) == (window > 0)  # near keys are read twice


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="launches are recorded in the interpreter")
def test_cases_reach_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    written = set()
    for path in Path(op.__file__).parent.glob("triton_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                written.add(node.name)
    launched = set()
    monkeypatch.setattr(  # remember the launch, compute nothing
        interpreter.GridExecutor, "__call__",
        lambda self, *_, **__: launched.add(self.fn.__name__),
    )  # fmt: skip
    with force_triton():
        for case in FAVOR:
            case.run(case.make())
    assert launched == written
    assert len(written) == 7

"""Native Sparse Attention as operators: registration, compilation, and what they refuse.

The numbers are in test_nsa.py.
"""

import inspect
from itertools import product

import pytest
import torch
from attention_inputs import BACKENDS, DEVICE, launching, needs_triton
from nsa_inputs import DEFAULTS, FLOATS, make_inputs, make_options, upstream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.kernels.nsa import (
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
)
from attnopt.kernels.nsa.arguments import COMBINES
from attnopt.kernels.nsa.reference import nsa_reference
from attnopt.testing import force_triton

REGIMES = ["short", "long"]
EVERY = [*product(COMBINES, REGIMES)]
SMALL = DEFAULTS | {"n": 24, "hkv": 1, "d": 8, "block": 4, "stride": 4, "select": 4, "count": 2,
                    "window": 3, "padding": "left", "layout": "packed"}  # fmt: skip
OPS = torch.ops.attnopt


def make(combine: str = "merged", **sizes) -> tuple[dict, dict]:
    """Inputs and options of a small call; B = 2, H = 2, Hkv = 1, left padding, packed q, k, v."""
    sizes = SMALL | sizes
    return make_inputs(**sizes, gates=combine == "gates"), make_options(sizes, combine)


def with_gradients(inputs: dict, only: tuple[str, ...] = FLOATS) -> dict:
    """The same tensors as leaves; those named want gradients."""
    return inputs | {
        name: inputs[name].detach().requires_grad_(name in only) for name in FLOATS
        if name in inputs
    }  # fmt: skip


def gradients(out: Tensor, inputs: dict, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of every leaf that wants one."""
    leaves = {name: inputs[name] for name in FLOATS if name in inputs}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grad = upstream(out) if grad is None else grad
    grads = torch.autograd.grad(out, [*leaves.values()], grad, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def everything(inputs: dict, options: dict, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of all inputs."""
    leaves = with_gradients(inputs)
    out = nsa_attention(**leaves, **options)
    return {"out": out.detach()} | gradients(out, leaves, grad)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Recorder(TorchDispatchMode):
    """Arguments of the last call of each operator of NSA, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "attnopt" and "nsa" in function.__name__:
            assert not kwargs
            self.calls[function.__name__.removesuffix(".default")] = args
        return function(*args, **kwargs or {})


def record(backend: str, combine: str, regime: str, **sizes) -> dict[str, tuple]:
    """Arguments that `nsa_attention` and its backward pass hand to each operator."""
    inputs, options = make(combine, **sizes)
    with launching(backend), Recorder() as recorder:
        everything(inputs, options | {"regime": regime, "backend": backend})
    return {
        name: tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        for name, args in recorder.calls.items()
    }


def wanting(arguments: tuple) -> tuple:
    """The same; the first three, queries, keys and values, want gradients."""
    return *(x.detach().requires_grad_() for x in arguments[:3]), *arguments[3:]


@pytest.mark.parametrize("combine, regime", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, combine: str, regime: str) -> None:
    """Shapes, strides, aliases and autograd of all operators, called as they are in use."""
    calls = record(backend, combine, regime, n=9 if backend == "triton" else 24)
    parts = ("compressed", "selected")
    assert calls.keys() >= {f"nsa_{x}_{way}" for x in parts for way in ("forward", "backward")}
    assert "nsa_select" in calls and len(calls) >= 5
    for name, arguments in calls.items():
        if backend == "triton" and regime == "long" and "selected" not in name:
            continue  # as in the other regime
        if name.endswith("forward"):
            arguments = wanting(arguments)
        with launching(backend):
            torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_combine(backend: str, parts: int) -> None:
    outs = [rand(2, 5, 3, 8, seed=i).transpose(1, 2) for i in range(3)]
    outs[2] = outs[2] if parts == 3 else None
    weights = rand(2, 3, 5, parts)
    leaves = [x if x is None else x.detach().requires_grad_() for x in (*outs, weights)]
    with launching(backend):
        torch.library.opcheck(OPS.nsa_combine.default, (*leaves, backend))
        arguments = (rand(2, 3, 5, 8, seed=4), *outs, weights, backend)
        torch.library.opcheck(OPS.nsa_combine_backward.default, arguments)


@pytest.mark.parametrize("backend, dynamic, combine, regime", [
    ("eager", False, "gates", "short"), *(("eager", True, *x) for x in EVERY),
    *((x, True, *y) for x in BACKENDS[1:] for y in [("merged", "long"), ("gates", "short")]),
])  # fmt: skip
def test_compiles_whole(backend: str, dynamic: bool, combine: str, regime: str) -> None:
    def attention(inputs: dict, options: dict) -> Tensor:
        out = nsa_attention(**inputs, **options)
        return 2 * out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with launching(backend):
        for n in (12, 21):
            inputs, options = make(combine, n=n)
            inputs, options = with_gradients(inputs), options | {"backend": backend}
            options["regime"] = regime
            expected, out = attention(inputs, options), compiled(inputs, options)
            assert torch.equal(out, expected)
            grad = torch.ones_like(out)
            assert_same(gradients(out, inputs, grad), gradients(expected, inputs, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_compile_whole_with_sizes_that_change(backend: str) -> None:
    def attention(inputs: dict) -> tuple[Tensor, ...]:
        q, k, v, k_cmp, v_cmp = (inputs[name] for name in ("q", "k", "v", "k_cmp", "v_cmp"))
        sizes = {"compress_block": 4, "compress_stride": 4, "backend": backend}
        tokens = k.shape[2]
        blocks = select_blocks(
            q, k_cmp, select_block=4, num_selected=3, local_blocks=1, num_tokens=tokens, **sizes
        )
        mask = inputs["key_mask"]
        return (
            blocks,
            compressed_attention(q, k_cmp, v_cmp, num_tokens=tokens, **sizes),
            compressed_attention(q, k_cmp, v_cmp, key_mask=mask, **sizes),
            selected_attention(q, k, v, blocks, select_block=4, key_mask=mask, backend=backend),
        )

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with launching(backend):
        for n in (12, 21):
            inputs, _ = make(n=n)
            for actual, expected in zip(compiled(inputs), attention(inputs), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("combine, regime", EVERY)
def test_exports_with_a_dynamic_length(combine: str, regime: str) -> None:
    inputs, options = make(combine, padding="none")
    options["regime"] = regime

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None) -> Tensor:
            means = (x.unflatten(2, (-1, 4)).mean(3) for x in (k, v))
            return nsa_attention(q, k, v, *means, gates=gates, **options)

    arguments = *(inputs[name] for name in "qkv"), inputs.get("gates")
    blocks = torch.export.Dim("blocks", min=3, max=500)
    dims = [None if x is None else {2: 4 * blocks} for x in arguments]
    program = torch.export.export(Attention(), arguments, dynamic_shapes=dims)
    longer, _ = make(combine, padding="none", n=40)
    longer = *(longer[name] for name in "qkv"), longer.get("gates")
    for x in (arguments, longer):
        assert torch.equal(program.module()(*x), Attention()(*x))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str, combine: str) -> None:
    inputs, options = make(combine)
    inputs = with_gradients(inputs)
    with launching(backend):
        out = nsa_attention(**inputs, **options, backend=backend)
        with pytest.raises(RuntimeError, match="double backward.*backend='reference'"):
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
            torch.autograd.grad(grad.square().sum(), inputs["k"])


@pytest.mark.parametrize("combine", COMBINES)
def test_reference_backend_is_the_definition_with_double_backward(combine: str) -> None:
    inputs, options = make(combine, dtype=torch.float64)
    inputs = with_gradients(inputs)
    out = nsa_attention(**inputs, **options, backend="reference")
    assert torch.equal(out, nsa_reference(**inputs, **options))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), inputs["k"])[0].any()


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_casts_all_but_gates(backend: str, combine: str) -> None:
    inputs, options = make(combine, n=18, separate=combine == "gates")
    inputs, options = with_gradients(inputs), options | {"backend": backend}
    low = {name: inputs[name].bfloat16() for name in FLOATS if name in inputs and name != "gates"}
    with launching(backend):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = nsa_attention(**inputs, **options)
        expected = nsa_attention(**inputs | low, **options)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected)
        actual, wanted = gradients(out, inputs), gradients(expected, inputs)
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_same(actual, wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_of_what_has_no_combination(backend: str) -> None:
    inputs, options = make("gates", separate=True)
    newest = inputs | {name: inputs[name][:, :, -1:] for name in ("q", "gates")}
    q, k, v, k_cmp, v_cmp = (inputs[name] for name in ("q", "k", "v", "k_cmp", "v_cmp"))
    sizes = {"compress_block": 4, "compress_stride": 4, "backend": backend}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        blocks = select_blocks(q, k_cmp, select_block=4, num_selected=3, **sizes)
        outs = [
            nsa_decode(**newest, **options, backend=backend),
            compressed_attention(q, k_cmp, v_cmp, **sizes),
            selected_attention(q, k, v, blocks, select_block=4, backend=backend),
        ]
    assert all(out.dtype == torch.bfloat16 and out.isfinite().all() for out in outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_layouts(backend: str, combine: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        return
    inputs, options = make(combine, n=9, dtype=dtype)
    inputs = with_gradients(inputs)
    with launching(backend):
        out = nsa_attention(**inputs, **options, backend=backend)
        grads = gradients(out, inputs)
    assert (out.dtype, out.stride()) == (dtype, torch.empty_like(inputs["q"]).stride())
    for name, grad in grads.items():
        assert (grad.dtype, grad.shape) == (inputs[name].dtype, inputs[name].shape)
        if name != "gates":
            strides = zip(grad.stride(), torch.empty_like(grad).stride(), grad.shape, strict=True)
            assert all(x == y for x, y, size in strides if size > 1), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_another_dtype(backend: str, dtype: torch.dtype) -> None:
    inputs, options = make("gates", n=12, dtype=torch.bfloat16)
    other = with_gradients(inputs | {"gates": inputs["gates"].to(dtype)})
    with launching(backend):
        out = nsa_attention(**other, **options, backend=backend)
        expected = nsa_attention(**inputs, **options, backend=backend)
        grads = gradients(out, other)
    assert torch.equal(out, expected) and out.dtype == torch.bfloat16
    assert grads["gates"].dtype == dtype and grads["gates"].any()


@pytest.mark.parametrize("combine, regime", EVERY)
def test_gradcheck(combine: str, regime: str) -> None:
    inputs, options = make(combine, n=6, extra=3, b=1, h=2, d=2, padding="none", layout="bhnd",
                           block=2, stride=2, select=2, window=2, separate=combine == "gates",
                           dtype=torch.float64)  # fmt: skip
    leaves = {name: inputs[name].requires_grad_() for name in FLOATS if name in inputs}

    def attention(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        return nsa_attention(**inputs | named, **options, regime=regime, backend="eager")

    assert torch.autograd.gradcheck(attention, [*leaves.values()])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_equals_all_together(backend: str, combine: str) -> None:
    inputs, options = make(combine, n=9, b=1, separate=combine == "gates")
    options["backend"] = backend
    with launching(backend):
        together = everything(inputs, options)
        unused = {"k", "v"} if combine == "gates" else set()  # all branches have their own
        wanted = [name for name in FLOATS if name in inputs and name not in unused]
        for name in wanted if backend == "eager" else ("q", "v_cmp"):
            leaves = with_gradients(inputs, (name,))
            alone = gradients(nsa_attention(**leaves, **options), leaves)
            assert_same(alone, {name: together[name]})
        assert not nsa_attention(**inputs, **options).requires_grad


class Garbage:
    """torch.empty and its kin, filled with a number; integers with its whole part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
        self.value, self.filled = value, 0
        places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
                  (Tensor, "new_empty"), (Tensor, "new_empty_strided")]  # fmt: skip
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._filling(getattr(owner, name)))

    def _filling(self, function):
        def fill(*args, **options):
            x = function(*args, **options)
            if x.is_floating_point():
                x.fill_(self.value)
            else:
                x.fill_(17 if self.value != self.value else int(self.value))
            self.filled += 1
            return x

        return fill


@pytest.mark.parametrize("combine, regime", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(
    backend: str, combine: str, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits whatever was in the memory before, be it NaN or a number."""
    for n, extra in [(19, 3), (3, 0)] if backend == "eager" else [(19, 3)]:
        inputs, options = make(combine, n=n, extra=extra, padding="empty-row")
        options |= {"regime": regime, "backend": backend}
        with launching(backend):
            expected = everything(inputs, options)
            for value in (float("nan"), -7.5) if backend == "eager" else (float("nan"),):
                with monkeypatch.context() as patch:
                    garbage = Garbage(patch, value)
                    actual = everything(inputs, options)
                    assert garbage.filled > 3
                assert_same(actual, expected)


@pytest.mark.parametrize("combine, regime", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_upstream_gradients_stay_as_they_are(
    backend: str, combine: str, regime: str
) -> None:
    inputs, options = make(combine, n=13)
    grad = rand(2, 2, 13, 8, seed=5)
    before = {name: x.clone() for name, x in inputs.items()}
    with launching(backend):
        everything(inputs, options | {"regime": regime, "backend": backend}, grad)
    assert_same(inputs, before)
    assert torch.equal(grad, rand(2, 2, 13, 8, seed=5))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_strides(backend: str, combine: str) -> None:
    inputs, options = make(combine, n=13)
    options["backend"] = backend
    one = rand(1, 1, 1, 8).expand(2, 2, 13, 8)
    sliced, transposed = rand(2, 2, 26, 16)[:, :, ::2, 1::2], rand(13, 8, 2, 2).permute(3, 2, 0, 1)
    with launching(backend):
        for grad in (one, sliced) if backend == "triton" else (one, sliced, transposed):
            expected = everything(inputs, options, grad.contiguous())
            for name, x in everything(inputs, options, grad).items():
                torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name, regime", [
    ("compressed", "short"), ("selected", "short"), ("selected", "long"),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_of_two_results_is_used(backend: str, name: str, regime: str) -> None:
    """Gradients of both results are the sum of either's."""
    arguments = wanting(record(backend, "gates", regime)[f"nsa_{name}_forward"])
    grads = []
    with launching(backend):
        for weights in [(1, 0), (0, 1), (1, 1)]:
            out, lse = getattr(OPS, f"nsa_{name}_forward")(*arguments)
            lse = lse.masked_fill(lse == -torch.inf, 0)
            losses = [(out * upstream(out)).sum(), (lse * lse.detach().cos()).sum()]
            loss = sum(x for x, w in zip(losses, weights, strict=True) if w)
            grads.append(torch.autograd.grad(loss, arguments[:3], materialize_grads=True))
    for x, y, both in zip(*grads, strict=True):
        torch.testing.assert_close(x + y, both, rtol=1e-5, atol=1e-6)
    assert grads[1][0].any() and grads[1][1].any() and not grads[1][2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_through_the_selection(backend: str) -> None:
    """With a gate for selected blocks alone, compressed keys choose and get no gradient."""
    inputs, options = make("gates")
    inputs["gates"] = torch.tensor([0.0, 1.0, 0.0], device=DEVICE).expand(2, 2, 24, 3)
    with launching(backend):
        results = everything(inputs, options | {"backend": backend})
        blocks = select_blocks(
            inputs["q"].detach().requires_grad_(), inputs["k_cmp"].detach().requires_grad_(),
            compress_block=4, compress_stride=4, select_block=4, num_selected=3, backend=backend,
        )  # fmt: skip
    assert not results["k_cmp"].any() and not results["v_cmp"].any()
    assert results["k"].any() and results["gates"].any()
    assert not blocks.requires_grad and blocks.dtype == torch.int32


def test_auto_is_eager_on_the_cpu_and_explicit_triton_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, options = make()
    inputs = {name: x.cpu() for name, x in inputs.items()}
    auto = nsa_attention(**inputs, **options)
    assert torch.equal(auto, nsa_attention(**inputs, **options, backend="eager"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton'.*cpu"):
        nsa_attention(**inputs, **options, backend="triton")


@needs_triton
def test_auto_is_triton_when_forced() -> None:
    inputs, options = make(n=20)
    with force_triton():
        auto = nsa_attention(**inputs, **options)
        triton = nsa_attention(**inputs, **options, backend="triton")
    assert torch.equal(auto, triton)
    assert not torch.equal(auto, nsa_attention(**inputs, **options, backend="eager"))


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **{"device": DEVICE, **options})


BAD = {  # B = 2, H = 2, Hkv = 1, N = 24, D = 8, P = 6
    "q's rank": ({"q": zeros(2, 24, 8)}, ["q", "4", "(2, 24, 8)"]),
    "no tensor": ({"q": None}, ["q", "tensor", "NoneType"]),
    "k unlike v": ({"v": zeros(2, 1, 23, 8)}, ["(2, 1, 24, 8)", "(2, 1, 23, 8)"]),
    "groups": ({"k": zeros(2, 3, 24, 8), "v": zeros(2, 3, 24, 8)}, ["heads", "2", "3"]),
    "no heads": ({"q": zeros(2, 0, 24, 8)}, ["empty", "(2, 0, 24, 8)"]),
    "no queries": ({"q": zeros(2, 2, 0, 8)}, ["empty", "(2, 2, 0, 8)"]),
    "queries": ({"q": zeros(2, 2, 25, 8)}, ["25", "24"]),
    "head dim": ({"q": zeros(2, 2, 24, 4)}, ["head_dim", "4", "(2, 1, 24, 8)"]),
    "dtypes": ({"k": zeros(2, 1, 24, 8).half()}, ["k", "float32", "float16"]),
    "device": ({"k": zeros(2, 1, 24, 8, device="meta")}, ["k", DEVICE, "meta"]),
    "mask": ({"key_mask": zeros(2, 23).bool()}, ["key_mask", "[2, 24]", "[2, 23]"]),
    "mask's dtype": ({"key_mask": zeros(2, 24)}, ["key_mask", "bool", "float32"]),
    "mask's device": ({"key_mask": zeros(2, 24, device="meta").bool()}, ["key_mask", "meta"]),
    "no k_cmp": ({"k_cmp": None}, ["k_cmp", "NoneType"]),
    "no v_cmp": ({"v_cmp": None}, ["v_cmp", "NoneType"]),
    "k_cmp's rank": ({"k_cmp": zeros(2, 6, 8)}, ["k_cmp", "4", "(2, 6, 8)"]),
    "k_cmp's heads": (
        {"k_cmp": zeros(2, 2, 6, 8), "v_cmp": zeros(2, 2, 6, 8)}, ["heads", "1", "2"],
    ),
    "k_cmp's batch": ({"k_cmp": zeros(1, 1, 6, 8)}, ["k_cmp", "2", "(1, 1, 6, 8)"]),
    "k_cmp's dim": ({"k_cmp": zeros(2, 1, 6, 4)}, ["k_cmp", "8", "(2, 1, 6, 4)"]),
    "k_cmp's blocks": (
        {"k_cmp": zeros(2, 1, 5, 8), "v_cmp": zeros(2, 1, 5, 8)}, ["24", "6", "k_cmp", "5"],
    ),
    "v_cmp unlike k_cmp": ({"v_cmp": zeros(2, 1, 5, 8)}, ["v_cmp", "(2, 1, 5, 8)"]),
    "v_cmp's dtype": ({"v_cmp": zeros(2, 1, 6, 8).half()}, ["v_cmp", "float32", "float16"]),
    "v_cmp's device": ({"v_cmp": zeros(2, 1, 6, 8, device="meta")}, ["v_cmp", DEVICE, "meta"]),
    "combine": ({"combine": "sum"}, ["combine", "merged", "gates", "'sum'"]),
    "regime": ({"regime": "medium"}, ["regime", "auto", "short", "long", "'medium'"]),
    "backend": ({"backend": "flash"}, ["flash", "auto", "triton", "eager", "reference"]),
    "scale": ({"scale": float("nan")}, ["scale", "finite", "nan"]),
    "select_block": ({"select_block": 0}, ["select_block", ">= 1", "0"]),
    "true select_block": ({"select_block": True}, ["select_block", "integer", "True"]),
    "default blocks": ({"select_block": 0, "compress_block": None, "compress_stride": None},
                       ["select_block must", ">= 1", "0"]),
    "window": ({"window": 0}, ["window", ">= 1", "0"]),
    "real window": ({"window": 2.5}, ["window", "integer", "2.5"]),
    "num_selected": ({"num_selected": 2.0}, ["num_selected", "integer", "2.0"]),
    "sink_blocks": ({"sink_blocks": -1}, ["sink_blocks", ">= 0", "-1"]),
}  # fmt: skip
BAD_MERGED = BAD | {
    "gates": ({"gates": zeros(2, 2, 24, 3)}, ["merged", "gates"]),
    "local blocks": ({"local_blocks": 1}, ["merged", "local_blocks", "1"]),
    "fewer selected than sinks": ({"sink_blocks": 3}, ["num_selected", "3", "2"]),
    "blocks": ({"compress_block": 8}, ["merged", "8", "4"]),
    "strides": ({"compress_stride": 2}, ["merged", "2", "4"]),
    **{name: ({name: zeros(2, 1, 24, 8)}, ["merged", name])
       for name in ("k_select", "v_select", "k_window", "v_window")},
}  # fmt: skip
BAD_GATES = BAD | {
    "no gates": ({"gates": None}, ["gates", "3", "NoneType"]),
    "gates' shape": ({"gates": zeros(2, 2, 24, 2)}, ["gates", "(2, 2, 24, 3)", "(2, 2, 24, 2)"]),
    "gates' heads": ({"gates": zeros(2, 1, 24, 3)}, ["gates", "(2, 2, 24, 3)", "(2, 1, 24, 3)"]),
    "gates' dtype": ({"gates": zeros(2, 2, 24, 3).long()}, ["gates", "floating", "int64"]),
    "gates' device": ({"gates": zeros(2, 2, 24, 3, device="meta")}, ["gates", DEVICE, "meta"]),
    "local_blocks": ({"local_blocks": -1}, ["local_blocks", ">= 0", "-1"]),
    "nothing selected": ({"num_selected": 0}, ["num_selected", ">= 1", "0"]),
    "fewer selected than forced": ({"local_blocks": 2}, ["num_selected", "1", "2", "3"]),
    "compress_block": ({"compress_block": 0}, ["compress_block", ">= 1", "0"]),
    "compress_stride": ({"compress_stride": -2}, ["compress_stride", ">= 1", "-2"]),
    "k_select": ({"k_select": zeros(2, 1, 23, 8)}, ["k_select", "(2, 1, 24, 8)", "(2, 1, 23, 8)"]),
    "v_select": ({"v_select": zeros(2, 2, 24, 8)}, ["v_select", "(2, 1, 24, 8)", "(2, 2, 24, 8)"]),
    "k_window": ({"k_window": zeros(2, 1, 24, 8).half()}, ["k_window", "float32", "float16"]),
    "v_window": ({"v_window": 1}, ["v_window", "(2, 1, 24, 8)", "int"]),
}  # fmt: skip
REFUSED = [
    pytest.param(combine, change, words, id=f"{combine}: {name}")
    for combine, bad in (("merged", BAD_MERGED), ("gates", BAD_GATES))
    for name, (change, words) in bad.items()
]  # fmt: skip


@pytest.mark.parametrize("combine, change, words", REFUSED)
def test_errors_say_what_was_expected_and_given(
    combine: str, change: dict, words: list[str]
) -> None:
    inputs, options = make(combine)
    with pytest.raises(ValueError) as error:
        nsa_attention(**inputs | options | change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("combine, change, words", [
    x for x in REFUSED if not {"q", "regime", "backend"} & {*x.values[1]}
])  # fmt: skip
def test_decoding_refuses_the_same(combine: str, change: dict, words: list[str]) -> None:
    inputs, options = make(combine)
    inputs |= {name: inputs[name][:, :, -1:] for name in ("q", "gates") if name in inputs}
    change = {n: x[:, :, -1:] if n == "gates" and x is not None else x for n, x in change.items()}
    words = [word.replace(", 24, 3)", ", 1, 3)").replace(", 24, 2)", ", 1, 2)") for word in words]
    with pytest.raises(ValueError) as error:
        nsa_decode(**inputs | options | change)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_decode_takes_one_query() -> None:
    inputs, options = make()
    with pytest.raises(ValueError, match="one query.*24"):
        nsa_decode(**inputs, **options)


SIZES = {"compress_block": 4, "compress_stride": 4}
BAD_BRANCHES = {  # function, changes, words
    "blocks' tokens": (compressed_attention, {"num_tokens": 23}, ["num_tokens", "24", "23"]),
    "longer text": (compressed_attention, {"num_tokens": 28, "key_mask": None}, ["28", "7", "6"]),
    "unlike mask": (compressed_attention, {"num_tokens": 27}, ["key_mask", "27", "24"]),
    "short mask": (compressed_attention, {"key_mask": zeros(2, 20).bool()}, ["24", "20"]),
    "q": (compressed_attention, {"q": zeros(24, 8), "num_tokens": 24}, ["q", "(24, 8)"]),
    "integers": (compressed_attention, {"q": zeros(2, 2, 24, 8).int()}, ["q", "float", "int32"]),
    "no values": (compressed_attention, {"v_cmp": None}, ["v_cmp", "NoneType"]),
    "block": (compressed_attention, {"compress_block": 0}, ["compress_block", ">= 1", "0"]),
    "blocks' backend": (compressed_attention, {"backend": "flash"}, ["flash", "eager"]),
    "no keys": (select_blocks, {"k_cmp": None}, ["k_cmp", "NoneType"]),
    "count": (select_blocks, {"num_selected": 2}, ["num_selected", "3", "2"]),
    "keys": (select_blocks, {"k_cmp": zeros(2, 1, 5, 8)}, ["24", "6", "5"]),
    "mask": (select_blocks, {"key_mask": zeros(2, 24)}, ["key_mask", "bool", "float32"]),
    "no indices": (selected_attention, {"block_indices": None}, ["block_indices", "NoneType"]),
    "indices' dtype": (selected_attention, {"block_indices": zeros(2, 1, 24, 3)},
                       ["block_indices", "int32", "float32"]),
    "indices' heads": (selected_attention, {"block_indices": zeros(2, 2, 24, 3).int()},
                       ["block_indices", "[2, 1, 24, S]", "[2, 2, 24, 3]"]),
    "indices' rank": (selected_attention, {"block_indices": zeros(2, 1, 24).int()},
                      ["block_indices", "[2, 1, 24]"]),
    "indices' device": (selected_attention,
                        {"block_indices": zeros(2, 1, 24, 3, device="meta").int()},
                        ["block_indices", DEVICE, "meta"]),
    "size": (selected_attention, {"select_block": 0}, ["select_block", ">= 1", "0"]),
    "regime": (selected_attention, {"regime": "medium"}, ["regime", "'medium'"]),
}  # fmt: skip


@pytest.mark.parametrize("function, change, words", BAD_BRANCHES.values(), ids=BAD_BRANCHES.keys())
def test_branches_say_what_was_expected_and_given(
    function, change: dict, words: list[str]
) -> None:
    inputs, _ = make()
    usual = inputs | SIZES | {
        "select_block": 4, "num_selected": 3, "block_indices": zeros(2, 1, 24, 3).int(),
    }  # fmt: skip
    arguments = {n: x for n, x in usual.items() if n in inspect.signature(function).parameters}
    function(**arguments)
    with pytest.raises(ValueError) as error:
        function(**arguments | change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("index", [-2, -(2**31), -(2**32), 6, 2**31 - 1, 2**32])
def test_indices_outside_the_text_select_nothing(index: int) -> None:
    inputs, _ = make()
    q, k, v = (inputs[name] for name in "qkv")
    indices = torch.full((2, 1, 24, 1), index, device=DEVICE)
    assert not selected_attention(q, k, v, indices, select_block=4).any()


def test_triton_refuses_what_it_cannot_do() -> None:
    inputs, options = make(dtype=torch.float64)
    with pytest.raises(ValueError, match="float32.*float64"), force_triton():
        nsa_attention(**inputs, **options, backend="triton")
    inputs, options = make(d=130, n=9)
    with pytest.raises(ValueError, match="128.*130.*eager"), force_triton():
        nsa_attention(**inputs, **options, backend="triton")
    assert nsa_attention(**inputs, **options, backend="eager").isfinite().all()
    inputs, options = make(n=9, count=65)
    with pytest.raises(ValueError, match="64.*65.*eager"), force_triton():
        nsa_attention(**inputs, **options, backend="triton")
    assert nsa_attention(**inputs, **options, backend="eager").isfinite().all()


@needs_triton
@pytest.mark.parametrize("regime", REGIMES)
def test_triton_takes_long_blocks(regime: str) -> None:
    sizes = {"b": 1, "n": 300, "h": 1, "block": 130, "stride": 130, "select": 130, "sinks": 0}
    inputs, options = make(**sizes, count=1)
    with launching("triton"):
        actual = everything(inputs, options | {"regime": regime, "backend": "triton"})
    expected = everything(inputs, options | {"backend": "reference"})
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-5, atol=1e-5)


def test_every_argument_is_documented() -> None:
    functions = (nsa_attention, nsa_decode, compressed_attention, select_blocks, selected_attention)
    for function in functions:
        for name in inspect.signature(function).parameters:
            assert f"{name}:" in inspect.getdoc(function), (function.__name__, name)

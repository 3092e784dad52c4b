"""FAVOR+ attention as an operator: registration, backends, and its error messages."""

import inspect
from itertools import product

import pytest
import torch
from attention_inputs import BACKENDS, DEVICE, launching, needs_triton
from torch import Tensor

from attnopt.kernels.favor import (
    FavorState,
    empty_state,
    favor_attention,
    favor_decode,
)
from attnopt.kernels.favor.plan import fits
from attnopt.kernels.favor.reference import favor_reference
from attnopt.testing import force_triton

NAMES = ["q", "k", "v", "projection"]


def make_inputs(n: int = 12, dtype: torch.dtype = torch.float32, grad: bool = False,
                window: int = 5) -> dict:  # fmt: skip
    """B = 2, H = 2, Hkv = 1, D = 8, M = 6, blocks of 4; the second row is left-padded by 3.

    q, k, v are views of one projection, as in GPT-2.
    """
    rng = torch.Generator().manual_seed(n)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE, dtype)

    heads = rand(2, n, 2 + 1 + 1, 8).transpose(1, 2).split([2, 1, 1], dim=1)
    inputs = dict(zip("qkv", heads, strict=True))
    inputs["projection"] = rand(2, 6, 8)
    if window:
        inputs["log_gate"] = rand(2).to(torch.promote_types(dtype, torch.float32))
    inputs = {name: x.detach().requires_grad_(grad) for name, x in inputs.items()}
    start = torch.tensor([[0], [3]], device=DEVICE)
    mask = torch.arange(n, device=DEVICE) >= start
    return inputs | {"key_mask": mask, "window": window, "window_block": 4}


def tensors(inputs: dict) -> list[Tensor]:
    return [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]


def gradients(out: Tensor, inputs: dict) -> tuple[Tensor, ...]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return torch.autograd.grad(out, tensors(inputs), grad)


def make_state(n: int = 12, window: int = 5, **options) -> FavorState:
    inputs = make_inputs(n, window=window)
    return favor_attention(**inputs, return_state=True, **options)[1]


def operator_arguments(backend: str, window: int, grad: bool, name: str = "favor") -> tuple:
    """What the registered operator takes: everything given, the projection per head."""
    inputs = make_inputs(7, window=window)
    if name == "taylor":
        inputs["projection"] = inputs["projection"][:, :0]
    count = 45 if name == "taylor" else 6
    state = [torch.rand(2, 2, count, *size, device=DEVICE) + 0.5 for size in [(8,), (), ()]]
    if name == "taylor":
        state[1][..., 0] += 100  # features may be negative, the sum of weights must not
    gate = inputs.get("log_gate", torch.zeros(2, device=DEVICE))
    floats = [inputs["q"], inputs["k"], inputs["v"], inputs["projection"], gate]
    floats, state[:2] = (
        [x.detach().clone().requires_grad_(grad) for x in part] for part in (floats, state[:2])
    )
    return *floats, inputs["key_mask"], *state, name, window, 4, True, "running", 0.5, backend


@pytest.mark.parametrize("backend, name, window", [
    ("eager", "taylor", 0), ("eager", "favor", 0), *product(BACKENDS, ["favor"], [5]),
])  # fmt: skip
def test_opcheck_forward(backend: str, name: str, window: int) -> None:
    arguments = operator_arguments(backend, window, True, name)
    with launching(backend):
        torch.library.opcheck(torch.ops.attnopt.favor_forward.default, arguments)


@pytest.mark.parametrize("backend, learned", [("eager", True), *product(BACKENDS[-1:], [False])])
def test_opcheck_backward(backend: str, learned: bool) -> None:
    arguments = operator_arguments(backend, 5, False)
    with launching(backend):
        out, lse, kv, z, *kept = torch.ops.attnopt.favor_forward(*arguments)
        upstream = (torch.randn_like(out), torch.randn_like(kv), torch.randn_like(z))
        torch.library.opcheck(
            torch.ops.attnopt.favor_backward.default,
            (*upstream, *arguments[:9], out, lse, *kept, *arguments[9:], learned),
        )


@pytest.mark.parametrize("backend, dynamic, window", [("eager", False, 0)] + [
    (backend, True, 5) for backend in BACKENDS
])  # fmt: skip
def test_compiles_whole(backend: str, dynamic: bool, window: int) -> None:
    def attention(inputs: dict) -> tuple[Tensor, FavorState]:
        out, state = favor_attention(**inputs, backend=backend, return_state=True)
        return 2 * out.transpose(1, 2).flatten(2), state

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with launching(backend):
        for n in (4, 7):
            inputs = make_inputs(n, grad=True, window=window)
            (expected, wanted), (out, state) = attention(inputs), compiled(inputs)
            assert torch.equal(out, expected)
            pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert isinstance(state, FavorState)
            assert all(
                a is b is None or torch.equal(a, b) for a, b in zip(state, wanted, strict=True)
            )


@pytest.mark.parametrize("window", [0, 5])
def test_gradients_have_the_promised_strides(window: int) -> None:
    """Those of the inputs, here [B, N, H, D]: a compiled backward pass relies on them."""
    rng = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 24, 2, 8, generator=rng).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    rows = torch.randn(2, 6, 8, generator=rng)
    out = favor_attention(*leaves, rows, window=window, backend="eager")
    for x, grad in zip(leaves, torch.autograd.grad(out, leaves, out.detach()), strict=True):
        assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("window", [0, 5])
def test_exports(window: int) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
            return favor_attention(q, k, v, projection, window=window)

    arguments = tuple(make_inputs()[name] for name in NAMES)
    program = torch.export.export(Attention(), arguments)
    assert torch.equal(program.module()(*arguments), favor_attention(*arguments, window=window))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    inputs = make_inputs(grad=True)
    with launching(backend):
        out = favor_attention(**inputs, backend=backend)
        with pytest.raises(RuntimeError, match="double backward.*backend='reference'"):
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
            torch.autograd.grad(grad.square().sum(), inputs["k"])


def test_reference_backend_is_the_definition_with_double_backward() -> None:
    inputs = make_inputs(dtype=torch.float64, grad=True)
    out = favor_attention(**inputs, backend="reference")
    assert torch.equal(out, favor_reference(**inputs))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), inputs["k"])[0].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_casts_qkv_and_keeps_the_rest(backend: str) -> None:
    inputs = make_inputs(grad=True)
    low = inputs | {name: inputs[name].bfloat16() for name in "qkv"}
    with launching(backend):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out, state = favor_attention(**inputs, backend=backend, return_state=True)
        expected, _ = favor_attention(**low, backend=backend, return_state=True)
        assert out.dtype == torch.bfloat16
        assert state.kv.dtype == state.z.dtype == state.log_scale.dtype == torch.float32
        assert torch.equal(out, expected)
        pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
        for actual, wanted in pairs:
            assert actual.dtype == torch.float32
            assert torch.equal(actual, wanted)


def test_autocast_decodes_from_its_own_empty_state() -> None:
    inputs = make_inputs(1)
    q, k, v, rows = (inputs[name] for name in NAMES)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        state = empty_state(q, k, rows, window=5)
        out, state = favor_decode(q, k, v, rows, state, window=5)
        out, state = favor_decode(q, k, v, rows, state, window=5)
    assert out.dtype == state.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_layouts(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        return
    inputs = make_inputs(9, dtype=dtype, grad=True)
    with launching(backend):
        out, state = favor_attention(**inputs, backend=backend, return_state=True)
        grads = gradients(out, inputs)
    assert (out.dtype, out.stride()) == (dtype, torch.empty_like(inputs["q"]).stride())
    wide = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in state[:5]] == [wide] * 3 + [dtype] * 2
    assert state.key_mask.dtype == torch.bool
    for x, grad in zip(tensors(inputs), grads, strict=True):
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
        assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("backend, window", [("eager", 0), *product(BACKENDS, [5])])
def test_one_projection_for_all_heads_gets_the_sum_of_gradients(backend: str, window: int) -> None:
    inputs = make_inputs(grad=True, window=window)
    rows = inputs["projection"][0].detach().to(torch.float64).requires_grad_()
    each = rows.detach().expand(2, -1, -1).clone().requires_grad_()
    with launching(backend):
        outs = [
            favor_attention(**inputs | {"projection": x}, backend=backend) for x in (rows, each)
        ]
        first, second = (
            torch.autograd.grad(out.square().sum(), x)[0]
            for out, x in zip(outs, (rows, each), strict=True)
        )
    assert torch.equal(*outs)
    assert first.dtype == torch.float64
    torch.testing.assert_close(first, second.sum(0), rtol=1e-5, atol=1e-6)


def test_auto_is_eager_on_the_cpu_and_explicit_triton_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in make_inputs().items()}
    assert torch.equal(favor_attention(**inputs), favor_attention(**inputs, backend="eager"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton'.*cpu"):
        favor_attention(**inputs, backend="triton")


@needs_triton
def test_auto_is_triton_when_forced() -> None:
    inputs = make_inputs(20)
    with force_triton():
        auto, triton = favor_attention(**inputs), favor_attention(**inputs, backend="triton")
    assert torch.equal(auto, triton)
    assert not torch.equal(auto, favor_attention(**inputs, backend="eager"))  # other rounding


@pytest.mark.parametrize("name", ["relu", "taylor"])
def test_triton_refuses_plain_features(name: str) -> None:
    inputs = make_inputs() | ({"projection": None} if name == "taylor" else {})
    with pytest.raises(ValueError, match=f"{name}.*eager"), force_triton():
        favor_attention(**inputs, feature_map=name, backend="triton")


@pytest.mark.parametrize("name", ["relu", "taylor"])
def test_auto_takes_the_eager_path_for_plain_features(name: str) -> None:
    inputs = make_inputs() | ({"projection": None} if name == "taylor" else {})
    with force_triton():  # as on a GPU
        out = favor_attention(**inputs, feature_map=name)
    assert torch.equal(out, favor_attention(**inputs, feature_map=name, backend="eager"))


def test_triton_refuses_float64() -> None:
    with pytest.raises(ValueError, match="float32.*float64"), force_triton():
        favor_attention(**make_inputs(dtype=torch.float64), backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("dim", "count", "dtype"),
    [
        (8, 257, torch.float32),
        (128, 129, torch.float32),
        (256, 16, torch.float16),
        (128, 257, torch.bfloat16),
        (512, 65, torch.bfloat16),
    ],
)
def test_triton_refuses_a_state_that_it_cannot_hold(dim, count, dtype) -> None:
    q, k, v = torch.zeros(3, 1, 1, 4, dim, device=DEVICE, dtype=dtype)
    projection = torch.zeros(count, dim, device=DEVICE)
    with force_triton():
        with pytest.raises(ValueError, match=f"{count} features of heads of {dim}.*eager"):
            favor_attention(q, k, v, projection, backend="triton")
        assert favor_attention(q, k, v, projection).isfinite().all()


@pytest.mark.parametrize(
    ("dim", "count", "dtype"),
    [(128, 128, torch.float32), (64, 256, torch.float16), (128, 256, torch.bfloat16)],
)
def test_triton_holds_states_up_to_a_size(dim, count, dtype) -> None:
    assert fits(torch.zeros(1, 1, 1, dim, dtype=dtype), count)


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **{"device": DEVICE, **options})


BAD = {
    "rank": ({"q": zeros(4, 12, 8)}, ["q", "4", "(4, 12, 8)"]),
    "k unlike v": ({"v": zeros(2, 1, 11, 8)}, ["(2, 1, 12, 8)", "(2, 1, 11, 8)"]),
    "groups": ({"q": zeros(2, 3, 12, 8), "k": zeros(2, 2, 12, 8), "v": zeros(2, 2, 12, 8)},
               ["heads", "3", "2"]),
    "queries": ({"q": zeros(2, 2, 13, 8)}, ["13", "12"]),
    "dtypes": ({"k": zeros(2, 1, 12, 8).half()}, ["k", "float32", "float16"]),
    "mask": ({"key_mask": zeros(2, 11).bool()}, ["key_mask", "[2, 12]", "[2, 11]"]),
    "map": ({"feature_map": "cosine"}, ["feature_map", "hedgehog", "taylor", "'cosine'"]),
    "stabilizer": ({"stabilizer": "none"}, ["stabilizer", "running", "static", "'none'"]),
    "window": ({"window": -1}, ["window", ">= 0", "-1"]),
    "real window": ({"window": 2.5}, ["window", "integer", "2.5"]),
    "true window": ({"window": True}, ["window", "integer", "True"]),
    "block": ({"window_block": 0}, ["window_block", "1..128", "0"]),
    "wide block": ({"window_block": 129}, ["window_block", "1..128", "129"]),
    "causal": ({"causal": 1}, ["causal", "True or False", "1"]),
    "two-sided window": ({"causal": False}, ["window", "causal=True", "window=5"]),
    "scale": ({"scale": float("nan")}, ["scale", "finite", "nan"]),
    "negative scale": ({"scale": -1.0}, ["scale", "positive", "-1.0"]),
    "zero scale": ({"scale": 0}, ["scale", "positive", "0"]),
    "no projection": ({"projection": None}, ["projection", "[M, 8]", "[2, M, 8]", "NoneType"]),
    "projection of taylor": ({"feature_map": "taylor"}, ["taylor", "projection=None"]),
    "integers": ({"projection": zeros(6, 8).int()}, ["projection", "floating", "int32"]),
    "projection's device": (
        {"projection": zeros(6, 8, device="meta")}, ["projection", DEVICE, "meta"],
    ),
    "projection's dim": ({"projection": zeros(6, 9)}, ["projection", "[M, 8]", "[6, 9]"]),
    "projection's heads": ({"projection": zeros(3, 6, 8)}, ["[2, M, 8]", "[3, 6, 8]"]),
    "projection's rank": ({"projection": zeros(1, 2, 6, 8)}, ["[2, M, 8]", "[1, 2, 6, 8]"]),
    "no features": ({"projection": zeros(0, 8)}, ["projection", "[M, 8]", "[0, 8]"]),
    "gate alone": ({"window": 0}, ["log_gate", "window"]),
    "gate's size": ({"log_gate": zeros(3)}, ["log_gate", "[2]", "[3]"]),
    "gate's dtype": ({"log_gate": zeros(2).int()}, ["log_gate", "floating"]),
    "gate's device": ({"log_gate": zeros(2, device="meta")}, ["log_gate", DEVICE, "meta"]),
    "state's type": ({"initial_state": (1, 2, 3)}, ["initial_state", "FavorState", "tuple"]),
    "backend": ({"backend": "flash"}, ["flash", "auto", "triton", "eager", "reference"]),
}  # fmt: skip
BAD_STATES = {
    "kv": (lambda s: {"kv": s.kv[:, :1]}, ["kv", "[2, 2, 6, 8]", "[2, 1, 6, 8]"]),
    "z": (lambda s: {"z": s.z[..., :5]}, ["z", "[2, 2, 6]", "[2, 2, 5]"]),
    "dtype": (lambda s: {"z": s.z.double()}, ["z", "float32", "float64"]),
    "device": (lambda s: {"log_scale": s.log_scale.to("meta")}, ["log_scale", DEVICE, "meta"]),
    "no ring": (lambda s: dict.fromkeys(FavorState._fields[3:]), ["window=5", "none"]),
    "keys": (lambda s: {"keys": s.keys[:1]}, ["keys", "[2, 1, 7, 8]", "[1, 1, 7, 8]"]),
    "keys' rank": (lambda s: {"keys": s.keys[0]}, ["keys", "[1, 7, 8]"]),
    "values": (lambda s: {"values": s.values[:, :, 1:]}, ["values", "[2, 1, 7, 8]", "1, 6, 8]"]),
    "values' dtype": (lambda s: {"values": s.values.half()}, ["values", "float32", "float16"]),
    "ring's mask": (lambda s: {"key_mask": s.key_mask[:, 1:]}, ["key_mask", "[2, 7]", "[2, 6]"]),
    "mask's dtype": (lambda s: {"key_mask": s.key_mask.int()}, ["key_mask", "bool", "int32"]),
    "mask's device": (lambda s: {"key_mask": s.key_mask.to("meta")}, ["key_mask", "meta"]),
    "no mask": (lambda s: {"key_mask": None}, ["key_mask"]),
    "no values": (lambda s: {"values": None}, ["values"]),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD.keys())
def test_errors_say_what_was_expected_and_given(change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        favor_attention(**make_inputs() | change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("change, words", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_states_are_checked(change, words: list[str]) -> None:
    state = make_state()
    with pytest.raises(ValueError) as error:
        favor_attention(**make_inputs(), initial_state=state._replace(**change(state)))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_state_with_a_ring_needs_a_window() -> None:
    with pytest.raises(ValueError, match="none without; got window=0"):
        favor_attention(**make_inputs(window=0), initial_state=make_state())


def test_decode_takes_one_token() -> None:
    inputs, state = make_inputs(), make_state()
    q, k, v, rows = (inputs[name] for name in NAMES)
    with pytest.raises(ValueError, match="one token.*12"):
        favor_decode(q, k, v, rows, state, window=5)


def test_empty_state_checks_what_it_takes() -> None:
    q, k = (make_inputs()[name] for name in "qk")
    for rows, name in [(None, "favor"), (q.new_zeros(6, 8), "cosine")]:
        with pytest.raises(ValueError, match="projection|cosine"):
            empty_state(q, k, rows, feature_map=name)


def test_decoding_makes_no_graph() -> None:
    inputs, state = make_inputs(1, grad=True), make_state(12)
    q, k, v, rows = (inputs[name] for name in NAMES)
    out, state = favor_decode(q, k, v, rows, state, window=5, window_block=4)
    assert not out.requires_grad
    assert not any(x.requires_grad for x in state)


def test_every_argument_is_documented() -> None:
    for function in (favor_attention, favor_decode, empty_state):
        for name in inspect.signature(function).parameters:
            assert f"{name}:" in inspect.getdoc(function), (function.__name__, name)

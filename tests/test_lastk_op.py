"""Last-k attention as an operator: registration, backends, decoding, and its error messages."""

import subprocess
import sys
import tempfile
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import BACKENDS, DEVICE, launching
from torch import Tensor

from attnopt.kernels.lastk import lastk_attention, lastk_decode, sliding_window_attention
from attnopt.kernels.lastk.op import MAX_DIM
from attnopt.kernels.lastk.reference import lastk_reference
from attnopt.testing import force_triton


def make_inputs(n: int = 12, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict:
    """B = 2, H = 4, Hkv = 2, D = 8, W = 4, T = 2; the second row is left-padded by 3.

    q, k, v are views of one projection, as in GPT-2.
    """
    rng = torch.Generator().manual_seed(n)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(DEVICE, dtype)

    heads = rand(2, n, 4 + 2 + 2, 8).transpose(1, 2).split([4, 2, 2], dim=1)
    inputs = dict(zip("qkv", heads, strict=True))
    inputs |= {"log_weights": rand(4, 4), "sink_log_weights": rand(2)}
    inputs = {name: x.detach().requires_grad_(grad) for name, x in inputs.items()}
    start = torch.tensor([[0], [3]], device=DEVICE)
    return inputs | {"key_mask": torch.arange(n, device=DEVICE) >= start}


def gradients(out: Tensor, inputs: dict) -> tuple[Tensor, ...]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    leaves = [x for x in inputs.values() if x.requires_grad]
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_log_weights_are_causal_attention(backend: str) -> None:
    q, k, v = (make_inputs(70)[name] for name in "qkv")
    with launching(backend):
        wide = lastk_attention(q, k, v, q.new_zeros(70), backend=backend)
        sinks = lastk_attention(
            q, k, v, q.new_zeros(50), sink_log_weights=q.new_zeros(20), backend=backend
        )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sinks, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 17, 300])
def test_sliding_window_is_a_band_mask(backend: str, window: int) -> None:
    inputs = make_inputs(70)
    q, k, v, key_mask = (inputs[name] for name in ("q", "k", "v", "key_mask"))
    with launching(backend):
        out = sliding_window_attention(
            q, k, v, window, key_mask=key_mask, scale=0.25, backend=backend
        )
    n = torch.arange(70, device=DEVICE)[:, None] - torch.arange(70, device=DEVICE)
    visible = ((n >= 0) & (n < window))[None, None] & key_mask[:, None, None]
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=0.25, enable_gqa=True
    )
    expected = expected.masked_fill(~visible.any(-1, keepdim=True), 0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def operator_arguments(backend: str, layout: str, grad: bool) -> tuple:
    """What the registered operator takes: weights [H, ...], the scale and a backend, all given."""
    inputs = make_inputs()
    if layout == "broadcast":
        inputs |= {name: inputs[name][:1, :, :1].expand(inputs[name].shape) for name in "qkv"}
    inputs["sink_log_weights"] = inputs["sink_log_weights"].repeat(4, 1)
    for name in inputs.keys() - {"key_mask"}:
        inputs[name] = inputs[name].detach().requires_grad_(grad)
    return *inputs.values(), 0.5, backend


@pytest.mark.parametrize(
    "backend, layout", [("eager", "broadcast"), *product(BACKENDS, ["packed"])]
)
def test_opcheck_forward(backend: str, layout: str) -> None:
    arguments = operator_arguments(backend, layout, grad=True)
    with launching(backend):
        torch.library.opcheck(torch.ops.attnopt.lastk_forward.default, arguments)


@pytest.mark.parametrize(
    "backend, layout", [("eager", "broadcast"), *product(BACKENDS, ["packed"])]
)
def test_opcheck_backward(backend: str, layout: str) -> None:
    arguments = operator_arguments(backend, layout, grad=False)
    with launching(backend):
        out, lse = torch.ops.attnopt.lastk_forward(*arguments)
        torch.library.opcheck(
            torch.ops.attnopt.lastk_backward.default,
            (torch.randn_like(out), *arguments[:-2], out, lse, *arguments[-2:]),
        )


@pytest.mark.parametrize("backend, dynamic", [("eager", False), *product(BACKENDS, [True])])
def test_compiles_whole(backend: str, dynamic: bool) -> None:
    def attention(inputs: dict) -> Tensor:
        out = lastk_attention(**inputs, backend=backend)
        return 2 * out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with launching(backend):
        for n in (5, 12):
            inputs = make_inputs(n, grad=True)
            expected, out = attention(inputs), compiled(inputs)
            assert torch.equal(out, expected)
            pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_exports() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor) -> Tensor:
            return lastk_attention(q, k, v, log_weights)

    arguments = tuple(make_inputs().values())[:4]
    program = torch.export.export(Attention(), arguments)
    assert torch.equal(program.module()(*arguments), lastk_attention(*arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    inputs = make_inputs(grad=True)
    with launching(backend):
        out = lastk_attention(**inputs, backend=backend)
        with pytest.raises(RuntimeError, match="double backward"):
            (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
            torch.autograd.grad(grad.square().sum(), inputs["k"])


def test_reference_backend_is_the_definition_with_double_backward() -> None:
    inputs = make_inputs(n=4, dtype=torch.float64, grad=True)
    out = lastk_attention(**inputs, backend="reference")
    assert torch.equal(out, lastk_reference(**inputs))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["q"], create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), inputs["k"])[0].any()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_casts_qkv_and_keeps_log_weights(backend: str) -> None:
    inputs = make_inputs(grad=True)
    low = inputs | {name: inputs[name].half() for name in "qkv"}
    with launching(backend):
        with torch.autocast(DEVICE, dtype=torch.float16):
            out = lastk_attention(**inputs, backend=backend)
        expected = lastk_attention(**low, backend=backend)
        assert out.dtype == torch.float16
        assert torch.equal(out, expected)
        pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
        for actual, wanted in pairs:
            assert actual.dtype == torch.float32
            assert torch.equal(actual, wanted)


def test_auto_is_eager_on_the_cpu_and_triton_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: x.cpu() for name, x in make_inputs().items()}
    assert torch.equal(lastk_attention(**inputs), lastk_attention(**inputs, backend="eager"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton'.*cpu"):
        lastk_attention(**inputs, backend="triton")


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_auto_is_triton_when_forced() -> None:
    inputs = make_inputs()
    with force_triton():
        auto, triton = lastk_attention(**inputs), lastk_attention(**inputs, backend="triton")
    assert torch.equal(auto, triton)
    assert not torch.equal(auto, lastk_attention(**inputs, backend="eager"))  # other rounding


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_large_heads_are_eager() -> None:
    """The kernels' tiles of more than 256 columns exceed the shared memory of a GPU."""
    q = torch.randn(1, 1, 5, MAX_DIM + 1, device=DEVICE)
    weights = torch.randn(3, device=DEVICE)
    expected = lastk_attention(q, q, q, weights, backend="eager")
    with force_triton():
        assert torch.equal(lastk_attention(q, q, q, weights), expected)
        with pytest.raises(ValueError, match="head_dim up to 256; got 257"):
            lastk_attention(q, q, q, weights, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_token_by_token_equals_the_whole(backend: str) -> None:
    inputs = make_inputs(8)
    weights = {name: inputs[name] for name in ("log_weights", "sink_log_weights")}
    q, k, v, key_mask = (inputs[name] for name in ("q", "k", "v", "key_mask"))
    with launching(backend):
        whole = lastk_attention(**inputs, backend=backend)
        for i in range(8):
            step = lastk_decode(
                q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1],
                key_mask=key_mask[:, : i + 1], backend=backend, **weights,
            )  # fmt: skip
            torch.testing.assert_close(step, whole[:, :, i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_needs_only_the_sinks_and_the_window(backend: str) -> None:
    inputs = make_inputs(8)
    weights = {name: inputs[name] for name in ("log_weights", "sink_log_weights")}
    q, k, v = (inputs[name] for name in "qkv")
    with launching(backend):
        whole = lastk_attention(q, k, v, **weights, backend=backend)
        for i in range(6, 8):
            held = [0, 1, *range(i - 3, i + 1)]  # T = 2 sinks, W = 4 recent tokens
            step = lastk_decode(
                q[:, :, i : i + 1], k[:, :, held], v[:, :, held], **weights, backend=backend
            )
            torch.testing.assert_close(step, whole[:, :, i : i + 1])


BAD = {
    "rank": ({"q": torch.zeros(4, 12, 8)}, ["q", "4", "(4, 12, 8)"]),
    "head dim": ({"q": torch.zeros(2, 4, 12, 16)}, ["16", "8"]),
    "batch": ({"q": torch.zeros(3, 4, 12, 8)}, ["batch", "3", "2"]),
    "k unlike v": ({"v": torch.zeros(2, 2, 11, 8)}, ["(2, 2, 12, 8)", "(2, 2, 11, 8)"]),
    "groups": ({"q": torch.zeros(2, 3, 12, 8)}, ["heads", "3", "2"]),
    "queries": ({"q": torch.zeros(2, 4, 13, 8)}, ["13", "12"]),
    "mixed dtypes": ({"k": torch.zeros(2, 2, 12, 8).half()}, ["k", "float32", "float16"]),
    "integers": ({"q": torch.zeros(2, 4, 12, 8).long()}, ["q", "float32", "int64"]),
    "device": ({"k": torch.zeros(2, 2, 12, 8, device="meta")}, ["k", DEVICE, "meta"]),
    "no window": ({"log_weights": torch.zeros(0)}, ["log_weights", "1", "0"]),
    "weights' heads": ({"log_weights": torch.zeros(3, 4)}, ["log_weights", "4", "3"]),
    "weights' rank": ({"log_weights": torch.zeros(1, 4, 4)}, ["log_weights", "[1, 4, 4]"]),
    "weights' dtype": ({"log_weights": torch.zeros(4).int()}, ["log_weights", "float", "int32"]),
    "weights' device": ({"log_weights": torch.zeros(4, device="meta")}, ["log_weights", "meta"]),
    "sinks' heads": ({"sink_log_weights": torch.zeros(3, 2)}, ["sink_log_weights", "4", "3"]),
    "mask length": ({"key_mask": torch.ones(2, 11).bool()}, ["key_mask", "[2, 12]", "[2, 11]"]),
    "mask dtype": ({"key_mask": torch.ones(2, 12).long()}, ["key_mask", "bool", "int64"]),
    "mask device": (
        {"key_mask": torch.ones(2, 12, device="meta").bool()},
        ["key_mask", DEVICE, "meta"],
    ),
    "scale": ({"scale": float("nan")}, ["scale", "finite", "nan"]),
    "backend": ({"backend": "flash"}, ["flash", "auto", "triton", "eager", "reference"]),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD.keys())
def test_errors_say_what_was_expected_and_given(change: dict, words: list[str]) -> None:
    moved = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x
        for name, x in change.items()
    }
    with pytest.raises(ValueError) as error:
        lastk_attention(**make_inputs() | moved)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_triton_refuses_float64() -> None:
    with pytest.raises(ValueError, match="float32.*float64"), force_triton():
        lastk_attention(**make_inputs(dtype=torch.float64), backend="triton")


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_window_must_be_a_positive_integer(window: float) -> None:
    q, k, v = (make_inputs()[name] for name in "qkv")
    with pytest.raises(ValueError, match=f"window.*{window}"):
        sliding_window_attention(q, k, v, window)


def test_decode_takes_one_query() -> None:
    with pytest.raises(ValueError, match="12"):
        lastk_decode(**make_inputs())


def test_explicit_triton_on_cpu_computes_bfloat16_exactly():
    """The interpreter alone would multiply the raw bits of bf16 numbers."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs only where there is no GPU")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 33, 32, generator=generator).bfloat16() for _ in range(3))
    weights = torch.randn(5, generator=generator)
    code = (
        "import sys, torch; from attnopt import lastk_attention; "
        "q, k, v, w = torch.load(sys.argv[1]); "
        "torch.save(lastk_attention(q, k, v, w, backend='triton'), sys.argv[1])"
    )
    with tempfile.TemporaryDirectory() as folder:  # a process in which nothing is repaired yet
        path = f"{folder}/tensors.pt"
        torch.save([q, k, v, weights], path)
        subprocess.run([sys.executable, "-c", code, path], check=True)
        out = torch.load(path)
    expected = lastk_attention(q.double(), k.double(), v.double(), weights, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("n", "window", "sinks"), [(700, 700, 0), (700, 600, 3), (400, 256, 0)])
def test_eager_wide_windows_match_the_definition(n, window, sinks):
    """Halos of four blocks and more: a text's first windows are computed without their void."""
    rng = torch.Generator().manual_seed(n)
    q, k, v, grad, weights, sink_weights = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in [(2, 2, n, 8), (2, 1, n, 8), (2, 1, n, 8), (2, 2, n, 8), (2, window), (sinks,)]
    )
    mask = torch.arange(n) >= torch.tensor([[0], [70]])
    inputs = [x.requires_grad_() for x in (q, k, v, weights, sink_weights)]

    def results(backend: str) -> list[Tensor]:
        out = lastk_attention(
            q, k, v, weights, sink_log_weights=sink_weights, key_mask=mask, backend=backend
        )
        return [out, *torch.autograd.grad(out, inputs, grad, allow_unused=not sinks)]

    for got, expected in zip(results("eager"), results("reference"), strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)

"""The eager FAVOR+ path: values and every gradient against the reference, precision, limits."""

import random
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.kernels.favor import eager, eager_problem
from attnopt.kernels.favor.eager import favor_backward, favor_forward
from attnopt.kernels.favor.reference import favor_reference

MAPS = ("favor", "hedgehog", "exp", "relu", "taylor")
STABILIZERS = ("running", "static")
INPUTS = ("q", "k", "v", "projection", "log_gate", "kv", "z")
RESULTS = ("out", "sum_kv", "sum_z")


class Eager(torch.autograd.Function):
    """The two inner functions as one differentiable function: out, lse, kv, z, log_scale."""

    @staticmethod
    def forward(ctx, q, k, v, projection, log_gate, kv, z, log_scale, key_mask, options):
        inputs = q, k, v, projection, log_gate, key_mask, kv, z, log_scale
        results = favor_forward(*inputs, **options)
        out, lse, _, _, scale, *kept = results
        ctx.inputs, ctx.kept, ctx.options = inputs, (out, lse, scale, *kept), options
        ctx.mark_non_differentiable(lse, scale)
        return results[:5]

    @staticmethod
    def backward(ctx, grad, _lse, grad_kv, grad_z, _scale):
        grads = favor_backward(grad, grad_kv, grad_z, *ctx.inputs, *ctx.kept, **ctx.options)
        return *grads, None, None, None


def eager_results(inputs: dict, options: dict) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    tensors = [inputs[name] for name in (*INPUTS, "log_scale", "key_mask")]
    out, _, *state = Eager.apply(*tensors, options)
    return out, tuple(state)


def reference_results(inputs: dict, options: dict) -> tuple[Tensor, tuple]:
    options = {name: x for name, x in options.items() if name != "stabilizer"}
    taylor, window = options["feature_map"] == "taylor", options["window"]
    return favor_reference(
        inputs["q"], inputs["k"], inputs["v"], None if taylor else inputs["projection"],
        log_gate=inputs["log_gate"] if window else None, key_mask=inputs["key_mask"],
        initial_state=(inputs["kv"], inputs["z"], inputs["log_scale"]), return_state=True, **options
    )


def make_options(**changes) -> dict:
    return {
        "feature_map": "favor", "window": 0, "window_block": 32, "causal": True,
        "stabilizer": "running", "scale": 0.3, **changes,
    }  # fmt: skip


def make_mask(kind: str, b: int, n: int, generator: torch.Generator) -> Tensor | None:
    mask = torch.ones(b, n).bool()
    if kind == "left":
        mask[0, : n // 3], mask[-1, : n // 20] = False, False
    elif kind == "right":
        mask[0, n - n // 5 :] = False
    elif kind == "holes":
        mask = torch.rand(b, n, generator=generator) > 0.3
    elif kind == "empty-row":
        mask[0] = False
    return None if kind == "none" else mask


def make_inputs(feature_map="favor", b=2, h=4, hkv=2, nq=150, nk=150, d=8, m=12, std=1.0,
                mask="none", state=False, seed=0, dtype=torch.float64) -> dict:
    """Random inputs; the initial state, if any, belongs to positive weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taylor = feature_map == "taylor"
    rows, m = (0, 1 + d + d * (d + 1) // 2) if taylor else (m, m)
    inputs = {
        "q": std * normal(b, h, nq, d), "k": std * normal(b, hkv, nk, d),
        "v": normal(b, hkv, nk, d), "projection": normal(h, rows, d), "log_gate": normal(h),
        "kv": normal(b, h, m, d) * state, "z": (normal(b, h, m).abs() + 0.5) * state,
        "log_scale": normal(b, h, m) if state else torch.full((b, h, m), -1e30),
    }  # fmt: skip
    if state and taylor:
        inputs["z"][:, :, 0] += 100
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    wide = torch.promote_types(dtype, torch.float32)
    for name in INPUTS[3:] + ("log_scale",):
        inputs[name] = inputs[name].to(wide)
    return inputs | {"key_mask": make_mask(mask, b, nk, generator)}


def as_float64(inputs: dict) -> dict:
    return {
        name: x.double() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def run(results, inputs: dict, options: dict, *, scaled: bool = True) -> dict[str, Tensor]:
    """Output, sums of the next state and every gradient under random upstream gradients.

    Sums are compared with `scaled`, by e^{log_scale}, which overflows where norms are large.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in INPUTS}
    out, (kv, z, log_scale) = results(inputs | leaves, options)
    factor = log_scale.exp() if scaled else torch.ones_like(z)  # 0 where there is nothing
    values = [out, kv * factor[..., None], z * factor]
    generator = torch.Generator().manual_seed(99)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in values
    ]
    grads = torch.autograd.grad(values, [*leaves.values()], upstream, allow_unused=True)
    grads = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
    return {n: x.detach() for n, x in zip(RESULTS, values, strict=True)} | grads


def error(actual: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    """Frobenius norm of the error over that of the exact tensor, or over a floor for it."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=floor))


def assert_close(actual: dict, exact: dict, tolerance: float = 1e-10) -> None:
    for name, expected in exact.items():
        assert actual[name].shape == expected.shape, name
        distance = error(actual[name], expected, floor=1.0)
        assert distance <= tolerance, (name, distance)


@contextmanager
def poisoned():
    """Fill what `torch.empty` gives with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def drawn_cases(count: int) -> list:
    draw = random.Random(1)
    cases = []
    for i in range(count):
        window = draw.choice([0, 0, 1, 2, 7, 33, 40, 64, 200])
        nk = draw.choice([1, 5, 64, 100, 150, 200])
        options = {
            "feature_map": MAPS[i % 5], "window": window,
            "window_block": draw.choice([1, 3, 8, 16, 20, 32, 128]),
            "causal": window > 0 or draw.random() < 0.7, "stabilizer": STABILIZERS[i % 2],
        }  # fmt: skip
        sizes = {
            "nk": nk, "nq": draw.choice([nk, nk, max(1, nk // 3), 1]), "state": draw.random() < 0.5,
            "mask": draw.choice(["none", "none", "left", "right", "holes", "empty-row"]),
            "hkv": draw.choice([1, 2, 4]),
        }  # fmt: skip
        label = "-".join(f"{x}" for x in (*options.values(), *sizes.values()))
        cases.append(pytest.param(options, sizes, [1, 30_000, 1 << 20][i % 3], id=label))
    return cases


@pytest.mark.parametrize(("options", "sizes", "run_bytes"), drawn_cases(75))
def test_values_and_gradients_in_float64(options, sizes, run_bytes, monkeypatch):
    monkeypatch.setattr(eager_problem, "RUN_BYTES", run_bytes)
    inputs, options = make_inputs(options["feature_map"], **sizes), make_options(**options)
    with poisoned():
        actual = run(eager_results, inputs, options)
    assert_close(actual, run(reference_results, inputs, options))


@pytest.mark.parametrize("mask", ["left", "right", "holes", "empty-row"])
@pytest.mark.parametrize("window", [0, 1, 20, 33])
@pytest.mark.parametrize("feature_map", ["favor", "taylor"])
def test_masks_in_float64(feature_map, window, mask, monkeypatch):
    monkeypatch.setattr(eager_problem, "RUN_BYTES", 100_000)
    options = make_options(feature_map=feature_map, window=window, window_block=16)
    inputs = make_inputs(feature_map, nq=90, nk=130, mask=mask, state=True)
    actual = run(eager_results, inputs, options)
    assert_close(actual, run(reference_results, inputs, options))
    if mask == "empty-row":
        assert not actual["k"][0].any()
        assert not actual["v"][0].any()


@pytest.mark.parametrize("window", [0, 1, 3, 6])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map, window, monkeypatch):
    monkeypatch.setattr(eager_problem, "RUN_BYTES", 1)
    monkeypatch.setattr(eager_problem, "CHUNK", 2)
    inputs = make_inputs(feature_map, b=1, h=2, hkv=1, nq=5, nk=7, d=2, m=2, state=True)
    options = make_options(
        feature_map=feature_map, window=window, window_block=2, stabilizer="static"
    )

    def outputs(*tensors):
        out, (kv, z, _) = eager_results(inputs | dict(zip(INPUTS, tensors, strict=True)), options)
        return out, kv, z  # at the static reference, which is the same for perturbed inputs

    wanted = [inputs[name].requires_grad_(name != "projection") for name in INPUTS]
    if feature_map in ("relu", "hedgehog"):  # their references do not depend on the projection
        inputs["projection"].requires_grad_()
    assert torch.autograd.gradcheck(outputs, wanted)


def block_orthogonal(h: int, m: int, d: int) -> Tensor:
    """Rows as FAVOR+ draws them: orthogonal in blocks of D, with the norms of normal rows."""
    blocks = torch.linalg.qr(torch.randn(h, -(-m // d), d, d)).Q
    return blocks.reshape(h, -1, d)[:, :m] * torch.randn(h, m, d).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("std", [0.5, 2.0, 5.0])
@pytest.mark.parametrize(("d", "m"), [(16, 16), (64, 64), (64, 256), (128, 128)])
def test_float32_is_precise(d, m, std):
    torch.manual_seed(0)
    inputs = make_inputs(b=1, h=1, hkv=1, nq=200, nk=200, d=d, m=m, std=std, dtype=torch.float32)
    inputs["projection"] = block_orthogonal(1, m, d)
    options = make_options(scale=d**-0.5)
    exact = run(reference_results, as_float64(inputs), options)
    actual, usual = (run(f, inputs, options) for f in (eager_results, reference_results))
    assert error(actual["out"], exact["out"]) <= 2e-6
    assert error(actual["out"][:, :, :64], exact["out"][:, :, :64]) <= 2e-6
    for name in ("q", "k", "v", "projection"):
        allowed = max(2e-6, 1.5 * error(usual[name], exact[name]))
        assert error(actual[name], exact[name]) <= allowed, name


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("window", "stabilizer"), [(0, "running"), (0, "static"), (33, "running")])
def test_float32_is_as_precise_as_the_definition(feature_map, window, stabilizer):
    options = make_options(
        feature_map=feature_map, window=window, stabilizer=stabilizer, scale=0.25
    )
    inputs = make_inputs(feature_map, d=16, m=32, mask="left", dtype=torch.float32)
    exact = run(reference_results, as_float64(inputs), options)
    actual, usual = (run(f, inputs, options) for f in (eager_results, reference_results))
    for name, expected in exact.items():
        allowed = 2 * error(usual[name], expected) + 5e-7
        floor = 1.0 if name == "log_gate" else 1e-6  # a sum over all tokens that cancels
        assert error(actual[name], expected, floor) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 33])
def test_low_precision(window, dtype):
    options = make_options(window=window)
    inputs = make_inputs(std=0.7, mask="left", state=True, dtype=dtype)
    exact = run(reference_results, as_float64(inputs), options)
    actual = run(eager_results, inputs, options)
    for name in ("out", "q", "k", "v"):
        assert actual[name].dtype == dtype
        assert error(actual[name], exact[name]) <= 2 * torch.finfo(dtype).eps, name
    assert actual["projection"].dtype == torch.float32


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("feature_map", MAPS)
def test_large_norms_stay_finite(feature_map, window, stabilizer):
    options = make_options(feature_map=feature_map, window=window, stabilizer=stabilizer)
    for std in (10.0, 100.0):
        inputs = make_inputs(feature_map, std=std, mask="left", d=16, dtype=torch.float32)
        for name, x in run(eager_results, inputs, options, scaled=False).items():
            assert x.isfinite().all(), (std, name)


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("feature_map", MAPS)
def test_one_visible_key_and_repeated_tokens(feature_map, window):
    options = make_options(feature_map=feature_map, window=window)
    std = 1.0 if feature_map == "taylor" else 30.0  # whose features cancel, without a window too
    inputs = make_inputs(feature_map, std=std, dtype=torch.float32)
    inputs["key_mask"] = torch.zeros(2, 150).bool()
    inputs["key_mask"][:, 70] = True
    results = run(eager_results, inputs, options, scaled=False)
    assert not results["out"][:, :, :70].any()
    expected = inputs["v"].repeat_interleave(2, 1)[:, :, 70:71].expand(-1, -1, 80, -1)
    torch.testing.assert_close(results["out"][:, :, 70:], expected, rtol=1e-5, atol=1e-5)
    inputs["key_mask"] = None
    for name in "qkv":
        inputs[name] = inputs[name][:, :, :1].expand_as(inputs[name]).contiguous()
    results = run(eager_results, inputs, options, scaled=False)
    expected = inputs["v"].repeat_interleave(2, 1)
    torch.testing.assert_close(results["out"], expected, rtol=1e-5, atol=1e-5)
    assert all(results[name].isfinite().all() for name in INPUTS)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize(("window", "block"), [(0, 1), (20, 16), (20, 5)])
def test_the_future_does_not_change_outputs(window, block, stabilizer):
    options = make_options(window=window, window_block=block, stabilizer=stabilizer)
    inputs, others = (
        make_inputs(nq=140, mask="left", dtype=torch.float32, seed=seed) for seed in (0, 1)
    )
    out, _ = eager_results(inputs, options)
    for last in (40, 63, 64, 100, 148):
        future = {name: inputs[name].clone() for name in ("q", "k", "v", "key_mask")}
        for name in "qkv":
            rows = slice(last + 1 - (150 - inputs[name].shape[2]), None)
            future[name][:, :, rows] = 10 * others[name][:, :, rows]
        future["key_mask"][:, -1] = False
        changed, _ = eager_results(inputs | future, options)
        rows = slice(0, last + 1 - 10)
        if stabilizer == "static":
            assert torch.equal(changed[:, :, rows], out[:, :, rows]), last
        else:
            assert error(changed[:, :, rows], out[:, :, rows]) <= 1e-5, last
        assert not torch.equal(changed, out)


@pytest.mark.parametrize("window", [0, 9, 33])
def test_padding_equals_the_row_alone(window):
    options = make_options(window=window, window_block=16)
    inputs, pad = make_inputs(nq=70, nk=70), 23
    alone = run(eager_results, inputs, options)
    for sides in [(pad, 0), (0, pad)]:
        padded = {name: F.pad(inputs[name], (0, 0, *sides), value=7.0) for name in "qkv"}
        padded["key_mask"] = F.pad(torch.ones(2, 70), sides).bool()
        out, (kv, z, scale) = eager_results(inputs | padded, options)
        rows = slice(sides[0], sides[0] + 70)
        assert_close({"out": out[:, :, rows]}, {"out": alone["out"]})
        if sides[0]:
            assert_close({"z": z * scale.exp()}, {"z": alone["sum_z"]})


@pytest.mark.parametrize("window", [150, 10**12])
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_window_over_everything_is_softmax(feature_map, window):
    inputs = make_inputs(feature_map, hkv=4)
    options = make_options(feature_map=feature_map, window=window, window_block=7)
    out, _ = eager_results(inputs, options)
    q, k, v = (inputs[name] for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert_close({"out": out}, {"out": expected})
    lse = Eager.apply(*(inputs[n] for n in (*INPUTS, "log_scale", "key_mask")), options)[1]
    scores = (0.3 * q @ k.mT).masked_fill(~torch.ones(150, 150).tril().bool(), -torch.inf)
    assert_close({"lse": lse}, {"lse": scores.logsumexp(-1)})


@pytest.mark.parametrize("feature_map", MAPS)
def test_text_fed_in_pieces(feature_map):
    options = make_options(feature_map=feature_map)
    inputs = make_inputs(feature_map)
    whole, sums = eager_results(inputs, options)
    pieces, state = [], {}
    for start, end in ((0, 70), (70, 149), (149, 150)):  # the last one is a step of decoding
        piece = {name: inputs[name][:, :, start:end] for name in "qkv"}
        out, (kv, z, log_scale) = eager_results(inputs | piece | state, options)
        pieces.append(out)
        state = {"kv": kv, "z": z, "log_scale": log_scale}
    assert_close({"out": torch.cat(pieces, 2)}, {"out": whole})
    assert_close({"z": z * log_scale.exp()}, {"z": sums[1] * sums[2].exp()})


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_step_of_decoding(feature_map, stabilizer):
    for window, nk, mask in [
        (0, 1, "none"), (0, 1, "empty-row"), (5, 5, "none"), (33, 48, "none"), (33, 48, "right"),
        (33, 64, "left"), (33, 47, "holes"), (33, 49, "empty-row"),
    ]:  # fmt: skip
        options = make_options(
            feature_map=feature_map, window=window, window_block=16, stabilizer=stabilizer
        )
        for state in (False, True):
            inputs = make_inputs(feature_map, nq=1, nk=nk, mask=mask, state=state)
            assert eager.is_step(inputs["q"], inputs["k"], window)
            actual = run(eager_results, inputs, options)
            assert_close(actual, run(reference_results, inputs, options))
            tensors = [inputs[n] for n in (*INPUTS[:5], "key_mask", *INPUTS[5:], "log_scale")]
            lse, in_chunks = (
                f(*tensors, **options)[1] for f in (favor_forward, eager.forward_in_chunks)
            )
            assert_close({"total": lse.exp()}, {"total": in_chunks.exp()})


@pytest.mark.parametrize("window", [0, 20])
def test_strided_inputs(window):
    options = make_options(window=window)
    inputs = make_inputs(b=2, h=3, hkv=3)
    packed = torch.cat([inputs[name].transpose(1, 2).flatten(2) for name in "qkv"], 2)
    views = packed.split(24, dim=2)  # [B, N, H D] each, as GPT-2 has them
    views = {n: x.view(2, 150, 3, 8).transpose(1, 2) for n, x in zip("qkv", views, strict=True)}
    assert_close(run(eager_results, inputs | views, options), run(eager_results, inputs, options))
    out, _ = eager_results(inputs | views, options)
    assert out.stride() == torch.empty_like(views["q"]).stride()
    expanded = {name: inputs[name][:1, :1].expand_as(inputs[name]) for name in "qkv"}
    dense = {name: x.contiguous() for name, x in expanded.items()}
    assert_close(
        run(eager_results, inputs | expanded, options), run(eager_results, inputs | dense, options)
    )


@pytest.mark.parametrize("window", [0, 33])
def test_same_bits_twice(window):
    inputs = make_inputs(mask="holes", state=True, dtype=torch.float32)
    first, second = (run(eager_results, inputs, make_options(window=window)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize(("window", "block"), [(0, 32), (1, 1), (40, 16), (300, 32)])
def test_saved_shapes(window, block, mask, monkeypatch):
    monkeypatch.setattr(eager_problem, "RUN_BYTES", 50_000)
    for nq, nk in [(1, 1), (1, 90), (150, 150), (40, 150)]:
        inputs = make_inputs(nq=nq, nk=nk, mask=mask)
        options = make_options(window=window, window_block=block)
        tensors = [inputs[n] for n in (*INPUTS[:5], "key_mask", *INPUTS[5:], "log_scale")]
        kept = favor_forward(*tensors, **options)[5:]
        shapes = eager.saved_shapes(
            inputs["q"], inputs["k"], inputs["projection"], feature_map="favor", window=window,
            window_block=block, causal=True,
        )
        assert [tuple(x.shape) for x in kept] == [tuple(shape) for shape in shapes]


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operation wrote to new memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.untyped_storage().size() // 4)
        return result


@pytest.mark.parametrize("window", [0, 33])
def test_memory_holds_no_features_of_the_whole_text(window):
    n, m, d = 4096, 128, 4
    inputs = make_inputs(b=1, h=8, hkv=8, nq=n, nk=n, d=d, m=m, dtype=torch.float32)
    tensors = [inputs[x] for x in (*INPUTS[:5], "key_mask", *INPUTS[5:], "log_scale")]
    options = make_options(window=window)
    with LargestTensor() as seen:
        out, lse, kv, z, scale, *kept = favor_forward(*tensors, **options)
        favor_backward(
            out, torch.zeros_like(kv), torch.zeros_like(z), *tensors, out, lse, scale, *kept,
            **options,
        )
    assert seen.elements <= 8 * n * m / 8


def test_projection_gradient_on_request():
    inputs, options = make_inputs(state=True), make_options()
    tensors = [inputs[n] for n in (*INPUTS[:5], "key_mask", *INPUTS[5:], "log_scale")]
    out, lse, kv, z, scale, *kept = favor_forward(*tensors, **options)
    upstream = out, kv, z, *tensors, out, lse, scale, *kept
    with_it, without = (
        favor_backward(*upstream, **options, projection_grad=flag) for flag in (True, False)
    )
    assert with_it[3].any()
    assert not without[3].any()
    for first, second in zip(with_it[:3], without[:3], strict=True):
        assert torch.equal(first, second)

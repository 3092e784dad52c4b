"""Numbers of FAVOR+ attention: every backend against the float64 definition.

Memory from torch.empty is filled with NaN throughout, so an element nobody wrote is seen.
Without a GPU the Triton kernels run in Triton's interpreter, on small sizes; sweeps are slow tests.
"""

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import BACKENDS, DEVICE, LAYOUTS, MASKS, launching, needs_triton
from favor_inputs import (
    MAPS,
    PAIRS,
    attend,
    define,
    error,
    make_inputs,
    make_options,
    run,
    run_backend,
    run_exact,
)
from torch import Tensor

from attnopt.kernels.favor import empty_state, favor_attention, favor_decode, plan
from attnopt.kernels.favor.projections import orthogonal_projection

STABILIZERS = ["running", "static"]
# window, its block: own block only, smaller than a block, across one, across two, everything
WINDOWS = [(0, 32), (1, 32), (7, 16), (20, 16), (33, 32), (300, 32)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def assert_right(backend: str, inputs: dict, options: dict) -> None:
    """At most twice the error of the definition in float32 on the same numbers, and a few bits.

    Errors are relative to a tensor's norm, or to 1 where gradients cancel.
    """
    exact = run_exact(inputs, options)
    log_scale = exact.pop("log_scale")
    actual = run_backend(backend, inputs, options, log_scale)
    usual = run(define, inputs, options, log_scale)
    for name, expected in exact.items():
        found, allowed = (error(x[name], expected, floor=1.0) for x in (actual, usual))
        assert found <= 2 * allowed + 4e-6, (name, found, allowed)


def grid(names: list[str], lengths: list[int], *, repeats: int = 1, small: bool = False) -> list:
    """Every feature map with every window and length; all other sizes are drawn.

    `small`: what takes the interpreter a second.
    """
    draw = random.Random(0)
    sets = []
    for name, n, (window, block), _ in product(names, lengths, WINDOWS, range(repeats)):
        h, hkv = draw.choice([(2, 1), (1, 1)] if small else [(2, 2), (4, 2), (3, 1), (1, 1)])
        b = draw.choice([1, 2] if h == 1 else [1]) if small else 2
        sizes = {
            "feature_map": name, "n": n, "window": window, "block": block, "h": h, "hkv": hkv,
            "b": b, "extra": draw.choice([0, 0, 1, 37]),
            "d": 8 if name == "taylor" else draw.choice([8, 20, 32]),
            "m": draw.choice([5, 12, 16, 24]), "std": 1.0 if name == "taylor" else 1.5,
            "layout": draw.choice(LAYOUTS), "state": draw.random() < 0.4 and window < 300,
            "gate": draw.random() < 0.6, "shared": draw.random() < 0.3,
        }  # fmt: skip
        sizes["mask"] = draw.choice(MASKS if sizes["b"] > 1 else MASKS[:-1])
        options = {"causal": window > 0 or draw.random() < 0.7}
        options["stabilizer"] = draw.choice(STABILIZERS)
        label = "-".join(f"{key}{value}" for key, value in (sizes | options).items())
        sets.append(pytest.param(sizes, options, id=label))
    return sets


@pytest.mark.parametrize("sizes, options", grid(MAPS, [1, 63, 257]))
def test_eager(sizes: dict, options: dict) -> None:
    assert_right("eager", make_inputs(**sizes), make_options(sizes, **options))


@needs_triton
@pytest.mark.parametrize(
    "sizes, options", grid(MAPS[:1], [63], small=True) + grid(MAPS[1:3], [1, 63], small=True)[::5]
)
def test_triton(sizes: dict, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "segments_override", 1 + sizes["m"] % 3)
    assert_right("triton", make_inputs(**sizes), make_options(sizes, **options))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("sizes, options", grid(MAPS[:3], [1, 63, 100, 257], repeats=2))
def test_triton_sweep(sizes: dict, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "segments_override", 1 + sizes["m"] % 3)
    assert_right("triton", make_inputs(**sizes), make_options(sizes, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exponents_above_a_static_reference_count(backend: str) -> None:
    sizes = {"feature_map": "exp", "n": 5, "window": 0, "d": 8, "m": 12, "std": 3.0}
    assert_right(backend, make_inputs(**sizes), make_options(sizes, stabilizer="static"))


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize(("window", "block"), [(0, 32), (20, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: str, window: int, block: int, mask: str) -> None:
    """Both rows of the batch are padded differently; row 0 of "empty-row" has no token at all."""
    sizes = {"n": 30, "extra": 7, "h": 1, "window": window, "block": block, "mask": mask}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    assert_right(backend, inputs, options)
    if mask == "empty-row":
        results = run_backend(backend, inputs, options)
        assert not any(results[name][0].any() for name in ("out", "q", "k", "v"))


@pytest.mark.parametrize("mask", ["left", "holes", "empty-row"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_query_sees_the_initial_state(backend: str, window: int, mask: str) -> None:
    """Also those before the first real token of a piece of text."""
    sizes = {"n": 20, "h": 1, "window": window, "block": 16, "mask": mask, "state": True}
    assert_right(backend, make_inputs(**sizes), make_options(sizes))


@pytest.mark.parametrize("std", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_precise(backend: str, window: int, std: float) -> None:
    sizes = {"n": 70, "d": 64, "m": 64, "h": 1, "b": 1, "std": std, "window": window, "block": 16}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    rng = torch.Generator().manual_seed(0)
    inputs["projection"] = orthogonal_projection(64, 64, heads=1, generator=rng).to(DEVICE)
    exact = run_exact(inputs, options)
    actual = run_backend(backend, inputs, options, exact["log_scale"])
    assert error(actual["out"], exact["out"]) <= 2e-6
    assert error(actual["out"][:, :, :16], exact["out"][:, :, :16]) <= 2e-6
    for name in ("q", "k", "v", "projection"):
        assert error(actual[name], exact[name]) <= 8e-6, name


class Product(torch.autograd.Function):
    """`a @ b` as tensor cores compute it: operands rounded to a dtype, sums in float32."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype, (a, b) = dtype, (x.to(dtype).float() for x in (a, b))
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        a, b = ctx.saved_tensors
        grad = grad.to(ctx.dtype).float()
        return grad @ b.mT, a.mT @ grad, None


def plain(inputs: dict, options: dict) -> tuple[Tensor, tuple]:
    """FAVOR+ without chunks, every product at the dtype of q: a kernel may be twice as wrong.

    Queries see all keys up to their own; there is no padding and no initial state.
    """
    q, k, v = (inputs[name].float() for name in "qkv")
    dtype, root = inputs["q"].dtype, q.shape[-1] ** -0.25
    groups, n, window = q.shape[1] // k.shape[1], k.shape[2], options["window"]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    rows = inputs["projection"].float()
    lq = root * Product.apply(q, rows.mT, dtype) - (root * q).square().sum(-1, keepdim=True) / 2
    lk = root * Product.apply(k, rows.mT, dtype) - (root * k).square().sum(-1, keepdim=True) / 2
    r = lk.detach().amax(2, keepdim=True)
    c = (lq + r).detach().amax(-1, keepdim=True)
    p, position = torch.arange(n, device=q.device), torch.arange(n, device=q.device)[:, None]
    exact = (p >= 0).expand(n, n)
    if window:
        scores = root**2 * Product.apply(q, k.mT, dtype)
        block = options["window_block"]
        exact = p >= (position - window + 1).clamp(min=0) // block * block
        c = torch.maximum(c, scores.detach().amax(-1, keepdim=True))
    pq, pk = (lq + r - c).exp() / rows.shape[-2], (lk - r).exp()
    weights = Product.apply(pq, pk.mT, dtype)
    if window:
        weights = torch.where(exact, (scores - c).exp(), weights)
    weights = weights * (p <= position)
    out = Product.apply(weights, v, dtype) / weights.sum(-1, keepdim=True)
    if window:  # what the next token sees through features
        pk = pk * (p < max(0, n - window + 1) // block * block)[:, None]
    return out.to(dtype), (Product.apply(pk.mT, v, dtype), pk.sum(2), r.squeeze(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"d": 32, "m": 32, "layout": "packed"},
        {"d": 40, "m": 24, "window": 33, "block": 32, "h": 2, "hkv": 1, "b": 1},
    ],
    ids=["packed", "groups-window"],
)
def test_low_precision(backend: str, dtype: torch.dtype, sizes: dict) -> None:
    """Against float64 on the same rounded inputs, projection included."""
    inputs, options = make_inputs(**sizes, dtype=dtype), make_options(sizes)
    exact = run_exact(inputs, options)
    actual = run_backend(backend, inputs, options, exact["log_scale"])
    usual = run(plain, inputs, options, exact["log_scale"])
    for name in ("out", "q", "k", "v", "projection", "kv'"):
        found, allowed = (error(x[name], exact[name]) for x in (actual, usual))
        assert found <= 2 * allowed, (name, found, allowed)


@pytest.mark.parametrize(("window", "block"), [(0, 32), (33, 16)])
@needs_triton
def test_segments_agree(window: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n": 112, "h": 1, "b": 1, "window": window, "block": block, "d": 8}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    found = []
    for segments in (1, 2, 7):
        monkeypatch.setattr(plan, "segments_override", segments)
        cut = plan.make_plan(
            inputs["q"], inputs["k"], 12, window=window, window_block=block, causal=True
        )
        assert (cut.segments > 1) == (segments > 1)
        log_scale = found[0]["log_scale"] if found else None
        found.append(run_backend("triton", inputs, options, log_scale))
    for other, name in product(found[1:], found[0]):
        assert error(other[name], found[0][name].double()) <= 5e-6, name


def pieces(inputs: dict, options: dict, backend: str, ends: list[int], decode: bool) -> tuple:
    """Outputs and last state of a text fed in pieces, or token by token."""
    q, k, v, rows, mask = (inputs[name] for name in ("q", "k", "v", "projection", "key_mask"))
    common = {"log_gate": inputs.get("log_gate"), "backend": backend}
    common |= {name: x for name, x in options.items() if name != "causal"}
    names = {name: options[name] for name in ("feature_map", "window")}
    state, outs, begin = empty_state(q, k, rows, **names), [], 0
    for end in ends:
        part = slice(begin, end)
        here = (q[:, :, part], k[:, :, part], v[:, :, part], rows)
        own = common | {"key_mask": None if mask is None else mask[:, part]}
        if decode:
            out, state = favor_decode(*here, state, **own)
            assert state.keys is None or state.keys.shape[2] <= (
                options["window"] + options["window_block"] - 2
            )
        else:
            out, state = favor_attention(*here, initial_state=state, return_state=True, **own)
        outs.append(out)
        begin = end
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize(("window", "block"), [(0, 32), (1, 8), (7, 4), (9, 8)])
@pytest.mark.parametrize("backend, name", PAIRS[:6])
def test_pieces_and_tokens_equal_the_whole(
    backend: str, name: str, window: int, block: int, mask: str
) -> None:
    sizes = {
        "feature_map": name, "n": 23, "d": 8, "h": 2 if backend == "eager" else 1, "mask": mask,
        "window": window, "block": block, "gate": True,
    }  # fmt: skip
    inputs, options = make_inputs(**sizes), make_options(sizes)
    if name == "taylor":
        inputs["projection"] = None
    exact, exact_state = define(inputs, options)
    with launching(backend), torch.no_grad():
        for ends, decode in [([11, 12, 23], False), ([*range(1, 24)], True)]:
            if decode and backend == "triton" and (window, mask) != (7, "left"):
                continue  # slow in the interpreter
            out, state = pieces(inputs, options, backend, ends, decode)
            torch.testing.assert_close(out, exact, rtol=2e-5, atol=2e-5)
            held = state.log_scale - exact_state[2]
            torch.testing.assert_close(
                torch.where(state.z == 0, 0, state.z * held.exp()), exact_state[1],
                rtol=2e-5, atol=2e-5,
            )  # fmt: skip


def test_decoding_keeps_a_constant_state() -> None:
    sizes = {"n": 60, "h": 1, "window": 9, "block": 8}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    held = [
        [x.shape for x in pieces(inputs, options, "eager", [*range(1, n + 1)], True)[1]]
        for n in (20, 60)
    ]
    assert held[0] == held[1]
    assert held[0][3][2] == 9 + 8 - 2


@pytest.mark.parametrize(("window", "block"), [(0, 32), (20, 16), (7, 16)])
@pytest.mark.parametrize("backend, name", [pair for pair in PAIRS if pair != ("triton", "exp")])
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_the_future_does_not_change_outputs(
    stabilizer: str, backend: str, name: str, window: int, block: int
) -> None:
    """Not a bit with static references; running ones see later keys of a block, which cancels."""
    sizes = {
        "feature_map": name, "n": 64, "d": 8, "h": 1, "b": 1, "mask": "left",
        "window": window, "block": block, "gate": True,
    }  # fmt: skip
    options = make_options(sizes, stabilizer=stabilizer)
    inputs, others = make_inputs(**sizes), make_inputs(**sizes, seed=1)
    with torch.no_grad(), launching(backend):
        out, _ = attend(inputs, options, backend)
        for last, factor in [(40, 6), (62, 6)]:
            future = {key: inputs[key].clone() for key in ("q", "k", "v", "key_mask")}
            for key in "qkv":
                future[key][:, :, last + 1 :] = factor * others[key][:, :, last + 1 :]
            future["key_mask"][:, -1] = False
            changed, _ = attend(inputs | future, options, backend)
            rows = slice(0, last + 1)
            if stabilizer == "static":
                assert torch.equal(changed[:, :, rows], out[:, :, rows]), last
            else:
                distance = error(changed[:, :, rows], out[:, :, rows].double())
                assert distance <= 2e-6, (last, distance)
            assert not torch.equal(changed, out)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend: str, window: int) -> None:
    sizes = {
        "n": 63, "b": 1, "window": window, "block": 16, "mask": "holes", "layout": "packed",
        "gate": True,
    }  # fmt: skip
    inputs, options = make_inputs(**sizes), make_options(sizes)
    first, second = (run_backend(backend, inputs, options) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("backend, name", PAIRS)
def test_large_norms_stay_finite(backend: str, name: str, window: int, stabilizer: str) -> None:
    limits = [(100.0, torch.float32), (20.0, torch.bfloat16), (20.0, torch.float32)]
    for std, dtype in limits[: 1 if backend == "triton" else 3]:
        sizes = {
            "feature_map": name, "n": 35, "d": 16, "m": 12, "h": 1, "b": 1, "std": std,
            "dtype": dtype, "window": window, "block": 16, "mask": "left", "layout": "packed",
        }  # fmt: skip
        inputs, options = make_inputs(**sizes), make_options(sizes, stabilizer=stabilizer)
        for key, x in run_backend(backend, inputs, options).items():
            assert x.isfinite().all(), (std, dtype, key)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("features", [1, 2, 3, 17])
@pytest.mark.parametrize("backend, name", PAIRS[:3] + PAIRS[5:])
def test_features_that_all_vanish_stay_finite(
    backend: str, name: str, features: int, stabilizer: str
) -> None:
    """Every real logit of some key lies far below 0, where padded features would not."""
    sizes = {"feature_map": name, "n": 24, "d": 8, "m": features, "h": 1, "b": 1, "std": 40.0}
    options = make_options(sizes, stabilizer=stabilizer)
    inputs = make_inputs(**sizes)
    inputs["projection"] = inputs["projection"].abs()
    inputs["k"][:, :, 3:] = -inputs["k"][:, :, 3:].abs()
    for key, x in run_backend(backend, inputs, options).items():
        assert x.isfinite().all(), key


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("backend, name", PAIRS)
def test_one_visible_key_and_repeated_tokens(backend: str, name: str, window: int) -> None:
    std = 1.0 if name == "taylor" else 20.0
    sizes = {
        "feature_map": name, "n": 40, "d": 16, "h": 1, "b": 1, "std": std,
        "window": window, "block": 16,
    }  # fmt: skip
    inputs, options = make_inputs(**sizes), make_options(sizes)
    inputs["key_mask"] = (torch.arange(40, device=DEVICE) == 21)[None]
    results = run_backend(backend, inputs, options)
    expected = inputs["v"][:, :, 21:22].expand(-1, 1, 19, -1)
    torch.testing.assert_close(results["out"][:, :, 21:], expected, rtol=1e-5, atol=1e-5)
    assert not results["out"][:, :, :21].any()
    assert all(x.isfinite().all() for x in results.values())
    inputs |= {key: inputs[key][:, :, :1].expand_as(inputs[key]).contiguous() for key in "qkv"}
    results = run_backend(backend, inputs | {"key_mask": None}, options)
    torch.testing.assert_close(results["out"], inputs["v"], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_of_no_key_do_not_drown_the_window(backend: str, stabilizer: str) -> None:
    """The first rows see one near key with a small score while nothing is far yet."""
    sizes = {"n": 30, "d": 16, "m": 16, "h": 1, "b": 1, "window": 20, "block": 16, "gate": True}
    inputs, options = make_inputs(**sizes), make_options(sizes, stabilizer=stabilizer, scale=1.0)
    row = F.normalize(inputs["projection"][0, 0], dim=0) * 8
    inputs["projection"][0, 0], inputs["log_gate"][:] = row, 20.0
    inputs["q"][:, :, 0], inputs["k"][:, :, 0] = row, -row
    exact = run_exact(inputs, options)
    actual = run_backend(backend, inputs, options, exact["log_scale"])
    assert error(actual["out"][:, :, :1], exact["out"][:, :, :1]) <= 1e-5


@pytest.mark.parametrize(
    "backend, name, window",
    [(*pair, 70) for pair in PAIRS] + [(backend, "favor", 10**9) for backend in BACKENDS],
)
def test_a_window_over_everything_is_softmax(backend: str, name: str, window: int) -> None:
    sizes = {
        "feature_map": name, "n": 70, "d": 8, "b": 1, "window": window, "block": 32, "gate": True,
    }  # fmt: skip
    inputs, options = make_inputs(**sizes), make_options(sizes)
    q, k, v = (inputs[key].requires_grad_() for key in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with launching(backend):
        out, _ = attend(inputs, options, backend)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        actual = torch.autograd.grad(out, [q, k, v], grad)
    wanted = torch.autograd.grad(expected, [q, k, v], grad)
    for x, y in zip([out, *actual], [expected, *wanted], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_equals_the_row_alone(backend: str, window: int) -> None:
    sizes = {"n": 50, "h": 1, "b": 1, "window": window, "block": 16}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    with torch.no_grad(), launching(backend):
        alone, state = attend(inputs, options, backend)
        for sides in [(23, 0), (0, 23)]:
            padded = {key: F.pad(inputs[key], (0, 0, *sides), value=7.0) for key in "qkv"}
            padded["key_mask"] = F.pad(torch.ones(1, 50, device=DEVICE), sides).bool()
            out, same = attend(inputs | padded, options, backend)
            rows = slice(sides[0], sides[0] + 50)
            torch.testing.assert_close(out[:, :, rows], alone, rtol=1e-5, atol=1e-5)
            if sides[0]:
                assert error(same.z, state.z.double()) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_equals_all_together(backend: str) -> None:
    sizes = {"n": 21, "h": 1, "b": 1, "window": 7, "block": 16, "gate": True, "state": True}
    inputs, options = make_inputs(**sizes), make_options(sizes)
    together = run_backend(backend, inputs, options)
    for name in ("q", "projection", "kv", "ring_keys"):
        alone = run_backend(backend, inputs, options, only=(name,))
        assert torch.equal(alone[name], together[name]), name

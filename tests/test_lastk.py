"""Numbers of last-k attention: every backend against the float64 definition.

Memory from torch.empty is filled with NaN throughout, so an element nobody wrote is seen.
Without a GPU the Triton kernels run in Triton's interpreter, on a smaller grid.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import (
    BACKENDS,
    DEVICE,
    LAYOUTS,
    MASKS,
    launching,
    make_mask,
    make_qkv,
    needs_triton,
)
from torch import Tensor

from attnopt.kernels.lastk import lastk_attention
from attnopt.kernels.lastk.reference import lastk_reference

WIDE = pytest.param(
    {"n": 40, "extra": 400, "w": 410, "t": 150, "h": 1, "b": 1, "hkv": 1}, id="wide"
)
LONG = pytest.param({"n": 2100, "w": 70, "t": 4, "h": 1, "hkv": 1, "mask": "left"}, id="long")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def make_inputs(
    *, n=100, extra=0, w=5, d=16, h=2, hkv=2, t=0, mask="none", per_head=False, layout="bhnd",
    b=2, dtype=torch.float32, seed=0,
) -> dict:  # fmt: skip
    """Arguments of lastk_attention: n queries, n + extra keys. Log-weights are at least float32."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:  # quantized to dtype
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)

    def table(length: int) -> Tensor:
        if per_head and layout == "broadcast":
            values = rand(1, length).expand(h, -1)
        else:
            values = rand(h, length) if per_head else rand(length)
        return values.to(torch.promote_types(dtype, torch.float32))

    q, k, v = make_qkv(layout, b, h, hkv, n, n + extra, d, rand)
    key_mask = make_mask(mask, b, n + extra, rng)
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_weights": table(w),
        "sink_log_weights": table(t) if t else None,
        "key_mask": None if key_mask is None else key_mask.to(DEVICE),
    }


def make_grad(inputs: dict, seed: int = 1) -> Tensor:
    """A random upstream gradient, strided as a model's [B, N, H * D] hands it back."""
    b, h, n, d = inputs["q"].shape
    rng = torch.Generator().manual_seed(seed)
    grad = torch.randn(b, n, h, d, generator=rng, dtype=torch.float64)
    return grad.to(inputs["q"]).transpose(1, 2)


def floats(inputs: dict) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name != "key_mask" and x is not None}


def as_float64(inputs: dict) -> dict:
    return inputs | {name: x.double() for name, x in floats(inputs).items()}


def run(function, inputs: dict, grad: Tensor, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The output and the gradient of every float input (or only those named)."""
    leaves = {name: x.detach() for name, x in floats(inputs).items()}
    wanted = {name: x.requires_grad_() for name, x in leaves.items() if not only or name in only}
    out = function(**inputs | leaves)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    for x, dx in zip(wanted.values(), grads, strict=True):
        assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (out.shape, out.dtype) == (inputs["q"].shape, inputs["q"].dtype)
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def run_backend(backend: str, inputs: dict, grad: Tensor, **options) -> dict[str, Tensor]:
    with launching(backend):
        return run(partial(lastk_attention, backend=backend), inputs, grad, **options)


def plain(q, k, v, log_weights, *, sink_log_weights=None, key_mask=None) -> Tensor:
    """The same maths in dense PyTorch at the dtype of q: a kernel may be twice as wrong."""
    (b, h, nq, d), (hkv, nk) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(h // hkv, dim=1) for x in (k, v))
    j = torch.arange(nk, device=q.device)
    n = j[nk - nq :, None] - j
    real = torch.ones(b, nk, device=q.device).bool() if key_mask is None else key_mask
    width = log_weights.shape[-1]
    bias = log_weights.expand(h, -1)[:, n.clamp(0, width - 1)].expand(b, -1, -1, -1)
    visible = ((n >= 0) & (n < width)).expand(b, h, -1, -1)
    if sink_log_weights is not None:
        rank = j - real.int().argmax(1, keepdim=True)  # [B, Nk]
        sink = ((rank >= 0) & (rank < sink_log_weights.shape[-1]))[:, None, None]
        rank = rank.clamp(0, sink_log_weights.shape[-1] - 1)
        own = sink_log_weights.expand(h, -1)[:, rank].transpose(0, 1)[:, :, None]
        bias, visible = torch.where(sink, own, bias), visible | (sink & (n >= 0))
    visible = visible & real[:, None, None]
    logits = d**-0.5 * (q @ k.mT) + bias.to(q.dtype)
    probabilities = logits.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1)
    return probabilities.masked_fill(~visible, 0) @ v


def assert_close(actual: dict, exact: dict, tolerance: float = 1e-11) -> None:
    """Largest error of each tensor, relative to its largest entry."""
    for name, expected in exact.items():
        error = (actual[name].double() - expected).abs().max()
        assert error <= tolerance * max(1, expected.abs().max()), (name, float(error))


def assert_no_worse_than_plain(backend: str, inputs: dict) -> None:
    """Error against float64 on the same inputs: at most twice that of plain PyTorch.

    The floor is for gradients that cancel: with one visible key plain PyTorch gives exact zeros.
    """
    grad = make_grad(inputs)
    exact = run(lastk_reference, as_float64(inputs), grad.double())
    actual, usual = run_backend(backend, inputs, grad), run(plain, inputs, grad)
    rows = inputs["q"][..., 0].numel()
    for name, expected in exact.items():
        error = (actual[name].double() - expected).abs().max()
        allowed = (usual[name].double() - expected).abs().max()
        terms = rows if "log_weights" in name else 1  # a log-weight's gradient sums over rows
        floor = 32 * torch.finfo(torch.float32).eps * terms**0.5 * max(1, expected.abs().max())
        assert error <= 2 * allowed + floor, (name, float(error), float(allowed), float(floor))


def grid(lengths: list[int], windows: list[int], *, repeats: int = 1, small: bool = False) -> list:
    """Every length with every window, repeatedly; all other sizes are drawn."""
    draw = random.Random(0)
    sets = []
    for n, w, _ in product(lengths, windows, range(repeats)):
        h, hkv = draw.choice([(2, 1), (1, 1)] if small else [(2, 2), (4, 2), (3, 1), (1, 1)])
        sizes = {
            "b": 1 if small else 2, "n": n, "w": w, "h": h, "hkv": hkv,
            "extra": draw.choice([0, 0, 1, 37]),
            "d": draw.choice([16, 40, 64]), "t": draw.choice([0, 1, 4, 20]),
            "mask": draw.choice(MASKS[:-1] if small else MASKS), "layout": draw.choice(LAYOUTS),
            "per_head": draw.random() < 0.5,
        }  # fmt: skip
        sets.append(
            pytest.param(sizes, id="-".join(f"{key}{value}" for key, value in sizes.items()))
        )
    return sets


@pytest.mark.parametrize("sizes", grid([1, 5, 63, 100], [1, 5, 64, 300]))
def test_plain_is_the_same_maths(sizes: dict) -> None:
    inputs = make_inputs(**sizes, dtype=torch.float64)
    grad = make_grad(inputs)
    assert_close(run(plain, inputs, grad), run(lastk_reference, inputs, grad))


@pytest.mark.parametrize(
    "sizes", [WIDE, LONG, *grid([1, 5, 63, 100, 257], [1, 2, 5, 17, 64, 100, 300, 1024], repeats=3)]
)
def test_eager_in_float64(sizes: dict) -> None:
    inputs = make_inputs(**sizes, dtype=torch.float64)
    grad = make_grad(inputs)
    assert_close(run_backend("eager", inputs, grad), run(lastk_reference, inputs, grad))


@pytest.mark.parametrize("w", [1, 7, 40, 150])
@pytest.mark.parametrize("t", [0, 1, 4, 20, 150])
@pytest.mark.parametrize("mask", MASKS)
def test_eager_masks_and_sinks_in_float64(mask: str, t: int, w: int) -> None:
    inputs = make_inputs(n=70, extra=30, w=w, t=t, mask=mask, dtype=torch.float64)
    grad = make_grad(inputs)
    assert_close(run_backend("eager", inputs, grad), run(lastk_reference, inputs, grad))


@needs_triton
@pytest.mark.parametrize("sizes", [WIDE, *grid([1, 63, 100, 193], [1, 40, 300], small=True)])
def test_triton_in_float32(sizes: dict) -> None:
    assert_no_worse_than_plain("triton", make_inputs(**sizes))


@needs_triton
@pytest.mark.parametrize("t", [4, 150])
@pytest.mark.parametrize("mask", MASKS)
def test_triton_masks_and_sinks_in_float32(mask: str, t: int) -> None:
    inputs = make_inputs(n=70, extra=30, w=7, t=t, mask=mask, h=1, hkv=1)
    assert_no_worse_than_plain("triton", inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"w": 5, "d": 64, "layout": "packed"},
        {"w": 40, "d": 40, "h": 4, "b": 1, "t": 4, "mask": "left", "per_head": True},
        {"n": 30, "extra": 71, "w": 300, "t": 1, "mask": "holes"},
    ],
    ids=["packed", "groups-sinks", "end-aligned"],
)
def test_low_precision(backend: str, dtype: torch.dtype, sizes: dict) -> None:
    assert_no_worse_than_plain(backend, make_inputs(**sizes, dtype=dtype))


def test_eager_gradcheck() -> None:
    sizes = {"n": 5, "extra": 2, "w": 3, "t": 2, "d": 2, "h": 4, "per_head": True, "mask": "left"}
    inputs = make_inputs(**sizes, dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in floats(inputs).items()}

    def attention(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        return lastk_attention(**inputs | named, backend="eager")

    assert torch.autograd.gradcheck(attention, list(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_and_right_padding_equal_the_row_alone(backend: str) -> None:
    inputs, pad = make_inputs(n=70, w=9, t=4, h=1, hkv=1, b=1), 23
    grad = make_grad(inputs)
    alone = run_backend(backend, inputs, grad)
    for sides in [(pad, 0), (0, pad)]:
        padded = {name: F.pad(inputs[name], (0, 0, *sides), value=7.0) for name in "qkv"}
        padded["key_mask"] = F.pad(torch.ones(1, 70, device=DEVICE), sides).bool()
        results = run_backend(backend, inputs | padded, F.pad(grad, (0, 0, *sides)))
        for name in ("out", "q", "k", "v"):
            results[name] = results[name][:, :, sides[0] : sides[0] + 70]
        assert_close(results, alone, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_give_exact_zeros(backend: str) -> None:
    inputs = make_inputs(n=70, w=3, t=2, h=1, hkv=1, mask="empty-row")
    inputs["log_weights"][1] = -torch.inf
    grad = make_grad(inputs)
    results = run_backend(backend, inputs, grad)
    assert_close(results, run(lastk_reference, as_float64(inputs), grad.double()), tolerance=1e-5)
    assert not any(results[name][0].any() for name in ("out", "q", "k", "v"))
    assert results["log_weights"][1] == 0
    inputs["log_weights"][:] = inputs["sink_log_weights"][:] = -torch.inf
    for name, result in run_backend(backend, inputs, grad).items():
        assert torch.equal(result, torch.zeros_like(result)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite_and_right(backend: str) -> None:
    inputs = make_inputs(n=70, w=9, t=4, hkv=1, b=1, mask="left")
    inputs["q"] *= 100
    inputs["log_weights"] *= 30
    grad = make_grad(inputs)
    exact = run(lastk_reference, as_float64(inputs), grad.double())
    assert_close(run_backend(backend, inputs, grad), exact, tolerance=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend: str) -> None:
    inputs = make_inputs(n=70, w=17, hkv=1, b=1, t=4, mask="holes", layout="packed")
    grad = make_grad(inputs)
    first, second = (run_backend(backend, inputs, grad) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("t", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_change_a_bit(backend: str, t: int) -> None:
    sizes = {"n": 100, "w": 20, "t": t, "h": 1, "hkv": 1, "mask": "left"}
    inputs, others = make_inputs(**sizes), make_inputs(**sizes, seed=2)
    with torch.no_grad(), launching(backend):
        out = lastk_attention(**inputs, backend=backend)
        for last in (40, 63, 64, 98):
            future = {name: inputs[name].clone() for name in ("q", "k", "v", "key_mask")}
            for name in "qkv":
                future[name][:, :, last + 1 :] = 1e4 * others[name][:, :, last + 1 :]
            future["key_mask"][:, -1] = False
            changed = lastk_attention(**inputs | future, backend=backend)
            assert torch.equal(changed[:, :, : last + 1], out[:, :, : last + 1]), last
            assert not torch.equal(changed, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_equals_all_together(backend: str) -> None:
    inputs = make_inputs(n=21, t=2, h=1, hkv=1)
    grad = make_grad(inputs)
    together = run_backend(backend, inputs, grad)
    for name in ("q", "k", "v", "log_weights", "sink_log_weights"):
        alone = run_backend(backend, inputs, grad, only=(name,))
        assert torch.equal(alone[name], together[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_upstream_gradient(backend: str) -> None:
    inputs = make_inputs(n=21, t=2)
    grad = make_grad(inputs)[:1, :1, :1].expand(inputs["q"].shape)
    exact = run(lastk_reference, as_float64(inputs), grad.double())
    assert_close(run_backend(backend, inputs, grad), exact, tolerance=1e-5)

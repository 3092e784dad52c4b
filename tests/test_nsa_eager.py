"""The eager paths of NSA: values, gradients and choices against the definition; memory, bits."""

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.kernels.lastk import eager as eager_band
from attnopt.kernels.nsa import eager_frame, eager_long
from attnopt.kernels.nsa.eager_compressed import compressed_backward, compressed_forward
from attnopt.kernels.nsa.eager_select import select
from attnopt.kernels.nsa.eager_selected import selected_backward, selected_forward
from attnopt.kernels.nsa.geometry import (
    compressed_count,
    real_tokens,
    row_starts,
    selection_count,
)
from attnopt.kernels.nsa.reference import (
    compressed_reference,
    select_reference,
    selected_reference,
)

REGIMES = ("short", "long")
MASKS = ("none", "left", "right", "holes", "empty-row", "empty-blocks")
SIZES = {
    "b": 2, "h": 2, "hkv": 2, "nq": 100, "nk": 100, "d": 8, "block": 8, "stride": 8, "select": 8,
    "window": 9, "delay": 9, "count": 3, "sinks": 1, "mask": "none", "logs": False,
}  # fmt: skip


class Case:
    """Random inputs of all three functions, and what the operators derive for them."""

    def __init__(self, dtype=torch.float64, seed=0, std=1.0, **sizes):
        self.sizes = s = SIZES | sizes
        b, h, hkv, nq, nk, d = (s[x] for x in ("b", "h", "hkv", "nq", "nk", "d"))
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

        blocks = compressed_count(nk, s["block"], s["stride"])
        self.q, self.k = std * normal(b, h, nq, d), normal(b, hkv, nk, d)
        self.v = normal(b, hkv, nk, d)
        self.k_cmp, self.v_cmp = normal(b, hkv, blocks, d), normal(b, hkv, blocks, d)
        self.key_mask = make_mask(s["mask"], b, nk, rng)
        self.start = row_starts(self.key_mask, self.q)
        real = torch.ones(b, nk).bool() if self.key_mask is None else self.key_mask
        wide = torch.promote_types(dtype, torch.float32)
        counts = real_tokens(real, self.start, s["block"], s["stride"], blocks).to(wide)
        self.bias = counts.log() if s["logs"] else torch.where(counts > 0, 0.0, counts.log())
        columns = selection_count(nk, s["select"])
        self.real = real_tokens(real, self.start, s["select"], s["select"], columns) > 0
        self.scale = d**-0.5

    def double(self) -> "Case":
        other = Case.__new__(Case)
        other.__dict__ = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.__dict__.items()
        }
        return other

    def geometry(self) -> dict:
        s = self.sizes
        return {
            "offset": s["nk"] - s["nq"], "block": s["block"], "stride": s["stride"],
            "delay": s["delay"], "scale": self.scale,
        }  # fmt: skip

    def defined_geometry(self) -> dict:
        s = self.sizes
        return {
            "compress_block": s["block"], "compress_stride": s["stride"], "num_tokens": s["nk"],
            "delay": s["delay"], "key_mask": self.key_mask, "scale": self.scale,
        }  # fmt: skip

    def choose(self) -> Tensor:
        s = self.sizes
        return select(
            self.q, self.k_cmp, self.bias, self.real, self.start, count=s["count"],
            sinks=s["sinks"], select_block=s["select"], near_window=s["window"], **self.geometry()
        )  # fmt: skip

    def choose_by_definition(self) -> Tensor:
        s = self.sizes
        return select_reference(
            self.q, self.k_cmp, count=s["count"], sinks=s["sinks"], select_block=s["select"],
            near_window=s["window"], **self.defined_geometry()
        )  # fmt: skip

    def nothing_chosen(self) -> Tensor:
        s = self.sizes
        return torch.full((s["b"], s["hkv"], s["nq"], 0), -1, dtype=torch.int32)


def make_mask(kind: str, b: int, n: int, rng: torch.Generator) -> Tensor | None:
    mask = torch.ones(b, n).bool()
    if kind == "left":
        mask[0, : n // 3], mask[-1, : n // 20] = False, False
    elif kind == "right":
        mask[0, n - n // 5 :] = False
    elif kind == "holes":
        mask = torch.rand(b, n, generator=rng) > 0.3
    elif kind == "empty-row":
        mask[0] = False
    elif kind == "empty-blocks":
        mask[:, n // 4 : n // 2], mask[0, 0] = False, False
    return None if kind == "none" else mask


class Branch(torch.autograd.Function):
    """A pair of inner functions as one differentiable function of q, k and v: out, lse."""

    @staticmethod
    def forward(ctx, q, k, v, forward, backward, others, options):
        out, lse = forward(q, k, v, *others, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = backward, others, options
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        backward, others, options = ctx.call
        wide = lse.dtype
        delta = (grad.to(wide) * out.to(wide)).sum(-1) - grad_lse
        grads = backward(grad, lse, delta, q, k, v, *others, **options)
        return *grads, None, None, None, None


def compressed(case: Case, chosen: Tensor):
    """The compressed branch as a function of its three tensors, and these."""
    others, options = (case.bias, chosen, case.start), case.geometry()

    def function(q, k, v):
        return Branch.apply(q, k, v, compressed_forward, compressed_backward, others, options)

    return function, (case.q, case.k_cmp, case.v_cmp)


def compressed_by_definition(case: Case, chosen: Tensor):
    def function(q, k, v):
        return compressed_reference(
            q, k, v, chosen=chosen, log_counts=case.sizes["logs"], **case.defined_geometry()
        )

    return function, (case.q, case.k_cmp, case.v_cmp)


def selected(case: Case, chosen: Tensor, regime: str):
    """The selected branch as a function of its three tensors, and these."""
    others = case.key_mask, case.start, chosen
    options = {
        "select_block": case.sizes["select"], "near_window": case.sizes["window"],
        "scale": case.scale, "regime": regime,
    }  # fmt: skip

    def function(q, k, v):
        return Branch.apply(q, k, v, selected_forward, selected_backward, others, options)

    return function, (case.q, case.k, case.v)


def selected_by_definition(case: Case, chosen: Tensor):
    def function(q, k, v):
        return selected_reference(
            q, k, v, chosen, select_block=case.sizes["select"], near_window=case.sizes["window"],
            key_mask=case.key_mask, scale=case.scale
        )  # fmt: skip

    return function, (case.q, case.k, case.v)


def run(function, tensors, seed=9) -> dict[str, Tensor]:
    """Output, log-sum-exp (as what it is the log of) and gradients, both with random upstream."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    assert out.shape == tensors[0].shape and out.dtype == tensors[0].dtype
    rng = torch.Generator().manual_seed(seed)
    grad, grad_lse = (
        torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in (out, lse)
    )
    seen = lse > -torch.inf
    loss = (out * grad).sum() + (lse.masked_fill(~seen, 0) * grad_lse).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    results = {"out": out.detach(), "lse": lse.detach().masked_fill(~seen, 1e9)}
    for name, x, dx in zip("qkv", leaves, grads, strict=True):
        results[name] = torch.zeros_like(x) if dx is None else dx
        assert results[name].shape == x.shape and results[name].dtype == x.dtype
    return results


def error(actual: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=floor))


def assert_close(actual: dict, exact: dict, tolerance: float = 1e-11) -> None:
    for name, expected in exact.items():
        distance = error(actual[name], expected, floor=1.0)
        assert distance <= tolerance, (name, distance)


def drawn_cases(number: int) -> list:
    """Sizes of all kinds: groups, odd sizes, fewer queries than keys, no blocks, no choice."""
    draw, cases = random.Random(3), []
    for i in range(number):
        b = draw.choice([1, 3, 8, 16, 32])
        block, stride = draw.choice([(b, b), (b, b), (2 * b, b), (5, 3), (8, 4), (32, 16)])
        nk = draw.choice([1, 17, 63, 100, 150])
        window = draw.choice([0, 1, 2, b + 1, 2 * b + 1, 40])
        group = (1, 2, 4, 16)[i % 4]
        hkv = draw.choice([1, 2]) if group < 16 else 1
        sizes = {
            "b": draw.choice([1, 2, 3]), "h": group * hkv, "hkv": hkv, "nk": nk,
            "nq": draw.choice([nk, nk, max(1, nk // 3), 1]), "d": draw.choice([4, 7]),
            "block": block, "stride": stride, "select": b, "window": window,
            "delay": window if block == stride == b else 0, "count": draw.choice([0, 1, 2, 3, 7]),
            "sinks": draw.choice([0, 1, 2]), "mask": draw.choice(MASKS),
            "logs": block == stride == b,
        }  # fmt: skip
        label = "-".join(f"{name}{x}" for name, x in sizes.items() if SIZES[name] != x)
        cases.append(pytest.param(sizes, [1, 4000, 1 << 20][i % 3], id=label))
    return cases


def cut_small(monkeypatch, budget: int) -> None:
    """Cut the work in pieces of so few bytes."""
    for module in (eager_frame, eager_long, eager_band):
        monkeypatch.setattr(module, "SEGMENT_BYTES", budget)
    monkeypatch.setattr(eager_long, "PART_BYTES", budget)
    monkeypatch.setattr(eager_frame, "CHUNK", 32 if budget < 5000 else 128)


@pytest.fixture
def poisoned():
    """Fill what `torch.empty` gives with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("sizes", "budget"), drawn_cases(120))
def test_everything_in_float64(sizes, budget, monkeypatch, poisoned):
    cut_small(monkeypatch, budget)
    case = Case(**sizes)
    chosen = case.choose()
    torch.testing.assert_close(chosen, case.choose_by_definition(), rtol=0, atol=0)
    assert chosen.dtype == torch.int32
    left_out = chosen if sizes["logs"] else case.nothing_chosen()
    exact = run(*compressed_by_definition(case, left_out))
    assert_close(run(*compressed(case, left_out)), exact)
    exact = run(*selected_by_definition(case, chosen))
    for regime in REGIMES:
        assert_close(run(*selected(case, chosen, regime)), exact)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [0, 1, 17, 100, 10**9])
def test_near_windows_and_masks(window, mask, regime):
    case = Case(window=window, mask=mask, h=4, nq=70, count=2)
    chosen = Case(window=min(window, 100), delay=0, mask=mask, h=4, nq=70, count=2).choose()
    exact = run(*selected_by_definition(case, chosen))
    actual = run(*selected(case, chosen, regime))
    assert_close(actual, exact)
    if mask == "empty-row":
        assert not any(actual[name][0].any() for name in ("out", "q", "k", "v"))


@pytest.mark.parametrize("regime", REGIMES)
def test_a_query_may_choose_its_own_block_without_a_near_window(regime):
    case = Case(window=0, h=4, mask="left")
    position = torch.arange(100) - case.start[:, None]
    own = position.div(8, rounding_mode="floor")[:, None, :, None].expand(2, 2, -1, -1)
    chosen = torch.cat([own - 1, own, torch.full_like(own, -1)], -1).clamp_min(-1).int()
    exact = run(*selected_by_definition(case, chosen))
    assert_close(run(*selected(case, chosen, regime)), exact)


@pytest.mark.parametrize("regime", REGIMES)
def test_slots_in_any_order(regime):
    case = Case(count=5, h=4)
    chosen = case.choose()
    shuffled = chosen[..., torch.tensor([3, 0, 4, 1, 2])]
    exact = run(*selected(case, chosen, regime))
    assert_close(run(*selected(case, shuffled, regime)), exact)
    function, tensors = compressed(case, shuffled)
    assert_close(run(function, tensors), run(*compressed(case, chosen)))


@pytest.mark.parametrize("nk", [1, 7])
def test_without_compressed_blocks(nk):
    case = Case(nk=nk, nq=nk, count=2)
    assert case.k_cmp.shape[2] == 0
    assert torch.equal(case.choose(), torch.full((2, 2, nk, 2), -1, dtype=torch.int32))
    function, tensors = compressed(case, case.nothing_chosen())
    results = run(function, tensors)
    assert not any(results[name].any() for name in ("out", "q", "k", "v"))
    assert (function(*tensors)[1] == -torch.inf).all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("window", [0, 9])
def test_nothing_chosen(window, regime):
    case = Case(window=window, delay=0)
    for chosen in (case.nothing_chosen(), torch.full((2, 2, 100, 3), -1, dtype=torch.int32)):
        exact = run(*selected_by_definition(case, chosen))
        assert_close(run(*selected(case, chosen, regime)), exact)


@pytest.mark.parametrize("h", [2, 4])
@pytest.mark.parametrize(("block", "stride"), [(8, 8), (8, 4), (5, 3)])
@pytest.mark.parametrize("sinks", [0, 2, 5])
def test_ties_go_to_the_lower_block(block, stride, h, sinks):
    case = Case(block=block, stride=stride, h=h, sinks=sinks, delay=9 if stride == 8 else 0)
    case.k_cmp = torch.zeros_like(case.k_cmp)  # equal importance, but at the edges
    assert torch.equal(case.choose(), case.choose_by_definition())
    case.k_cmp[:, :, ::2] = 1.0  # two values
    case.q = case.q[:, :, :1].expand_as(case.q)
    if h == 2 and stride == 8:  # a sum of probabilities may round differently
        assert torch.equal(case.choose(), case.choose_by_definition())


def test_choices_in_float32_are_those_of_the_definition():
    for sizes in ({"nk": 400, "nq": 400}, {"nk": 400, "nq": 400, "h": 8, "delay": 0, "stride": 4}):
        case = Case(dtype=torch.float32, **sizes)
        differ = (case.choose() != case.double().choose_by_definition()).any(-1)
        assert differ.float().mean() <= 2e-3


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("window", [0, 3])
def test_gradcheck_selected(regime, window):
    sizes = {"nq": 7, "nk": 9, "d": 2, "b": 1, "h": 2, "hkv": 1, "block": 2, "stride": 2}
    case = Case(window=window, delay=window, select=2, count=2, mask="left", **sizes)
    function, tensors = selected(case, case.choose(), regime)
    seen = function(*tensors)[1] > -torch.inf

    def outputs(*leaves):
        out, lse = function(*leaves)
        return out, lse[seen]

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("count", [0, 1])
def test_gradcheck_compressed(count):
    sizes = {"nq": 7, "nk": 9, "d": 2, "b": 2, "h": 2, "hkv": 1, "block": 2, "stride": 2}
    case = Case(window=1, delay=1, select=2, count=count, mask="holes", logs=True, **sizes)
    function, tensors = compressed(case, case.choose())
    seen = function(*tensors)[1] > -torch.inf

    def outputs(*leaves):
        out, lse = function(*leaves)
        return out, lse[seen]

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in tensors])


def pairs_of_functions(case: Case) -> list:
    """(implementation, definition) of every branch and regime."""
    chosen = case.choose()
    branches = [(compressed(case, chosen), compressed_by_definition(case, chosen))]
    definition = selected_by_definition(case, chosen)
    return branches + [(selected(case, chosen, regime), definition) for regime in REGIMES]


@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize("h", [2, 8])
def test_float32_is_as_precise_as_the_definition(h, std):
    case = Case(dtype=torch.float32, d=20, h=h, std=std, mask="left", logs=True)
    for actual, definition in pairs_of_functions(case):
        exact = run(definition[0], [x.double() for x in definition[1]])
        usual, actual = run(*definition), run(*actual)
        lse = exact["lse"][exact["lse"] < 1e9].abs().max()
        for name, expected in exact.items():
            allowed = 2 * error(usual[name], expected) + 2e-7
            if name in "qkv":  # their probabilities come from the rounded lse
                allowed += 2**-24 * float(lse)
            assert error(actual[name], expected) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    case = Case(dtype=dtype, h=4, mask="left", logs=True)
    for actual, definition in pairs_of_functions(case):
        exact = run(definition[0], [x.double() for x in definition[1]])
        actual = run(*actual)
        assert actual["lse"].dtype == torch.float32
        assert error(actual["lse"], exact["lse"]) <= 1e-6
        for name in ("out", "q", "k", "v"):
            assert error(actual[name], exact[name]) <= 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("mask", ["none", "left"])
def test_large_scores_stay_finite(mask):
    for std in (100.0, 1e4):
        case = Case(dtype=torch.float32, std=std, mask=mask, h=4)
        for actual, _ in pairs_of_functions(case):
            assert all(x.isfinite().all() for x in run(*actual).values())


def test_strided_inputs_keep_their_layout():
    case = Case(h=4, hkv=4, logs=True)
    plain = [run(*actual) for actual, _ in pairs_of_functions(case)]
    for name in ("q", "k", "v", "k_cmp", "v_cmp"):
        x = getattr(case, name)
        setattr(case, name, x.transpose(1, 2).contiguous().transpose(1, 2))
    for ((function, tensors), _), expected in zip(pairs_of_functions(case), plain, strict=True):
        actual = run(function, tensors)
        assert_close(actual, expected)
        assert actual["out"].stride() == actual["q"].stride() == tensors[0].stride()
        assert actual["k"].stride() == tensors[1].stride()
    for name in ("q", "k", "v", "k_cmp", "v_cmp"):
        setattr(case, name, getattr(case, name)[:1, :1].expand_as(getattr(case, name)))
    expanded = [run(*actual) for actual, _ in pairs_of_functions(case)]
    for name in ("q", "k", "v", "k_cmp", "v_cmp"):
        setattr(case, name, getattr(case, name).contiguous())
    for (actual, _), expected in zip(pairs_of_functions(case), expanded, strict=True):
        assert_close(run(*actual), expected)


def test_the_same_bits_every_time():
    case = Case(dtype=torch.float32, h=8, nq=300, nk=300, mask="left", logs=True)
    assert torch.equal(case.choose(), case.choose())
    first, second = ([run(*f) for f, _ in pairs_of_functions(case)] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_the_future_changes_no_bit(mask):
    sizes = {"dtype": torch.float32, "nq": 200, "nk": 200, "mask": mask, "logs": True}
    case, other = Case(**sizes), Case(seed=1, std=10.0, **sizes)
    before = [f(*tensors) for (f, tensors), _ in pairs_of_functions(case)]
    chosen = case.choose()
    for last in (31, 64, 130, 198):
        changed = Case(**sizes)
        for name in ("q", "k", "v"):
            getattr(changed, name)[:, :, last + 1 :] = getattr(other, name)[:, :, last + 1 :]
        early = torch.arange(changed.k_cmp.shape[2]) * 8 + 7 + int(case.start.min()) <= last
        for name in ("k_cmp", "v_cmp"):
            fresh = getattr(other, name)
            getattr(changed, name)[:, :, ~early] = fresh[:, :, ~early]
        assert torch.equal(changed.choose()[:, :, : last + 1], chosen[:, :, : last + 1])
        for ((f, tensors), _), results in zip(pairs_of_functions(changed), before, strict=True):
            for x, y in zip(f(*tensors), results, strict=True):
                assert torch.equal(x[:, :, : last + 1], y[:, :, : last + 1]), last


@pytest.mark.parametrize("h", [2, 4])
def test_a_block_that_every_query_chose(h, monkeypatch):
    cut_small(monkeypatch, 100_000)
    case = Case(h=h, nq=300, nk=300, count=2)
    chosen = torch.full((2, 2, 300, 2), -1, dtype=torch.int32)
    chosen[:, :, 16:, 0] = 0  # near(16) = 1
    exact = run(*selected_by_definition(case, chosen))
    for regime in REGIMES:
        assert_close(run(*selected(case, chosen, regime)), exact)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("hot", [False, True])
def test_memory_is_linear(mask, hot, monkeypatch):
    cut_small(monkeypatch, 1 << 16)
    largest = {}
    for n in (1024, 2048):
        sizes = {"nq": n, "nk": n, "h": 4, "hkv": 2, "d": 8, "select": 32, "block": 32}
        case = Case(dtype=torch.float32, b=1, stride=32, window=33, delay=33, mask=mask, **sizes)
        chosen = case.choose()
        if hot:
            chosen[..., 1:] = -1
            chosen[..., 0].masked_fill_(chosen[..., 0] >= 0, 0)
        calls = [compressed(case, chosen), *(selected(case, chosen, r) for r in REGIMES)]
        for i, (function, tensors) in enumerate(calls):
            with Largest() as mode:
                run(function, tensors)
            largest[i, n] = mode.bytes
        with Largest() as mode:
            case.choose()
        largest["select", n] = mode.bytes
    for (name, n), size in largest.items():  # the float64 upstream gradient is twice the output
        assert size <= 2.1 * (n * 4 * 8 * 4), (name, n)


def test_padding_equals_the_row_alone():
    alone, pad = Case(h=4, nq=70, nk=70, logs=True), 23
    padded = Case(h=4, nq=93, nk=93, logs=True)
    padded.key_mask = torch.arange(93).expand(2, -1) >= pad
    padded.start = row_starts(padded.key_mask, padded.q)
    for name in ("q", "k", "v"):
        getattr(padded, name)[:, :, pad:] = getattr(alone, name)
    blocks = alone.k_cmp.shape[2]
    for name in ("k_cmp", "v_cmp"):
        getattr(padded, name)[:, :, :blocks] = getattr(alone, name)
    counts = real_tokens(padded.key_mask, padded.start, 8, 8, padded.k_cmp.shape[2])
    padded.bias, padded.real = counts.double().log(), padded.real & False
    padded.real[:, : alone.real.shape[1]] = True
    assert torch.equal(padded.choose()[:, :, pad:], alone.choose())
    pairs = zip(pairs_of_functions(padded), pairs_of_functions(alone), strict=True)
    for ((actual, inputs), _), ((expected, tensors), _) in pairs:
        for x, y in zip(actual(*inputs), expected(*tensors), strict=True):
            x, y = x[:, :, pad:].nan_to_num(neginf=1e9), y.nan_to_num(neginf=1e9)
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

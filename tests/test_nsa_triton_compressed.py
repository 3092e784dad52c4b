"""Triton kernels of NSA that read compressed blocks: attention to them, and the choice of blocks.

The launchers are called as the operators call them and compared with the definition in float64.
Memory from torch.empty is filled with NaN (or the largest integer), so an element nobody wrote is
seen; blocks that are hidden hold huge numbers, so a read of one is seen as well.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from attention_inputs import DEVICE, HAS_TRITON, needs_triton
from nsa_inputs import make_inputs
from torch import Tensor

from attnopt.kernels.nsa.reference import compressed_reference
from attnopt.kernels.nsa.reference_select import importance_reference, select_reference

if HAS_TRITON:
    import triton
    import triton.language as tl

    from attnopt.kernels.interpreter import prepare_interpreter
    from attnopt.kernels.nsa.triton_compressed import compressed_backward, compressed_forward
    from attnopt.kernels.nsa.triton_select import EMPTY, keep_best, rank_keys, select

pytestmark = needs_triton
on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="the grid is reordered in the interpreter")
HUGE = 1e38  # fits bf16 and fp32; fp16 gets its largest number
RESULTS = ("out", "lse", "q", "k", "v")  # values, then gradients

FORWARD = [  # sizes of nsa_inputs.make_inputs, and what the launchers take beside
    {"n": 1},
    {"n": 1, "extra": 62, "h": 4, "hkv": 1, "d": 20, "delay": 5, "left_out": 3},
    {"n": 63, "b": 1, "h": 1, "hkv": 1, "delay": 9, "left_out": 2, "padding": "left"},
    {"n": 70, "block": 4, "stride": 4, "h": 4, "hkv": 2, "d": 40, "delay": 3,
     "left_out": 5, "padding": "holes", "layout": "packed"},
    {"n": 37, "extra": 63, "block": 5, "stride": 3, "d": 20, "padding": "right",
     "layout": "transposed"},
    {"n": 80, "block": 2, "stride": 1, "h": 2, "hkv": 1, "delay": 1, "left_out": 20,
     "layout": "broadcast"},
    {"n": 17, "b": 1, "block": 1, "stride": 1, "h": 16, "hkv": 1, "left_out": 7},
    {"n": 20, "extra": 120, "block": 2, "stride": 2, "d": 72, "delay": 11, "left_out": 4,
     "padding": "empty-row"},
    {"n": 130, "b": 1, "block": 8, "stride": 4, "h": 2, "hkv": 2, "d": 128, "left_out": 1},
    {"n": 17, "block": 32, "stride": 16, "h": 2, "hkv": 1},  # no compressed block at all
    {"n": 290, "b": 1, "block": 4, "stride": 4, "h": 1, "hkv": 1, "delay": 13, "left_out": 2},
]  # fmt: skip
SELECT = [
    {"n": 1},
    {"n": 63, "near": 9, "count": 2},
    {"n": 63, "near": 0, "count": 3, "sinks": 1, "padding": "left"},
    {"n": 130, "b": 1, "block": 2, "stride": 2, "select": 2, "near": 5, "count": 20, "sinks": 2,
     "padding": "holes", "delay": 5},
    {"n": 37, "extra": 93, "block": 4, "stride": 4, "select": 4, "h": 4, "hkv": 2, "near": 6,
     "delay": 6, "count": 5, "padding": "right"},
    {"n": 70, "block": 5, "stride": 3, "select": 8, "h": 2, "hkv": 1, "d": 20, "near": 1,
     "count": 3, "sinks": 1, "layout": "packed", "padding": "empty-row"},
    {"n": 100, "b": 1, "block": 8, "stride": 4, "select": 16, "near": 17, "count": 4, "sinks": 1},
    {"n": 40, "extra": 60, "b": 1, "block": 5, "stride": 7, "select": 3, "h": 16, "hkv": 1,
     "count": 17, "near": 4, "layout": "transposed"},
    {"n": 60, "block": 4, "stride": 8, "select": 2, "h": 2, "hkv": 1, "count": 9, "near": 3,
     "padding": "holes"},
    {"n": 40, "extra": 160, "b": 1, "block": 2, "stride": 1, "select": 3, "h": 2, "hkv": 2,
     "count": 40, "near": 0, "sinks": 3},
    {"n": 17, "block": 32, "stride": 16, "select": 4, "near": 0, "count": 4},
    {"n": 110, "b": 1, "block": 1, "stride": 1, "select": 1, "h": 1, "hkv": 1, "near": 1,
     "count": 3},
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN; let the interpreter compute bf16 as hardware does."""
    if DEVICE == "cpu":
        prepare_interpreter()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def label(sizes: dict) -> str:
    return "-".join(f"{key}{value}" for key, value in sizes.items())


class Problem:
    """Arguments of the launchers, and of the definition, for one set of sizes."""

    def __init__(self, **sizes) -> None:
        sizes = {"block": 8, "stride": 8, "select": 8, "delay": 0, "dtype": torch.float32} | sizes
        self.rng = torch.Generator().manual_seed(sizes.get("seed", 0) + 7)
        inputs = make_inputs(**sizes)
        self.sizes, self.key_mask = sizes, inputs["key_mask"]
        self.q, self.k, self.v = inputs["q"], inputs["k_cmp"], inputs["v_cmp"]
        self.tokens = inputs["k"].shape[2]
        mask = self.key_mask
        if mask is None:
            mask = torch.ones(self.q.shape[0], self.tokens, dtype=torch.bool, device=DEVICE)
        position = torch.arange(self.tokens, device=DEVICE)
        self.start = torch.where(mask, position, self.tokens).amin(1).int()
        text = [row[first:] for row, first in zip(mask, self.start.tolist(), strict=True)]

        def real_tokens(first: int, length: int) -> Tensor:
            return torch.stack([row[first : first + length].sum() for row in text])

        block, stride, chunk = sizes["block"], sizes["stride"], sizes["select"]
        counts = [real_tokens(c * stride, block) for c in range(self.k.shape[2])]
        counts = torch.stack(counts, 1) if counts else mask.new_zeros(len(text), 0).long()
        self.bias = counts.to(torch.promote_types(self.q.dtype, torch.float32)).log()
        firsts = range(0, self.tokens, chunk)
        self.real = torch.stack([real_tokens(j, chunk) > 0 for j in firsts], 1)
        hidden = (counts == 0)[:, None, :, None]
        huge = min(HUGE, torch.finfo(self.q.dtype).max)
        self.k, self.v = self.k.masked_fill(hidden, huge), self.v.masked_fill(hidden, huge)
        self.chosen = self.draw(sizes.get("left_out", 0))
        self.rows = self.bias, self.chosen, self.start
        self.common = {
            "offset": self.tokens - self.q.shape[2], "block": block, "stride": stride,
            "delay": sizes["delay"], "scale": sizes.get("scale", self.q.shape[3] ** -0.5),
        }  # fmt: skip
        self.defined = {
            "compress_block": block, "compress_stride": stride, "num_tokens": self.tokens,
            "delay": sizes["delay"], "key_mask": self.key_mask, "scale": self.common["scale"],
        }  # fmt: skip

    def draw(self, count: int) -> Tensor:
        """Distinct compressed blocks of every query, ascending, some -1 at the end."""
        (b, _, n, _), (hkv, p) = self.q.shape, self.k.shape[1:3]
        order = torch.rand(b, hkv, n, max(p, count), generator=self.rng).argsort(-1)[..., :count]
        order = order.masked_fill((order >= p) | (order % 5 == 0), p + 1).sort(-1).values
        return order.masked_fill(order > p, -1).int().to(DEVICE)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64).to(DEVICE)

    def attend(self) -> tuple[Tensor, Tensor]:
        return compressed_forward(self.q, self.k, self.v, *self.rows, **self.common)

    def attend_with_gradients(self, grad: Tensor, dlse: Tensor) -> dict[str, Tensor]:
        out, lse = self.attend()
        delta = (grad.float() * out.float()).sum(-1) - dlse.float()
        grads = compressed_backward(
            grad, lse, delta, self.q, self.k, self.v, *self.rows, **self.common
        )
        for x, dx in zip((self.q, self.k, self.v), grads, strict=True):
            assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
        assert (out.shape, out.dtype) == (self.q.shape, self.q.dtype)
        assert (lse.shape, lse.dtype) == (self.q.shape[:3], torch.float32)
        return dict(zip(RESULTS, (out, lse, *grads), strict=True))

    def define(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return compressed_reference(q, k, v, log_counts=True, chosen=self.chosen, **self.defined)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same maths in dense PyTorch at the dtype of q: a kernel may be twice as wrong."""
        groups = q.shape[1] // k.shape[1]
        hidden = (self.bias == -torch.inf)[:, None, :, None]
        k, v = (x.masked_fill(hidden, 0).repeat_interleave(groups, 1) for x in (k, v))
        end = torch.arange(k.shape[2], device=DEVICE) * self.common["stride"]
        end = end + self.common["block"] - 1 + self.common["delay"]
        row = torch.arange(q.shape[2], device=DEVICE) + self.common["offset"]
        visible = (row - self.start[:, None])[:, None, :, None] >= end
        own = torch.arange(k.shape[2], device=DEVICE)
        left_out = (self.chosen[..., None] == own).any(3).repeat_interleave(groups, 1)
        bias = self.bias[:, None, None].masked_fill(~visible | left_out, -torch.inf)
        logits = self.common["scale"] * (q @ k.mT) + bias.clamp_min(-1e30).to(q.dtype)
        logits = logits.masked_fill(bias == -torch.inf, torch.finfo(q.dtype).min)
        weights = logits.softmax(-1).masked_fill(bias == -torch.inf, 0)
        blind = (bias == -torch.inf).all(-1)
        return weights @ v, logits.logsumexp(-1).masked_fill(blind, -torch.inf)

    def choose(self) -> Tensor:
        sizes = self.sizes
        return select(
            self.q, self.k, self.bias, self.real, self.start, count=sizes.get("count", 2),
            sinks=sizes.get("sinks", 0), select_block=sizes["select"],
            near_window=sizes.get("near", 1), **self.common,
        )  # fmt: skip

    def choose_by_definition(self) -> Tensor:
        sizes = self.sizes
        return select_reference(
            self.q.double(), self.k.double(), select_block=sizes["select"],
            count=sizes.get("count", 2), sinks=sizes.get("sinks", 0),
            near_window=sizes.get("near", 1), **self.defined,
        )  # fmt: skip


def with_gradients(function, problem: Problem, dtype: torch.dtype, grad: Tensor, dlse: Tensor):
    """Output, log-sum-exp and gradients of `function(q, k, v)`; blind rows have no gradient."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out, lse = function(*leaves)
    seen = lse > -torch.inf
    loss = (out * grad.to(dtype)).sum() + (lse.masked_fill(~seen, 0) * dlse * seen).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, grads, strict=True)]
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *grads), strict=True))


def largest(x: Tensor) -> Tensor:
    """The largest finite entry's size, 0 for none."""
    return torch.cat([x.flatten().abs().nan_to_num(0, 0, 0), x.new_zeros(1)]).max()


def assert_no_worse_than_plain(problem: Problem) -> None:
    """Error against float64 on the same inputs: at most twice that of plain PyTorch, and a bit."""
    (b, h, n, d), dtype = problem.q.shape, problem.q.dtype
    grad = problem.random(b, n, h, d).to(dtype).transpose(1, 2)
    dlse = problem.random(b, h, n).float().double()
    actual = problem.attend_with_gradients(grad, dlse)
    exact = with_gradients(problem.define, problem, torch.float64, grad, dlse)
    usual = with_gradients(problem.plain, problem, dtype, grad, dlse)
    blind = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, blind)
    assert not actual["out"][blind].any()
    assert not actual["q"][blind].any()
    for name, expected in exact.items():
        assert not actual[name].isnan().any(), name
        error = largest(actual[name].double() - expected)  # -inf - -inf is no number: 0
        allowed = largest(usual[name].double() - expected)
        floor = 32 * torch.finfo(torch.float32).eps * largest(expected).clamp_min(1)
        assert error <= 2 * allowed + floor, (name, float(error), float(allowed), float(floor))


@pytest.mark.parametrize("sizes", FORWARD, ids=label)
def test_attention_in_float32(sizes: dict) -> None:
    assert_no_worse_than_plain(Problem(**sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [FORWARD[3], FORWARD[6], FORWARD[7]], ids=label)
def test_attention_in_half_precision(sizes: dict, dtype: torch.dtype) -> None:
    assert_no_worse_than_plain(Problem(**sizes, dtype=dtype))


@pytest.mark.parametrize("sizes", FORWARD, ids=label)
def test_plain_is_the_same_maths(sizes: dict) -> None:
    problem = Problem(**sizes, dtype=torch.float64)
    grad, dlse = problem.random(*problem.q.shape), problem.random(*problem.q.shape[:3])
    plain, exact = (
        with_gradients(function, problem, torch.float64, grad, dlse)
        for function in (problem.plain, problem.define)
    )
    for name, expected in exact.items():
        torch.testing.assert_close(plain[name], expected, rtol=1e-10, atol=1e-10)


def test_later_blocks_leave_no_trace_in_earlier_rows() -> None:
    problem = Problem(n=100, b=1, block=4, stride=2, delay=3, left_out=3)
    before = problem.attend()
    seen = 30  # blocks 30 ... end at 60 + 4 - 1 and are seen 3 tokens later
    problem.k[:, :, seen:] *= 3
    problem.v[:, :, seen:] += 1
    after = problem.attend()
    first = 2 * seen + 4 - 1 + 3
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, :first], y[:, :, :first])
        assert not torch.equal(x[:, :, first], y[:, :, first])


def rank(index: Tensor, values: Tensor, fill: float) -> Tensor:
    """`values[..., index]`, or `fill` where the index is -1."""
    taken = values.gather(-1, index.clamp_min(0).long())
    return taken.masked_fill(index < 0, fill)


def assert_well_chosen(problem: Problem) -> None:
    """As many blocks as by definition, in order, the forced ones, none worse than one left out."""
    sizes, chosen = problem.sizes, problem.choose()
    expected = problem.choose_by_definition()
    assert (chosen.shape, chosen.dtype) == (expected.shape, torch.int32)
    assert torch.equal(chosen >= 0, expected >= 0)
    assert (chosen < problem.real.shape[1]).all()
    assert not ((chosen[..., 1:] >= 0) & (chosen[..., 1:] <= chosen[..., :-1])).any()
    forced = (expected >= 0) & (expected < sizes.get("sinks", 0))
    assert torch.equal(chosen.masked_fill(~forced, -1), expected.masked_fill(~forced, -1))
    importance = importance_reference(
        problem.q.double(), problem.k.double(), select_block=sizes["select"], **problem.defined
    )
    got = rank(chosen.masked_fill(forced, -1), importance, 0).sort(-1).values
    best = rank(expected.masked_fill(forced, -1), importance, 0).sort(-1).values
    torch.testing.assert_close(got, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SELECT, ids=label)
def test_choice_of_random_keys(sizes: dict) -> None:
    assert_well_chosen(Problem(**sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SELECT[3], SELECT[5]], ids=label)
def test_choice_in_half_precision(sizes: dict, dtype: torch.dtype) -> None:
    assert_well_chosen(Problem(**sizes, dtype=dtype))


@pytest.mark.parametrize("scale", [0.5, -0.5])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 130, "b": 1, "h": 1, "hkv": 1, "block": 2, "stride": 2, "select": 2, "near": 5,
         "count": 20},
        {"n": 60, "block": 1, "stride": 1, "select": 1, "near": 0, "count": 3, "sinks": 2},
        {"n": 90, "b": 1, "block": 4, "stride": 4, "select": 4, "near": 2, "count": 1,
         "padding": "holes"},
    ],
    ids=label,
)  # fmt: skip
def test_ties_between_exact_scores_go_to_the_lower_block(sizes: dict, scale: float) -> None:
    problem = Problem(**sizes, scale=scale)
    for name in ("q", "k"):
        x = getattr(problem, name)
        small = torch.randint(-1, 2, x.shape, generator=problem.rng).to(x)
        setattr(problem, name, torch.where(x == HUGE, x, small))
    assert torch.equal(problem.choose(), problem.choose_by_definition())


@pytest.mark.parametrize("groups", [1, 4])
def test_ties_between_probabilities_go_to_the_lower_block(groups: int) -> None:
    problem = Problem(n=100, b=1, h=groups, hkv=1, block=8, stride=4, select=16, near=1, count=3)
    problem.q = torch.zeros_like(problem.q)  # every visible block is as likely as any other
    chosen = problem.choose()
    for row in range(100):
        visible = [c for c in range(24) if row >= 4 * c + 7]
        shared = [
            sum(max(0, min(4 * c + 8, 16 * j + 16) - max(4 * c, 16 * j)) for c in visible)
            for j in range(row // 16)
        ]
        best = sorted(range(len(shared)), key=lambda j: (-shared[j], j))[:3]
        assert chosen[0, 0, row].tolist() == (sorted(best) + [-1] * 3)[:3], row


def test_nothing_to_choose() -> None:
    assert Problem(n=40, count=0).choose().shape == (2, 2, 40, 0)
    assert (Problem(n=40, near=40).choose() == -1).all()  # all is near


@on_cpu
def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    problem = Problem(n=40, h=2, hkv=1, d=72, block=2, stride=1, left_out=3, select=4, near=2)
    grad, dlse = problem.random(*problem.q.shape).to(problem.q), problem.random(2, 2, 40)
    before = problem.attend_with_gradients(grad, dlse) | {"chosen": problem.choose()}
    place = interpreter.InterpreterBuilder.set_grid_idx
    grids = set()

    def shuffled(self, x: int, y: int, z: int) -> None:
        size = self.grid_dim[0]
        grids.add(size)
        place(self, random.Random(size).sample(range(size), size)[x], y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", shuffled)
    after = problem.attend_with_gradients(grad, dlse) | {"chosen": problem.choose()}
    assert min(grids) > 4
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name


if HAS_TRITON:

    @triton.jit
    def keys_kernel(x_ptr, keys_ptr, N: tl.constexpr):
        """Keys of one row of importances."""
        j = tl.arange(0, N)
        keys = rank_keys(tl.load(x_ptr + j)[None, :], j)
        tl.store(keys_ptr + j[None, :], keys)

    @triton.jit
    def best_kernel(best_ptr, keys_ptr, ROWS: tl.constexpr, LOG: tl.constexpr):
        """Merge keys into a descending list, row by row."""
        place = tl.arange(0, ROWS)[:, None] * (1 << LOG) + tl.arange(0, 1 << LOG)[None, :]
        best = keep_best(tl.load(best_ptr + place), tl.load(keys_ptr + place), ROWS, LOG)
        tl.store(best_ptr + place, best)


def test_keys_order_numbers_and_then_indices() -> None:
    inf = float("inf")
    numbers = [0.0, -0.0, 1.5, -1.5, inf, 1e-45, -1e-45, 3e38]
    numbers += [-3e38, -0.0, 0.0, 1.5, -1.5, inf, 2.0, 7.0]
    x = torch.tensor(numbers, device=DEVICE)
    keys = torch.empty(16, dtype=torch.int64, device=DEVICE)
    keys_kernel[(1,)](x, keys, 16)
    order = sorted(range(16), key=lambda j: (-numbers[j], j))
    assert keys.argsort(descending=True).tolist() == order
    assert (keys > EMPTY.value).all()


@pytest.mark.parametrize("log", [4, 5, 6])
def test_running_list_keeps_the_largest(log: int) -> None:
    rng = torch.Generator().manual_seed(log)
    bounds = -(2**63) + 1, 2**63 - 1
    best, keys = torch.randint(*bounds, (2, 16, 1 << log), generator=rng).to(DEVICE)
    best[:4], keys[2:6] = bounds[0], bounds[0]  # none yet
    best = best.sort(descending=True).values
    everything = torch.cat([best, keys], 1).sort(descending=True).values
    best_kernel[(1,)](best, keys, 16, log)
    assert torch.equal(best, everything[:, : 1 << log])

"""The selected branch in Triton: right in both regimes, in bounded memory, in any order."""

import pytest
import torch
from attention_inputs import DEVICE, launching, make_mask, make_qkv, needs_triton

from attnopt.kernels.nsa.geometry import near_block, query_positions, row_starts, selection_count
from attnopt.kernels.nsa.reference import selected_reference

pytestmark = needs_triton
REGIMES = ["short", "long"]
SIZES = [  # b, h, hkv, nq, nk, d, select_block, slots, near_window, padding
    (1, 2, 2, 100, 100, 16, 16, 2, 17, "none"),
    (2, 4, 1, 65, 65, 20, 24, 3, 30, "left"),
    (1, 16, 1, 30, 57, 16, 8, 4, 0, "holes"),
    (2, 6, 2, 33, 70, 64, 32, 2, 33, "right"),
    (1, 2, 2, 1, 1, 16, 16, 2, 1, "none"),
    (1, 2, 2, 130, 130, 16, 3, 5, 4, "left"),
    (2, 2, 1, 50, 50, 16, 16, 0, 17, "empty-row"),
    (2, 3, 1, 70, 70, 32, 64, 1, 65, "none"),
    (1, 1, 1, 70, 70, 16, 1, 5, 1, "none"),
]


def make(b, h, hkv, nq, nk, d, size, slots, near_window, padding, dtype, seed=0):
    """q, k, v, mask, first real tokens, distinct random far blocks, and upstream gradients."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)

    q, k, v = make_qkv("packed", b, h, hkv, nq, nk, d, rand)
    mask = make_mask(padding, b, nk, rng)
    mask = None if mask is None else mask.to(DEVICE)
    start = row_starts(mask, k)
    end = near_block(query_positions(start, nq, nk - nq), size, near_window)
    blocks = selection_count(nk, size)
    liking = torch.rand(b, hkv, nq, blocks, generator=rng).to(DEVICE)
    far = torch.arange(blocks, device=DEVICE) < end[:, None, :, None]
    best = liking.masked_fill(~far, -1.0).topk(min(slots, blocks), dim=3)
    chosen = best.indices.masked_fill(best.values < 0, -1).int()
    chosen = torch.nn.functional.pad(chosen, (0, slots - chosen.shape[3]), value=-1)
    grad = rand(b, nq, h, d).transpose(1, 2)
    return q, k, v, mask, start, chosen, grad, rand(b, h, nq).to(torch.float32)


def exact(q, k, v, mask, chosen, grad, grad_lse, **sizes):
    """Output, log-sum-exp and gradients by the definition in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = selected_reference(*leaves, chosen, key_mask=mask, **sizes)
    finite = lse.isfinite()
    value = (out * grad.double()).sum() + (lse.masked_fill(~finite, 0.0) * grad_lse).sum()
    return [out, lse, *torch.autograd.grad(value, leaves)]


def run(inputs, regime, select_block, near_window):
    """The same from the kernels."""
    from attnopt.kernels.interpreter import prepare_interpreter
    from attnopt.kernels.nsa import triton_selected

    if DEVICE == "cpu":
        prepare_interpreter()
    q, k, v, mask, start, chosen, grad, grad_lse = inputs
    options = {
        "select_block": select_block, "near_window": near_window, "scale": q.shape[3] ** -0.5,
        "regime": regime,
    }  # fmt: skip
    with launching("triton"):
        out, lse = triton_selected.selected_forward(q, k, v, mask, start, chosen, **options)
        delta = (grad.float() * out.float()).sum(-1) - grad_lse
        grads = triton_selected.selected_backward(
            grad, lse, delta, q, k, v, mask, start, chosen, **options
        )
    return [out, lse, *grads]


def compare(found, expected, tolerance):
    """Largest error relative to the largest number; -inf must stand where it should."""
    assert torch.equal(found[1].isfinite(), expected[1].isfinite())
    for name, x, y in zip(("out", "lse", "q", "k", "v"), found, expected, strict=True):
        y = y.masked_fill(~y.isfinite(), 0.0)
        x = x.double().masked_fill(~x.isfinite() if name == "lse" else torch.tensor(False), 0.0)
        worst = (x - y).abs().max() / y.abs().max().clamp(min=1.0)
        assert worst <= tolerance, (name, float(worst))


@pytest.fixture
def small_passes(monkeypatch):
    """Segments and passes so small that every size has several."""
    from attnopt.kernels.nsa import triton_selected, work_list

    monkeypatch.setattr(work_list, "SEGMENT", 32)
    monkeypatch.setattr(triton_selected, "PASS_BYTES", 1 << 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_against_the_definition(sizes, regime, dtype, small_passes):
    inputs = make(*sizes, dtype)
    q, k, v, mask, _, chosen, grad, grad_lse = inputs
    options = {"select_block": sizes[6], "near_window": sizes[8]}
    expected = exact(q, k, v, mask, chosen, grad, grad_lse, **options)
    compare(run(inputs, regime, **options), expected, 2e-6 if dtype == torch.float32 else 8e-3)


def test_regimes_agree(small_passes):
    sizes = (1, 4, 2, 77, 90, 16, 8, 3, 9, "left")
    inputs = make(*sizes, torch.float32)
    found = [run(inputs, regime, 8, 9) for regime in REGIMES]
    compare(found[0], [x.double() for x in found[1]], 2e-6)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_hot_block(regime, small_passes):
    """Every query selects the first block, which then has as many segments as queries need."""
    from attnopt.kernels.nsa.work_list import count_segments, make_work_list

    inputs = list(make(1, 2, 2, 150, 150, 16, 8, 3, 9, "none", torch.float32))
    chosen = inputs[5]
    end = near_block(torch.arange(150), 8, 9)
    chosen[:] = -1
    chosen[..., 1] = torch.where(end > 0, 0, -1).to(DEVICE)
    work = make_work_list(chosen.flatten(0, 1), 19)
    used = int(work.first[0, -1])
    assert used == -(-int((end > 0).sum()) // 32) <= count_segments(150 * 3, 19)
    q, k, v, mask, _, _, grad, grad_lse = inputs
    options = {"select_block": 8, "near_window": 9}
    expected = exact(q, k, v, mask, chosen, grad, grad_lse, **options)
    compare(run(inputs, regime, **options), expected, 2e-6)


def test_work_list_holds_every_pair_once():
    from attnopt.kernels.nsa.work_list import SEGMENT, make_work_list

    chosen = make(2, 2, 1, 700, 700, 16, 16, 4, 17, "left", torch.float32)[5].flatten(0, 1)
    work = make_work_list(chosen, 44)
    for x in range(len(chosen)):
        block, begin, end = (part[x] for part in work.segments)
        assert ((end - begin) <= SEGMENT).all()
        seen = []
        for number, (own, low, high) in enumerate(zip(block, begin, end, strict=True)):
            pairs = work.order[x, low:high].long()
            assert (chosen[x].flatten()[pairs] == own).all()
            assert (pairs.diff() > 0).all()
            if high > low:
                assert work.first[x, own] <= number < work.first[x, own + 1]
            seen += pairs.tolist()
        wanted = (chosen[x].flatten() >= 0).nonzero().flatten()
        assert sorted(seen) == wanted.tolist()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs is shuffled")
@pytest.mark.parametrize("regime", REGIMES)
def test_any_order_of_programs_gives_the_same_bits(regime, small_passes, monkeypatch):
    from triton.runtime import interpreter

    inputs = make(2, 2, 1, 60, 60, 16, 8, 3, 9, "left", torch.bfloat16)
    first = run(inputs, regime, 8, 9)
    ordered = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(self, x, y, z):  # what the last program does first
        ordered(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)
    again = run(inputs, regime, 8, 9)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("size", [40, 200])
def test_large_blocks_are_cut_into_pieces(size, small_passes):
    """fp32 holds 32 keys in a program and bf16 128."""
    dtype = torch.float32 if size == 40 else torch.bfloat16
    inputs = make(1, 2, 1, 3 * size + 5, 3 * size + 5, 16, size, 2, 5, "left", dtype)
    q, k, v, mask, _, chosen, grad, grad_lse = inputs
    expected = exact(q, k, v, mask, chosen, grad, grad_lse, select_block=size, near_window=5)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    compare(run(inputs, "long", size, 5), expected, tolerance)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("combine", ["merged", "gates"])
def test_no_limit_on_the_window_is_no_overflow(combine, regime):
    """2^31 - 1 as a window, or as many local blocks: dense attention, whatever the padding."""
    from attnopt.kernels.nsa import mean_compress, nsa_attention

    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24, 16, generator=rng).to(DEVICE) for _ in range(3))
    mask = (torch.arange(24) >= torch.tensor([[0], [5]])).to(DEVICE)
    sizes = {"select_block": 4, "num_selected": 2, "window": 2**31 - 1}
    gates = None
    if combine == "gates":
        sizes |= {"num_selected": 2**29 + 1, "local_blocks": 2**29, "window": 8}
        gates = torch.tensor([0.0, 1.0, 0.0]).to(DEVICE).expand(2, 2, 24, 3)
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        means = [mean_compress(x, compress_block=4, compress_stride=4, key_mask=mask)
                 for x in leaves[1:]]  # fmt: skip
        with launching(backend):
            out = nsa_attention(
                *leaves, *means, gates=gates, combine=combine, key_mask=mask, regime=regime,
                backend=backend, **sizes,
            )  # fmt: skip
        found.append([out.detach(), *torch.autograd.grad(out, leaves, q)])
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() < 2e-6 * max(1.0, y.abs().max())

"""Bytes that the kernels move, counted in the interpreter, against their plans."""

import pytest
import torch
from attention_inputs import DEVICE, HAS_TRITON

from attnopt.kernels.favor import favor_attention, orthogonal_projection, plan
from attnopt.kernels.nsa.geometry import near_block, row_starts
from attnopt.testing import force_triton

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)
from attnopt.bench.instruments.traffic_counter import PYTORCH, Traffic, counting  # noqa: E402

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")


def distinct(traffic: Traffic) -> int:
    """Bytes of all kernels, what a program reads twice counted once."""
    return sum(kernel.moved for name, kernel in traffic.kernels.items() if name != PYTORCH)


def every(traffic: Traffic) -> int:
    """Bytes of all kernels, as often as they are read."""
    kernels = [kernel for name, kernel in traffic.kernels.items() if name != PYTORCH]
    return sum(kernel.total("loaded") + kernel.total("stored") for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 33])
def test_favor_moves_what_its_plan_says(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a program counted once: tokens, states between segments, and the projection."""
    n, d, m, segments = 1024, 64, 64, 2
    monkeypatch.setattr(plan, "segments_override", segments)
    rng = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=rng).bfloat16() for _ in range(4))
    rows = orthogonal_projection(m, d, generator=rng)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with force_triton():
        with counting() as forward:
            out = favor_attention(*leaves, rows, window=window)
        with counting() as backward:
            torch.autograd.grad(out, leaves, grad)
    tensor, state, references = 2 * n * d, 4 * (m * d + 2 * m), 4 * m * (n // 32 + 1)
    expected = 6 * tensor + 4 * n  # k and v twice, and the log-sum-exp
    expected += (4 * segments + 1) * state + 2 * segments * 2 * m * d + references
    found = distinct(forward)
    assert abs(found / expected - 1) < 0.03
    assert found <= (1.9 if window == 0 else 1.95) * 4 * tensor
    assert distinct(backward) <= 2.1 * 8 * tensor
    assert (every(forward) > 1.2 * found) == (window > 0)  # near keys are read twice


def far_blocks(n: int, slots: int, size: int, near_window: int) -> torch.Tensor:
    """Random far blocks of n queries `[1, 1, n, slots]`, the first block among them."""
    rng = torch.Generator().manual_seed(0)
    end = near_block(torch.arange(n), size, near_window)
    liking = torch.rand(n, -(-n // size), generator=rng)
    liking[:, 0] = 2.0
    liking = liking.masked_fill(torch.arange(liking.shape[1]) >= end[:, None], -1.0)
    best = liking.topk(min(slots, liking.shape[1]))
    chosen = best.indices.masked_fill(best.values < 0, -1).int()
    return torch.nn.functional.pad(chosen, (0, slots - chosen.shape[1]), value=-1)[None, None]


def moved(n: int, slots: int, d: int = 64, size: int = 64) -> tuple[int, int]:
    """Bytes of the selected branch in the long regime, forward and backward, one head in bf16."""
    from attnopt.kernels.nsa import triton_selected

    rng = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=rng).bfloat16() for _ in range(4))
    tensors = (q, k, v, None, row_starts(None, k), far_blocks(n, slots, size, size + 1))
    options = {
        "select_block": size, "near_window": size + 1, "scale": d**-0.5, "regime": "long",
    }  # fmt: skip
    with counting() as forward:
        _, lse = triton_selected.selected_forward(*tensors, **options)
    with counting() as backward:
        triton_selected.selected_backward(grad, lse, lse, *tensors, **options)
    return distinct(forward), distinct(backward)


@pytest.mark.slow
def test_selected_blocks_move_what_their_plan_says() -> None:
    """Per token and slot: gather q, write the partial result, read it again; twice backward.

    Two lengths with all slots in use make the law; at 64k tokens and 12 heads it is 5.2 GB forward
    and 9.2 GB backward, where reading S b keys for each query would be 206 GB.
    """
    slots, d, low, high = 14, 64, 2048, 4096
    (forward, backward), (forward2, backward2) = moved(low, slots), moved(high, slots)
    per_token, per_token_back = (
        (forward2 - forward) / (high - low), (backward2 - backward) / (high - low)
    )  # fmt: skip
    row = 2 * d
    plan = slots * 3 * row + 4 * row  # and q, k, v, out once
    assert plan < per_token < 1.2 * plan
    plan = slots * 4 * row + 8 * row  # q and dO gathered
    assert plan < per_token_back < 1.5 * plan
    assert 5.1e9 < 12 * (forward2 + per_token * (65536 - high)) < 5.4e9
    assert 9.1e9 < 12 * (backward2 + per_token_back * (65536 - high)) < 9.4e9

"""Memory of the Triton path at 64k tokens: every allocation, recorded with fake tensors."""

import pytest
import torch
from attention_inputs import DEVICE, needs_triton
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnopt.kernels.nsa import geometry, nsa_attention
from attnopt.kernels.nsa.arguments import choose_regime, gates_pattern, merged_pattern
from attnopt.kernels.nsa.calls import make_call
from attnopt.testing import force_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(DEVICE == "cuda", reason="launches are left out in the interpreter"),
]
PATTERNS = {
    "gates": gates_pattern(32, 16, 64, 16, 512, 1, 2),
    "merged": merged_pattern(64, 64, 64, 16, 512, 0, None),
}


class Allocations(TorchDispatchMode):
    """Bytes of every new storage, in order."""

    def __init__(self):
        super().__init__()
        self.bytes, self._seen, self._kept = [], set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self._kept.append(storage)  # so that its address is not used again
                    self.bytes.append(storage.nbytes())
        return out


@pytest.fixture
def no_launches(monkeypatch):
    from triton.runtime import interpreter

    launched = []
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn)
    )
    return launched


def allocations(n, heads, pattern):
    """Bytes allocated by all launchers, forward and backward, at n tokens of 64 numbers in bf16."""
    from attnopt.kernels.nsa import triton_compressed, triton_select, triton_selected

    p = pattern
    with FakeTensorMode():
        blocks = geometry.compressed_count(n, p.block, p.stride)
        q, k, v, grad = (torch.empty(1, heads, n, 64, dtype=torch.bfloat16) for _ in range(4))
        k_cmp, v_cmp = (torch.empty(1, heads, blocks, 64, dtype=torch.bfloat16) for _ in range(2))
        delta = torch.empty(1, heads, n)
        with Allocations() as found:
            rows = make_call(p, n, None, k, 0.125, "long", "triton")
            compressed = {
                "offset": 0, "block": p.block, "stride": p.stride, "delay": p.delay, "scale": 0.125
            }  # fmt: skip
            chosen = triton_select.select(
                q, k_cmp, rows.bias, rows.real, rows.start, count=p.far, sinks=p.sinks,
                select_block=p.select_block, near_window=p.near_window, **compressed,
            )  # fmt: skip
            left_out = chosen if p.combine == "merged" else chosen[..., :0]
            tensors = (q, k_cmp, v_cmp, rows.bias, left_out, rows.start)
            _, lse = triton_compressed.compressed_forward(*tensors, **compressed)
            triton_compressed.compressed_backward(grad, lse, delta, *tensors, **compressed)
            selected = {
                "select_block": p.select_block, "near_window": p.near_window, "scale": 0.125,
                "regime": choose_regime("auto", n, "triton"),
            }  # fmt: skip
            tensors = (q, k, v, None, rows.start, chosen)
            _, lse = triton_selected.selected_forward(*tensors, **selected)
            triton_selected.selected_backward(grad, lse, delta, *tensors, **selected)
    return found.bytes


@pytest.mark.parametrize("combine", PATTERNS)
def test_no_allocation_above_2_gb_at_64k(combine, no_launches):
    found = allocations(65536, 12, PATTERNS[combine])
    names = {kernel.__name__ for kernel in no_launches}
    assert {"gather_forward_kernel", "gather_backward_kernel"} <= names
    assert max(found) <= 2e9
    assert max(found) >= 12 * 65536 * 64 * 2  # the output at least: they are recorded


@pytest.mark.parametrize("combine", PATTERNS)
def test_no_allocation_grows_faster_than_the_text(combine, no_launches):
    small, large = (allocations(n, 1, PATTERNS[combine]) for n in (32768, 65536))
    assert len(small) == len(large)
    grown = [(x, y) for x, y in zip(small, large, strict=True) if y > 2.05 * max(x, 1 << 16)]
    assert not grown


@pytest.mark.parametrize("combine", PATTERNS)
def test_the_public_op_allocates_no_more(combine):
    """What is around the kernels: masks, the sum of the branches and its gradients."""
    p, n, heads = PATTERNS[combine], 65536, 12
    with FakeTensorMode(), force_triton(), Allocations() as found:
        q, k, v = (
            torch.empty(1, heads, n, 64, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        blocks = geometry.compressed_count(n, p.block, p.stride)
        k_cmp, v_cmp = (torch.empty(1, heads, blocks, 64, dtype=torch.bfloat16) for _ in range(2))
        gates = torch.empty(1, heads, n, 3) if combine == "gates" else None
        out = nsa_attention(
            q, k, v, k_cmp, v_cmp, gates=gates, combine=combine, compress_block=p.block,
            compress_stride=p.stride, select_block=p.select_block, num_selected=16, window=512,
        )  # fmt: skip
        out.backward(torch.empty_like(out))
    assert max(found.bytes) <= 2e9


@pytest.mark.parametrize("heads", [1, 12, 100])
def test_partial_results_of_a_pass_fit_their_budget(heads):
    """All that lives at a time in the backward pass."""
    from attnopt.kernels.nsa import triton_selected

    n, p = 65536, PATTERNS["gates"]
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, n, 64, dtype=torch.bfloat16) for _ in range(3))
        chosen = torch.empty(1, heads, n, p.far, dtype=torch.int32)
        job = triton_selected._Job(
            q, k, v, None, torch.empty(1, dtype=torch.int32), chosen, p.select_block,
            p.near_window, 0.125, "long",
        )  # fmt: skip
        held = [*job.partials(), job.segment_gradients(), job.segment_gradients()]
    assert sum(x.untyped_storage().nbytes() for x in held) <= triton_selected.PASS_BYTES
    passes = list(job.passes())
    assert [x for x0, count in passes for x in range(x0, x0 + count)] == list(range(heads))
    assert max(count for _, count in passes) == job.step == min(heads, 5)

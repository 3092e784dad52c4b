"""Cases whose builds have one fault each, and NSA with sizes of one: what builds are tested on."""

from functools import partial

import torch
import triton
import triton.language as tl

from attnopt.testing import Case


@triton.jit
def healthy_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """A dot on tensor cores."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def ordinary_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """One dot on tensor cores, and one that leaves them idle."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + tile)
    fast = tl.dot(x, x, input_precision="tf32")
    tl.store(out_ptr + tile, tl.dot(fast, x, input_precision="ieee"))


@triton.jit
def spilling_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """All of a tile is needed twice, and does not fit the registers of one warp."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(out_ptr + tile, x * tl.sum(x))


@triton.jit
def hoarding_kernel(x_ptr, out_ptr, N, SIZE: tl.constexpr):
    """A loop whose tiles are fetched so many steps ahead that they exceed the shared memory."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(0, N):
        x = tl.load(x_ptr + i * SIZE * SIZE + tile)
        total = tl.dot(x, tl.load(x_ptr + (N + i) * SIZE * SIZE + tile), total)
    tl.store(out_ptr + tile, total)


@triton.jit
def trapped_kernel(x_ptr, out_ptr, N, SIZE: tl.constexpr):
    """Three results in tensor memory, 768 columns of the 512 that sm_100 has."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    top = tl.arange(0, 128)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    first = tl.zeros([128, SIZE], tl.float32)
    second, third = first, first
    for i in range(0, N):
        x, y = tl.load(x_ptr + i + top), tl.load(x_ptr + i + tile)
        first, second = tl.dot(x, y, first), tl.dot(x, y * 2, second)
        third = tl.dot(x, y + 1, third)
    tl.store(out_ptr + top, first + second * third)


@triton.jit
def refused_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Shapes that do not multiply."""
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.zeros([2 * SIZE, SIZE], tl.float32)))


def _make(dtype, size):
    return {"x": torch.zeros(size, size, dtype=dtype)}


def _launch(kernel, options, inputs):
    out = torch.empty_like(inputs["x"])
    kernel[(1,)](inputs["x"], out, SIZE=len(out), **options)
    return {"out": out}


def _unanswered(inputs):
    raise AssertionError("builds ask for no reference")


def planted(kernel, dtype, size, **options) -> Case:
    """A case that launches one kernel on a tile of `size` by `size`."""
    name = kernel.fn.__name__
    return Case(
        id=f"planted/{name}/{dtype}", op="lastk", phase="fwd", dtype=dtype, shape={}, config={},
        make=partial(_make, dtype, size), run=partial(_launch_by_name, name, options),
        ref=_unanswered,
    )


def _launch_by_name(name, options, inputs):
    return _launch(globals()[name], options, inputs)


def planted_cases() -> list[Case]:
    """One healthy kernel and one of each fault."""
    return [
        planted(healthy_kernel, torch.bfloat16, 64, PRECISION="tf32"),
        planted(ordinary_kernel, torch.float32, 16),
        planted(spilling_kernel, torch.float32, 128, num_warps=1),
        planted(hoarding_kernel, torch.bfloat16, 128, N=64, num_stages=8),
        planted(refused_kernel, torch.float32, 16),
    ]


def nsa_edge(sizes, dtype, masked, **options) -> Case:
    """NSA, forward and backward, with sizes `(b, h, hkv, nq, nk, d)` that may be one."""
    return Case(
        id=f"nsa/bwd/{dtype}-{sizes}-{options}", op="nsa", phase="bwd", dtype=dtype, shape={},
        config={}, make=dict, run=partial(_run_nsa, sizes, dtype, masked, options),
        ref=_unanswered,
    )


def _run_nsa(sizes, dtype, masked, options, inputs):
    from attnopt.kernels.nsa import mean_compress, nsa_attention

    b, h, hkv, nq, nk, d = sizes
    q = torch.zeros(b, h, nq, d, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(b, hkv, nk, d, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(b, nk, dtype=torch.bool) if masked else None
    size = options["select_block"]
    means = (
        mean_compress(x, compress_block=size, compress_stride=size, key_mask=mask) for x in (k, v)
    )
    gates = torch.zeros(b, h, nq, 3) if options["combine"] == "gates" else None
    out = nsa_attention(q, k, v, *means, gates=gates, key_mask=mask, **options)
    out.backward(torch.zeros_like(out))
    return {"out": out}

"""How fast is last-k attention next to other ways to the same mask, and next to dense attention?

Each cell is one op, forward or forward + backward (all gradients), at B=1 H=12 D=64 on GPT-2's
strided views of one projection; fp32 on a CPU with one thread, bf16 on a GPU.

    lastk       attnopt.lastk_attention: the eager path on a CPU, Triton on a GPU
    band-sdpa   F.scaled_dot_product_attention with the same band as an [N, N] float bias
    shifted     a loop over the W offsets on shifted views, no gather and no N x N (W=5 only)
    dense-sdpa  F.scaled_dot_product_attention, causal: what last-k replaces, another function

The first three are checked against the float64 definition at the timed shape before they are timed,
outputs and gradients: an error above twice that of band-sdpa (plus 1e-6) fails the cell. On a CPU
times are CPU seconds of the process, on a GPU wall seconds up to the end of the kernels.
"""

import time
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from attnopt import lastk_attention
from attnopt.kernels.lastk.reference import lastk_reference
from attnopt.testing.case import make_qkv

H, D = 12, 64
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
TIMER = time.perf_counter if ON_GPU else time.process_time
SIZES = (256, 1024, 4096)
CELLS = [
    *[(n, 5, name) for n in SIZES for name in ("lastk", "band-sdpa", "shifted")],
    *[(n, 64, "lastk") for n in SIZES],
    *[(n, n, "dense-sdpa") for n in SIZES],
]


def band_sdpa(q, k, v, log_weights):
    n, width = q.shape[2], len(log_weights)
    offset = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    visible = (offset >= 0) & (offset < width)
    bias = log_weights.to(q.dtype)[offset.clamp(0, width - 1)].masked_fill(~visible, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def shifted(q, k, v, log_weights):
    width, n = len(log_weights), q.shape[2]
    k, v = (F.pad(x, (0, 0, width - 1, 0)) for x in (k, v))
    starts = range(width - 1, -1, -1)  # offset 0 first
    scores = torch.stack([(q * k[:, :, s : s + n]).sum(-1) for s in starts], -1) * D**-0.5
    position = torch.arange(n, device=q.device)[:, None]
    future = torch.arange(width, device=q.device) > position
    scores = (scores + log_weights).masked_fill(future, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    return sum(weights[..., i, None] * v[:, :, s : s + n] for i, s in enumerate(starts))


def dense_sdpa(q, k, v, log_weights):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


OPS = {
    "lastk": partial(lastk_attention, backend="triton" if ON_GPU else "eager"),
    "band-sdpa": band_sdpa,
    "shifted": shifted,
    "dense-sdpa": dense_sdpa,
}


@cache
def inputs(n, width):
    """Leaves q, k, v, log_weights and the upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(B=1, H=H, Hkv=H, N=n, D=D)
    qkv = make_qkv(shape, "packed", n, DTYPE, generator)
    log_weights = torch.randn(width, generator=generator)
    grad = torch.randn(1, H, n, D, generator=generator).to(DTYPE)
    return [x.to(DEVICE).detach() for x in (*qkv, log_weights, grad)]


def results(op, n, width, dtype=None):
    """Output and gradients of every input, in the dtype of the inputs or another."""
    *leaves, grad = [x if dtype is None else x.cpu().to(dtype) for x in inputs(n, width)]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves)
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def blockwise_reference(q, k, v, log_weights, block=256):
    """The definition, query block by query block: each needs its own keys and the band before."""
    width, parts = len(log_weights), []
    for start in range(0, q.shape[2], block):
        rows, keys = slice(start, start + block), slice(max(0, start - width + 1), start + block)
        parts.append(lastk_reference(q[:, :, rows], k[:, :, keys], v[:, :, keys], log_weights))
    return torch.cat(parts, 2)


@cache
def exact(n, width):
    return results(blockwise_reference, n, width, torch.float64)


@cache
def errors(name, n, width):
    """Largest error of the output and of each gradient, relative to the largest true value."""
    found = results(OPS[name], n, width)
    truth = exact(n, width)
    return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, truth, strict=True)]


def check(name, n, width):
    limits = [2 * e + 1e-6 for e in errors("band-sdpa", n, width)]
    labels = ("output", "dq", "dk", "dv", "dlog_weights")
    for label, error, limit in zip(labels, errors(name, n, width), limits, strict=True):
        where = f"{name} N={n} W={width}"
        assert error <= limit, f"{where}: the error of {label} is {error:.2g} > {limit:.2g}"


@pytest.mark.benchmark(timer=TIMER, warmup=False, min_rounds=3, max_time=0.5)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize(("n", "width", "name"), CELLS, ids=lambda x: str(x))
def test_lastk(benchmark, phase, n, width, name):
    torch.set_num_threads(1)
    if name != "dense-sdpa":
        check(name, n, width)
    *leaves, grad = inputs(n, width)
    leaves = [x.detach().requires_grad_(phase != "forward") for x in leaves]
    wanted = leaves[:3] if name == "dense-sdpa" else leaves

    def call():
        out = OPS[name](*leaves)
        if phase != "forward":
            torch.autograd.grad(out, wanted, grad)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{phase}, N={n}"
    benchmark.name = name if name == "dense-sdpa" else f"{name} W={width}"
    benchmark.extra_info = {"device": DEVICE, "dtype": str(DTYPE), "torch": torch.__version__}
    call()
    benchmark(call)

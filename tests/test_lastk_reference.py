"""The dense definition of last-k attention, against plain Python loops and known identities."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.lastk.reference import lastk_reference

MASKS = {
    "none": None,
    "left": lambda b, j, n: j >= min(2 + 2 * b, n - 1),
    "right": lambda b, j, n: j < max(n - 1 - 2 * b, 1),
    "holes": lambda b, j, n: (j + b) % 3 != 1,
    "sink-hole": lambda b, j, n: j >= 1 and j != 2 + b,
    "empty-row": lambda b, j, n: b != 0,
}


def make_mask(kind: str, batch: int, n: int) -> Tensor | None:
    """[batch, n] bool, or None."""
    rule = MASKS[kind]
    if rule is None:
        return None
    return torch.tensor([[rule(b, j, n) for j in range(n)] for b in range(batch)])


def make_inputs(
    *, b=2, h=2, hkv=2, nq=5, nk=None, d=3, w=3, t=0, per_head=False, mask="none", seed=0
) -> dict:
    """Arguments of lastk_reference in float64, every float one of them with requires_grad."""
    rng = torch.Generator().manual_seed(seed)
    nk = nq if nk is None else nk

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()

    return {
        "q": rand(b, h, nq, d),
        "k": rand(b, hkv, nk, d),
        "v": rand(b, hkv, nk, d),
        "log_weights": rand(h, w) if per_head else rand(w),
        "sink_log_weights": None if t == 0 else rand(h, t) if per_head else rand(t),
        "key_mask": make_mask(mask, b, nk),
    }


def plain_loops(q, k, v, log_weights, sink_log_weights=None, key_mask=None, scale=None) -> Tensor:
    """The definition in Python floats: one query, one key, one feature at a time."""
    (batch, heads, nq, dim), (_, kv_heads, nk, _) = q.shape, k.shape
    band = log_weights.expand(heads, -1).tolist()
    sinks = (
        [[]] * heads if sink_log_weights is None else sink_log_weights.expand(heads, -1).tolist()
    )
    real = [[True] * nk] * batch if key_mask is None else key_mask.tolist()
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k, v, out = q.tolist(), k.tolist(), v.tolist(), torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        start = real[b].index(True) if True in real[b] else nk
        for h in range(heads):
            g = h // (heads // kv_heads)
            for r in range(nq):
                i, seen = r + nk - nq, []
                for j in range(nk):
                    if j > i or not real[b][j]:
                        continue
                    if start <= j < start + len(sinks[h]):
                        bias = sinks[h][j - start]
                    elif i - j < len(band[h]):
                        bias = band[h][i - j]
                    else:
                        continue
                    score = scale * sum(x * y for x, y in zip(q[b][h][r], k[b][g][j], strict=True))
                    seen.append((math.exp(score + bias), v[b][g][j]))
                total = math.fsum(weight for weight, _ in seen)
                for c in range(dim):
                    if total > 0:
                        out[b, h, r, c] = math.fsum(w * value[c] for w, value in seen) / total
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"nq": 1, "w": 1},
        {"nq": 6, "w": 1},
        {"nq": 6, "w": 2, "per_head": True},
        {"nq": 6, "w": 9},
        {"nq": 7, "w": 2, "t": 1},
        {"nq": 7, "w": 2, "t": 3, "per_head": True},
        {"nq": 4, "w": 2, "t": 7},
        {"nq": 6, "w": 3, "t": 2, "h": 4, "hkv": 2, "per_head": True},
        {"nq": 5, "w": 3, "h": 3, "hkv": 1},
        {"nq": 2, "nk": 7, "w": 3, "t": 1},
        {"nq": 1, "nk": 6, "w": 4, "t": 2, "h": 4, "per_head": True},
    ],
    ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()),
)
def test_equals_plain_loops(sizes: dict, mask: str) -> None:
    inputs = make_inputs(mask=mask, **sizes)
    assert_close(lastk_reference(**inputs), plain_loops(**inputs))


def test_scale_and_minus_infinity_equal_plain_loops() -> None:
    inputs = make_inputs(nq=6, w=4, t=2, per_head=True, b=1)
    with torch.no_grad():
        inputs["log_weights"][:, 1] = -math.inf
        inputs["sink_log_weights"][1, 0] = -math.inf
    assert_close(lastk_reference(**inputs, scale=0.3), plain_loops(**inputs, scale=0.3))


def test_wide_window_is_causal_attention() -> None:
    inputs = make_inputs(nq=9, w=12, d=4)
    inputs["log_weights"] = torch.zeros(12)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(lastk_reference(**inputs), expected)


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
def test_zero_log_weights_are_a_band_mask_and_sinks_count_once(sinks: int) -> None:
    inputs = make_inputs(nq=9, w=3, d=4)
    inputs["log_weights"] = torch.zeros(3)
    inputs["sink_log_weights"] = torch.zeros(sinks)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    i, j = torch.arange(9)[:, None], torch.arange(9)
    visible = (j <= i) & ((i - j < 3) | (j < sinks))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert_close(lastk_reference(**inputs), expected)


def test_sinks_own_their_tokens_inside_the_band() -> None:
    inputs = make_inputs(nq=6, w=6, t=3)
    out = lastk_reference(**inputs)
    inputs["log_weights"] = inputs["log_weights"] + torch.arange(1, 7)
    moved = lastk_reference(**inputs)
    assert torch.equal(out[:, :, :3], moved[:, :, :3])  # these rows see sinks alone
    assert not torch.isclose(out[:, :, 3:], moved[:, :, 3:]).any()


def test_grouped_heads_equal_repeated_keys() -> None:
    inputs = make_inputs(h=4, hkv=2, t=1, per_head=True)
    out = lastk_reference(**inputs)
    for name in ("k", "v"):
        inputs[name] = inputs[name].repeat_interleave(2, dim=1)
    assert torch.equal(out, lastk_reference(**inputs))


def test_last_queries_alone_equal_the_whole() -> None:
    inputs = make_inputs(nq=8, w=3, t=2, mask="left")
    whole = lastk_reference(**inputs)
    inputs["q"] = inputs["q"][:, :, -3:]
    assert_close(lastk_reference(**inputs), whole[:, :, -3:])


def test_left_padding_equals_the_row_alone() -> None:
    inputs = make_inputs(nq=9, w=3, t=2, mask="left")
    padded = lastk_reference(**inputs)
    for b, real in enumerate(inputs["key_mask"]):
        start = int((~real).sum())
        alone = {name: inputs[name][b : b + 1, :, start:] for name in ("q", "k", "v")}
        alone |= {name: inputs[name] for name in ("log_weights", "sink_log_weights")}
        assert start > 0
        assert_close(padded[b : b + 1, :, start:], lastk_reference(**alone))
        assert torch.equal(padded[b, :, :start], torch.zeros_like(padded[b, :, :start]))


@pytest.mark.parametrize("sinks", [0, 2])
def test_blind_rows_return_zeros_and_zero_gradients(sinks: int) -> None:
    inputs = make_inputs(nq=6, w=2, t=sinks)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0] = False
    mask[1, 2:5] = False  # with W = 2 the query at 4 sees nothing unless there are sinks
    out = lastk_reference(**inputs | {"key_mask": mask})
    blind = torch.zeros(2, 6, dtype=torch.bool)
    blind[0] = True
    blind[1, 3:5] = sinks == 0
    assert torch.equal(out.eq(0).all(-1).all(1), blind)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    for name, tensor in inputs.items():
        if isinstance(tensor, Tensor):
            assert tensor.grad.isfinite().all(), name
    assert not inputs["q"].grad.transpose(1, 2)[blind].any()
    assert not inputs["k"].grad.transpose(1, 2)[~mask].any()
    assert not inputs["v"].grad.transpose(1, 2)[~mask].any()


def test_weight_zero_everywhere_returns_zeros_and_zero_gradients() -> None:
    inputs = make_inputs(w=2, t=1)
    with torch.no_grad():
        inputs["log_weights"].fill_(-math.inf)
        inputs["sink_log_weights"].fill_(-math.inf)
    out = lastk_reference(**inputs)
    assert torch.equal(out, torch.zeros_like(out))
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    for tensor in inputs.values():
        assert tensor is None or torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("mask", ["none", "holes", "empty-row"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"nq": 5, "w": 2, "t": 2, "h": 4, "hkv": 2, "per_head": True},
        {"nq": 2, "nk": 5, "w": 3},
        {"nq": 4, "w": 6, "t": 6},
    ],
    ids=["groups-sinks", "end-aligned", "wide"],
)
def test_gradients(sizes: dict, mask: str) -> None:
    inputs = make_inputs(d=2, mask=mask, **sizes)
    names = [name for name in inputs if name != "key_mask" and inputs[name] is not None]

    def run(*tensors: Tensor) -> Tensor:
        return lastk_reference(**inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, [inputs[name] for name in names], fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype: torch.dtype) -> None:
    inputs = make_inputs(nq=7, t=2, mask="holes")
    low = {name: inputs[name].detach().to(dtype) for name in ("q", "k", "v")}
    high = {name: tensor.float() for name, tensor in low.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lastk_reference(**inputs | low)
    assert out.dtype == dtype
    assert torch.equal(out, lastk_reference(**inputs | high).to(dtype))

"""Last-k attention in both directions: the op on every backend, and the modules around it."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import BACKENDS, DEVICE, launching, make_mask
from torch import Tensor

from attnopt.attention import NSA, Favor, LastK, Masks, build_mechanism
from attnopt.kernels.favor.op import favor_attention
from attnopt.kernels.lastk import lastk_attention, sliding_window_attention

# A few queries run as one tile in eager, others in blocks; sinks may lie ahead of the band's reach;
# a band may reach past the text.
CASES = [
    dict(n=1, reach=2, sinks=2),
    dict(n=9, reach=0),
    dict(n=9, reach=0, sinks=3, mask="left"),
    dict(n=12, reach=3, sinks=2, mask="holes"),
    dict(n=70, reach=3, mask="right"),
    dict(n=70, reach=20, sinks=30, mask="left", per_head=True),
    dict(n=70, reach=100, sinks=1, mask="empty-row"),
    dict(n=300, reach=40, sinks=4, mask="right", b=1),
]
ON_TRITON = (1, 3, 5)  # the interpreter is slow


def make_inputs(*, n, reach, sinks=0, mask="none", per_head=False, b=2, dtype=torch.float64):
    """Arguments of lastk_attention with 4 query and 2 key heads, all floats with gradients."""
    rng = torch.Generator().manual_seed(n + reach)

    def rand(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_()

    heads = (4,) if per_head else ()
    inputs = {
        "q": rand(b, 4, n, 8),
        "k": rand(b, 2, n, 8),
        "v": rand(b, 2, n, 8),
        "log_weights": rand(*heads, 2 * reach + 1),
    }
    if sinks:
        inputs["sink_log_weights"] = rand(*heads, sinks)
    key_mask = make_mask(mask, b, n, rng)
    return inputs | {"key_mask": None if key_mask is None else key_mask.to(DEVICE)}


def written_out(q, k, v, log_weights, sink_log_weights=None, key_mask=None) -> Tensor:
    """The definition, one pair of tokens at a time."""
    batch, heads, n, dim = q.shape
    reach = log_weights.shape[-1] // 2
    sinks = log_weights[..., :0] if sink_log_weights is None else sink_log_weights
    count = sinks.shape[-1]
    nothing = torch.full_like(log_weights[..., :1], -torch.inf)
    table = torch.cat([sinks, log_weights, nothing], -1).expand(heads, -1)
    real = [[True] * n] * batch if key_mask is None else key_mask.tolist()
    entries = []
    for b in range(batch):
        start = real[b].index(True) if True in real[b] else n
        for i, j in product(range(n), range(n)):
            entry = -1
            if real[b][i] and real[b][j]:
                if start <= j < start + count:
                    entry = j - start
                elif abs(i - j) <= reach:
                    entry = count + i - j + reach
            entries.append(entry)
    bias = table[:, entries].view(heads, batch, n, n).transpose(0, 1)
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / dim**0.5
    sees = (bias > -torch.inf).any(-1, keepdim=True)
    weights = (scores + bias.masked_fill(~sees, 0)).softmax(-1)
    return (weights @ v).masked_fill(~sees, 0)


def run(function, inputs: dict, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of every float, computed at `dtype`, in float64."""
    floats = {name: x for name, x in inputs.items() if name != "key_mask"}
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in floats.items()}
    out = function(**inputs | leaves)
    rng = torch.Generator().manual_seed(0)
    upstream = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)
    grads = torch.autograd.grad(out, [*leaves.values()], upstream)
    return [x.double() for x in (out, *grads)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_follows_its_definition(case: dict) -> None:
    inputs = make_inputs(**case)
    expected = run(written_out, inputs, torch.float64)
    for backend in ("reference", "eager"):
        function = partial(lastk_attention, causal=False, backend=backend)
        for ours, want in zip(run(function, inputs, torch.float64), expected, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", ON_TRITON)
def test_every_backend_agrees_in_fp32(index: int, backend: str) -> None:
    inputs = make_inputs(**CASES[index])
    function = partial(lastk_attention, causal=False)
    expected = run(partial(function, backend="reference"), inputs, torch.float64)
    with launching(backend):
        found = run(partial(function, backend=backend), inputs, torch.float32)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_zero_weights_are_attention_in_both_directions(backend: str) -> None:
    q, k, v = (x.detach().float() for x in list(make_inputs(n=37, reach=0).values())[:3])
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    near = (torch.arange(37)[:, None] - torch.arange(37)).abs() < 5
    band = F.scaled_dot_product_attention(q, k, v, near.to(DEVICE), enable_gqa=True)
    with launching(backend):
        wide = lastk_attention(q, k, v, q.new_zeros(73), causal=False, backend=backend)
        window = sliding_window_attention(q, k, v, 37, causal=False, backend=backend)
        narrow = sliding_window_attention(q, k, v, 5, causal=False, backend=backend)
    for out in (wide, window):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow, band, rtol=1e-5, atol=1e-5)


def test_packed_documents_are_documents_alone() -> None:
    inputs = make_inputs(n=40, reach=6, sinks=9, b=1)
    ends = [0, 3, 4, 25, 40]
    packed = torch.tensor(ends, device=DEVICE)
    for options in ({}, {"max_seqlen": 30}):
        out = lastk_attention(**inputs, cu_seqlens=packed, causal=False, **options)
        for a, b in zip(ends, ends[1:], strict=False):
            parts = {name: inputs[name][:, :, a:b] for name in "qkv"}
            alone = lastk_attention(**inputs | parts, causal=False)
            torch.testing.assert_close(out[:, :, a:b], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("entry, ahead", [(0, 2), (1, 1), (2, 0), (4, -2)])
def test_weights_run_from_ahead_to_back(entry: int, ahead: int) -> None:
    inputs = make_inputs(n=8, reach=2)
    weights = torch.full((5,), -torch.inf, device=DEVICE, dtype=torch.float64)
    weights[entry] = 0
    out = lastk_attention(**inputs | {"log_weights": weights}, causal=False)
    value = inputs["v"].repeat_interleave(2, dim=1)
    expected = value.roll(-ahead, dims=2)
    expected[:, :, slice(8 - ahead, None) if ahead > 0 else slice(0, -ahead)] = 0
    torch.testing.assert_close(out, expected)


def test_refuses_what_it_cannot_mean() -> None:
    q, k, v, weights, _ = make_inputs(n=8, reach=2).values()
    with pytest.raises(ValueError, match=r"as many keys as queries; got 3 queries and 8 keys"):
        lastk_attention(q[:, :, :3], k, v, weights, causal=False)
    with pytest.raises(ValueError, match=r"odd number of weights.*got \[4\]"):
        lastk_attention(q, k, v, weights[:4], causal=False)
    with pytest.raises(ValueError, match="causal must be True or False; got 'no'"):
        lastk_attention(q, k, v, weights, causal="no")
    with pytest.raises(ValueError, match="as many keys as queries"):
        sliding_window_attention(q[:, :, :3], k, v, 2, causal=False)


SHAPE = dict(num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32, layer_idx=0, causal=False)


def build(config, **shape):
    torch.manual_seed(0)
    return build_mechanism(config, **SHAPE | shape)


def text(n: int, batch: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(n)
    return [torch.randn(batch, heads, n, 8, generator=rng) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    "config",
    [LastK(1, sinks=2, init="random"), LastK(3, sinks=4, per_head=True, init="random")],
    ids=str,
)
def test_module_is_its_mask_matrix(config: LastK) -> None:
    mechanism = build(config)
    q, k, v = text(9)
    matrix = mechanism.mask_matrix(9)  # [1 or H, 9, 9]
    assert mechanism.alpha.shape[-1] == 2 * config.window - 1
    scores = q @ k.repeat_interleave(2, dim=1).mT / 8**0.5
    expected = (scores + matrix.log()).softmax(-1) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_labels_follow_the_weights() -> None:
    mechanism = build(LastK(3, sinks=1))
    labels = mechanism.labels()
    assert labels["offsets"] == ["2 ahead", "1 ahead", "itself", "1 back", "2 back"]
    with torch.no_grad():
        mechanism.alpha.copy_(torch.arange(5.0))
        mechanism.sink_alpha.fill_(-torch.inf)
    weights = dict(zip(labels["offsets"], mechanism.coefficients()["offsets"], strict=True))
    matrix = mechanism.mask_matrix(6)[0]
    assert matrix[2, 4] == weights["2 ahead"] and matrix[4, 2] == weights["2 back"]
    assert matrix[1, 5] == matrix[5, 2] == matrix[3, 0] == 0
    torch.testing.assert_close(
        mechanism.l1_penalty(), torch.cat([*mechanism.coefficients().values()]).mean()
    )


EACH = [
    LastK(4, sinks=2, init="random"),
    Favor(num_features=16, seed=1),
    Favor(feature_map="taylor"),
]


@pytest.mark.parametrize("config", EACH, ids=str)
def test_padding_changes_nothing(config) -> None:
    mechanism = build(config)
    q, k, v = text(7, batch=1)
    alone = mechanism(q, k, v)
    for front, back in ((5, 0), (0, 5)):
        longer = [F.pad(x, (0, 0, front, back), value=3.0) for x in (q, k, v)]
        mask = F.pad(torch.ones(1, 7, dtype=torch.bool), (front, back))
        out = mechanism(*longer, key_mask=mask)[:, :, front : front + 7]
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", EACH, ids=str)
def test_first_token_sees_the_last(config) -> None:
    q, k, v = text(4)
    changed = v.clone()
    changed[:, :, -1] += 1
    for causal in (True, False):
        mechanism = build(config, causal=causal)
        moved = (mechanism(q, k, changed) - mechanism(q, k, v))[:, :, 0].abs().max()
        assert moved == 0 if causal else moved > 1e-3


def test_favor_hands_the_direction_on() -> None:
    mechanism = build(Favor(num_features=16))
    q, k, v = text(9)
    expected = favor_attention(q, k, v, mechanism.projection, causal=False)
    assert torch.equal(mechanism(q, k, v), expected)


def test_compiles_whole() -> None:
    mechanism = build(LastK(3, sinks=4, init="random"))
    compiled = torch.compile(mechanism, fullgraph=True, backend="aot_eager")
    mask = make_mask("left", 2, 9, torch.Generator())
    for key_mask in (None, mask):
        inputs = [x.requires_grad_() for x in text(9)]
        expected, out = (f(*inputs, key_mask=key_mask) for f in (mechanism, compiled))
        torch.testing.assert_close(out, expected)
        leaves = [*inputs, *mechanism.parameters()]
        upstream = torch.randn_like(out)
        grads = [torch.autograd.grad(o, leaves, upstream) for o in (out, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "config, message",
    [
        (NSA(), "NSA is causal, but this model attends in both directions; LastK, Linformer"),
        (Masks(), "Masks is causal, but this model attends in both directions"),
        (Favor(window=33), "window of Favor is causal.*leave the window out; got window=33"),
    ],
    ids=str,
)
def test_causal_mechanisms_refuse(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config)

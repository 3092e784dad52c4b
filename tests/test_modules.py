"""Mechanisms as modules, against masks written out entry by entry from their definition."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from attnopt.attention import Every, First, LastK, Masks, NthLast, Window, build_mechanism

HEADS, KV_HEADS, DIM = 4, 2, 8

CONFIGS = [
    LastK(1),
    LastK(5, init="random"),
    LastK(3, sinks=2, init="random"),
    LastK(4, sinks=3, per_head=True, init="random"),
    LastK(64, sinks=1, init="random"),
    Masks(init="random"),
    Masks([NthLast(3)], init="random"),
    Masks([First(2)], init="random"),
    Masks([First(2), First(5), Window(3)], init="random"),
    Masks([NthLast(2), Window(4), First(3), Window(6)], per_head=True, init="random"),
    Masks([Every()], init="random"),
    Masks([NthLast(2), Every(), First(3), Window(4)], init="random"),
    Masks([Every(), Window(3)], per_head=True, init="random"),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=str)


def build(config, seed=0):
    torch.manual_seed(seed)
    return build_mechanism(
        config,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        hidden_size=HEADS * DIM,
        layer_idx=0,
    )


def inputs(length, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(batch, h, length, DIM, generator=generator).to(dtype) for h in heads]


@dataclass(frozen=True)
class Token:
    """Candidate mask: the t-th real token alone, as a sink of LastK."""

    t: int


def terms(mechanism):
    """Candidate masks, their weights and the number of tokens that the band skips."""
    config, weights = mechanism.config, mechanism.coefficients()
    if isinstance(config, LastK):
        candidates = [NthLast(n) for n in range(config.window)]
        candidates += [Token(t) for t in range(config.sinks)]
        weights = torch.cat([*weights.values()], dim=-1)
        return candidates, weights, config.sinks
    counts = [c.count for c in config.candidates if isinstance(c, First)]
    return config.candidates, weights["masks"], max(counts, default=0)


def covers(candidate, i, j, start, sinks):
    """M_c[i, j] for real tokens: the first `sinks` of them belong to First and Token alone."""
    if j > i:
        return False
    if j < start + sinks:
        if isinstance(candidate, Token):
            return j == start + candidate.t
        return isinstance(candidate, First) and j < start + candidate.count
    if isinstance(candidate, NthLast):
        return i - j == candidate.n
    if isinstance(candidate, Window):
        return i - j < candidate.size
    return isinstance(candidate, Every)


def written_out(mechanism, mask):
    """m_ij as [B, H, N, N], float64, one candidate and one entry at a time."""
    candidates, weights, sinks = terms(mechanism)
    length = mask.shape[1]
    rows = []
    for real in mask.tolist():
        start = real.index(True) if any(real) else length
        entries = []
        for i in range(length):
            for j in range(length):
                total = torch.zeros(HEADS, dtype=torch.float64)
                for c, candidate in enumerate(candidates):
                    if real[j] and covers(candidate, i, j, start, sinks):
                        total = total + weights[..., c]
                entries.append(total)
        rows.append(torch.stack(entries, -1).reshape(HEADS, length, length))
    return torch.stack(rows)


def definition(q, k, v, m):
    """o_i = sum_j m_ij e^{s_ij} v_j / sum_j m_ij e^{s_ij}, zero where nothing is visible."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = q @ k.mT / DIM**0.5
    weight = m * torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    total = weight.sum(-1, keepdim=True)
    return (weight / total.masked_fill(total == 0, 1)) @ v


PADDINGS = {
    "none": [[1] * 11, [1] * 11],
    "left": [[0] * 4 + [1] * 7, [1] * 11],
    "right": [[1] * 6 + [0] * 5, [0] * 11],
}


@pytest.mark.parametrize("padding", PADDINGS)
@each_config
def test_follows_its_definition(config, padding):
    mechanism = build(config)
    mask = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    q, k, v = (x.requires_grad_() for x in inputs(mask.shape[1]))
    leaves = [q, k, v, *mechanism.parameters()]
    expected = definition(q, k, v, written_out(mechanism, mask))
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((expected * upstream).sum(), leaves)

    out = mechanism(q, k, v, key_mask=None if padding == "none" else mask)
    got = torch.autograd.grad((out * upstream).sum(), leaves)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=5e-5)


@each_config
def test_mask_matrix_is_the_definition(config):
    mechanism = build(config)
    matrix = mechanism.mask_matrix(9)
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert matrix.shape == (HEADS if config.per_head else 1, 9, 9)
    expected = written_out(mechanism, mask)[0].float().expand(HEADS, 9, 9)
    torch.testing.assert_close(matrix.expand(HEADS, 9, 9), expected, atol=1e-6, rtol=1e-6)


@each_config
def test_queries_are_the_last_positions(config):
    mechanism = build(config)
    mask = torch.tensor(PADDINGS["left"], dtype=torch.bool)
    q, k, v = inputs(mask.shape[1])
    whole = mechanism(q, k, v, key_mask=mask)
    for count in (1, 3):
        part = mechanism(q[:, :, -count:], k, v, key_mask=mask)
        torch.testing.assert_close(part, whole[:, :, -count:], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("config", [LastK(64), LastK(64, sinks=4), Masks([Every(), First(2)])])
def test_zero_init_is_softmax(config):
    q, k, v = inputs(40)
    out = build(config)(q, k, v, scale=0.7)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "config", [LastK(3, sinks=1), Masks([NthLast(0), First(1)]), Masks([Every(), First(1)])]
)
def test_weight_zero_gives_no_nan(config):
    mechanism = build(config)
    with torch.no_grad():
        for alpha in mechanism.parameters():
            alpha.fill_(-torch.inf)
    q, k, v = (x.requires_grad_() for x in inputs(7))
    out = mechanism(q, k, v)
    assert (out == 0).all()
    out.square().sum().backward()
    for tensor in (q, k, v, *mechanism.parameters()):
        assert (tensor.grad == 0).all()


def test_offset_without_a_candidate_has_weight_zero():
    mechanism = build(Masks([NthLast(2), First(1)]))
    weights = mechanism.log_weights()
    assert weights.band.exp().tolist() == [0.0, 0.0, 0.5]
    assert weights.sinks.exp().tolist() == [0.5]
    assert mechanism.mask_matrix(4)[0].tolist() == [
        [0.5, 0.0, 0.0, 0.0],
        [0.5, 0.0, 0.0, 0.0],
        [0.5, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
    ]


@each_config
def test_coefficients_have_labels_and_a_penalty(config):
    mechanism = build(config)
    coefficients, labels = mechanism.coefficients(), mechanism.labels()
    assert coefficients.keys() == labels.keys()
    for kind, values in coefficients.items():
        assert values.requires_grad
        assert values.shape[-1] == len(labels[kind]) == len(set(labels[kind]))
        assert values.ndim == 1 + config.per_head
    flat = torch.cat([c.flatten() for c in coefficients.values()])
    penalty = mechanism.l1_penalty()
    assert penalty.ndim == 0
    torch.testing.assert_close(penalty, flat.sum() / flat.numel())
    penalty.backward()
    assert all((p.grad > 0).all() for p in mechanism.parameters())


def test_labels_read_well():
    assert build(LastK(3, sinks=1)).labels() == {
        "offsets": ["itself", "1 back", "2 back"],
        "sinks": ["token 0"],
    }
    config = Masks([NthLast(0), NthLast(4), Window(8), First(2), Every()])
    assert build(config).labels()["masks"] == ["itself", "4 back", "last 8", "first 2", "every"]


@pytest.mark.parametrize("per_head", [False, True])
def test_initialization(per_head):
    zeros = build(LastK(6, sinks=2, per_head=per_head))
    assert all((p == 0).all() for p in zeros.parameters())
    config = LastK(6, sinks=2, per_head=per_head, init="random")
    one, same, other = build(config, seed=3), build(config, seed=3), build(config, seed=4)
    assert torch.equal(one.alpha, same.alpha) and torch.equal(one.sink_alpha, same.sink_alpha)
    assert not torch.equal(one.alpha, other.alpha)
    torch.manual_seed(9)
    one.reset_parameters(torch.Generator().manual_seed(5))
    other.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(one.alpha, other.alpha)
    alphas = torch.cat([build(LastK(500, init="random")).alpha for _ in range(2)])
    assert 0.9 < alphas.std() < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_keep_their_precision(dtype):
    mechanism = build(LastK(4, sinks=1, init="random"))
    before = mechanism.alpha.detach().clone()
    mechanism.to(dtype)
    assert mechanism.alpha.dtype == torch.float32 and torch.equal(mechanism.alpha, before)
    q, k, v = inputs(9, dtype=dtype)
    out = mechanism(q, k, v)
    assert out.dtype == dtype
    exact = mechanism(q.float(), k.float(), v.float())
    assert (out.float() - exact).abs().max() < 0.03
    assert mechanism.double().alpha.dtype == torch.float64


@pytest.mark.parametrize("config", [LastK(3), Masks([Every(), NthLast(1)])], ids=str)
def test_trains_under_autocast(config):
    mechanism = build(config)
    q, k, v = (x.requires_grad_() for x in inputs(9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mechanism(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert mechanism.alpha.grad.dtype == torch.float32
    assert mechanism.alpha.grad.abs().sum() > 0


def test_backend_is_handed_on(monkeypatch):
    asked = []
    import attnopt.attention.lastk.module as masks

    def record(*args, backend, **kwargs):
        asked.append(backend)
        return args[0]

    monkeypatch.setattr(masks, "lastk_attention", record)
    build(LastK(2, backend="eager"))(*inputs(3))
    build(Masks(backend="reference"))(*inputs(3))
    assert asked == ["eager", "reference"]


def test_refuses_what_is_no_config():
    with pytest.raises(ValueError, match="one of LastK, Masks, Favor, NSA, .*; got 'lastk'"):
        build("lastk")

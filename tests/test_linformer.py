"""Linformer against its definition, one slot and one token at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.attention import Linformer, build_mechanism, config_from_dict
from attnopt.attention.linformer.module import _sum_up

HEADS, KV_HEADS, DIM = 4, 2, 8
PADDINGS = {
    "none": None,
    "left": [[0] * 4 + [1] * 5, [1] * 9],
    "right": [[1] * 6 + [0] * 3, [1] * 2 + [0] * 7],
    "holes": [[0, 1, 0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 1, 0]],
    "empty": [[0] * 9, [1] * 9],
}


def build(slots: int = 4, length: int = 12, seed: int | None = 0, **shape):
    """A mechanism with random projections, or with its own start for seed None."""
    shape = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, causal=False) | shape
    mechanism = build_mechanism(
        Linformer(slots, length), hidden_size=HEADS * DIM, layer_idx=0, **shape
    )
    if seed is not None:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in mechanism.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
                parameter[1, 2:] = 0  # a slot that some texts do not reach
    return mechanism


def text(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(batch, h, length, DIM, generator=rng).to(dtype) for h in heads]


def definition(mechanism, q, k, v, mask, scale) -> Tensor:
    """The module's docstring in float64, one row, head and slot at a time."""
    E, F_ = (p.double() for p in (mechanism.key_projection, mechanism.value_projection))
    q, k, v = (x.double() for x in (q, k, v))
    out = []
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(HEADS)):
        real = mask[b].nonzero().flatten().tolist()
        if not real:
            out.append(torch.zeros_like(q[b, h]))
            continue
        place = [j - real[0] for j in real]  # of the real tokens
        keys, values, weights = [], [], []
        for c in range(E.shape[0]):
            w, u = (x[c, place].abs().sum() / x[c].abs().sum() for x in (E, F_))
            if w == 0:
                continue
            g = h // (HEADS // KV_HEADS)
            keys.append(sum(E[c, p] * k[b, g, j] for p, j in zip(place, real, strict=True)) / w)
            values.append(sum(F_[c, p] * v[b, g, j] for p, j in zip(place, real, strict=True)) / u)
            weights.append(w)
        scores = scale * q[b, h] @ torch.stack(keys).T
        probs = torch.stack(weights) * (scores - scores.amax(1, keepdim=True).detach()).exp()
        out.append(probs / probs.sum(1, keepdim=True) @ torch.stack(values))
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [9, 12])  # of texts; 9 is the length of the masks too
def test_follows_its_definition(length: int, padding: str) -> None:
    mechanism = build(length=length)
    rows = PADDINGS[padding]
    key_mask = None if rows is None else torch.tensor(rows, dtype=torch.bool)
    q, k, v = (x.requires_grad_() for x in text(9))
    mask = torch.ones(2, 9, dtype=torch.bool) if rows is None else key_mask
    expected = definition(mechanism, q, k, v, mask, 0.4)
    out = mechanism(q, k, v, key_mask=key_mask, scale=0.4)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    leaves = [q, k, v, *mechanism.parameters()]
    grads = [torch.autograd.grad((o * upstream).sum(), leaves) for o in (out, expected)]
    for ours, want in zip(*grads, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [12, 7])
def test_as_many_slots_as_tokens_start_as_softmax(length: int) -> None:
    mechanism = build(slots=12, seed=None)
    q, k, v = text(length)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-5, atol=1e-5)
    mask = torch.arange(length) >= torch.tensor([[0], [3]])
    expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
    out = mechanism(q, k, v, key_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_starts_as_means_of_neighbors() -> None:
    projection = build(slots=3, length=8, seed=None).key_projection
    assert torch.equal(projection, build(slots=3, length=8, seed=None).value_projection)
    expected = [[1 / 2] * 2 + [0] * 6, [0] * 2 + [1 / 3] * 3 + [0] * 3, [0] * 5 + [1 / 3] * 3]
    torch.testing.assert_close(projection.data, torch.tensor(expected))


def test_tokens_of_equal_runs_give_softmax_at_any_length() -> None:
    mechanism = build(slots=4, length=12, seed=None)  # runs of 3 tokens
    q, k, v = text(12)
    k, v = (x[:, :, ::3].repeat_interleave(3, dim=2) for x in (k, v))
    for length in (12, 7):
        parts = (x[:, :, :length] for x in (q, k, v))
        q_, k_, v_ = parts
        expected = F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=True)
        torch.testing.assert_close(mechanism(q_, k_, v_), expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing() -> None:
    mechanism = build()
    q, k, v = text(7, batch=1)
    alone = mechanism(q, k, v)
    for front, back in ((5, 0), (0, 5), (2, 3)):
        longer = [F.pad(x, (0, 0, front, back), value=torch.nan) for x in (k, v)]
        mask = F.pad(torch.ones(1, 7, dtype=torch.bool), (front, back))
        out = mechanism(F.pad(q, (0, 0, front, back)), *longer, key_mask=mask)
        torch.testing.assert_close(out[:, :, front : front + 7], alone, rtol=1e-5, atol=1e-5)


def test_packed_documents_are_documents_alone() -> None:
    mechanism = build()
    q, k, v = text(20, batch=1)
    ends = [0, 3, 15, 20]
    out = mechanism(q, k, v, cu_seqlens=torch.tensor(ends))
    for a, b in zip(ends, ends[1:], strict=False):
        alone = mechanism(*(x[:, :, a:b] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, a:b], alone, rtol=1e-5, atol=1e-5)


def test_compiles_whole_with_autocast() -> None:
    mechanism = build()
    inputs = [x.requires_grad_() for x in text(9)]
    compiled = torch.compile(mechanism, fullgraph=True, backend="aot_eager")
    for rows in (None, PADDINGS["left"]):
        mask = None if rows is None else torch.tensor(rows, dtype=torch.bool)
        expected, out = (f(*inputs, key_mask=mask) for f in (mechanism, compiled))
        torch.testing.assert_close(out, expected)
        leaves = [*inputs, *mechanism.parameters()]
        upstream = torch.randn_like(out)
        grads = [torch.autograd.grad(o, leaves, upstream) for o in (out, expected)]
        torch.testing.assert_close(*grads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = mechanism(*inputs, key_mask=mask)
        assert rounded.dtype == torch.bfloat16
        # keys are sums of 12 tokens with weights of about 1, so that scores are of the order of 10
        torch.testing.assert_close(rounded.float(), expected, rtol=0.2, atol=0.2)
        rounded.float().sum().backward()
    assert mechanism.key_projection.grad.dtype == torch.float32


def test_text_without_a_real_token_hides_nothing() -> None:
    """Not left to the softmax: implementations differ on rows in which all is hidden."""
    slots, log_weights = _sum_up(
        build().key_projection, text(9)[1], torch.tensor(PADDINGS["empty"], dtype=torch.bool)
    )
    assert (slots[0] == 0).all() and (log_weights[0] == 0).all()
    assert (log_weights[1] < 0).any()


def test_refuses() -> None:
    with pytest.raises(ValueError, match="texts of up to 12 tokens .max_length.; got 13"):
        build()(*text(13))
    with pytest.raises(ValueError, match="Linformer lets every token see all others.*is causal"):
        build(causal=True)
    with pytest.raises(ValueError, match="projected_length must be at most max_length, 8; got 9"):
        Linformer(9, 8)
    with pytest.raises(ValueError, match="max_length must be an integer >= 1; got 0"):
        Linformer(1, 0)


def test_config_travels() -> None:
    config = Linformer(4, 12)
    assert config_from_dict(config.to_dict()) == config
    assert build().coefficients() == {} and build().l1_penalty() == 0

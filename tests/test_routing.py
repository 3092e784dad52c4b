"""Routing attention against masked softmax, its centroids, and converted models that decode."""

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import BACKENDS, launching, make_mask
from generation import STARTS, assert_equal, decode, prompts
from small_gpt2 import tiny, tokens
from small_llama import tiny_llama
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnopt
from attnopt.attention import LastK, Routing, build_mechanism, config_from_dict
from attnopt.attention.routing import attention as routing
from attnopt.attention.routing.attention import routing_attention
from attnopt.attention.routing.gauge import ROUNDS, SAMPLE

HEADS, KV_HEADS, DIM = 4, 2, 8
SOME = Routing(4, 3)


def build(config=SOME, seed=0, training=False, **shape):
    torch.manual_seed(seed)
    shape = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM) | shape
    mechanism = build_mechanism(config, hidden_size=HEADS * DIM, layer_idx=0, **shape)
    return mechanism.train(training)


def text(length, batch=2, queries=None, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, queries or length), (KV_HEADS, length), (KV_HEADS, length))
    made = [torch.randn(batch, h, n, DIM, generator=rng, dtype=torch.float64) for h, n in sizes]
    return [x.to(dtype).requires_grad_() for x in made]


def clusters(length, count, batch=2, queries=None, seed=1):
    rng = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, queries or length), (KV_HEADS, length))
    return [torch.randint(count, (batch, h, n), generator=rng) for h, n in sizes]


def definition(q, k, v, query_clusters, key_clusters, *, window, key_mask=None):
    """Softmax under the mask of what a query sees, padding its window; zero where that is none."""
    groups, (queries, keys) = HEADS // KV_HEADS, (q.shape[2], k.shape[2])
    k, v, key_clusters = (x.repeat_interleave(groups, 1) for x in (k, v, key_clusters))
    j = torch.arange(keys)
    i = j[keys - queries :, None]
    same = query_clusters[..., None] == key_clusters[:, :, None]
    seen = ((i - j < window) | same) & (j <= i)
    if key_mask is not None:
        same = same & key_mask[:, None, keys - queries :, None]
        seen = ((i - j < window) | same) & (j <= i) & key_mask[:, None, None]
    nothing = ~seen.any(-1, keepdim=True)
    scores = (q @ k.mT / DIM**0.5).masked_fill(~seen & ~nothing, -torch.inf)
    return (scores.softmax(-1) @ v).masked_fill(nothing, 0)


def with_gradients(function, inputs):
    """Output and gradients."""
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


CASES = [
    dict(length=1, count=1),
    dict(length=9, count=1, window=4),
    dict(length=50, count=5, window=7, mask="left"),
    dict(length=50, count=3, queries=20, mask="holes"),
    dict(length=300, count=2, window=40, mask="right"),  # three tiles, two clusters in one
    dict(length=300, count=100, window=500),
    dict(length=140, count=9, mask="empty-row"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_follows_its_definition(case):
    case = {"window": 1, "queries": None, "mask": "none"} | case
    length, queries = case["length"], case["queries"]
    inputs = text(length, queries=queries, dtype=torch.float64)
    ids = clusters(length, case["count"], queries=queries)
    mask = make_mask(case["mask"], 2, length, torch.Generator().manual_seed(3))
    options = {"window": case["window"], "key_mask": mask}
    found, expected = (
        with_gradients(lambda *x, f=f: f(*x, *ids, **options), inputs)
        for f in (routing_attention, definition)
    )
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_band_on_every_backend(backend):
    inputs, ids = text(40), clusters(40, 3)
    mask = torch.arange(40) >= torch.tensor([[0], [7]])
    want = with_gradients(
        lambda *x: definition(*x, *ids, window=5, key_mask=mask),
        [x.detach().double().requires_grad_() for x in inputs],
    )  # fmt: skip
    with launching(backend):
        found = with_gradients(
            lambda *x: routing_attention(*x, *ids, window=5, key_mask=mask, backend=backend),
            inputs,
        )  # fmt: skip
    for ours, exact in zip(found, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_operators_keep_their_contract():
    arguments = (*text(20), *clusters(20, 3), None, 4, 0.3, "eager")
    torch.library.opcheck(torch.ops.attnopt.routing_forward.default, arguments)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, lse = torch.ops.attnopt.routing_forward(*plain)
    arguments = (torch.randn_like(out), *plain[:6], out, lse, *plain[6:])
    torch.library.opcheck(torch.ops.attnopt.routing_backward.default, arguments)


def lengths_of_tiles(monkeypatch):
    """A list to which every tile adds the number of keys that it meets."""
    met = []
    tile = routing._Far.tile

    def watched(self, rows, length):
        met.append(length)
        return tile(self, rows, length)

    monkeypatch.setattr(routing._Far, "tile", watched)
    return met


def test_memory_is_linear(monkeypatch):
    """No tile holds more than its own queries against the clusters that they are of."""
    met = lengths_of_tiles(monkeypatch)
    length, count = 2048, 16
    ids = [(torch.arange(length) % count).expand(1, h, -1) for h in (HEADS, KV_HEADS)]
    inputs = text(length, batch=1)
    routing_attention(*inputs, *ids, window=8)
    assert len(met) == length // routing.TILE and max(met) <= routing.TILE
    met.clear()
    routing_attention(*inputs, *ids, window=length)
    assert not met


@pytest.mark.parametrize("config", [Routing(1, 2), Routing(7, 40), Routing(7, 10**12)], ids=str)
def test_one_cluster_or_a_wide_window_is_softmax(config):
    inputs = text(40)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.7, enable_gqa=True)
    out = build(config)(*inputs, scale=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_clusters_are_the_nearest_centroids():
    mechanism = build(Routing(5, 1))
    q, k, v = text(9)
    of_queries, of_keys = mechanism.route(q, k, None)
    assert 1 < len(of_queries.unique()) <= 5
    for x, ids in ((q, of_queries), (k, of_keys)):
        for b, h, n in ((0, 0, 0), (1, 1, 3), (0, x.shape[1] - 1, 8)):
            point = F.layer_norm(x[b, h, n], (DIM,))
            centroids = mechanism.centroids[h // (x.shape[1] // KV_HEADS)]
            assert ids[b, h, n] == (centroids - point / DIM**0.5).square().sum(-1).argmin()
    expected = definition(q, k, v, of_queries, of_keys, window=1)
    torch.testing.assert_close(mechanism(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_later_tokens_change_nothing():
    mechanism = build(Routing(3, 4)).double()
    inputs = text(300, dtype=torch.float64)
    changed = [torch.cat([x[:, :, :170], 5 * x[:, :, 170:].flip(2)], 2) for x in inputs]
    out, other = mechanism(*inputs), mechanism(*changed)
    torch.testing.assert_close(out[:, :, :170], other[:, :, :170], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(out[:, :, 170:], other[:, :, 170:])


def test_packed_documents_are_documents_alone(monkeypatch):
    met = lengths_of_tiles(monkeypatch)
    mechanism = build(Routing(3, 2))
    q, k, v = text(30, batch=1)
    ends = [0, 3, 20, 30]
    for options in ({}, {"max_seqlen": 200}):
        out = mechanism(q, k, v, cu_seqlens=torch.tensor(ends), **options)
        for a, b in zip(ends, ends[1:], strict=False):
            alone = mechanism(*(x[:, :, a:b] for x in (q, k, v)))
            torch.testing.assert_close(out[:, :, a:b], alone, rtol=1e-5, atol=1e-5)
    assert max(met) < 20  # rows of 200 are padding for the most part, which costs nothing


def test_training_moves_the_centroids():
    mechanism = build(Routing(3, 2, decay=0.9), training=True)
    before = mechanism.centroids.clone()
    q, k, v = text(12)
    mask = torch.arange(12) >= torch.tensor([[0], [5]])
    ids = build(Routing(3, 2, decay=0.9)).route(q, k, mask)
    mechanism(q, k, v, key_mask=mask)
    assert torch.equal(mechanism.centroids, before)  # of this pass
    assert ids[1].unique().numel() == 3
    for h in range(KV_HEADS):
        for c in range(3):
            points = k[:, h][(ids[1][:, h] == c) & mask]
            points = F.normalize(F.layer_norm(points, (DIM,), eps=1e-12), dim=-1)
            moved = F.normalize(0.9 * before[h, c] + 0.1 * points.mean(0), dim=-1)
            torch.testing.assert_close(mechanism.next_centroids[h, c], moved)
    mechanism(q, k, v, key_mask=mask)
    assert not torch.equal(mechanism.centroids, before)
    buffers = {name: x.clone() for name, x in mechanism.named_buffers()}
    mechanism.eval()(q, k, v)
    assert all(torch.equal(x, buffers[name]) for name, x in mechanism.named_buffers())


def test_empty_clusters_stay():
    mechanism = build(Routing(50, 2), training=True)
    before = mechanism.centroids.clone()
    q, k, v = text(3, batch=1)
    ids = mechanism.route(q, k, None)[1][0]
    still = build(Routing(50, 2, decay=1), training=True)
    still.route(q, k, None)
    torch.testing.assert_close(still.next_centroids, before)
    for h in range(KV_HEADS):
        stayed = (mechanism.next_centroids[h] == before[h]).all(1)
        assert set((~stayed).nonzero().flatten().tolist()) == set(ids[h].tolist())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    results = []
    for checkpointed in (False, True):
        mechanism = build(Routing(4, 2, decay=0.05), training=True)
        for step in range(3):
            inputs = text(20, seed=step)
            out = (
                checkpoint(mechanism, *inputs, use_reentrant=reentrant)
                if checkpointed
                else mechanism(*inputs)
            )
            out.square().sum().backward()
        results.append([out, *(x.grad for x in inputs), *mechanism.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    plain, twin = (build(Routing(4, 3), training=training) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    mask = torch.arange(20) >= torch.tensor([[0], [4]])
    for _ in range(2):
        calls = [lambda *x, m=m: m(*x, key_mask=mask) for m in (plain, compiled)]
        results = [with_gradients(call, text(20)) for call in calls]
        torch.testing.assert_close(*results)
    torch.testing.assert_close(plain.state_dict(), twin.state_dict())


def test_autocast_routes_in_full_precision():
    mechanism = build(Routing(4, 3))
    q, k, v = text(200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mechanism(q, k, v)
        ids = mechanism.route(q, k, None)
    assert out.dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(ids, mechanism.route(q, k, None), strict=True))
    torch.testing.assert_close(out.float(), mechanism(q, k, v), rtol=0.02, atol=0.02)
    assert mechanism.to(torch.bfloat16).centroids.dtype == torch.float32


CONFIGS = {
    "all": SOME,
    "mixed": {0: Routing(3, 1), 2: LastK(4, sinks=2, init="random")},
}
MAKERS = {"gpt2": lambda: tiny(n_positions=256, pad_token_id=0), "llama": tiny_llama}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", MAKERS)
def test_decoding(kind, name):
    torch.manual_seed(0)
    model, inputs = attnopt.convert(MAKERS[kind](), CONFIGS[name]), prompts()
    expected = decode(model, inputs, use_cache=False)
    together = decode(model, inputs)
    assert_equal(together, expected)
    for row, start in enumerate(STARTS):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert_equal(decode(model, alone), [x[row : row + 1] for x in together])


def test_models_with_it_travel(tmp_path):
    torch.manual_seed(0)
    model = attnopt.convert(tiny(), Routing(4, 3, decay=0.5))
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in model.transformer.h[0].attn.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = attnopt.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    for index, mechanism in attnopt.mechanisms(model).items():
        theirs = attnopt.mechanisms(loaded)[index].next_centroids
        assert torch.equal(theirs, mechanism.next_centroids)
        assert not torch.equal(theirs, mechanism.centroids)


def test_start_is_random_and_repeatable():
    one, same, other = build(seed=3), build(seed=3), build(seed=4)
    assert torch.equal(one.centroids, same.centroids)
    assert not torch.equal(one.centroids, other.centroids)
    assert torch.equal(one.centroids, one.next_centroids)
    torch.testing.assert_close(one.centroids.norm(dim=-1), torch.ones(KV_HEADS, 4))


def lloyd(points, count, rounds):
    """Spherical k-means of unit vectors, one vector at a time."""
    centroids = [points[c * len(points) // count] for c in range(count)]
    for _ in range(rounds):
        members = [[] for _ in range(count)]
        for point in points:
            members[max(range(count), key=lambda c: float(centroids[c] @ point))].append(point)
        centroids = [
            F.normalize(torch.stack(mine).sum(0), dim=0) if mine else old
            for mine, old in zip(members, centroids, strict=True)
        ]
    return torch.stack(centroids)


def test_calibration_is_k_means_of_the_real_keys():
    model, seen = attnopt.convert(tiny(), {1: Routing(3, 2)}), []
    ids, mask = tokens(3), torch.arange(24) >= torch.tensor([[0], [9], [4]])
    dense = tiny().transformer
    dense.h[1].attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    dense(ids, attention_mask=mask, position_ids=positions)
    keys = seen[0].detach().chunk(3, -1)[1].unflatten(-1, (4, 8))  # [B, N, H, D]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    found = attnopt.calibrate(model, [inputs, inputs])
    for h in range(4):
        points = F.normalize(F.layer_norm(keys[:, :, h][mask], (8,), eps=1e-12), dim=-1)
        expected = lloyd(points.repeat(2, 1), 3, ROUNDS)
        torch.testing.assert_close(found[1][h], expected, rtol=1e-4, atol=1e-5)
    mechanism = attnopt.mechanisms(model)[1]
    assert torch.equal(mechanism.next_centroids, found[1])
    again = attnopt.calibrate(model, [inputs, inputs])
    assert torch.equal(again[1], found[1])


def test_calibration_takes_a_sample_and_needs_as_many_keys_as_clusters():
    mechanism = build(Routing(5, 2))
    before = mechanism.centroids.clone()
    mask = torch.ones(2, 2, dtype=torch.bool)
    gauge = mechanism.make_gauge()
    gauge.add(*text(2), mask, 1.0, None)
    assert gauge.finish() is None and torch.equal(mechanism.centroids, before)
    gauge.add(*text(3000), torch.ones(2, 3000, dtype=torch.bool), 1.0, None)
    assert SAMPLE * 5 <= gauge.sampled[1].shape[1] < SAMPLE * 6
    assert gauge.finish() is not None
    gauge = mechanism.make_gauge()  # of keys that are all one: four clusters stay without any
    same = (x[:, :, :1].expand(-1, -1, 9, -1) for x in text(9, batch=1))
    gauge.add(*same, torch.ones(1, 9, dtype=torch.bool), 1.0, None)
    torch.testing.assert_close(gauge.finish().norm(dim=-1), torch.ones(KV_HEADS, 5))


def test_refuses():
    q, k, v = text(9)
    ids = clusters(9, 3)
    with pytest.raises(ValueError, match=r"key_clusters must be int64 \[2, 2, 9\]; got .* 8\]"):
        routing_attention(q, k, v, ids[0], ids[1][:, :, 1:], window=1)
    with pytest.raises(ValueError, match="query_clusters must be int64.*got torch.int32"):
        routing_attention(q, k, v, ids[0].int(), ids[1], window=1)
    with pytest.raises(ValueError, match="Routing is causal, but"):
        build(causal=False)
    for fields, message in (
        ({"num_clusters": 0}, "num_clusters must be an integer >= 1; got 0"),
        ({"window": 0}, "window must be an integer >= 1; got 0"),
        ({"decay": 1.1}, r"decay must be a number in \(0, 1\]; got 1.1"),
        ({"decay": "0.9"}, r"decay must be a number in \(0, 1\]; got '0.9'"),
        ({"backend": "reference"}, "backend must be one of auto, triton, eager; got 'reference'"),
    ):
        with pytest.raises(ValueError, match=message):
            Routing(**fields)
    config = Routing(3, 4, 0.5)
    assert config_from_dict(config.to_dict()) == config

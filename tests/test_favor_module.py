"""FAVOR+ as a module and in a model: initialization, redrawing, conversion, disk."""

import copy

import pytest
import torch
from small_gpt2 import LENGTH, VOCABULARY, tiny, tokens

import attnopt.attention.favor.module as favor
from attnopt import Favor, LastK, convert, from_pretrained, mechanisms, redraw
from attnopt.attention import build_mechanism
from attnopt.kernels.favor.reference import favor_reference

HEADS, KV_HEADS, DIM = 4, 2, 8

CONFIGS = {
    "favor": Favor(24),
    "favor-window": Favor(24, window=5, window_block=4),
    "constant": Favor(12, window=3, window_block=2, norms="constant", gate=True),
    "learned": Favor(10, learned=True, stabilizer="static"),
    "hedgehog": Favor(feature_map="hedgehog", window=4, window_block=3),
    "exp": Favor(20, feature_map="exp", window=2, window_block=4),
    "relu": Favor(20, feature_map="relu"),
    "taylor": Favor(feature_map="taylor", window=4, window_block=1),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
MIXED = {0: CONFIGS["hedgehog"], 1: Favor(16, window=3, window_block=2), 2: LastK(3)}


def build(config, seed=0, layer_idx=0, head_dim=DIM):
    torch.manual_seed(seed)
    return build_mechanism(
        config,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        hidden_size=HEADS * head_dim,
        layer_idx=layer_idx,
    )


def inputs(length, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(batch, h, length, DIM, generator=generator).to(dtype) for h in heads]


# --- the module -------------------------------------------------------------------------------


@each_config
def test_attends_as_its_config_says(name):
    config = CONFIGS[name]
    mechanism = build(config)
    if mechanism.log_gate is not None:
        torch.nn.init.normal_(mechanism.log_gate)
    mask = torch.tensor([[0] * 4 + [1] * 13, [1] * 17], dtype=torch.bool)
    q, k, v = (x.requires_grad_() for x in inputs(17))
    leaves = [q, k, v, *mechanism.parameters()]
    expected = favor_reference(
        q,
        k,
        v,
        mechanism.projection,
        feature_map=config.feature_map,
        window=config.window,
        window_block=config.window_block,
        log_gate=mechanism.log_gate,
        key_mask=mask,
        scale=0.4,
    )
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((expected * upstream).sum(), leaves)
    out = mechanism(q, k, v, key_mask=mask, scale=0.4)
    got = torch.autograd.grad((out * upstream).sum(), leaves)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@each_config
def test_states_continue(name):
    mechanism = build(CONFIGS[name])
    q, k, v = inputs(15)
    whole, end = mechanism(q, k, v, return_state=True)
    first, state = mechanism(q[:, :, :9], k[:, :, :9], v[:, :, :9], return_state=True)
    rest = (x[:, :, 9:] for x in (q, k, v))
    second, last = mechanism(*rest, initial_state=state, return_state=True)
    ours = torch.cat([first, second], 2)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    scaled = [s.z * s.log_scale.exp() for s in (last, end)]
    torch.testing.assert_close(*scaled, atol=1e-4, rtol=1e-4)


def test_options_are_handed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(favor, "favor_attention", lambda q, *_, **kw: asked.append(kw) or q)
    build(Favor(window=3, window_block=7, stabilizer="static", backend="eager"))(*inputs(3))
    build(Favor(feature_map="hedgehog", window=1, backend="reference"))(*inputs(3))
    picked = ("feature_map", "window", "window_block", "stabilizer", "backend")
    assert [tuple(kw[name] for name in picked) for kw in asked] == [
        ("favor", 3, 7, "static", "eager"),
        ("hedgehog", 1, 32, "running", "reference"),
    ]
    assert asked[0]["log_gate"] is None and asked[1]["log_gate"].shape == (HEADS,)


@each_config
def test_what_is_learned_and_what_is_kept(name):
    config = CONFIGS[name]
    mechanism = build(config)
    learned = {n for n, _ in mechanism.named_parameters()}
    kept = {n for n, _ in mechanism.named_buffers()}
    rows = set() if config.feature_map == "taylor" else {"projection"}
    assert learned == (rows if config.learned else set()) | ({"log_gate"} if config.gate else set())
    assert kept == rows - learned
    assert set(mechanism.state_dict()) == learned | kept
    count = config.num_features or 2 * DIM
    for tensor in mechanism.state_dict().values():
        assert tensor.dtype == torch.float32
        assert tensor.shape in ((HEADS,), (HEADS, count, DIM))


@each_config
def test_has_no_coefficients(name):
    mechanism = build(CONFIGS[name])
    assert mechanism.coefficients() == mechanism.labels() == {}
    assert mechanism.mask_matrix(5) is None
    assert mechanism.l1_penalty() == 0 and mechanism.l1_penalty().shape == ()


def test_initialization():
    def rows(config, **options):
        return build(config, **options).projection

    norms = rows(Favor(2 * DIM, norms="constant")).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, DIM**0.5))
    assert rows(Favor(2 * DIM)).norm(dim=-1).std() > 0.3
    assert torch.equal(rows(Favor(8), seed=1), rows(Favor(8), seed=1))
    assert not torch.equal(rows(Favor(8), seed=1), rows(Favor(8), seed=2))
    seeded = Favor(8, seed=3)
    assert torch.equal(rows(seeded, seed=1), rows(seeded, seed=2))
    assert not torch.equal(rows(seeded), rows(seeded, layer_idx=1))
    assert not torch.equal(rows(seeded), rows(Favor(8, seed=4)))
    assert not torch.equal(rows(Favor(8))[0], rows(Favor(8))[1])
    one, other = build(seeded), build(Favor(8))
    for mechanism in (one, other):
        mechanism.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(one.projection, other.projection)


def test_hedgehog_starts_from_the_identity():
    eye = torch.eye(DIM)
    assert torch.equal(build(Favor(feature_map="hedgehog")).projection[1], torch.cat([eye, -eye]))
    assert build(Favor(6, feature_map="hedgehog")).projection.shape == (HEADS, 6, DIM)


@pytest.mark.parametrize("feature_map", ["favor", "hedgehog", "exp", "taylor"])
def test_gates_start_where_tokens_of_norm_zero_weigh_alike(feature_map):
    """With all scores 0 the far tokens should weigh what the near ones do: the plain mean."""
    mechanism = build(Favor(feature_map=feature_map, window=2, window_block=2, gate=True))
    q, k, v = inputs(9)
    out = mechanism(0 * q, 0 * k, v)
    mean = v.cumsum(2) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(out, mean.repeat_interleave(HEADS // KV_HEADS, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_keep_their_precision(dtype):
    mechanism = build(CONFIGS["constant"])
    before = mechanism.projection.clone()
    mechanism.to(dtype)
    assert torch.equal(mechanism.projection, before) and mechanism.log_gate.dtype == torch.float32
    q, k, v = inputs(9, dtype=dtype)
    out = mechanism(q, k, v)
    assert out.dtype == dtype
    exact = mechanism(q.float(), k.float(), v.float())
    assert (out.float() - exact).abs().max() < 0.03
    assert mechanism.double().projection.dtype == torch.float64


# --- redrawing --------------------------------------------------------------------------------


def test_redraw_changes_random_features_alone():
    configs = {0: Favor(8, window=2), 1: Favor(8, learned=True), 2: Favor(8, seed=3)}
    model = convert(tiny(), configs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    storage = mechanisms(model)[0].projection.data_ptr()
    redraw(model)
    state = model.state_dict()
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"transformer.h.{i}.attn.attnopt.projection" for i in (0, 2)}
    assert mechanisms(model)[0].projection.data_ptr() == storage
    draws = []
    for _ in range(2):
        redraw(torch.nn.Sequential(model), torch.Generator().manual_seed(1))
        draws.append([mechanisms(model)[i].projection.clone() for i in (0, 2)])
    assert all(map(torch.equal, *draws)) and not torch.equal(*draws[0])
    redraw(model)
    assert not torch.equal(mechanisms(model)[2].projection, draws[0][1])


def test_redraw_keeps_the_norms():
    mechanism = build(Favor(2 * DIM, norms="constant"))
    mechanism.redraw()
    assert (mechanism.projection.norm(dim=-1) - DIM**0.5).abs().max() < 1e-5


def test_redraw_refuses_what_is_not_random():
    with pytest.raises(ValueError, match="no layer has random features"):
        redraw(convert(tiny(), {0: Favor(8, learned=True), 1: LastK(2)}))
    for name, message in (("learned", "is learned"), ("taylor", "does not exist")):
        with pytest.raises(ValueError, match=message):
            build(CONFIGS[name]).redraw()


# --- in a model -------------------------------------------------------------------------------

WIDE = [
    Favor(8, window=LENGTH),
    Favor(8, window=1000, window_block=128, norms="constant"),
    Favor(feature_map="hedgehog", window=LENGTH, window_block=5),
    Favor(feature_map="taylor", window=LENGTH + 1, window_block=1),
    Favor(8, feature_map="relu", window=LENGTH),
    Favor(8, feature_map="exp", window=1, window_block=LENGTH),
]


@pytest.mark.parametrize("config", WIDE, ids=str)
def test_wide_windows_leave_the_logits(config):
    model, x = tiny(), tokens()
    before = model(x).logits
    assert (convert(model, config)(x).logits - before).abs().max() <= 1e-5


def test_many_features_come_close_to_softmax():
    """Unbiased features of many rows approach softmax, and a window is closer than none."""
    model, x = tiny(initializer_range=0.1), tokens()
    before = model(x).logits

    def error(config):
        return (convert(copy.deepcopy(model), config)(x).logits - before).norm().item()

    errors = [error(Favor(m, seed=0)) for m in (8, 512)]
    windowed = error(Favor(8, seed=0, window=8, window_block=1))
    assert errors[1] < errors[0] / 3 and windowed < errors[0] / 2


@pytest.mark.parametrize("name", [*CONFIGS, "mixed"])
def test_padding_changes_nothing(name):
    model = convert(tiny(), CONFIGS.get(name, MIXED))
    x, real = tokens(3), [LENGTH, 15, 1]
    left, right = torch.zeros_like(x), torch.zeros_like(x)
    for row, count in enumerate(real):
        left[row, LENGTH - count :] = right[row, :count] = 1
    rolled = torch.stack([r.roll(LENGTH - n) for r, n in zip(x, real, strict=True)])
    for ids, mask in ((rolled, left), (x, right)):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, count in enumerate(real):
            alone = model(x[row : row + 1, :count]).logits[0]
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, atol=3e-5, rtol=1e-5)


@each_config
def test_no_token_sees_the_future(name):
    """Bit for bit with the static stabilizer; with the running one but for rounding."""
    config = CONFIGS[name]
    model, x = convert(tiny(), config), tokens(1)
    with torch.no_grad():
        before = model(x).logits
        for t in (0, 7, LENGTH - 2):
            changed = x.clone()
            changed[:, t + 1 :] = VOCABULARY - 1 - changed[:, t + 1 :]
            after = model(changed).logits
            past, then = after[:, : t + 1], before[:, : t + 1]
            if config.stabilizer == "static":
                assert torch.equal(past, then)
            torch.testing.assert_close(past, then, atol=2e-5, rtol=1e-5)
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_compiles_into_one_graph():
    model, x = convert(tiny(), MIXED), tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x, attention_mask=mask).logits[mask == 1].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_gradients_reach_features_and_gates():
    model, x = convert(tiny(), {0: CONFIGS["hedgehog"], 1: Favor(8, learned=True)}), tokens()
    model(x, labels=x).loss.backward()
    for mechanism in mechanisms(model).values():
        assert all(p.grad.abs().sum() > 0 for p in mechanism.parameters())


# --- on disk ----------------------------------------------------------------------------------


def assert_same_features(ours, theirs):
    for index, mechanism in mechanisms(theirs).items():
        state = mechanisms(ours)[index].state_dict()
        assert state.keys() == mechanism.state_dict().keys()
        for name, tensor in mechanism.state_dict().items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


@pytest.mark.parametrize("name", [*CONFIGS, "mixed"])
def test_saves_and_loads(name, tmp_path):
    model, x = convert(tiny(), CONFIGS.get(name, MIXED)), tokens()
    for mechanism in mechanisms(model).values():
        if getattr(mechanism, "log_gate", None) is not None:
            torch.nn.init.normal_(mechanism.log_gate)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # nothing may be drawn anew
    random = torch.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.config for m in mechanisms(loaded).values()] == [
        m.config for m in mechanisms(model).values()
    ]
    assert_same_features(loaded, model)
    assert torch.equal(loaded(x).logits, model(x).logits)
    rounded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert_same_features(rounded, model)
    assert torch.equal(rounded(x).logits, copy.deepcopy(model).to(torch.bfloat16)(x).logits)


def test_missing_features_are_drawn(tmp_path):
    configs = {0: Favor(8), 1: Favor(8, seed=4), 2: CONFIGS["hedgehog"]}
    model = convert(tiny(), configs)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "attnopt" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(5)
    loaded = mechanisms(from_pretrained(tmp_path))
    expected = build(configs[0], seed=5).projection
    assert torch.equal(loaded[0].projection, expected)
    own = mechanisms(model)
    assert torch.equal(loaded[1].projection, own[1].projection)
    assert torch.equal(loaded[2].projection, own[2].projection)
    assert torch.equal(loaded[2].log_gate, own[2].log_gate)

"""NSA as a module and in a model: compressors, gates, identities, conversion, disk."""

import copy
import re

import pytest
import torch
from small_gpt2 import LENGTH, VOCABULARY, tiny, tokens
from small_llama import tiny_llama

import attnopt.attention.nsa.module as nsa
from attnopt import NSA, LastK, convert, from_pretrained, mechanisms
from attnopt.attention import build_mechanism
from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.reference import nsa_reference
from attnopt.trainer import DistillationTrainer

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 32

CONFIGS = {
    "merged": NSA(select_block=4, num_selected=2, window=3),
    "merged-sink": NSA(select_block=4, num_selected=1, window=6, sink_blocks=1),
    "merged-weighted": NSA(select_block=3, num_selected=2, window=1, compression="weighted"),
    "merged-mlp": NSA(select_block=4, num_selected=0, window=5, compression="mlp"),
    "gates": NSA("gates", select_block=4, window=5),
    "gates-weighted": NSA("gates", 8, 4, 2, 3, 4, 1, 1, "weighted"),
    "gates-mlp": NSA("gates", 4, 5, 3, 2, 3, 0, 0, "mlp"),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
MIXED = {0: CONFIGS["gates-mlp"], 1: CONFIGS["merged-weighted"], 2: LastK(3)}
MASK = torch.tensor([[0] * 5 + [1] * 18, [1] * 23, [0] * 2 + [1] * 3 + [0] * 10 + [1] * 8]).bool()


def build(config, seed=0, learned=True):
    """A mechanism with grouped heads, its parameters not where they start if `learned`."""
    torch.manual_seed(seed)
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "hidden_size": WIDTH}
    mechanism = build_mechanism(config, layer_idx=0, **shape)
    return train(mechanism) if learned else mechanism


def train(module, seed=1):
    """Move every parameter of the mechanisms in a module as training would."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if re.search("compressor|gate", name):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return module


def inputs(length=23, batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, length, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    shapes.append((batch, length, WIDTH))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_definition(mechanism, q, k, v, hidden, mask, scale):
    config, kept = mechanism.config, ("mechanism", "compression", "regime", "backend")
    options = {name: x for name, x in config.to_dict().items() if name not in kept}
    gates = None
    if config.gate:
        logits = hidden @ mechanism.gate.weight.T + mechanism.gate.bias
        gates = torch.stack([x.sigmoid() for x in logits.split(3, -1)], 1)
    keys, values = (
        compress(compressor, x, mask)
        for compressor, x in ((mechanism.key_compressor, k), (mechanism.value_compressor, v))
    )
    return nsa_reference(q, k, v, keys, values, gates=gates, key_mask=mask, scale=scale, **options)


def compress(compressor, x, mask):
    """One block at a time, from the definition."""
    named = dict(compressor.named_parameters())
    batch, heads, length, _ = x.shape
    block, stride = compressor.block, compressor.stride
    out = []
    for c in range(max(0, (length - block) // stride + 1)):
        for row in range(batch):
            first = int(mask[row].int().argmax()) + c * stride
            columns = range(first, min(first + block, length))
            real = [t for t in columns if mask[row, t]]
            for h in range(heads):
                if not real:
                    out.append(torch.zeros_like(x[0, 0, 0]))
                    continue
                place = [t - first for t in real]
                pooled = x[row, h, real].mean(0)
                if "position_logits" in named:
                    weights = named["position_logits"][h, place].softmax(0)
                    pooled = weights @ (x[row, h, real] + named["position_embedding"][h, place])
                elif named:
                    whole = torch.zeros(block, x.shape[3], dtype=x.dtype)
                    whole[place] = x[row, h, real] + named["position_embedding"][h, place]
                    hidden = named["first.weight"] @ whole.flatten() + named["first.bias"]
                    hidden = torch.nn.functional.gelu(hidden)
                    pooled = pooled + named["second.weight"] @ hidden + named["second.bias"]
                out.append(pooled)
    if not out:
        return x[:, :, :0]
    return torch.stack(out).view(-1, batch, heads, x.shape[3]).permute(1, 2, 0, 3)


# --- the module -------------------------------------------------------------------------------


@each_config
def test_attends_as_its_config_says(name):
    mechanism = build(CONFIGS[name])
    q, k, v, hidden = (x.requires_grad_() for x in inputs())
    leaves = [q, k, v, *([hidden] if CONFIGS[name].gate else []), *mechanism.parameters()]
    expected = by_definition(mechanism, q, k, v, hidden, MASK, 0.4)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((expected * upstream).sum(), leaves)
    out = mechanism(q, k, v, key_mask=MASK, scale=0.4, hidden_states=hidden)
    got = torch.autograd.grad((out * upstream).sum(), leaves)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert theirs.abs().sum() > 0


@each_config
def test_one_query_without_gradients_is_the_last_one(name):
    mechanism = build(CONFIGS[name])
    q, k, v, hidden = inputs()
    whole = mechanism(q, k, v, key_mask=MASK, hidden_states=hidden)
    with torch.no_grad():
        step = mechanism(q[:, :, -1:], k, v, key_mask=MASK, hidden_states=hidden[:, -1:])
    torch.testing.assert_close(step, whole[:, :, -1:], atol=1e-5, rtol=1e-5)
    q = q[:, :, -1:].requires_grad_()
    out = mechanism(q, k, v, key_mask=MASK, hidden_states=hidden[:, -1:])
    torch.testing.assert_close(out, step, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(out.square().sum(), q)[0].abs().sum() > 0


def test_options_are_handed_on(monkeypatch):
    asked = []
    for op in ("nsa_attention", "nsa_decode"):
        monkeypatch.setattr(nsa, op, lambda q, *_, op=op, **kw: asked.append((op, kw)) or q)
    config = NSA("gates", 8, 6, 2, 7, 9, 3, 1, regime="long", backend="reference")
    q, k, v, hidden = inputs(3)
    mechanism = build(config)
    mechanism(q, k, v, scale=0.3, hidden_states=hidden)
    with torch.no_grad():
        mechanism(q[:, :, -1:], k, v, scale=0.3, hidden_states=hidden[:, -1:])
    (first, whole), (second, step) = asked
    assert (first, second) == ("nsa_attention", "nsa_decode")
    assert whole.pop("gates").shape == (3, HEADS, 3, 3) and step.pop("gates").shape[2] == 1
    assert whole.pop("regime") == "long" and whole == step
    names = "combine compress_block compress_stride select_block num_selected window sink_blocks"
    assert {name: whole[name] for name in (*names.split(), "local_blocks", "backend")} == {
        "combine": "gates", "select_block": 8, "compress_block": 6, "compress_stride": 2,
        "num_selected": 7, "window": 9, "sink_blocks": 3, "local_blocks": 1,
        "backend": "reference",
    }  # fmt: skip
    assert whole["scale"] == 0.3 and whole["key_mask"] is None
    merged = build(NSA(regime="short"))
    merged(q, k, v)
    assert asked[-1][1]["gates"] is None and asked[-1][1]["regime"] == "short"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", [None, MASK])
@each_config
def test_compressors_start_as_the_mean(name, mask, dtype):
    mechanism = build(CONFIGS[name], learned=False)
    _, k, v, _ = inputs(dtype=dtype)
    for compressor, x in ((mechanism.key_compressor, k), (mechanism.value_compressor, v)):
        config = mechanism.config
        sizes = {name: getattr(config, name) for name in ("compress_block", "compress_stride")}
        expected = mean_compress(x, key_mask=mask, **sizes)
        got = compressor(x, mask)
        assert got.dtype == dtype and got.isfinite().all()
        if mask is not None:  # a block without real tokens holds anything
            seen = mean_compress(mask[:, None, :, None].double(), key_mask=mask, **sizes) > 0
            got, expected = got * seen, expected * seen
        torch.testing.assert_close(got, expected)


@each_config
def test_gates_come_from_the_hidden_states(name):
    mechanism = build(CONFIGS[name], learned=False)
    q, k, v, hidden = inputs(7)
    gates = mechanism.gates(hidden)
    if not CONFIGS[name].gate:
        assert gates is None and mechanism.gate is None
        with pytest.raises(ValueError, match="layer 0 has no gates"):
            mechanism.set_gates(torch.rand(HEADS, 3))
        return
    torch.testing.assert_close(gates, torch.full((3, HEADS, 7, 3), 1 / 3))
    values = torch.rand(HEADS, 3, generator=torch.Generator().manual_seed(0))
    train(mechanism).set_gates(values)
    torch.testing.assert_close(mechanism.gates(hidden), values[:, None].expand(3, -1, 7, -1))
    for wrong in (None, hidden[..., 1:]):
        with pytest.raises(ValueError, match=r"layer 0: the gates .* \[batch, tokens, 32\]; got"):
            mechanism(q, k, v, hidden_states=wrong)


def test_what_is_learned():
    def shapes(config):
        assert not [*build(config).buffers()]
        parameters = build(config, learned=False).named_parameters()
        assert all(p.dtype == torch.float32 for _, p in parameters)
        return {n: tuple(p.shape) for n, p in build(config).named_parameters()}

    def of(kind, **named):
        return {f"{kind}_compressor.{name.replace('_of_', '.')}": s for name, s in named.items()}

    gate = {"gate.weight": (3 * HEADS, WIDTH), "gate.bias": (3 * HEADS,)}
    weighted = {"position_logits": (KV_HEADS, 4), "position_embedding": (KV_HEADS, 4, DIM)}
    mlp = {
        "position_embedding": (KV_HEADS, 5, DIM),
        "first_of_weight": (2 * DIM, 5 * DIM), "first_of_bias": (2 * DIM,),
        "second_of_weight": (DIM, 2 * DIM), "second_of_bias": (DIM,),
    }  # fmt: skip
    assert shapes(CONFIGS["merged"]) == {}
    assert shapes(CONFIGS["gates"]) == gate
    assert shapes(CONFIGS["gates-weighted"]) == gate | of("key", **weighted) | of(
        "value", **weighted
    )
    assert shapes(CONFIGS["gates-mlp"]) == gate | of("key", **mlp) | of("value", **mlp)


@each_config
def test_has_no_coefficients(name):
    mechanism = build(CONFIGS[name])
    assert mechanism.coefficients() == mechanism.labels() == {}
    assert mechanism.mask_matrix(5) is None and mechanism.l1_penalty() == 0


def test_what_weight_decay_leaves_alone():
    model = convert(tiny(), {0: CONFIGS["gates-mlp"], 1: CONFIGS["merged-weighted"]})
    trainer = object.__new__(DistillationTrainer)
    decayed = {n for n in trainer.get_decay_parameter_names(model) if "attnopt" in n}
    kinds = {"key", "value"}
    assert decayed == {
        f"transformer.h.0.attn.attnopt.{kind}_compressor.{layer}.weight"
        for kind in kinds
        for layer in ("first", "second")
    }


def test_initialization():
    def first(**options):
        return build(NSA(compression="mlp"), learned=False, **options).key_compressor.first.weight

    assert torch.equal(first(seed=1), first(seed=1)) and not torch.equal(first(), first(seed=2))
    assert 0.9 < first().abs().max() * (32 * DIM) ** 0.5 <= 1
    one, other = build(NSA(compression="mlp")), build(NSA(compression="mlp"), seed=4)
    for mechanism in (one, other):
        mechanism.reset_parameters(torch.Generator().manual_seed(5))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    a, b = one.key_compressor, one.value_compressor
    assert not torch.equal(a.first.weight, b.first.weight)
    assert a.second.weight.abs().sum() == 0
    random = torch.manual_seed(0).get_state()
    build(CONFIGS["gates-weighted"], seed=0, learned=False)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.device("meta"):
        held = [*build(CONFIGS["gates-mlp"], seed=0, learned=False).parameters()]
    assert all(p.is_meta for p in held) and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_keep_their_precision(dtype):
    mechanism = build(CONFIGS["gates-mlp"])
    before = copy.deepcopy(mechanism.state_dict())
    mechanism.to(dtype)
    assert all(torch.equal(x, before[n]) for n, x in mechanism.state_dict().items())
    q, k, v, hidden = inputs(dtype=dtype)
    out = mechanism(q, k, v, hidden_states=hidden)
    assert out.dtype == dtype
    exact = mechanism(*(x.float() for x in (q, k, v)), hidden_states=hidden.float())
    # a rounded score may select another block; most queries select the same
    error = (out.float() - exact).abs().amax((1, 3)).flatten()
    assert error.median() < 0.03
    assert mechanism.double().gate.weight.dtype == torch.float64


# --- in a model -------------------------------------------------------------------------------

MAKERS = {"gpt2": tiny, "llama": tiny_llama}
each_model = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
EXACT = {
    "window": NSA(select_block=4, window=LENGTH),
    "far-window": NSA(window=1000),
    "all-selected": NSA(select_block=4, num_selected=LENGTH // 4, window=1),
    "all-sinks": NSA(select_block=5, num_selected=5, window=2, sink_blocks=5, compression="mlp"),
    "one-block": NSA(select_block=LENGTH, num_selected=0, window=1, compression="weighted"),
}
GATED = {
    "window": ([1e-9, 1e-9, 1 - 1e-7], NSA("gates", 4, window=LENGTH)),
    "all-selected": ([1e-9, 1 - 1e-7, 1e-9], NSA("gates", 4, num_selected=6, window=1)),
    "all-local": (
        [1e-9, 1 - 1e-7, 1e-9], NSA("gates", 8, 5, 3, 3, sink_blocks=0, local_blocks=3),
    ),
}  # fmt: skip


@each_model
@pytest.mark.parametrize("name", EXACT)
def test_what_sees_every_token_exactly_leaves_the_logits(make, name):
    model, x = make(), tokens()
    before = model(x).logits
    assert (convert(model, EXACT[name])(x).logits - before).abs().max() <= 2e-5


@each_model
@pytest.mark.parametrize("name", GATED)
def test_one_branch_that_sees_every_token_leaves_the_logits(make, name):
    values, config = GATED[name]
    model, x = make(), tokens()
    before = model(x).logits
    convert(model, config)
    for mechanism in mechanisms(model).values():
        mechanism.set_gates(torch.tensor(values).expand(4, 3))
    assert (model(x).logits - before).abs().max() <= 2e-5


@each_model
def test_more_blocks_come_closer_to_softmax(make):
    model, x = make(initializer_range=0.15), tokens(4)
    before = model(x).logits

    def error(**options):
        config = NSA(select_block=4, window=2, **options)
        return (convert(copy.deepcopy(model), config)(x).logits - before).norm().item()

    errors = [error(num_selected=count) for count in (0, 2, 5)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 1e-3 * errors[0]


@pytest.mark.parametrize("name", [*CONFIGS, "mixed"])
def test_padding_changes_nothing(name):
    model = train(convert(tiny(), CONFIGS.get(name, MIXED)))
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
            torch.testing.assert_close(logits[row][mask[row] == 1], alone, atol=5e-5, rtol=1e-5)


@each_model
@pytest.mark.parametrize("regime", ["short", "long"])
@each_config
def test_no_token_sees_the_future(make, name, regime):
    """Bit for bit, the choice of blocks included; the text is longer than any window."""
    fields = CONFIGS[name].to_dict() | {"regime": regime, "backend": "eager"}
    del fields["mechanism"]
    model, x = train(convert(make(), NSA(**fields))), tokens(1, 2 * LENGTH)
    with torch.no_grad():
        before = model(x).logits
        for t in (0, 7, 30, 2 * LENGTH - 2):
            changed = x.clone()
            changed[:, t + 1 :] = VOCABULARY - 1 - changed[:, t + 1 :]
            after = model(changed).logits
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


def test_compiles_into_one_graph():
    model, x = train(convert(tiny(), MIXED)), tokens()
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


@each_model
@pytest.mark.parametrize("name", ["merged-weighted", "gates-weighted", "merged-mlp", "gates-mlp"])
def test_gradients_reach_compressors_and_gates(make, name):
    model, x = convert(make(), CONFIGS[name]), tokens()
    reached = []
    for _ in range(2):  # an MLP's first layer is reached once its second is not 0
        model(x, labels=x).loss.backward()
        reached.append(
            {
                name
                for m in mechanisms(model).values()
                for name, p in m.named_parameters()
                if p.grad.abs().sum() > 0
            }
        )
        train(model)
    own = {name for name, _ in next(iter(mechanisms(model).values())).named_parameters()}
    late = {n for n in own if "mlp" in name and re.search(r"first|position", n)}
    # a shift common to all keys cancels in one softmax, but not beside exact keys
    assert reached[1] == own and reached[0] >= own - late


def test_trains_under_autocast():
    model, x = train(convert(tiny(), MIXED)), tokens()
    exact = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, labels=x)
    rounded.loss.backward()
    assert (rounded.logits - exact).abs().median() < 0.1 * exact.abs().median()
    own = [p.grad for m in mechanisms(model).values() for p in m.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in own)


# --- on disk ----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("name", [*CONFIGS, "mixed"])
def test_saves_and_loads(make, name, tmp_path):
    model, x = train(convert(make(), CONFIGS.get(name, MIXED))), tokens()
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # nothing may be drawn anew
    random = torch.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    for index, mechanism in mechanisms(model).items():
        ours = mechanisms(loaded)[index]
        assert ours.config == mechanism.config
        assert ours.state_dict().keys() == mechanism.state_dict().keys()
        for key, tensor in mechanism.state_dict().items():
            assert torch.equal(ours.state_dict()[key], tensor)
    assert torch.equal(loaded(x).logits, model(x).logits)
    rounded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    held = [p for m in mechanisms(rounded).values() for p in m.parameters()]
    assert all(p.dtype == torch.float32 for p in held)
    if make is tiny:  # Llama's `to` rounds its rotary frequencies, loading does not
        assert torch.equal(rounded(x).logits, copy.deepcopy(model).to(torch.bfloat16)(x).logits)


def test_missing_parameters_start_anew(tmp_path):
    model = train(convert(tiny(), MIXED))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "attnopt" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(5)
    loaded = mechanisms(from_pretrained(tmp_path))
    torch.manual_seed(5)
    fresh = mechanisms(convert(tiny(), MIXED))
    for index in (0, 1):
        ours, theirs = loaded[index].state_dict(), fresh[index].state_dict()
        for key, tensor in theirs.items():
            if "first" in key:
                assert 0 < ours[key].abs().max() <= tensor.abs().max() * 1.2
            else:
                assert torch.equal(ours[key], tensor), key

"""attnopt.nn: torch's MultiheadAttention with a mechanism inside."""

import copy
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import attnopt
from attnopt.attention.lastk.module import LastKMechanism
from attnopt.nn import MultiheadAttention, replace_attention

WIDTH, HEADS, TOKENS = 16, 4, 7
WIDE = attnopt.LastK(window=TOKENS)
MECHANISMS = [
    WIDE,
    attnopt.LastK(window=2, sinks=1, init="random"),
    attnopt.Favor(num_features=8),
    attnopt.NSA(combine="gates", select_block=2, compress_block=2, num_selected=3, window=2),
]


def original(seed: int = 0, **options) -> nn.MultiheadAttention:
    """torch's module with random biases too."""
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def triangle(length: int = TOKENS) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry for every forward pass of a last-k mechanism."""
    seen = []
    forward = LastKMechanism.forward

    def counting(self, *args, **kwargs):
        seen.append(self.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LastKMechanism, "forward", counting)
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options, shapes",
    [
        ({}, [(TOKENS, 2, WIDTH)] * 3),
        ({"batch_first": True}, [(2, TOKENS, WIDTH)] * 3),
        ({"batch_first": True, "bias": False}, [(TOKENS, WIDTH)] * 3),
        ({"kdim": 5, "vdim": 6}, [(TOKENS, 2, WIDTH), (TOKENS, 2, 5), (TOKENS, 2, 6)]),
        ({"vdim": 6, "bias": False}, [(TOKENS, WIDTH), (TOKENS, WIDTH), (TOKENS, 6)]),
    ],
    ids=str,
)
def test_full_window_is_torchs_attention(options: dict, shapes: list, causal: bool) -> None:
    torchs = original(**options)
    ours = MultiheadAttention.from_torch(torchs, WIDE, causal=causal)
    assert ours.state_dict().keys() - {"mechanism.alpha"} == torchs.state_dict().keys()
    assert (ours.kdim, ours.vdim) == (torchs.kdim, torchs.vdim)
    inputs = [text(*shape, seed=i) for i, shape in enumerate(shapes)]
    for same in (False, True):  # one tensor takes the packed projection
        if same:
            if len(set(shapes)) > 1:
                continue
            inputs = inputs[:1] * 3
        mask = triangle() if causal else None
        expected, _ = torchs(*inputs, attn_mask=mask, need_weights=False)
        out, weights = ours(*inputs)
        assert weights is None and out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        leaves = [*torchs.parameters()]
        upstream = torch.randn_like(out)
        grads = [torch.autograd.grad(o, leaves, upstream) for o in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_true_means_padding(kind: str, batch_first: bool) -> None:
    torchs = original(batch_first=batch_first)
    ours = MultiheadAttention.from_torch(torchs, WIDE)
    x = text(2, TOKENS, WIDTH)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    mask = padding if kind == "bool" else torch.zeros(2, TOKENS).masked_fill(padding, -torch.inf)
    inputs = (x if batch_first else x.transpose(0, 1),) * 3
    expected, _ = torchs(*inputs, key_padding_mask=mask, need_weights=False)
    out, _ = ours(*inputs, key_padding_mask=mask)
    if not batch_first:
        expected, out = expected.transpose(0, 1), out.transpose(0, 1)
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
    alone, _ = ours(x[1], x[1], x[1], key_padding_mask=mask[1])
    torch.testing.assert_close(alone[:4], out[1, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", ["replaced", "given"])
def test_encoder_runs_the_mechanism(calls, build: str, training: bool, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    if build == "replaced":
        torchs = nn.TransformerEncoder(layer, 2)
        encoder = replace_attention(copy.deepcopy(torchs), WIDE)
    else:
        torchs = nn.TransformerEncoder(layer, 2)
        layer = copy.deepcopy(layer)
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, WIDE)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = text(2, TOKENS, WIDTH)
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [4]]) if padded else None
    with torch.set_grad_enabled(training):
        out = encoder.train(training)(x, src_key_padding_mask=padding)
        expected = torchs.train(True)(x, src_key_padding_mask=padding)
    assert calls == ([0, 1] if build == "replaced" else [0, 0])
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-5)


def test_causal_encoder_and_decoder(calls) -> None:
    torch.manual_seed(0)
    torchs = nn.Transformer(WIDTH, HEADS, 1, 2, 32, dropout=0.0, batch_first=True)
    model = copy.deepcopy(torchs)
    replace_attention(model.encoder, WIDE)
    replace_attention(model.decoder, WIDE, causal=True)
    assert isinstance(model.decoder.layers[1].self_attn, MultiheadAttention)
    assert type(model.decoder.layers[1].multihead_attn) is nn.MultiheadAttention
    source, target = text(2, 5, WIDTH), text(2, TOKENS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    for training in (True, False):
        expected = torchs.train(training)(source, target, tgt_mask=mask)
        calls.clear()
        out = model.train(training)(source, target, tgt_mask=mask)
        assert calls == [0, 0, 1]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        without = model.decoder(target, model.encoder(source), tgt_is_causal=True)
        torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-5)


def test_causal_masks_are_looked_at() -> None:
    ours = MultiheadAttention(WIDTH, HEADS, WIDE, causal=True, batch_first=True)
    x = text(2, TOKENS, WIDTH)
    plain, _ = ours(x, x, x)
    floats = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    for mask in (triangle(), floats, triangle().expand(2 * HEADS, -1, -1)):
        assert torch.equal(ours(x, x, x, attn_mask=mask, is_causal=True)[0], plain)
    assert torch.equal(ours(x, x, x, is_causal=True)[0], plain)
    band = triangle() | triangle().T.roll(-1, 0)
    for wrong in (band, torch.zeros_like(floats), ~triangle()):
        with pytest.raises(ValueError, match="must be exactly the causal mask"):
            ours(x, x, x, attn_mask=wrong, is_causal=True)
    with pytest.raises(ValueError, match="must hold 0 and -inf and nothing else"):
        ours(x, x, x, attn_mask=floats.clamp_min(-1e4))
    with pytest.raises(ValueError, match=r"causal mask \[7, 7\]; got the shape \[5, 5\]"):
        ours(x, x, x, attn_mask=triangle(5))


REFUSED = {
    "weights": (dict(need_weights=True), "need_weights must be False"),
    "mask": (dict(attn_mask=triangle()), "both directions and takes no attn_mask"),
    "hint": (dict(is_causal=True), "build it with causal=True"),
    "bias": (dict(key_padding_mask=torch.ones(2, TOKENS)), "must hold 0 and -inf"),
    "integers": (dict(key_padding_mask=torch.ones(2, TOKENS).long()), "must be bool or float"),
    "shape": (dict(key_padding_mask=torch.ones(TOKENS, 2).bool()), r"shape \[2, 7\]; got \[7, 2\]"),
    "cross": (dict(key=text(2, 5, WIDTH), value=text(2, 5, WIDTH)), "only self-attention"),
    "four": (dict(query=text(1, 2, TOKENS, WIDTH)), "3 with a batch; got shape"),
    "nested": (dict(query=torch.nested.nested_tensor([text(3, WIDTH)])), "got nested ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    ours = MultiheadAttention(WIDTH, HEADS, WIDE, batch_first=True)
    x = text(2, TOKENS, WIDTH)
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ours(**{"query": x, "key": x, "value": x} | arguments)


def test_refuses_to_build() -> None:
    with pytest.raises(ValueError, match="dropout must be 0.*got 0.1"):
        MultiheadAttention(WIDTH, HEADS, WIDE, dropout=0.1)
    with pytest.raises(ValueError, match="must be one of LastK.*got 0.1"):
        MultiheadAttention(WIDTH, HEADS, 0.1)
    with pytest.raises(ValueError, match="NSA is causal"):
        MultiheadAttention(WIDTH, HEADS, attnopt.NSA())
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn"):
            MultiheadAttention.from_torch(original(**options), WIDE)
    ours = MultiheadAttention(WIDTH, HEADS, WIDE)
    with pytest.raises(ValueError, match=r"torch.nn.MultiheadAttention; got MultiheadAttention"):
        MultiheadAttention.from_torch(ours, WIDE)
    with pytest.raises(ValueError, match="found no torch.nn.MultiheadAttention.*Linear"):
        replace_attention(nn.Linear(2, 2), WIDE)


def test_from_torch_shares_and_says_what_changed(caplog) -> None:
    torchs = original(dropout=0.1).eval()
    with caplog.at_level(logging.INFO, logger="attnopt.nn"):
        ours = MultiheadAttention.from_torch(torchs, WIDE)
    assert "0.1" in caplog.text and ours.dropout == 0 and not ours.training
    theirs = dict(torchs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert name == "mechanism.alpha" or parameter is theirs.pop(name)
    assert not theirs


@pytest.mark.parametrize("options", [{}, {"kdim": 5}])
def test_starts_as_torchs_does(options: dict) -> None:
    torch.manual_seed(0)
    torchs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    torch.manual_seed(0)
    ours = MultiheadAttention(WIDTH, HEADS, WIDE, **options)
    for again in (False, True):
        if again:
            torch.manual_seed(1)
            torchs._reset_parameters()
            torch.manual_seed(1)
            ours._reset_parameters()
        own = dict(ours.named_parameters())
        assert all(torch.equal(own[name], x) for name, x in torchs.named_parameters())


@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts(nested: bool) -> None:
    def wrap(module):
        return nn.Sequential(nn.ModuleDict({"a": module})) if nested else module

    torchs = wrap(original())
    ours = wrap(MultiheadAttention(WIDTH, HEADS, attnopt.LastK(3, init="random")))
    (mechanism,) = [m for m in ours.modules() if isinstance(m, LastKMechanism)]
    alpha = mechanism.alpha.detach().clone()
    ours.load_state_dict(torchs.state_dict())
    assert torch.equal(mechanism.alpha, alpha)
    theirs = torchs.state_dict()
    own = {k: v for k, v in ours.state_dict().items() if not k.endswith("mechanism.alpha")}
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)
    saved = {k: torch.zeros_like(v) for k, v in ours.state_dict().items()}
    ours.load_state_dict(saved)
    assert (mechanism.alpha == 0).all()
    del saved[next(k for k in saved if k.endswith("in_proj_weight"))]
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("config", MECHANISMS, ids=lambda config: config.mechanism)
def test_copies_pickles_and_compiles_whole(config) -> None:
    torch.manual_seed(0)
    ours = MultiheadAttention(WIDTH, HEADS, config, causal=True, batch_first=True)
    x = text(2, TOKENS, WIDTH).requires_grad_()
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [4]])
    expected, _ = ours(x, x, x, key_padding_mask=padding)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x, x, x, key_padding_mask=padding)[0], expected)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mask in (padding, torch.zeros(2, TOKENS).masked_fill(padding, -torch.inf)):
        out, _ = compiled(
            x, x, x, key_padding_mask=mask, attn_mask=triangle(), is_causal=True
        )
        torch.testing.assert_close(out, expected)
    leaves = [x, *ours.parameters()]
    upstream = torch.randn_like(out)
    options = {"grad_outputs": upstream, "allow_unused": True}  # biases of keys, for one
    grads = [torch.autograd.grad(o, leaves, **options) for o in (out, expected)]
    torch.testing.assert_close(*grads)


def test_dtypes() -> None:
    torch.manual_seed(0)
    exact = MultiheadAttention(WIDTH, HEADS, WIDE, batch_first=True, dtype=torch.float64)
    x = text(2, TOKENS, WIDTH).double()
    assert all(p.dtype == torch.float64 for p in exact.parameters())
    expected, _ = exact(x, x, x)
    assert expected.dtype == torch.float64
    single = copy.deepcopy(exact).float()
    x = x.float()
    torch.testing.assert_close(single(x, x, x)[0].double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = single(x, x, x)
    assert out.dtype == torch.bfloat16
    half = copy.deepcopy(single).to(torch.bfloat16)
    assert half.mechanism.alpha.dtype == torch.float32
    for rounded in (out, half(*[x.to(torch.bfloat16)] * 3)[0]):
        torch.testing.assert_close(rounded.double(), expected, rtol=0.05, atol=0.02)


def test_replacing_twice_the_same_module_keeps_it_one() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = original()
            self.c = original()

    model = Twins()
    model.d = original(add_zero_attn=True)
    with pytest.raises(ValueError, match="add_zero_attn"):
        replace_attention(model, WIDE)
    assert type(model.a) is nn.MultiheadAttention
    del model.d
    replace_attention(model, WIDE)
    assert model.a is model.b and model.a is not model.c
    assert [m.layer_idx for m in (model.a.mechanism, model.c.mechanism)] == [0, 1]


def test_is_loaded_when_it_is_asked_for() -> None:
    code = "import sys, attnopt; assert 'torch' not in sys.modules; attnopt.nn.MultiheadAttention"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

"""Packed documents: every op and mechanism gives each what it gives it alone, and nothing else."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from attention_inputs import BACKENDS, DEVICE, launching
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt import NSA, Every, Favor, First, LastK, Masks, NthLast
from attnopt.attention import build_mechanism
from attnopt.attention.nsa.compressors import COMPRESSORS
from attnopt.kernels.favor.op import empty_state, favor_attention
from attnopt.kernels.lastk.op import lastk_attention, sliding_window_attention
from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.op import nsa_attention
from attnopt.kernels.packing import lay_out, similar_lengths

LENGTHS = (5, 1, 17, 40, 3, 64, 2, 39)
H, HKV, D, WIDTH = 4, 2, 8, 6
NSA_TOKENS = ("k_select", "v_select", "k_window", "v_window")


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def draw(lengths, layout="bhnd", dtype=torch.float64, seed=0) -> dict[str, Tensor]:
    """What all ops together take of these documents."""
    rng, n = torch.Generator().manual_seed(seed), sum(lengths)

    def rand(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)

    def tokens(heads, width=D):
        return rand(1, n, heads, width).transpose(1, 2) if layout == "bnhd" else rand(
            1, heads, n, width
        )

    made = {"q": tokens(H), "k": tokens(HKV), "v": tokens(HKV)}
    made |= {"log_weights": rand(H, 5), "sink_log_weights": rand(2), "log_gate": rand(H)}
    made |= {"projection": rand(H, WIDTH, D), "gates": tokens(H, 3).sigmoid()}
    made |= {name: tokens(HKV) for name in NSA_TOKENS}
    return {name: x.requires_grad_() for name, x in made.items()}


def compressed(x, options, block, stride):
    """Both sides of nsa_attention's blocks, through which gradients go on to the tokens."""
    packed = {"cu_seqlens": options["cu_seqlens"]} if "cu_seqlens" in options else {}
    sizes = {"compress_block": block, "compress_stride": stride}
    return (mean_compress(x[name], **sizes, **packed) for name in ("k", "v"))


def nsa_merged(x, **options):
    return nsa_attention(
        x["q"], x["k"], x["v"], *compressed(x, options, 4, 4), select_block=4, num_selected=2,
        window=5, **options,
    )  # fmt: skip


def nsa_gates(x, **options):
    own = {name: x[name] for name in ("gates", *NSA_TOKENS)}
    return nsa_attention(
        x["q"], x["k"], x["v"], *compressed(x, options, 6, 3), combine="gates", compress_block=6,
        compress_stride=3, select_block=8, num_selected=3, sink_blocks=2, local_blocks=1, window=5,
        **own, **options,
    )  # fmt: skip


def favor(x, gate=False, **options):
    if gate:
        options["log_gate"] = x["log_gate"]
    return favor_attention(x["q"], x["k"], x["v"], x["projection"], **options)


def lastk(x, **options):
    sinks = x["sink_log_weights"]
    return lastk_attention(
        x["q"], x["k"], x["v"], x["log_weights"], sink_log_weights=sinks, **options
    )


OPS: dict[str, Callable[..., Tensor]] = {
    "lastk": lastk,
    "lastk-both-ways": partial(lastk, causal=False),
    "window": lambda x, **options: sliding_window_attention(x["q"], x["k"], x["v"], 7, **options),
    "favor": favor,
    "favor-both-ways": partial(favor, causal=False),
    "favor-window": partial(favor, gate=True, window=6, window_block=4, feature_map="hedgehog"),
    "nsa-merged": nsa_merged,
    "nsa-gates": nsa_gates,
}


def alone(op, x, lengths, **options):
    """The op on one document after the other."""
    parts = []
    for begin, end in pairwise(bounds(lengths).tolist()):
        own = {n: t[:, :, begin:end] if t.dim() == 4 else t for n, t in x.items()}
        parts.append(op(own, **options))
    return torch.cat(parts, 2)


def gradients(out, x):
    """By name, for a random gradient of the output; zeros for what was not used."""
    rng = torch.Generator().manual_seed(9)
    upstream = torch.randn(out.shape, generator=rng, dtype=out.dtype).to(DEVICE)
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(out, list(x.values()), upstream, **options)
    return dict(zip(x, found, strict=True))


def assert_same(op, lengths, *, tolerance=1e-10, x=None, expected=None, **options):
    x = draw(lengths) if x is None else x
    wanted = alone(op, x, lengths, **(expected or {"backend": "reference"}))
    out = op(x, cu_seqlens=bounds(lengths), **options)
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        gradients(out, x), gradients(wanted, x), atol=10 * tolerance, rtol=10 * tolerance
    )


@pytest.mark.parametrize("max_seqlen", [None, 64, 70])
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_documents_give_what_they_give_alone(op, backend, max_seqlen):
    assert_same(OPS[op], LENGTHS, backend=backend, max_seqlen=max_seqlen)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
@pytest.mark.parametrize(("op", "max_seqlen"), [("lastk", None), ("favor-window", 10),
                                                ("nsa-merged", None)])  # fmt: skip
def test_on_triton(op, max_seqlen):
    lengths = (9, 4)
    x = draw(lengths, dtype=torch.float32)
    with launching("triton"):
        assert_same(
            OPS[op], lengths, x=x, tolerance=2e-5, backend="triton", max_seqlen=max_seqlen,
            expected={"backend": "eager"},
        )  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["lastk", "favor-window", "nsa-merged", "nsa-gates"]),
    st.lists(st.one_of(st.just(1), st.integers(1, 50)), min_size=1, max_size=12),
)
def test_any_lengths(op, lengths):
    assert_same(OPS[op], tuple(lengths), expected={"backend": "eager"}, backend="eager")


@pytest.mark.parametrize("max_seqlen", [None, 64])
@pytest.mark.parametrize("op", OPS)
def test_documents_never_see_each_other(op, max_seqlen):
    x = draw(LENGTHS)
    options = {"cu_seqlens": bounds(LENGTHS), "max_seqlen": max_seqlen, "backend": "eager"}
    begin, end = sum(LENGTHS[:3]), sum(LENGTHS[:4])
    others = [*range(begin), *range(end, sum(LENGTHS))]
    with torch.no_grad():
        before = OPS[op](x, **options)
        changed = {n: t.clone() for n, t in x.items()}
        for t in changed.values():
            if t.dim() == 4:
                t[:, :, begin:end] = 1e3 if t.shape[3] == D else 7.0
        after = OPS[op](changed, **options)
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert not torch.equal(before[:, :, begin:end], after[:, :, begin:end])


@pytest.mark.parametrize("op", ["lastk", "favor-window", "nsa-gates"])
def test_strides_and_dtypes(op):
    """As models hand them over; in bf16 as exact as each document alone is."""
    assert_same(OPS[op], LENGTHS, x=draw(LENGTHS, "bnhd"), backend="eager")
    x = draw(LENGTHS, "bnhd", torch.bfloat16)
    exact = alone(OPS[op], {n: t.detach().double() for n, t in x.items()}, LENGTHS)
    errors = [
        (out.detach().double() - exact).norm()
        for out in (OPS[op](x, cu_seqlens=bounds(LENGTHS)), alone(OPS[op], x, LENGTHS))
    ]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("op", ["lastk", "favor-window"])
def test_compiles_whole(op):
    x, cu = draw(LENGTHS), bounds(LENGTHS)
    run = partial(OPS[op], cu_seqlens=cu, max_seqlen=64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, plain = compiled(x), run(x)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(gradients(out, x), gradients(plain, x))


def test_a_length_that_is_too_small_fails_where_it_cannot_be_checked():
    x, cu = draw(LENGTHS), bounds(LENGTHS)
    compiled = torch.compile(partial(lastk, cu_seqlens=cu, max_seqlen=63), backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError)):
        compiled(x)


def test_second_derivatives_with_the_reference():
    lengths = (2, 1, 3)
    x = {n: t for n, t in draw(lengths).items() if n in ("q", "k", "v")}

    def run(*tensors):
        own = dict(zip(x, tensors, strict=True))
        return sliding_window_attention(
            own["q"], own["k"], own["v"], 2, cu_seqlens=bounds(lengths), backend="reference"
        )

    assert torch.autograd.gradgradcheck(run, tuple(x.values()))


# ---- mechanisms

MECHANISMS = {
    "lastk": LastK(4, sinks=2, init="random"),
    "masks": Masks((NthLast(1), NthLast(3), First(2), Every()), init="random"),
    "favor": Favor(6, window=6, window_block=4),
    "nsa-merged": NSA(select_block=4, num_selected=2, window=5, compression="mlp"),
    "nsa-gates": NSA("gates", 4, num_selected=3, window=5, compression="weighted"),
}
BOTH_WAYS = {"lastk": LastK(4, sinks=2, init="random"), "favor": Favor(6)}


def build(config, causal=True):
    torch.manual_seed(3)
    shape = {"num_heads": H, "num_kv_heads": HKV, "head_dim": D, "hidden_size": 10}
    mechanism = build_mechanism(config, **shape, layer_idx=0, causal=causal).to(DEVICE).double()
    for parameter in mechanism.parameters():  # away from zero, so that all have gradients
        torch.nn.init.normal_(parameter, std=0.5)
    return mechanism


@pytest.mark.parametrize(
    ("config", "causal"),
    [pytest.param(c, True, id=n) for n, c in MECHANISMS.items()]
    + [pytest.param(c, False, id=f"{n}-both-ways") for n, c in BOTH_WAYS.items()],
)
def test_mechanisms(config, causal):
    mechanism, x, n = build(config, causal), draw(LENGTHS), sum(LENGTHS)
    q, k, v = (x[name] for name in ("q", "k", "v"))
    hidden = torch.randn(1, n, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    parts = [
        mechanism(*(t[:, :, a:b] for t in (q, k, v)), hidden_states=hidden[:, a:b], scale=0.5)
        for a, b in pairwise(bounds(LENGTHS).tolist())
    ]
    expected = torch.cat(parts, 2)
    leaves = {"q": q, "k": k, "v": v, "hidden": hidden} | dict(mechanism.named_parameters())
    wanted = gradients(expected, leaves)
    for max_seqlen in (None, 64):
        packed = {"cu_seqlens": bounds(LENGTHS), "max_seqlen": max_seqlen}
        out = mechanism(q, k, v, **packed, hidden_states=hidden, scale=0.5)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        found = gradients(out, leaves)
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
        assert all(found[name].any() for name, _ in mechanism.named_parameters())


@pytest.mark.parametrize("name", MECHANISMS)
def test_autocast_may_mix_dtypes(name):
    """As rotary embeddings in fp32 leave them."""
    mechanism, x = build(MECHANISMS[name]).float(), draw(LENGTHS, dtype=torch.float32)
    hidden = torch.randn(1, sum(LENGTHS), 10, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        options = {"hidden_states": hidden, "cu_seqlens": bounds(LENGTHS)}
        out = mechanism(x["q"], x["k"], x["v"].bfloat16(), **options)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_nsa_compiles_whole_with_its_compressors():
    mechanism, x = build(MECHANISMS["nsa-gates"]), draw(LENGTHS)
    hidden = torch.randn(1, sum(LENGTHS), 10, dtype=torch.float64, device=DEVICE)
    run = partial(mechanism, cu_seqlens=bounds(LENGTHS), max_seqlen=64, hidden_states=hidden)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    tensors = [x[name] for name in ("q", "k", "v")]
    torch.testing.assert_close(compiled(*tensors), run(*tensors))


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressors_lay_the_blocks_of_documents_end_to_end(kind):
    compressor = COMPRESSORS[kind](HKV, D, block=4, stride=2).to(DEVICE)
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter)
    k = draw(LENGTHS)["k"]
    parts = [compressor(k[:, :, a:b]) for a, b in pairwise(bounds(LENGTHS).tolist())]
    packed = compressor(k, cu_seqlens=bounds(LENGTHS))
    torch.testing.assert_close(packed, torch.cat(parts, 2))
    assert packed.shape[2] == sum(max(0, (n - 4) // 2 + 1) for n in LENGTHS)
    assert compressor(k[:, :, :4], cu_seqlens=bounds((1, 2, 1))).shape == (1, HKV, 0, D)


# ---- rows

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200))
def test_little_padding(lengths):
    groups = similar_lengths(lengths)
    assert sorted(torch.cat([g.documents for g in groups]).tolist()) == [*range(len(lengths))]
    for documents, longest in groups:
        own = [lengths[i] for i in documents.tolist()]
        assert max(own) == longest
        assert longest * len(own) - sum(own) <= max(sum(own) / 8, 128)


def test_packing_is_a_permutation_and_back():
    x = draw(LENGTHS)["k"]
    layout = lay_out(bounds(LENGTHS), x)
    assert len(layout.groups) > 1
    rows, masks = layout.pack(x), layout.masks()
    assert [(len(r), r.shape[2]) for r in rows] == [tuple(m.shape) for m in masks]
    assert sum(int(m.sum()) for m in masks) == sum(LENGTHS)
    assert torch.equal(layout.unpack(rows), x)
    document = x[0, :, sum(LENGTHS[:5]) : sum(LENGTHS[:6])]  # the longest comes first
    assert torch.equal(rows[0][0], document)


def merge_options(options):
    """Arguments of a call on 6 tokens, all of them right but for the options."""
    made = draw((2, 4))
    return {n: made[n] for n in ("q", "k", "v")} | {"cu_seqlens": bounds((2, 4))} | options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": [0, 2, 6]}, "cu_seqlens must be an int32 or int64 tensor; got list"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64 tensor; got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, "shape [documents + 1] with at least one"),
        ({"cu_seqlens": torch.tensor([0])}, "with at least one document; got [1]"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "must start with 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "end with the number of tokens, 6"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 6])}, "no document is empty); got [0, 2, 2, 6]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "increase strictly"),
        ({"max_seqlen": 3}, "at least the longest document, 4; got 3"),
        ({"max_seqlen": 0}, "max_seqlen must be an integer >= 1; got 0"),
        ({"max_seqlen": 2.0}, "max_seqlen must be an integer >= 1; got 2.0"),
        ({"key_mask": torch.ones(1, 6, dtype=torch.bool)}, "cu_seqlens or key_mask, not both"),
        ({"q": torch.zeros(1, H, 3, D, dtype=torch.float64)}, "got 3 queries and 6 keys"),
        (
            {n: torch.zeros(2, h, 6, D) for n, h in (("q", H), ("k", HKV), ("v", HKV))},
            "the batch size must be 1",
        ),
    ],
)
def test_refuses(options, message):
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    with pytest.raises(ValueError) as error:
        lastk_attention(log_weights=torch.zeros(3, device=DEVICE), **merge_options(options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("op", "option"),
    [(op, "scale") for op in OPS] + [(op, "backend") for op in OPS]
    + [("favor", "stabilizer"), ("nsa-merged", "regime")],
)
def test_every_option_counts(op, option):
    with pytest.raises(ValueError, match=option):
        OPS[op](draw((2, 4)), cu_seqlens=bounds((2, 4)), **{option: "none"})


def test_refuses_what_only_one_op_takes():
    x = draw((2, 4))
    q, k, v, cu = x["q"], x["k"], x["v"], bounds((2, 4))
    state = empty_state(q, k, x["projection"])
    for options in ({"initial_state": state}, {"return_state": True}):
        with pytest.raises(ValueError, match="neither take nor return a state"):
            favor_attention(q, k, v, x["projection"], cu_seqlens=cu, **options)
    sizes = {"select_block": 2, "num_selected": 1, "window": 2}
    with pytest.raises(ValueError, match="have 3 compressed blocks of 2 at stride 2; got 2"):
        nsa_attention(q, k, v, k[:, :, :2], v[:, :, :2], cu_seqlens=cu, **sizes)
    with pytest.raises(ValueError, match="shape .1, heads, 6, features.; got .* .1, 4, 5"):
        nsa_attention(
            q, k, v, k[:, :, :3], v[:, :, :3], cu_seqlens=cu, combine="gates",
            gates=x["gates"][:, :, :5], **sizes | {"num_selected": 3},
        )  # fmt: skip
    with pytest.raises(ValueError, match="compressed one by one"):
        build(MECHANISMS["nsa-merged"])(q, k, v, cu_seqlens=cu, compressed=(k, v))

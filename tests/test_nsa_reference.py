"""The dense definition of Native Sparse Attention, against plain loops and known identities."""

import math
from itertools import product

import pytest
import torch
from attention_inputs import LAYOUTS, MASKS
from nsa_inputs import (
    MERGED,
    PADDINGS,
    SHAPES,
    cases,
    define,
    error,
    label,
    make_inputs,
    make_options,
    plain_loops,
    run,
    run_exact,
)
from torch import Tensor

from attnopt.kernels.nsa.compress import mean_compress
from attnopt.kernels.nsa.reference import (
    compressed_reference,
    importance_reference,
    nsa_reference,
    select_reference,
    selected_reference,
)

DOUBLE = torch.float64
EQUAL = {"n": 20, "d": 3, "block": 3, "stride": 3, "select": 3, "count": 2, "window": 2}
SMALL = [  # one block size; overlapping blocks; d does not divide b; l > b; l < d; too short
    EQUAL,
    EQUAL | {"h": 4, "hkv": 2, "window": 4, "sinks": 0},
    EQUAL | {"n": 4, "extra": 9, "count": 3, "sinks": 2, "local": 0},
    EQUAL | {"block": 4, "stride": 2, "select": 6, "h": 2, "hkv": 1},
    EQUAL | {"block": 5, "stride": 3, "select": 4, "h": 4, "hkv": 2, "count": 3, "local": 2},
    EQUAL | {"block": 6, "stride": 4, "select": 5, "local": 0, "sinks": 2, "count": 2},
    EQUAL | {"block": 1, "stride": 2, "select": 4, "local": 0, "sinks": 0, "window": 1},
    EQUAL | {"n": 3, "block": 4, "stride": 2, "select": 8, "count": 1},
]
EVERY = [  # both ways to combine, the merged one where it exists
    pytest.param(sizes, combine, id=f"{label(sizes)}-{combine}")
    for sizes, combine in product(SMALL, ["gates", "merged"])
    if combine == "gates" or sizes["block"] == sizes["stride"] == sizes["select"]
]


def call(sizes: dict, combine: str, **others) -> tuple[dict, dict]:
    """Tensors and options of nsa_reference in float64."""
    gates = combine == "gates"
    inputs = make_inputs(**{"dtype": DOUBLE, "gates": gates} | sizes | others)
    return inputs, make_options(sizes, combine)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def select(inputs: dict, options: dict) -> Tensor:
    """Far blocks that nsa_reference chooses."""
    b, window, local = options["select_block"], options["window"], options.get("local_blocks")
    merged = local is None
    return select_reference(
        inputs["q"], inputs["k_cmp"], compress_block=options["compress_block"],
        compress_stride=options["compress_stride"], select_block=b,
        count=options["num_selected"] - (local or 0), sinks=options["sink_blocks"],
        near_window=window if merged else (local - 1) * b + 1 if local else 0,
        num_tokens=inputs["k"].shape[2], delay=window if merged else 0,
        key_mask=inputs["key_mask"],
    )  # fmt: skip


def dense(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Causal softmax attention; 0 where a query sees nothing."""
    groups, (nq, nk) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen = torch.ones(nq, nk).tril(nk - nq).bool()
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -math.inf)
    return logits.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("padding", [*MASKS, "gap"])
@pytest.mark.parametrize(("sizes", "combine"), EVERY)
def test_equals_plain_loops(sizes: dict, combine: str, padding: str) -> None:
    inputs, options = call(
        sizes, combine, padding="none" if padding == "gap" else padding, separate=combine == "gates"
    )
    if padding == "gap":  # at least one block of any kind has no text
        column = torch.arange(inputs["k"].shape[2])
        inputs["key_mask"] = (column < 2) | (column > torch.tensor([[13], [16]]))
    out, far = plain_loops(inputs, options)
    assert torch.equal(select(inputs, options), far.int())
    assert_close(define(inputs, options), out)


@pytest.mark.parametrize("sizes", [(32, 16, 64), (5, 3, 8), (8, 4, 16), (8, 8, 4), (2, 3, 4)])
def test_importance_weighs_by_shared_tokens(sizes: tuple[int, int, int]) -> None:
    block, stride, size = sizes
    n = 4 * max(size, block) + 1
    count = (n - block) // stride + 1
    q = 1e4 * torch.eye(count, dtype=DOUBLE)[:, None, None].expand(-1, 2, -1, -1)  # row c: block c
    k_cmp = torch.eye(count, dtype=DOUBLE).expand(count, 1, -1, -1)
    weights = importance_reference(
        q, k_cmp, compress_block=block, compress_stride=stride, select_block=size, num_tokens=n,
        scale=1.0,
    )[:, 0, 0] / 2  # fmt: skip
    assert weights.shape == (count, -(-n // size))
    for c, j in product(*map(range, weights.shape)):
        tokens = [t for t in range(n) if c * stride <= t < c * stride + block and t // size == j]
        assert math.isclose(weights[c, j], len(tokens) / stride, abs_tol=1e-12)
    if sizes == (32, 16, 64):
        for j in range(1, 3):
            assert weights[4 * j - 1 : 4 * j + 4, j].round(decimals=9).tolist() == [1, 2, 2, 2, 1]
            assert weights[:, j].count_nonzero() == 5


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("sizes", "combine"), EVERY)
def test_reading_everything_is_causal_attention(sizes: dict, combine: str, padding: str) -> None:
    inputs, options = call(sizes, combine, padding=padding)
    q, k, v, key_mask = (inputs[name] for name in ("q", "k", "v", "key_mask"))
    expected = dense(q, k, v, key_mask)

    def result(pick: int, **changed) -> Tensor:
        gates = torch.eye(3, dtype=DOUBLE)[pick].expand(*q.shape[:3], 3)
        given = inputs | {"gates": gates} if combine == "gates" else inputs
        return define(given, options | changed)

    if combine == "merged":  # pooled entries are then all left out
        assert_close(result(1, num_selected=30), expected)
        assert_close(result(1, window=k.shape[2]), expected)
        return
    ranked_by_score = options["compress_block"] == options["compress_stride"] == sizes["select"]
    ranked_by_score &= q.shape[1] == k.shape[1]
    for local in (0, 1, 2):
        if local or not ranked_by_score:  # which leaves out the own block until it is complete
            assert_close(result(1, num_selected=30 + local, local_blocks=local), expected)
    assert_close(result(1, num_selected=30, local_blocks=30), expected)
    assert_close(result(2, window=k.shape[2]), expected)
    assert not torch.allclose(result(0), expected)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("groups", [1, 2])
def test_merged_counts_every_token_once(groups: int, padding: str) -> None:
    """With equal tokens in a block its mean, weighed by its real tokens, loses nothing."""
    sizes = EQUAL | {"n": 31, "d": 8, "h": 2 * groups, "window": 5}
    inputs, options = call(sizes, "merged", padding=padding)
    mask = torch.ones(2, 31).bool() if inputs["key_mask"] is None else inputs["key_mask"]
    position = torch.arange(31) - mask.long().argmax(1)[:, None]
    first = (torch.arange(31) - position % 3).clamp_min(0)[:, None, :, None]
    for name in ("k", "v"):
        inputs[name] = inputs[name].take_along_dim(first, 2)
        inputs[f"{name}_cmp"] = mean_compress(
            inputs[name], compress_block=3, compress_stride=3, key_mask=inputs["key_mask"]
        )
    expected = dense(inputs["q"], inputs["k"], inputs["v"], inputs["key_mask"])
    for window, count, sinks in product((1, 4, 9), (0, 2), (0, 1)):
        changed = {"window": window, "num_selected": count, "sink_blocks": sinks}
        assert_close(define(inputs, options | changed), expected)


@pytest.mark.parametrize("padding", MASKS)
def test_merged_is_both_branches_joined_by_their_logsumexp(padding: str) -> None:
    inputs, options = call(EQUAL | {"h": 4}, "merged", padding=padding)
    q, k, v, k_cmp, v_cmp, key_mask = inputs.values()
    chosen = select(inputs, options)
    tokens, lse = selected_reference(
        q, k, v, chosen, select_block=3, near_window=2, key_mask=key_mask
    )
    pooled, lse_pooled = compressed_reference(
        q, k_cmp, v_cmp, compress_block=3, compress_stride=3, num_tokens=20, delay=2,
        log_counts=True, chosen=chosen, key_mask=key_mask,
    )  # fmt: skip
    weights = torch.stack([lse, lse_pooled]).softmax(0).nan_to_num()[..., None]
    assert_close(define(inputs, options), weights[0] * tokens + weights[1] * pooled)
    assert (lse == -math.inf).equal(tokens.eq(0).all(-1))
    assert (lse_pooled == -math.inf).equal(pooled.eq(0).all(-1)) and (lse_pooled > -math.inf).any()


def test_grouped_heads_equal_repeated_keys() -> None:
    """Selection is the group's, so it is given; all else is each head's own."""
    inputs, options = call(EQUAL | {"h": 4, "hkv": 2}, "merged", padding="holes")
    q, k, v, k_cmp, v_cmp, key_mask = inputs.values()
    chosen = select(inputs, options)

    def both(repeats: int) -> list[Tensor]:
        x, y, xc, yc, ids = (t.repeat_interleave(repeats, 1) for t in (k, v, k_cmp, v_cmp, chosen))
        near = {"select_block": 3, "near_window": 4, "key_mask": key_mask}
        sizes = {"compress_block": 3, "compress_stride": 3, "num_tokens": 20, "key_mask": key_mask}
        return [
            *selected_reference(q, x, y, ids, **near),
            *compressed_reference(q, xc, yc, chosen=ids, log_counts=True, **sizes),
        ]

    for grouped, repeated in zip(both(1), both(2), strict=True):
        assert torch.equal(grouped, repeated)
    assert not torch.equal(chosen.repeat_interleave(2, 1), select(
        inputs | {"k_cmp": k_cmp.repeat_interleave(2, 1)}, options
    ))  # fmt: skip


@pytest.mark.parametrize(("side", "shift"), [("left", 5), ("right", 4)])
@pytest.mark.parametrize(("sizes", "combine"), EVERY)
def test_padding_equals_the_row_alone(sizes: dict, combine: str, side: str, shift: int) -> None:
    alone, options = call(sizes | {"n": sizes["n"] + sizes.get("extra", 0), "extra": 0}, combine)
    n = alone["k"].shape[2]
    text = slice(shift, shift + n) if side == "left" else slice(0, n)
    mask = torch.zeros(2, n + shift).bool()
    mask[:, text] = True
    padded = {"key_mask": mask}
    for name in {"q", "k", "v", "gates"} & alone.keys():
        padded[name] = torch.full_like(alone[name][:, :, :1], 7.0).repeat(1, 1, n + shift, 1)
        padded[name][:, :, text] = alone[name]
    for name in ("k", "v"):
        padded[f"{name}_cmp"] = mean_compress(
            padded[name], compress_block=sizes["block"], compress_stride=sizes["stride"],
            key_mask=mask,
        )  # fmt: skip
    assert torch.equal(select(padded, options)[:, :, text], select(alone, options))
    assert_close(define(padded, options)[:, :, text], define(alone, options))
    if side == "left":
        assert (select(padded, options)[:, :, :shift] == -1).all()
        assert (define(padded, options)[:, :, :shift] == 0).all()


@pytest.mark.parametrize(("sizes", "combine"), EVERY)
def test_the_last_queries_alone_and_no_later_token(sizes: dict, combine: str) -> None:
    """Bit for bit: what comes after a query changes neither its output nor its selection."""
    inputs, options = call(sizes | {"n": 20, "extra": 0}, combine)
    inputs["key_mask"] = torch.arange(20) % 4 != torch.tensor([[1], [2]])

    def compress(given: dict) -> None:
        for name in ("k", "v"):
            given[f"{name}_cmp"] = mean_compress(
                given[name], compress_block=sizes["block"], compress_stride=sizes["stride"],
                key_mask=given["key_mask"],
            )  # fmt: skip

    compress(inputs)
    tail = {name: inputs[name][:, :, 15:] for name in ("q", "gates") if name in inputs}
    assert_close(define(inputs | tail, options), define(inputs, options)[:, :, 15:])
    for last in (0, 4, 10, 17):
        changed = dict(inputs)
        for name in {"q", "k", "v", "gates"} & inputs.keys():
            later = torch.arange(20)[:, None] > last
            changed[name] = torch.where(later, 3 - 5 * inputs[name], inputs[name])
        changed["key_mask"] = inputs["key_mask"] ^ (torch.arange(20) > last)
        compress(changed)
        for result in (define, select):
            before, after = (result(given, options) for given in (inputs, changed))
            assert torch.equal(before[:, :, : last + 1], after[:, :, : last + 1])
            assert not torch.equal(before, after) or result is select


@pytest.mark.parametrize("combine", ["gates", "merged"])
def test_masked_keys_are_never_read(combine: str) -> None:
    inputs, options = call(EQUAL, combine, padding="holes")
    hole = ~inputs["key_mask"][:, None, :, None]
    other = {name: torch.where(hole, 1e3, inputs[name]) for name in ("k", "v")}
    assert hole[:, :, 5:].any() and torch.equal(
        define(inputs, options), define(inputs | other, options)
    )


def test_blocks_without_text_are_hidden() -> None:
    inputs, options = call(EQUAL | {"sinks": 2, "b": 1}, "merged")
    mask = torch.ones(1, 20).bool()
    mask[:, 3:6] = False  # block 1
    inputs |= {"key_mask": mask}
    assert (select(inputs, options) != 1).all() and (select(inputs, options)[:, :, -1, 1] > 1).all()
    loud = {name: inputs[name].clone() for name in ("k_cmp", "v_cmp")}
    for x in loud.values():
        x[:, :, 1] = 1e3
    assert torch.equal(define(inputs | loud, options), define(inputs, options))


def test_early_queries_see_no_compressed_block() -> None:
    inputs, _ = call(EQUAL, "gates")
    sizes = {"compress_block": 4, "compress_stride": 2, "num_tokens": 20}
    k_cmp, v_cmp = (inputs[x][:, :, :1].expand(-1, -1, 9, -1) for x in ("k_cmp", "v_cmp"))
    for delay in (0, 3):
        out, lse = compressed_reference(inputs["q"], k_cmp, v_cmp, delay=delay, **sizes)
        blind = torch.arange(20) < 3 + delay
        assert (out == 0).all(-1).equal(blind.expand(2, 2, -1))
        assert (lse == -math.inf).equal(blind.expand(2, 2, -1))
        assert_close(out[:, :, ~blind], v_cmp[:, :, :1].expand(-1, -1, 17 - delay, -1))


@pytest.mark.parametrize("heads", [1, 2])
def test_ties_go_to_the_lower_block(heads: int) -> None:
    """Pooled scores are small integers; with two heads probabilities are equal in pairs."""
    q = torch.ones(1, heads, 1, 1)
    k_cmp = torch.tensor([0.0, 2, 1, 2, -0.0, 1, 2])[None, None, :, None]
    found = [
        select_reference(
            q, k_cmp, compress_block=2, compress_stride=2, select_block=2, count=count, sinks=0,
            near_window=1, num_tokens=15, scale=1.0,
        ).flatten().tolist() for count in range(9)
    ]  # fmt: skip
    order = [1, 3, 6, 2, 5, 0, 4]
    for count, blocks in enumerate(found):
        assert blocks == sorted(order[:count]) + [-1] * (count - 7)


@pytest.mark.parametrize("padding", ["none", "left", "holes", "empty-row"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("combine", ["gates", "merged"])
def test_gradients(combine: str, order: int, padding: str) -> None:
    sizes = EQUAL | {"n": 7, "extra": 1, "d": 2, "block": 2, "stride": 2, "select": 2, "h": 4}
    inputs, options = call(sizes, combine, padding=padding, separate=combine == "gates")
    names = [name for name in inputs if name != "key_mask"]

    def result(*tensors: Tensor) -> Tensor:
        return define(inputs | dict(zip(names, tensors, strict=True)), options)

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(result, [inputs[name].requires_grad_() for name in names], fast_mode=order == 2)


@pytest.mark.parametrize("branch", ["compressed", "selected"])
def test_gradients_of_the_logsumexp(branch: str) -> None:
    inputs, options = call(EQUAL | {"n": 9, "h": 4, "d": 2}, "merged", padding="left")
    chosen, key_mask = select(inputs, options), inputs["key_mask"]

    def result(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if branch == "selected":
            out, lse = selected_reference(q, k, v, chosen, select_block=3, key_mask=key_mask)
        else:
            out, lse = compressed_reference(
                q, k, v, compress_block=3, compress_stride=3, num_tokens=9, key_mask=key_mask
            )
        return out, lse.masked_fill(lse == -math.inf, 0)

    names = ("q", "k", "v") if branch == "selected" else ("q", "k_cmp", "v_cmp")
    assert torch.autograd.gradcheck(result, [inputs[name].requires_grad_() for name in names])


def test_no_gradient_flows_through_the_choice() -> None:
    inputs, options = call(EQUAL, "gates")
    inputs["gates"] = torch.tensor([0.0, 1, 1], dtype=DOUBLE).expand_as(inputs["gates"])
    grads = run(define, inputs, options)
    assert not grads["k_cmp"].any() and not grads["v_cmp"].any() and grads["gates"][..., 0].any()
    q, k_cmp = (inputs[name].requires_grad_() for name in ("q", "k_cmp"))
    chosen = select(inputs, options)
    assert not chosen.requires_grad and chosen.dtype == torch.int32
    assert not importance_reference(
        q, k_cmp, compress_block=3, compress_stride=3, select_block=3, num_tokens=20
    ).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combine", ["gates", "merged"])
def test_low_precision_computes_in_float32(combine: str, dtype: torch.dtype) -> None:
    inputs, options = call(EQUAL | {"h": 4}, combine, dtype=dtype, padding="holes")
    high = {name: x if name == "key_mask" else x.float() for name, x in inputs.items()}
    sizes = {"compress_block": 3, "compress_stride": 3, "select_block": 3, "num_tokens": 20}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nsa_reference(**inputs, **options)
        importance = importance_reference(inputs["q"], inputs["k_cmp"], **sizes)
    assert out.dtype == dtype and torch.equal(out, define(high, options).to(dtype))
    assert torch.equal(importance, importance_reference(high["q"], high["k_cmp"], **sizes))


@pytest.mark.parametrize("combine, sizes", [
    *[("gates", case.values[0]) for case in cases()],
    *[("merged", case.values[0]) for case in cases(MERGED)],
], ids=str)  # fmt: skip
def test_shared_inputs(combine: str, sizes: dict) -> None:
    """What other tests start from: float32 is right on it, queries in padding get zeros."""
    number = SHAPES.index(sizes)
    padding, layout = (PADDINGS[1:] + ["none"])[number % 4], LAYOUTS[number % 4]
    inputs = make_inputs(
        **sizes, padding=padding, layout=layout, gates=combine == "gates", separate=False
    )
    options = make_options(sizes, combine)
    actual, exact = run(define, inputs, options), run_exact(inputs, options)
    for name, x in exact.items():
        assert x.isfinite().all() and error(actual[name], x, floor=1.0) < 1e-5, name
    if inputs["key_mask"] is not None:
        before = inputs["key_mask"].cumsum(1)[:, sizes["extra"] :] == 0
        for name in ("out", "q"):
            assert (actual[name].transpose(1, 2)[before] == 0).all()
        for name in ("k", "v"):
            assert (actual[name].transpose(1, 2)[~inputs["key_mask"]] == 0).all()

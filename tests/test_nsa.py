"""Numbers of Native Sparse Attention: every backend, combination and regime against float64.

The definition runs on the same quantized inputs, drawn so that rounding cannot change which blocks
are selected. Memory from torch.empty is filled with NaN (or the largest integer) throughout, so an
element nobody wrote is seen. Without a GPU the Triton kernels run in Triton's interpreter, on fewer
and smaller sizes; the slow tests sweep everything.
"""

from collections.abc import Iterator
from itertools import count, product

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import BACKENDS, DEVICE, LAYOUTS, MASKS, launching, needs_triton
from nsa_inputs import (
    DEFAULTS,
    SHAPES,
    as_float64,
    define,
    label,
    make_inputs,
    make_options,
    plain_loops,
    run,
    run_exact,
)
from torch import Tensor

from attnopt.kernels.nsa import (
    compressed_attention,
    mean_compress,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
)
from attnopt.kernels.nsa.arguments import COMBINES
from attnopt.kernels.nsa.geometry import near_window_of
from attnopt.kernels.nsa.reference_select import (
    first_near_block,
    importance_reference,
    is_chosen,
    rows_of,
    select_reference,
    visible_blocks,
)

REGIMES = ["short", "long"]
EVERY = [*product(COMBINES, REGIMES)]
FP32 = 3e-6  # largest error relative to the largest entry, or to 1
SMALL = DEFAULTS | {"n": 47, "b": 1, "count": 2, "window": 5, "sinks": 0}
TRITON = [  # sizes for the interpreter, in what combination
    ("merged", SMALL | {"padding": "left", "layout": "packed"}),
    ("gates", SMALL | {"padding": "left", "layout": "packed", "separate": True}),
    ("merged", SMALL | {"n": 20, "extra": 30, "b": 2, "hkv": 1, "padding": "empty-row",
                        "layout": "broadcast", "sinks": 1}),
    ("gates", SMALL | {"n": 37, "extra": 26, "d": 20, "hkv": 1, "stride": 4, "select": 16,
                       "padding": "holes", "layout": "transposed"}),
    ("gates", SMALL | {"n": 33, "block": 5, "stride": 3, "local": 0, "padding": "right"}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work of the long regime so small that little inputs have several pieces."""
    from attnopt.kernels.nsa import eager_frame, eager_long, work_list

    monkeypatch.setattr(work_list, "SEGMENT", 32)
    monkeypatch.setattr(eager_frame, "SEGMENT_BYTES", 4000)
    monkeypatch.setattr(eager_long, "SEGMENT_BYTES", 4000)
    monkeypatch.setattr(eager_long, "PART_BYTES", 4000)
    if "triton" in BACKENDS:
        from attnopt.kernels.nsa import triton_selected

        monkeypatch.setattr(triton_selected, "PASS_BYTES", 1 << 14)


def select_options(options: dict, tokens: int) -> dict:
    """What `select_reference` takes for the options of `nsa_attention`."""
    merged, size = options["combine"] == "merged", options["select_block"]
    local, window = options.get("local_blocks", 0), options["window"]
    return {
        "compress_block": options["compress_block"], "compress_stride": options["compress_stride"],
        "select_block": size, "count": options["num_selected"] - local,
        "sinks": options["sink_blocks"], "num_tokens": tokens, "delay": window if merged else 0,
        "near_window": window if merged else near_window_of(local, size),
    }  # fmt: skip


def choose(inputs: dict, options: dict, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Far blocks by the definition in float64, of compressed keys with relative noise."""
    q, k_cmp = inputs["q"].double(), inputs["k_cmp"].double()
    rng = torch.Generator().manual_seed(seed)
    noise = noise * torch.randn(k_cmp.shape, generator=rng, dtype=torch.float64).to(k_cmp.device)
    return select_reference(
        q, k_cmp * (1 + noise), key_mask=inputs["key_mask"],
        **select_options(options, inputs["k"].shape[2]),
    )  # fmt: skip


def make(sizes: dict, combine: str, dtype: torch.dtype = torch.float32, **more) -> tuple:
    """Inputs and options, from the first seed with which rounding cannot change the selection."""
    options = make_options(sizes, combine)
    sizes = DEFAULTS | sizes | more | {"gates": combine == "gates", "dtype": dtype}
    if combine == "merged":
        sizes["separate"] = False
    for seed in count():
        inputs = make_inputs(**sizes, seed=seed)
        chosen = choose(inputs, options)
        if all(torch.equal(chosen, choose(inputs, options, 1e-5, i)) for i in range(3)):
            return inputs, options


def attend(inputs: dict, options: dict) -> Tensor:
    return nsa_attention(**inputs, **options)


def run_backend(backend: str, inputs: dict, options: dict) -> dict[str, Tensor]:
    with launching(backend):
        return run(attend, inputs, options | {"backend": backend})


def forward(backend: str, inputs: dict, options: dict) -> Tensor:
    with torch.no_grad(), launching(backend):
        return attend(inputs, options | {"backend": backend})


def assert_close(actual: dict, exact: dict, tolerance: float = FP32) -> None:
    """Largest error of each tensor, relative to its largest entry."""
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        if expected.numel():
            worst = (actual[name].double() - expected.double()).abs().max()
            limit = tolerance * max(1, expected.abs().max())
            assert worst <= limit, (name, float(worst), float(limit))


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention to the keys that are seen, dense and at the dtype of q; 0 where none is."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q.shape[3] ** -0.5 * (q @ k.mT) + bias
    seen = seen.expand(logits.shape)
    logits = F.pad(logits.masked_fill(~seen, -torch.inf), (0, 1), value=-1e4)
    return logits.softmax(-1)[..., :-1].masked_fill(~seen, 0) @ v


def plain(inputs: dict, options: dict) -> Tensor:
    """The same maths in dense PyTorch at the dtype of q: a kernel may be twice as wrong."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    o, merged = select_options(options, k.shape[2]), options["combine"] == "merged"
    size, near_window = o["select_block"], o["near_window"]
    chosen, rows = choose(inputs, options), rows_of(inputs["key_mask"], q, k.shape[2])
    shown, number = visible_blocks(rows, o["compress_block"], o["compress_stride"], o["delay"])
    position, p = rows.key[:, None, None], rows.query[:, None, :, None]
    block = position.div(size, rounding_mode="floor")
    far = is_chosen(chosen, -(-k.shape[2] // size), q.shape[1])
    far = far.take_along_dim(block.clamp_min(0), -1)
    past = rows.real[:, None, None] & (position <= p)
    read = past & (far | (block >= first_near_block(p, size, near_window)))

    k_cmp, v_cmp = inputs["k_cmp"], inputs["v_cmp"]
    if merged:
        logs = number.clamp_min(1).to(q.dtype).log()[:, None, None]
        shown = shown & ~is_chosen(chosen, k_cmp.shape[2], q.shape[1])
        seen = torch.cat([read.expand(*q.shape[:3], -1), shown], -1)
        bias = F.pad(logs, (k.shape[2], 0))
        return masked(q, torch.cat([k, k_cmp], 2), torch.cat([v, v_cmp], 2), seen, bias)
    ks, vs, kw, vw = (
        inputs.get(f"{x}_{name}", inputs[x]) for name in ("select", "window") for x in "kv"
    )
    recent = past & (p - position < options["window"])
    outs = [masked(q, k_cmp, v_cmp, shown), masked(q, ks, vs, read), masked(q, kw, vw, recent)]
    return sum(inputs["gates"][..., i, None] * out for i, out in enumerate(outs))


def assert_no_worse_than_plain(backend: str, inputs: dict, options: dict) -> None:
    """Error against float64 on the same inputs: at most twice that of plain PyTorch.

    By the Frobenius norm, for the largest of few errors is a matter of luck.
    """
    exact = run_exact(inputs, options)
    actual, usual = run_backend(backend, inputs, options), run(plain, inputs, options)
    for name, expected in exact.items():
        error, allowed = ((x[name].double() - expected).norm() for x in (actual, usual))
        size = expected.norm().clamp_min(expected.numel() ** 0.5)
        floor = 32 * torch.finfo(torch.float32).eps * size
        assert error <= 2 * allowed + floor, (name, float(error), float(allowed))


def combined(shapes: tuple[dict, ...] = SHAPES) -> list:
    """Parameters (combine, sizes): "merged" where blocks agree."""
    pairs = product(COMBINES, shapes)
    return [
        pytest.param(combine, sizes, id=f"{combine}-{label(sizes)}") for combine, sizes in pairs
        if combine == "gates" or sizes["block"] == sizes["stride"] == sizes["select"]
    ]  # fmt: skip


@pytest.mark.parametrize(("combine", "sizes"), combined())
def test_plain_is_the_same_maths(combine: str, sizes: dict) -> None:
    inputs, options = make(sizes, combine, torch.float64, padding="holes", separate=True)
    assert_close(run(plain, inputs, options), run_exact(inputs, options), 1e-11)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("combine", "sizes"), combined())
def test_eager(combine: str, sizes: dict, regime: str, small_pieces) -> None:
    """Paddings and layouts take turns; float64 shows the maths and float32 the rounding."""
    turn = SHAPES.index(sizes)
    more = {"layout": LAYOUTS[turn % 4], "padding": MASKS[turn % 5], "separate": turn % 2 == 0}
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, FP32)):
        inputs, options = make(sizes, combine, dtype, **more)
        actual = run_backend("eager", inputs, options | {"regime": regime})
        assert_close(actual, run_exact(inputs, options), tolerance)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "regime"), EVERY)
def test_eager_paddings_and_layouts(combine: str, regime: str, layout: str, padding: str) -> None:
    sizes = DEFAULTS | {"n": 30, "extra": 21, "d": 8, "h": 4, "layout": layout, "padding": padding}
    if combine == "gates":
        sizes |= {"block": 8, "stride": 4, "select": 16, "count": 2}
    inputs, options = make(sizes, combine, torch.float64, separate=True)
    actual = run_backend("eager", inputs, options | {"regime": regime})
    assert_close(actual, run_exact(inputs, options), 1e-11)


@needs_triton
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("combine", "sizes"), TRITON, ids=lambda x: x if x in COMBINES else "")
def test_triton_in_float32(combine: str, sizes: dict, regime: str, small_pieces) -> None:
    inputs, options = make(sizes, combine)
    actual = run_backend("triton", inputs, options | {"regime": regime})
    assert_close(actual, run_exact(inputs, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend: str, combine: str, regime: str, dtype: torch.dtype) -> None:
    short = dtype == torch.float16 and backend == "triton"
    sizes = SMALL | {"n": 24 if short else 47, "padding": "left", "layout": "packed"}
    inputs, options = make(sizes, combine, dtype, separate=True)
    assert_no_worse_than_plain(backend, inputs, options | {"regime": regime})


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 4, 16])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("combine", "sizes"), combined())
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything(
    backend: str, combine: str, sizes: dict, padding: str, group: int, small_pieces
) -> None:
    """Every shape, padding and group; regimes within, dtypes and layouts in turns."""
    turn = SHAPES.index(sizes) + MASKS.index(padding) + group
    sizes = sizes | {"h": group * min(2, 16 // group), "hkv": min(2, 16 // group)}
    if backend == "triton" and DEVICE == "cpu":  # the interpreter takes a minute for long rows
        sizes |= {"n": min(sizes["n"], 63), "b": 1 + (padding == "empty-row")}
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    more = {"padding": padding, "layout": LAYOUTS[turn % 4], "separate": turn % 2 == 0}
    for regime in REGIMES if backend == "eager" else [REGIMES[turn % 2]]:
        for dtype in dtypes if backend == "eager" else [dtypes[turn % 3]]:
            inputs, options = make(sizes, combine, dtype, **more)
            options["regime"] = regime
            if dtype == torch.float32:
                assert_close(run_backend(backend, inputs, options), run_exact(inputs, options))
            else:
                assert_no_worse_than_plain(backend, inputs, options)


def dense(inputs: dict, _: dict) -> Tensor:
    """Causal attention of all tokens."""
    q, k, v = (inputs[name] for name in "qkv")
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = seen.tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("how", ["every block selected", "wide window"])
@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_attention_in_the_limit(backend: str, combine: str, regime: str, how: str) -> None:
    inputs, options = make({"n": 37, "extra": 13, "b": 1, "hkv": 1, "window": 3}, combine)
    options["regime"], window = regime, how == "wide window"
    options |= {"window": 50} if window else {"num_selected": 7, "sink_blocks": 0}
    if combine == "gates":
        inputs["gates"] = torch.zeros_like(inputs["gates"])
        inputs["gates"][..., 2 if window else 1] = 1
    exact = run(dense, as_float64(inputs), {}, only=("q", "k", "v"))
    actual = run_backend(backend, inputs, options)
    assert_close({name: actual[name] for name in exact}, exact)
    if combine == "merged":
        assert not actual["k_cmp"].any() and not actual["v_cmp"].any()


@pytest.mark.parametrize("n", [1, 7, 8, 9])
@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_early_tokens(backend: str, combine: str, regime: str, n: int) -> None:
    """Texts about as long as a block: no compressed block, or one that hardly a query sees."""
    sizes = {"n": n, "b": 1, "window": 2, "h": 1, "hkv": 1}
    if n != 9:
        sizes["local"] = 0
    inputs, options = make(sizes, combine)
    assert inputs["k_cmp"].shape[2] == n // 8
    exact, options["regime"] = run_exact(inputs, options), regime
    if backend == "eager" or n in (1, 9):
        assert_close(run_backend(backend, inputs, options), exact)
    assert_close({"out": forward(backend, inputs, options)}, {"out": exact["out"]})


@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_query_selects_one_hot_block(
    backend: str, combine: str, regime: str, small_pieces
) -> None:
    inputs, options = make({"n": 70, "b": 1, "h": 1, "hkv": 1, "sinks": 0, "count": 2}, combine)
    inputs["q"] = inputs["q"].abs()
    inputs["k_cmp"][:, :, 2] = 3.0
    chosen = choose(inputs, options)
    assert (chosen[:, :, 40:] == 2).any(-1).all()
    assert torch.equal(chosen, choose(inputs, options, 1e-5))
    options["regime"] = regime
    assert_close(run_backend(backend, inputs, options), run_exact(inputs, options))


def selection(backend: str, inputs: dict, options: dict) -> Tensor:
    """`select_blocks` with the options of `nsa_attention(combine="gates")`."""
    names = ("compress_block", "compress_stride", "select_block", "num_selected", "sink_blocks",
             "local_blocks")  # fmt: skip
    with launching(backend):
        return select_blocks(
            inputs["q"], inputs["k_cmp"], num_tokens=inputs["k"].shape[2], backend=backend,
            key_mask=inputs["key_mask"], **{name: options[name] for name in names},
        )  # fmt: skip


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("sizes", [
    {"count": 4, "local": 2}, {"h": 4, "hkv": 1, "block": 8, "stride": 4, "select": 16},
    {"block": 5, "stride": 3, "local": 0, "sinks": 2},
], ids=label)
@pytest.mark.parametrize("backend", BACKENDS)
def test_select_blocks(backend: str, sizes: dict, padding: str) -> None:
    """The far blocks that loops over queries and tokens find, and the local ones."""
    if backend == "triton" and padding not in ("left", "holes"):
        return
    inputs, options = make({"n": 29, "extra": 18, "d": 4, "padding": padding} | sizes, "gates")
    actual = selection(backend, inputs, options)
    _, far = plain_loops(as_float64(inputs), options)
    p = rows_of(inputs["key_mask"], inputs["q"], 47).query
    assert actual.dtype == torch.int32
    assert actual.shape == (*far.shape[:3], options["num_selected"])
    for b, g, r in product(*map(range, far.shape[:3])):
        own, blocks = int(p[b, r]) // options["select_block"], actual[b, g, r].tolist()
        local = range(max(0, own - options["local_blocks"] + 1), own + 1)
        wanted = sorted({x for x in far[b, g, r].tolist() if x >= 0} | set(local))
        assert blocks == wanted + [-1] * (len(blocks) - len(wanted)), (b, g, r)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend: str, group: int, padding: str) -> None:
    """Scores that are small integers tie all the time: lower blocks first, or as important ones."""
    sizes = {"n": 60, "b": 1, "h": group, "hkv": 1, "d": 16, "padding": padding, "select": 4,
             "block": 4, "stride": 4, "count": 5, "sinks": 1, "local": 1}  # fmt: skip
    options = make_options(sizes, "gates")
    inputs = make_inputs(**DEFAULTS | sizes)
    for name in ("q", "k_cmp"):
        inputs[name] = inputs[name].round().clamp(-1, 1) * (1.0 if name == "q" else 2.0)
    actual = selection(backend, inputs, options)
    expected = selection("reference", as_float64(inputs), options)
    if group == 1:
        assert torch.equal(actual, expected)
    assert torch.equal((actual >= 0).sum(-1), (expected >= 0).sum(-1))
    importance = importance_reference(
        inputs["q"].double(), inputs["k_cmp"].double(), compress_block=4, compress_stride=4,
        select_block=4, num_tokens=60, key_mask=inputs["key_mask"],
    )  # fmt: skip
    importance = importance.masked_fill(importance == -torch.inf, -9)
    found, wanted = (
        importance.take_along_dim(x.clamp_min(0).long(), 3).masked_fill(x < 0, -99).sort(-1).values
        for x in (actual, expected)
    )
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("combine, regime", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_change_a_bit(
    backend: str, combine: str, regime: str, small_pieces
) -> None:
    sizes = DEFAULTS | {"n": 50, "b": 1, "count": 2, "window": 6, "gates": combine == "gates"}
    sizes |= {"padding": "left", "hkv": 1}
    inputs, options = make_inputs(**sizes), make_options(sizes, combine, regime=regime)
    others, out = make_inputs(**sizes, seed=1), forward(backend, inputs, options)
    for last in (33, 41) if backend == "triton" else (26, 31, 32, 33, 40, 48):
        future = {name: x.clone() for name, x in inputs.items()}
        for name in "qkv":
            future[name][:, :, last + 1 :] = 30 * others[name][:, :, last + 1 :]
        future["key_mask"][:, -1] = False
        for name in "kv":
            future[f"{name}_cmp"] = mean_compress(
                future[name], compress_block=8, compress_stride=8, key_mask=future["key_mask"]
            )
        changed = forward(backend, future, options)
        assert torch.equal(changed[:, :, : last + 1], out[:, :, : last + 1]), last
        assert not torch.equal(changed, out)


@pytest.mark.parametrize("combine, regime", EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend: str, combine: str, regime: str, small_pieces) -> None:
    sizes = SMALL | {"n": 40, "hkv": 1, "padding": "holes", "layout": "packed"}
    inputs, options = make(sizes, combine, torch.bfloat16)
    first, second = (
        run_backend(backend, inputs, options | {"regime": regime}) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("padding", ["none", "left", "empty-row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_attention(backend: str, padding: str) -> None:
    sizes = DEFAULTS | {"n": 30, "extra": 17, "block": 5, "stride": 3, "hkv": 1, "d": 20}
    inputs = make_inputs(**sizes, padding=padding, layout="packed")
    rows = rows_of(inputs["key_mask"], inputs["q"], 47)

    def definition(x: dict, _: dict) -> Tensor:
        end = torch.arange(15, device=DEVICE) * 3 + 4
        real = rows.real.flip(1).cumsum(1).flip(1)  # real tokens from a column on
        exists = (real.gather(1, (rows.real.int().argmax(1)[:, None] + end).clamp_max(46)) > 0)
        seen = (rows.query[:, None, :, None] >= end) & exists[:, None, None]
        return masked(x["q"], x["k_cmp"], x["v_cmp"], seen)

    def function(x: dict, _: dict) -> Tensor:
        return compressed_attention(
            x["q"], x["k_cmp"], x["v_cmp"], compress_block=5, compress_stride=3, backend=backend,
            num_tokens=47 if padding == "none" else None, key_mask=x["key_mask"],
        )  # fmt: skip

    only = ("q", "k_cmp", "v_cmp")
    exact = run(definition, as_float64(inputs), {}, only=only)
    with launching(backend):
        assert_close(run(function, inputs, {}, only=only), exact)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selected_attention(backend: str, regime: str, dtype: torch.dtype, small_pieces) -> None:
    """Blocks in any order, twice, in the future, beyond the end, and -1."""
    padding = "left" if dtype == torch.int32 else "empty-row"
    inputs = make_inputs(b=2, h=2, hkv=1, n=26, extra=13, padding=padding, layout="packed")
    rng = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 8, (2, 1, 26, 6), generator=rng).to(DEVICE, dtype)
    indices[:, :, 3] = indices[:, :, 4, 5:]
    indices[:, :, 7], indices[:, :, 9] = -1, torch.iinfo(dtype).max
    rows = rows_of(inputs["key_mask"], inputs["q"], 39)
    position, p = rows.key[:, None, None], rows.query[:, None, :, None]
    block = position.div(8, rounding_mode="floor")
    chosen = (indices[..., None, :] == block[..., None]).any(-1)
    seen = chosen & (position <= p) & (position >= 0) & rows.real[:, None, None]

    def function(x: dict, _: dict) -> Tensor:
        return selected_attention(
            x["q"], x["k"], x["v"], indices, select_block=8, key_mask=x["key_mask"], regime=regime,
            backend=backend,
        )  # fmt: skip

    def definition(x: dict, _: dict) -> Tensor:
        return masked(x["q"], x["k"], x["v"], seen)

    only, before = ("q", "k", "v"), indices.clone()
    exact = run(definition, as_float64(inputs), {}, only=only)
    with launching(backend):
        assert_close(run(function, inputs, {}, only=only), exact)
    assert torch.equal(indices, before)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("combine", "sizes"), combined(SHAPES[3:14]))
def test_decoding_is_the_last_row_and_reads_what_it_needs(
    combine: str, sizes: dict, padding: str
) -> None:
    inputs, options = make(sizes, combine, padding=padding, separate=True)
    exact = define(as_float64(inputs), options)[:, :, -1:]
    newest = inputs | {name: inputs[name][:, :, -1:] for name in ("q", "gates") if name in inputs}
    actual = nsa_decode(**newest, **options)
    assert not actual.requires_grad
    assert_close({"out": actual}, {"out": exact})
    far = choose(newest, options)[:, :, 0]
    rows = rows_of(inputs["key_mask"], newest["q"], inputs["k"].shape[2])
    o = select_options(options, inputs["k"].shape[2])
    size, p = o["select_block"], rows.query
    near = rows.key >= first_near_block(p, size, o["near_window"]) * size
    read = (rows.key.div(size, rounding_mode="floor")[:, None, :, None] == far[:, :, None]).any(-1)
    read = read | (near & (rows.key >= 0))[:, None]  # [B, Hkv, Nk]
    recent = (p - rows.key < options["window"])[:, None].expand(read.shape)
    own = {"k": read, "v": read, "k_select": read, "v_select": read}
    if combine == "gates":
        own |= {"k_window": recent, "v_window": recent, "k": read | recent, "v": read | recent}
    tokens = torch.arange(rows.key.shape[1], device=DEVICE)  # a row may be read with weight 0
    touched = (tokens > tokens[-1] - o["near_window"] - size) | (rows.key == 0)
    poison = torch.where(touched, 1e30, torch.nan)[:, None, :, None]
    for name, seen in own.items():
        if name in newest:
            unread = (~seen & (rows.key >= 0)[:, None]).unsqueeze(3)
            newest[name] = torch.where(unread, poison, newest[name])
    assert torch.equal(nsa_decode(**newest, **options), actual)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_in_chunks_equal_the_whole(
    backend: str, combine: str, regime: str, padding: str
) -> None:
    if backend == "triton" and padding == "none":
        return
    sizes = SMALL | {"n": 61, "h": 2, "hkv": 1, "stride": 8, "window": 5, "padding": padding}
    inputs, options = make(sizes, combine)
    options["regime"], parts = regime, []
    exact = define(as_float64(inputs), {n: x for n, x in options.items() if n != "regime"})
    for first, end in [(0, 23), (23, 24), (24, 61)]:
        chunk = {name: inputs[name][:, :, :end] for name in "kv"}
        chunk |= {n: inputs[n][:, :, first:end] for n in ("q", "gates") if n in inputs}
        mask = chunk["key_mask"] = None if padding == "none" else inputs["key_mask"][:, :end]
        for name in "kv":
            chunk[f"{name}_cmp"] = mean_compress(
                chunk[name], compress_block=8, compress_stride=8, key_mask=mask
            )
        parts.append(forward(backend, chunk, options))
    assert_close({"out": torch.cat(parts, 2)}, {"out": exact})


@pytest.mark.parametrize("padding", ["left", "right", "empty-row"])
@pytest.mark.parametrize(("combine", "regime"), EVERY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_are_never_seen(
    backend: str, combine: str, regime: str, padding: str, small_pieces
) -> None:
    """Whatever masked keys and values hold, and compressed ones of blocks without text."""
    if backend == "triton" and (padding != "left" or regime == "long"):
        return
    rows = 2 if padding == "empty-row" else 1
    inputs, options = make(SMALL | {"b": rows, "padding": padding, "separate": True}, combine)
    options["regime"], mask = regime, inputs["key_mask"]
    start = mask.int().argmax(1)[:, None] + (~mask.any(1, keepdim=True)) * mask.shape[1]
    first = torch.arange(inputs["k_cmp"].shape[2], device=DEVICE) * options["compress_stride"]
    column = (start + first)[..., None] + torch.arange(options["compress_block"], device=DEVICE)
    inside = column < mask.shape[1]
    text = mask.gather(1, column.clamp_max(mask.shape[1] - 1).flatten(1)).view_as(column) & inside
    results = []
    for value in (0.0, 1e30):
        changed = {
            name: x.masked_fill(~(text.any(-1) if "cmp" in name else mask)[:, None, :, None], value)
            for name, x in inputs.items() if name[0] in "kv" and name != "key_mask"
        }  # fmt: skip
        results.append(run_backend(backend, inputs | changed, options))
    for name, x in results[0].items():
        assert x.isfinite().all(), name
        assert torch.equal(x, results[1][name]), (name, (x - results[1][name]).abs().max())

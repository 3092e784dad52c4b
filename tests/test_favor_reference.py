"""The dense definition of FAVOR+ and its family, against plain loops and known identities."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.kernels.favor.reference import favor_reference

FEATURE_MAPS = ("favor", "hedgehog", "exp", "relu", "taylor")
MASKS = {
    "none": None,
    "left": lambda b, j, n: j >= min(1 + 2 * b, n - 1),
    "right": lambda b, j, n: j < max(n - 1 - 2 * b, 1),
    "holes": lambda b, j, n: (j + b) % 3 != 1,
    "empty-row": lambda b, j, n: b != 0,
}
DOUBLE = torch.float64


def make_inputs(
    *, b=2, h=2, hkv=2, nq=5, nk=None, d=2, m=3, per_head=False, feature_map="favor", std=1.0,
    gate=False, state=False, mask="none", seed=0, **options
) -> dict:  # fmt: skip
    """Arguments of favor_reference in float64; `options` are passed on."""
    rng = torch.Generator().manual_seed(seed)
    nk = nq if nk is None else nk

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=DOUBLE)

    inputs = {"q": std * rand(b, h, nq, d), "k": std * rand(b, hkv, nk, d)}
    inputs |= {"v": rand(b, hkv, nk, d), "feature_map": feature_map}
    inputs["projection"] = rand(h, m, d) if per_head else rand(m, d)
    if feature_map == "taylor":
        inputs["projection"], m = None, 1 + d + d * (d + 1) // 2
    if gate:
        inputs["log_gate"] = rand(h)
    if state:
        z, log_scale = rand(b, h, m).abs() + 0.1, rand(b, h, m)
        if feature_map == "taylor":  # signed features: only a sum over keys has a positive total
            z, log_scale = taylor_features(rand(2, b, h, d)).sum(0), torch.full_like(z, 0.5)
        inputs["initial_state"] = (rand(b, h, m, d), z, log_scale)
    if rule := MASKS[mask]:
        inputs["key_mask"] = torch.tensor([[rule(i, j, nk) for j in range(nk)] for i in range(b)])
    return inputs | options


def taylor_features(x: Tensor) -> Tensor:
    """1, x_a and the products of pairs, along the last axis."""
    pairs = itertools.combinations_with_replacement(range(x.shape[-1]), 2)
    pairs = [x[..., a] * x[..., b] * (1 if a < b else 0.5**0.5) for a, b in pairs]
    return torch.cat([torch.ones_like(x[..., :1]), x, torch.stack(pairs, -1)], -1)


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def add_up(terms: list[tuple]) -> tuple[float, float, list[float]]:
    """The largest log, and by it the sums of e^log * (mass, vector) over (log, mass, vector)."""
    peak = max((log for log, _, _ in terms), default=-1e30)
    factors = [math.exp(log - peak) for log, _, _ in terms]
    mass = dot(factors, [term[1] for term in terms])
    return peak, mass, [dot(factors, column) for column in zip(*(t[2] for t in terms), strict=True)]


def log_sum(logs: list[float], masses: list[float]) -> float:
    """log of the sum of mass * e^log."""
    peak, total, _ = add_up([(log, mass, []) for log, mass in zip(logs, masses, strict=True)])
    return peak + math.log(total)


def phi(x: list[float], rows: list | None, feature_map: str) -> tuple[list[float], list[float]]:
    """Features of one token as (logs, masses): phi_m = mass * e^log."""
    if feature_map == "taylor":
        masses = taylor_features(torch.tensor(x, dtype=DOUBLE)).tolist()
        return [0.0] * len(masses), masses
    ones, dots = [1.0] * len(rows), [dot(row, x) for row in rows]
    if feature_map == "favor":
        dots = [value - dot(x, x) / 2 for value in dots]
    elif feature_map == "hedgehog":
        dots = [value - log_sum(dots, ones) for value in dots]
    elif feature_map == "relu":
        dots = [math.log(max(value, 0.0) + 0.001) for value in dots]
    return dots, ones


def plain_loops(
    q, k, v, projection, feature_map="favor", window=0, window_block=32, log_gate=None, causal=True,
    key_mask=None, scale=None, initial_state=None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The definition in Python floats: one query, one key, one feature at a time."""
    (batch, heads, nq, dim), (_, kv_heads, nk, _) = q.shape, k.shape
    root = math.sqrt(1 / math.sqrt(dim) if scale is None else scale)
    real = [[True] * nk] * batch if key_mask is None else key_mask.tolist()
    out, state = torch.zeros(q.shape, dtype=DOUBLE), []
    q, k, v = (root * q).tolist(), (root * k).tolist(), v.tolist()
    for b, h in itertools.product(range(batch), range(heads)):
        g, start = h // (heads // kv_heads), real[b].index(True) if True in real[b] else nk
        rows = None if projection is None else projection.expand(heads, -1, -1)[h].tolist()
        log_c = 0.0 if log_gate is None else float(log_gate[h])
        log_c -= math.log(len(rows)) if feature_map == "favor" else 0.0
        keys = [phi(x, rows, feature_map) for x in k[b][g]]
        earlier = [[] for _ in keys[0][0]]  # of each feature: [(log, mass, vector)] or nothing
        if initial_state is not None:
            kv, z, log_scale = (part[b, h].tolist() for part in initial_state)
            earlier = [[term] for term in zip(log_scale, z, kv, strict=True)]

        def is_far(i: int, j: int, start: int = start) -> bool:
            """Key j lies in a block before the one in which the window of query i starts."""
            first = max(0, i - start - window + 1) // window_block
            return window == 0 or (j - start) // window_block < first

        for r in range(nq):
            i, (logs, masses), seen = r + nk - nq, phi(q[b][h][r], rows, feature_map), []
            for j in range(nk):
                if real[b][j] and (j <= i or not causal):
                    log_u = dot(q[b][h][r], k[b][g][j])
                    if is_far(i, j):
                        products = [x * y for x, y in zip(masses, keys[j][1], strict=True)]
                        sums = [x + y for x, y in zip(logs, keys[j][0], strict=True)]
                        log_u = log_c + log_sum(sums, products)
                    seen.append((log_u, 1.0, v[b][g][j]))
            for log, mass, terms in zip(logs, masses, earlier, strict=True):
                for log_m, z_m, kv_m in terms:
                    seen.append((log_c + log + log_m, mass * z_m, [mass * x for x in kv_m]))
            if seen:
                _, total, summed = add_up(seen)
                out[b, h, r] = torch.tensor(summed, dtype=DOUBLE) / total
        for m, terms in enumerate(earlier):
            for j in range(nk):
                if real[b][j] and is_far(nk, j):
                    mass = keys[j][1][m]
                    terms.append((keys[j][0][m], mass, [mass * x for x in v[b][g][j]]))
            log_scale, z, kv = add_up(terms)
            state.append([log_scale, z, *(kv or [0.0] * dim)])
    table = torch.tensor(state, dtype=DOUBLE).reshape(batch, heads, -1, 2 + dim)
    return out, (table[..., 2:], table[..., 1], table[..., 0])


def assert_close(actual, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"nq": 5},
        {"nq": 3, "nk": 5, "h": 4, "per_head": True, "state": True},
        {"nq": 4, "causal": False, "per_head": True},
        {"nq": 2, "nk": 4, "h": 3, "hkv": 1, "causal": False, "state": True},
        {"nq": 7, "window": 1, "window_block": 1},
        {"nq": 7, "window": 2, "window_block": 2, "gate": True, "h": 4, "per_head": True},
        {"nq": 8, "window": 3, "window_block": 2, "state": True, "gate": True, "scale": 0.3},
        {"nq": 2, "nk": 9, "window": 2, "window_block": 3, "state": True},
        {"nq": 5, "window": 9, "gate": True, "state": True},
    ],
    ids=lambda sizes: "-".join(f"{key}{value}" for key, value in sizes.items()),
)
def test_equals_plain_loops(sizes: dict, mask: str, feature_map: str, monkeypatch) -> None:
    inputs = make_inputs(mask=mask, feature_map=feature_map, **sizes)
    expected = plain_loops(**inputs)
    assert_close(favor_reference(**inputs, return_state=True), expected)
    monkeypatch.setattr("attnopt.kernels.favor.reference.CHUNK", 1)  # one query at a time
    assert_close(favor_reference(**inputs), expected[0])


@pytest.mark.parametrize("std", [5.0, 100.0])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_large_norms_are_exact_and_finite(feature_map: str, window: int, std: float) -> None:
    options = {"window": window, "window_block": 2, "feature_map": feature_map}
    inputs = make_inputs(nq=12, d=4, m=6, std=std, **options)
    out, _ = plain_loops(**inputs)
    for name in ("q", "k", "v"):
        inputs[name].requires_grad_()
    actual = favor_reference(**inputs)
    assert_close(actual, out, 1e-9)
    actual.backward(torch.randn(out.shape, dtype=DOUBLE))
    assert all(inputs[name].grad.isfinite().all() for name in ("q", "k", "v"))
    inputs["q"] = inputs["q"].detach().float()
    assert favor_reference(**inputs).isfinite().all()


def weights_by_hand(q: float, k: list[float], **options) -> list[float]:
    """Share of each key for the last query, with D = 1 and scale 1, one value at a time."""
    query = torch.full((1, 1, 1, 1), q, dtype=DOUBLE)
    keys = torch.tensor(k, dtype=DOUBLE)[None, None, :, None]
    values = torch.eye(len(k), dtype=DOUBLE)[:, None, None, :, None]
    return [favor_reference(query, keys, v, scale=1.0, **options).item() for v in values]


def shares(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def test_feature_maps_by_hand() -> None:
    options = {"projection": torch.tensor([[1.0], [-1.0]], dtype=DOUBLE), "feature_map": "relu"}
    expected = shares(0.501 * 2.001 + 0.001 * 0.001, 0.501 * 0.001 + 0.001 * 1.001)
    assert weights_by_hand(0.5, [2.0, -1.0], **options) == pytest.approx(expected)
    options["feature_map"] = "exp"
    expected = shares(math.cosh(2.5), math.cosh(-0.5))
    assert weights_by_hand(0.5, [2.0, -1.0], **options) == pytest.approx(expected)
    options["feature_map"] = "hedgehog"
    far = [math.cosh(0.5 + x) / (2 * math.cosh(0.5) * math.cosh(x)) for x in (1.0, -2.0)]
    assert weights_by_hand(0.5, [1.0, -2.0], **options) == pytest.approx(shares(*far))
    options |= {"window": 1, "window_block": 1, "log_gate": torch.tensor([3.0]).double().log()}
    expected = shares(3 * far[0], 3 * far[1], math.exp(0.5 * 0.25))
    assert weights_by_hand(0.5, [1.0, -2.0, 0.25], **options) == pytest.approx(expected)


def test_favor_beside_a_window_by_hand() -> None:
    """With the rows 0 and 2: the mean over both of e^(w q + w k - q^2 / 2 - k^2 / 2)."""
    rows = torch.tensor([[0.0], [2.0]], dtype=DOUBLE)
    far = [(1 + math.exp(2 * (0.5 + k))) / 2 * math.exp(-(0.25 + k * k) / 2) for k in (1.0, -1.0)]
    options = {"projection": rows, "window": 2, "window_block": 1}
    actual = weights_by_hand(0.5, [1.0, -1.0, -2.0, 1.0], **options)
    assert actual == pytest.approx(shares(*far, math.exp(0.5 * -2), math.exp(0.5)))


def test_window_blocks_by_hand() -> None:
    """W = 2, b = 3: at positions 4 and 5 the window starts at 3, before that at 0."""
    rows = torch.zeros(1, 1, dtype=DOUBLE)  # with exp features every far weight is 1
    options = {"projection": rows, "feature_map": "exp", "window": 2, "window_block": 3}
    keys = [0.1, -0.4, 0.3, 0.9, -0.7, 0.2, 1.1]
    for n, first in enumerate([0, 0, 0, 0, 3, 3, 3], start=1):
        expected = shares(*(math.exp(2 * x) if j >= first else 1.0 for j, x in enumerate(keys[:n])))
        assert weights_by_hand(2.0, keys[:n], **options) == pytest.approx(expected)


@pytest.mark.parametrize("causal", [True, False])
def test_taylor_is_the_second_order_series(causal: bool) -> None:
    inputs = make_inputs(nq=9, d=4, feature_map="taylor", causal=causal)
    s = inputs["q"] @ inputs["k"].mT / 2
    weights = (1 + s + s**2 / 2).tril(0 if causal else 9)
    expected = weights / weights.sum(-1, keepdim=True) @ inputs["v"]
    assert_close(favor_reference(**inputs), expected)


@pytest.mark.parametrize("window", [9, 12])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_wide_window_is_causal_attention(feature_map: str, window: int) -> None:
    inputs = make_inputs(nq=9, d=4, h=4, window=window, window_block=2, feature_map=feature_map)
    out, (kv, z, log_scale) = favor_reference(**inputs, return_state=True)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(out, expected)
    assert not kv.any() and not z.any() and (log_scale == -1e30).all()


def draws(m: int, heads: int, n: int, std: float, **options) -> tuple[Tensor, Tensor]:
    """Estimated weights [heads, n, n], one Gaussian projection per head, and the true scores."""
    rng = torch.Generator().manual_seed(1)
    q, k = std * torch.randn(2, n, 8, generator=rng, dtype=DOUBLE)
    rows = torch.randn(heads, m, 8, generator=rng, dtype=DOUBLE)
    tensors = (x.expand(1, heads, -1, -1) for x in (q, k, torch.eye(n, 8, dtype=DOUBLE)))
    return favor_reference(*tensors, rows, **options)[0, :, :, :n], q @ k.T / 8**0.5


def test_error_falls_with_the_root_of_the_number_of_features() -> None:
    """At larger norms the estimates are heavy-tailed, and the slope needs far more features."""
    errors = []
    for m in (16, 64, 256, 1024):
        estimates, scores = draws(m, heads=48, n=8, std=0.25)
        exact = torch.where(torch.ones(8, 8).tril() > 0, scores, -math.inf).softmax(-1)
        errors.append((estimates - exact).square().mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(1024 / 16)
    assert -0.6 < slope < -0.4, errors
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.003


def test_favor_is_unbiased_beside_an_exact_window() -> None:
    """Odds of a far key against an exact one, times the weight of that one, estimate e^s."""
    estimates, scores = draws(8, heads=4000, n=2, std=0.5, window=1, window_block=1)
    ratio = estimates[:, 1, 0] / estimates[:, 1, 1] * (scores[1, 1] - scores[1, 0]).exp()
    deviation = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 3 * deviation < 0.06


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_causal_in_every_bit(feature_map: str) -> None:
    inputs = make_inputs(nq=9, window=2, window_block=2, gate=True, feature_map=feature_map)
    out = favor_reference(**inputs)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name] * torch.where(torch.arange(9) < 6, 1, -7)[:, None]
    moved = favor_reference(**inputs)
    assert torch.equal(out[:, :, :6], moved[:, :, :6])
    assert not torch.isclose(out[:, :, 6:], moved[:, :, 6:]).all(-1).any()


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_left_padding_equals_the_row_alone(feature_map: str, window: int) -> None:
    inputs = make_inputs(nq=11, window=window, window_block=2, mask="left", feature_map=feature_map)
    padded, state = favor_reference(**inputs, return_state=True)
    for b, real in enumerate(inputs["key_mask"]):
        start = int((~real).sum())
        alone = {name: inputs[name][b : b + 1, :, start:] for name in ("q", "k", "v")}
        out, own = favor_reference(**inputs | alone | {"key_mask": None}, return_state=True)
        assert start == 1 + 2 * b
        assert_close(padded[b : b + 1, :, start:], out)
        assert_close(tuple(part[b : b + 1] for part in state), own)
        assert torch.equal(padded[b, :, :start], torch.zeros_like(padded[b, :, :start]))


@pytest.mark.parametrize("window, block", [(0, 1), (1, 1), (3, 1), (1, 4), (3, 2), (5, 3), (16, 2)])
@pytest.mark.parametrize("std", [1.0, 50.0])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_pieces_equal_the_whole(feature_map: str, std: float, window: int, block: int) -> None:
    """Each piece reads its tokens after the last W + b - 2 that are not in the state yet."""
    options = {"window": window, "window_block": block, "gate": window > 0, "std": std}
    inputs = make_inputs(nq=14, mask="left", feature_map=feature_map, **options)
    whole, final = favor_reference(**inputs, return_state=True)
    starts = (~inputs["key_mask"]).sum(1)
    outputs, state, done = [], None, 0
    for length in (2, 5, 1, 1, 4, 1):
        absorbed = (done - starts - window + 1).clamp_min(0) // block * block
        first = max(0, done - (window + block - 2)) if window else done
        columns = torch.arange(first, done + length)
        piece = {name: inputs[name][:, :, columns] for name in ("k", "v")}
        piece["q"] = inputs["q"][:, :, done : done + length]
        piece["key_mask"] = columns >= (starts + absorbed * (window > 0))[:, None]
        out, state = favor_reference(**inputs | piece, initial_state=state, return_state=True)
        outputs, done = [*outputs, out], done + length
    assert_close(torch.cat(outputs, 2), whole, 1e-12 * std**2)
    assert_close(state, final, 1e-12 * std**2)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_pieces_of_keys_seen_from_everywhere(feature_map: str) -> None:
    inputs = make_inputs(nq=4, nk=9, causal=False, mask="holes", feature_map=feature_map)
    whole, final = favor_reference(**inputs, return_state=True)
    k, v, mask = (inputs.pop(name).split([5, 4], 2 if name != "key_mask" else 1)
                  for name in ("k", "v", "key_mask"))  # fmt: skip
    state = None
    for piece in zip(k, v, mask, strict=True):
        inputs |= dict(zip(("k", "v", "key_mask"), piece, strict=True)) | {"initial_state": state}
        out, state = favor_reference(**inputs, return_state=True)
    assert_close(out, whole)
    assert_close(state, final)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_blind_rows_return_zeros_and_zero_gradients(feature_map: str) -> None:
    inputs = make_inputs(nq=5, feature_map=feature_map, state=True, window=2, window_block=1)
    mask = torch.tensor([[False] * 5, [False, False, True, True, False]])
    kv, z, _ = inputs["initial_state"]
    inputs["initial_state"] = (0 * kv, 0 * z, torch.full_like(z, -1e30))
    leaves = [inputs[name] for name in ("q", "k", "v")] + list(inputs["initial_state"][:2])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, state = favor_reference(**inputs | {"key_mask": mask}, return_state=True)
    assert torch.equal(out, favor_reference(**inputs | {"key_mask": mask, "initial_state": None}))
    blind = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert torch.equal(out.eq(0).all(-1).all(1), blind)
    assert not state[0][0].any() and not state[1][0].any() and (state[2][0] == -1e30).all()
    out.backward(torch.randn(out.shape, dtype=DOUBLE))
    assert not leaves[0].grad.transpose(1, 2)[blind].any()
    assert not any(leaf.grad.transpose(1, 2)[~mask].any() for leaf in leaves[1:3])
    assert not any(leaf.grad.any() for leaf in leaves[3:])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients(feature_map: str, window: int, order: int) -> None:
    options = {"window": window, "window_block": 1, "gate": window > 0, "feature_map": feature_map}
    inputs = make_inputs(b=1, hkv=1, m=2, per_head=True, state=True, mask="left", **options)
    kv, z, log_scale = inputs["initial_state"]
    names = [name for name in ("q", "k", "v", "projection", "log_gate") if name in inputs]
    tensors = {name: inputs[name] for name in names if inputs[name] is not None}
    tensors |= {"kv": kv, "z": z}

    def run(*values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        named["initial_state"] = (named.pop("kv"), named.pop("z"), log_scale)
        out, (kv1, z1, log_scale1) = favor_reference(**inputs | named, return_state=True)
        assert not log_scale1.requires_grad
        return out, kv1 * log_scale1.exp()[..., None], z1 * log_scale1.exp()

    values = [tensor.requires_grad_() for tensor in tensors.values()]
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(run, values, fast_mode=order == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype: torch.dtype) -> None:
    inputs = make_inputs(nq=7, window=2, window_block=2, mask="holes", state=True, gate=True)
    low = {name: inputs[name].to(dtype) for name in ("q", "k", "v")}
    high = {name: tensor.float() for name, tensor in low.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = favor_reference(**inputs | low, return_state=True)
    assert out.dtype == dtype and all(part.dtype == torch.float32 for part in state)
    assert torch.equal(out, favor_reference(**inputs | high).to(dtype))

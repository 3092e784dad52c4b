"""Growth and crossover of measured times: known answers, and what must not be compared."""

import math

import numpy as np
import pytest

from attnopt.bench.growth import (
    crossover,
    crossover_words,
    exponent,
    floor_seconds,
    is_reported,
    median,
    ratio,
    roofline_percent,
    speedups,
    spread,
)


def cell(n, times, **changes):
    """A cell that was timed and passed its check."""
    times = times if isinstance(times, list) else [times]
    place = {"phase": "fwd", "dtype": "float32", "B": 1, "H": 2, "D": 4, "N": n}
    facts = {"status": "ok", "times": times, "errors": {"out": 1e-7}, "limit": 1e-5}
    return place | facts | {"bytes": 0, "flops": 0, "minimal_bytes": 0} | changes


def curve(seconds, lengths=(256, 512, 1024, 2048)):
    """Cells whose time is a function of N."""
    return [cell(n, seconds(n)) for n in lengths]


def test_median_and_quartiles():
    one = cell(1, [5.0, 1.0, 2.0, 4.0, 3.0])
    assert median(one) == 3.0
    assert spread(one) == (2.0, 4.0)


def test_rounds_are_paired_by_index():
    """A machine that slows down in one round slows both: the ratio does not see it."""
    slow = np.array([1.0, 7.0, 1.0, 3.0, 1.0])
    assert ratio(cell(64, list(slow)), cell(64, list(2.5 * slow))) == (2.5, 2.5, 2.5)
    assert ratio(cell(64, [1.0, 2.0, 4.0]), cell(64, [4.0, 4.0, 4.0])) == (2.0, 1.5, 3.0)


def test_a_round_without_partner_does_not_count():
    assert ratio(cell(64, [1.0, 1.0, 100.0]), cell(64, [3.0, 3.0]))[0] == 3.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("N", 128), ("B", 2), ("H", 1), ("D", 8), ("dtype", "float16"), ("phase", "bwd")],
)
def test_different_shapes_are_not_compared(key, value):
    with pytest.raises(ValueError, match=f"the same {key}, got"):
        ratio(cell(64, 1.0), cell(64, 1.0, **{key: value}))


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_law_is_exact(power):
    fit = exponent((n, 3e-7 * n**power) for n in (256, 1024, 2048, 4096, 65536))
    assert fit.slope == pytest.approx(power, abs=1e-12)
    assert fit.error == pytest.approx(0, abs=1e-7)
    assert (fit.lengths, fit.start) == (3, 2048)


def test_short_lengths_count_only_where_long_ones_are_few():
    law = [(n, 1.0 + n) for n in (256, 512, 1024, 2048, 4096)]
    few = exponent(law)
    assert (few.lengths, few.start) == (5, 256)
    many = exponent([*law, (8192, 8193.0)])
    assert (many.lengths, many.start) == (3, 2048)
    assert few.slope < many.slope < 1


def test_the_standard_error_is_that_of_least_squares():
    """Against the textbook: residues +e, -2e, +e leave the slope and have 1 degree of freedom."""
    e, step = 0.01, math.log(2)
    points = [(2048 << i, math.exp(2 * i * step + s * e)) for i, s in enumerate((1, -2, 1))]
    fit = exponent(points)
    assert fit.slope == pytest.approx(2)
    assert fit.error == pytest.approx(math.sqrt(6 * e**2 / 1 / (2 * step**2)))


def test_the_standard_error_covers_noise():
    """Of many noisy laws, about two thirds lie within one standard error (t, 4 degrees)."""
    random = np.random.default_rng(0)
    lengths = [2048 << i for i in range(6)]
    hits = 0
    for _ in range(300):
        fit = exponent((n, n**1.3 * math.exp(0.05 * random.standard_normal())) for n in lengths)
        hits += abs(fit.slope - 1.3) < fit.error
    assert 0.55 < hits / 300 < 0.72


def test_few_points_and_points_without_a_logarithm():
    assert exponent([]) is None
    assert exponent([(64, 1.0)]) is None
    assert exponent([(64, 1.0), (64, 2.0)]) is None
    assert exponent([(64, 0), (128, 0), (256, 5)]) is None
    two = exponent([(64, 1.0), (128, 4.0), (256, 0.0)])
    assert (two.slope, two.error, two.lengths) == (pytest.approx(2), None, 2)


def test_the_crossover_of_two_power_laws_is_where_they_meet():
    """900 * n against n^2 meet at n = 900, between two measured lengths."""
    linear, square = curve(lambda n: 900.0 * n), curve(lambda n: float(n * n))
    assert crossover(linear, square) == pytest.approx(900)
    assert crossover_words(linear, square) == "from N ≈ 900"
    assert crossover(square, linear) is None
    assert crossover_words(square, linear) == "never up to N = 2,048"


def test_ahead_everywhere_and_never():
    fast, slow = curve(lambda n: 1.0 * n), curve(lambda n: 3.0 * n)
    assert crossover(fast, slow) == 256
    words = crossover_words(fast, slow)
    assert words == "everywhere measured, from N = 256"
    assert crossover(slow, fast) is None
    assert crossover(slow, slow) is None, "equal is not ahead"


def test_the_crossover_is_the_first_length_from_which_it_stays_ahead():
    ratios = [(256, 0.5), (512, 2.0), (1024, 0.5), (2048, 2.0), (4096, 3.0)]
    own, partner = [cell(n, 1.0) for n, _ in ratios], [cell(n, value) for n, value in ratios]
    assert speedups(own, partner) == ratios
    assert crossover(own, partner) == pytest.approx(1024 * math.sqrt(2))
    partner[-1] = cell(4096, 0.9)
    assert crossover(own, partner) is None


def test_equal_at_the_first_length_is_not_ahead_of_it():
    own, partner = curve(lambda n: 1.0), curve(lambda n: n / 256)
    assert crossover(own, partner) == pytest.approx(256)
    assert crossover_words(own, partner) == "from N ≈ 260"


def test_only_common_lengths_count():
    own, partner = curve(lambda n: 1.0), curve(lambda n: 2.0, (1024, 2048, 4096))
    assert crossover(own, partner) == 1024
    assert crossover(own, curve(lambda n: 2.0, (4096,))) is None
    words = crossover_words(own, curve(lambda n: 2.0, (4096,)))
    assert words == "not comparable: no length in common"


def test_a_curve_has_one_cell_per_length():
    with pytest.raises(ValueError, match="two at N = 256"):
        speedups([cell(256, 1.0), cell(256, 2.0, B=2)], [cell(256, 1.0)])


@pytest.mark.parametrize(
    "change",
    [
        {"status": "failed its check"},
        {"status": "out of memory"},
        {"errors": {"out": 2e-5}},
        {"errors": {"out": 1e-7, "dq": math.nan}},
        {"errors": {"out": None}},
        {"errors": {}},
    ],
)
def test_what_did_not_pass_its_check_does_not_count(change):
    bad = [cell(256, 0.1, **change)]
    assert is_reported(cell(256, 0.1))
    assert not is_reported(bad[0])
    assert speedups(bad, [cell(256, 1.0)]) == speedups([cell(256, 1.0)], bad) == []


def test_the_floor_is_the_larger_of_two_times():
    ceilings = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": {"float32": 100.0}}
    moving = cell(64, 8.0, flops=100, minimal_bytes=40)
    computing = cell(64, 8.0, flops=600, minimal_bytes=40)
    assert floor_seconds(moving, ceilings) == 4.0
    assert floor_seconds(computing, ceilings) == 6.0
    assert roofline_percent(computing, ceilings) == 75.0


@pytest.mark.parametrize(
    "ceilings",
    [None, {}, {"copy_bytes_per_s": 1.0}, {"matmul_flops_per_s": {"float32": 1.0}},
     {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": {"float16": 1.0}}],
)  # fmt: skip
def test_without_ceilings_there_is_no_percentage(ceilings):
    assert roofline_percent(cell(64, 1.0, flops=1, minimal_bytes=1), ceilings) is None


def test_without_work_there_is_no_percentage():
    ceilings = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": {"float32": 100.0}}
    assert roofline_percent(cell(64, 1.0), ceilings) is None

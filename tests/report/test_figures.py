"""Numbers as people read them."""

import math
import random
from statistics import NormalDist, pstdev

import pytest

from penchant.report.figures import duration, magnitude, number, percent, roc_interval, size, wilson_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6931, "0.693"),
        (0.09996, "0.100"),
        (0.1, "0.1"),
        (1e-5, "1e-5"),
        (2.5e-7, "2.5e-7"),
        (0.000123, "1.23e-4"),
        (0.001, "0.001"),
        (-118.4, "−118"),
        (9.999, "10.0"),
        (999.9, "1,000"),
        (12345.6, "12,300"),
        (12345, "12,345"),
        (1.5e9, "1.5e9"),
        (0.0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_have_three_significant_digits_and_integers_all(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units_are_those_of_the_size_of_the_thing() -> None:
    assert [duration(s) for s in (4.26, 62, 412.7, 3725, 273600)] == [
        "4.3 s",
        "62 s",
        "6 min 53 s",
        "1 h 2 min",
        "3 d 4 h",
    ]
    assert [size(n) for n in (512, 3 * 2**20, 3_400_000_000)] == ["512 B", "3 MiB", "3.17 GiB"]
    assert [magnitude(n) for n in (950, 134_515_008, 7.2e9)] == ["950", "135 million", "7.2 billion"]
    assert percent(0.4464) == "44.6%"


def test_wilson_interval_is_the_one_worked_by_hand() -> None:
    # p = 0.9, n = 10, z = 1.96, z^2 = 3.8416: middle (0.9 + 0.19208) / 1.38416 = 0.788984,
    # half 1.96 sqrt(0.009 + 0.009604) / 1.38416 = 1.96 * 0.1363965 / 1.38416 = 0.193140.
    low, high = wilson_interval(0.9, 10, z=1.96)
    assert low == pytest.approx(0.595844, abs=1e-5)
    assert high == pytest.approx(0.982124, abs=1e-5)


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (1.0, 1), (0.0, 50), (1.0, 50), (0.3, 7), (0.5, 10_000)])
def test_wilson_bounds_solve_the_score_equation(share: float, n: int) -> None:
    z = 1.959964
    for bound in wilson_interval(share, n):
        assert 0 <= bound <= 1
        # The bounds are the q with |p - q| = z sqrt(q (1 - q) / n).
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_wilson_interval_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="num_trials"):
        wilson_interval(0.5, 0)


def test_roc_interval_is_the_one_worked_by_hand() -> None:
    # A = 0.75, A^2 = 0.5625, Q1 = 0.75 / 1.25 = 0.6, Q2 = 1.125 / 1.75 = 0.642857; of 4 and 6 examples
    # SE^2 = (0.1875 + 3 * 0.0375 + 5 * 0.080357) / 24 = 0.701786 / 24 = 0.0292411, SE = 0.171000.
    low, high = roc_interval(0.75, 4, 6, z=1.0) or (0, 0)
    assert (low, high) == (pytest.approx(0.579, abs=1e-6), pytest.approx(0.921, abs=1e-6))
    # Of 6 and 4 it is (0.1875 + 5 * 0.0375 + 3 * 0.080357) / 24 = 0.0256696, SE = 0.160217: the classes differ.
    assert roc_interval(0.75, 6, 4, z=1.0) == pytest.approx((0.589783, 0.910217), abs=1e-6)
    assert roc_interval(0.75, 4, 6) == (pytest.approx(0.75 - 1.959964 * 0.171, abs=1e-5), 1.0)


def test_roc_interval_is_as_wide_as_areas_of_exponential_scores_scatter() -> None:
    # For scores with exponential distributions Q1 and Q2 are exact. P(positive > negative) = 1 / (1 + rate).
    noise = random.Random(5)
    num_positive, num_negative, rate = 12, 20, 0.25
    areas = []
    for _ in range(3000):
        negative = [noise.expovariate(1.0) for _ in range(num_negative)]
        positive = [noise.expovariate(rate) for _ in range(num_positive)]
        areas.append(sum(p > n for p in positive for n in negative) / (num_positive * num_negative))
    low, high = roc_interval(0.8, num_positive, num_negative, z=1.0) or (0, 0)
    assert (high - low) / 2 == pytest.approx(pstdev(areas), rel=0.05)


def test_both_intervals_agree_on_how_sure_95_percent_is() -> None:
    z = NormalDist().inv_cdf(0.975)
    assert roc_interval(0.6, 9, 9) == pytest.approx(roc_interval(0.6, 9, 9, z=z), abs=1e-6)
    assert wilson_interval(0.6, 9) == pytest.approx(wilson_interval(0.6, 9, z=z), abs=1e-6)


@pytest.mark.parametrize("unknown", [(0.7, 0, 5), (0.7, 5, 0), (0.7, 5, -1), (1.0, 5, 5), (0.0, 5, 5)])
def test_one_class_alone_and_an_area_without_spread_have_no_roc_interval(unknown: tuple[float, int, int]) -> None:
    assert roc_interval(*unknown) is None

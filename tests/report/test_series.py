"""Thinning keeps what a reader looks for in a curve."""

import math
import random

import pytest

from penchant.report.series import Series, finite, spread_evenly, thin


def test_thinning_keeps_extremes_and_ends() -> None:
    noise = random.Random(1)
    points = [(float(i), noise.random()) for i in range(100_000)]
    points[31_415] = (31_415.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert {points[0], points[-1], points[31_415], points[77_777]} <= set(kept)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)


def test_thinning_keeps_every_extreme_of_every_stretch() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(40_000)]
    values = [value for _, value in thin(points, 400) if value is not None]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    assert turns >= 25  # sin(i / 500) turns 25 times up to i = 40,000


def test_thinning_keeps_a_gap_and_the_last_number_before_it() -> None:
    points = [(float(i), 1.0 if i < 900 else None) for i in range(1000)]
    kept = thin(points, 40)
    assert (899.0, 1.0) in kept
    assert kept[-1] == (999.0, None)


def test_short_series_stay_as_they_are() -> None:
    points = [(1.0, 2.0), (2.0, None)]
    assert thin(points, 400) == points
    assert spread_evenly([1, 2, 3], 3) == [1, 2, 3]


def test_even_spreading_keeps_both_ends() -> None:
    kept = spread_evenly(range(1001), 11)
    assert kept == list(range(0, 1001, 100))


def test_last_skips_what_is_not_finite_and_says_so() -> None:
    series = Series(((0, 1.0), (1, 2.0), (2, None)))
    assert (series.first, series.last, series.ends_broken) == (1.0, 2.0, True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", True, [1], 10**1000, 1e300])
def test_what_no_axis_can_show_is_not_finite(value: object) -> None:
    assert finite(value) is None

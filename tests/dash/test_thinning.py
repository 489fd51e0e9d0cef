"""Long curves in little memory: no spike is lost, both ends are exact, short curves are whole."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.dash import thinning
from penchant.dash.thinning import ThinnedCurve


def curve_of(values: list[float], chunks: list[int] | None = None) -> ThinnedCurve:
    curve, steps = ThinnedCurve(), np.arange(1, len(values) + 1, dtype=np.float64)
    bounds = np.cumsum([0, *(chunks or []), len(values)]).clip(0, len(values))
    for start, stop in itertools.pairwise(bounds):
        curve.add(steps[start:stop], np.array(values[start:stop], dtype=np.float64))
    return curve


def test_a_curve_of_a_thousand_points_is_whole() -> None:
    values = np.random.default_rng(0).normal(size=1000).tolist()
    series = curve_of(values).series()
    assert series.points == tuple(enumerate(values, start=1))
    assert series.num_left_out == 0


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), max_size=400),
    st.lists(st.integers(0, 90), max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_every_stretch_keeps_its_extremes_however_the_points_come(values: list[float], chunks: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thinning, "_MOST_BUCKETS", 16)
        curve = curve_of(values, chunks)
        whole = curve_of(values)
    assert curve.series() == whole.series()
    kept = dict(curve.series().points)
    assert len(kept) <= 4 * 16 + curve._size + 2
    for step, value in kept.items():
        given_value = values[int(step) - 1]
        assert value == given_value or (value is None and not math.isfinite(given_value))
    numbers = [(step, value) for step, value in enumerate(values, start=1) if math.isfinite(value)]
    if numbers:
        assert kept[numbers[0][0]] == numbers[0][1]
        assert kept[numbers[-1][0]] == numbers[-1][1]
    for start in range(0, len(values), curve._size):
        stretch = [value for value in values[start : start + curve._size] if math.isfinite(value)]
        there = [kept[step] for step in range(start + 1, start + 1 + curve._size) if kept.get(step) is not None]
        if stretch:
            assert (min(there), max(there)) == (min(stretch), max(stretch))
        if len(stretch) < len(values[start : start + curve._size]):
            assert None in [kept.get(step, 0) for step in range(start + 1, start + 1 + curve._size)]


def test_one_spike_among_a_hundred_thousand_stays() -> None:
    values = [1.0] * 100_000
    values[77_776], values[12_345], values[50_000] = 50.0, -3.0, math.nan
    series = curve_of(values, [999] * 90).series()
    points = dict(series.points)
    assert (points[77_777], points[12_346], points[50_001]) == (50.0, -3.0, None)
    assert len(points) < 3300
    assert len(points) + series.num_left_out == 100_000

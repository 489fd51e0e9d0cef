"""A chart shows its values: read back from the drawing by its own axes, they are the numbers that went in."""

import math
import random
from xml.etree import ElementTree

import pytest

from penchant.report.charts import Baseline, Group, Line, histogram, line_chart, nice_step, tick_labels
from penchant.report.series import Series


def series(*values: float | None) -> Series:
    return Series(tuple((10.0 * (i + 1), value) for i, value in enumerate(values)))


def to_number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def axis(svg: ElementTree.Element, which: str) -> tuple[float, float]:
    """Slope and offset of the map from a coordinate back to the quantity, from the first and the last tick."""
    coordinate = {"x": "x", "y": "y"}[which]
    found = [
        (float(text.get(coordinate, "")), to_number(text.text or ""))
        for text in svg.iter("text")
        if text.get("class") == f"tick {which}"
    ]
    (c0, v0), (c1, v1) = found[0], found[-1]
    slope = (v1 - v0) / (c1 - c0)
    return slope, v0 - slope * c0


def read_back(svg: ElementTree.Element, polyline: ElementTree.Element) -> list[tuple[float, float]]:
    (x_slope, x_offset), (y_slope, y_offset) = axis(svg, "x"), axis(svg, "y")
    corners = [tuple(map(float, corner.split(","))) for corner in polyline.get("points", "").split()]
    return [(x * x_slope + x_offset, y * y_slope + y_offset) for x, y in corners]


@pytest.mark.parametrize(
    "values",
    [
        (0.69, 0.5, 0.41),
        (-1203.0, -1201.5, -1204.25),
        (1e-6, 1e-5, 2e-6),
        (0.0, 3e7, 1.2e8),
        (-0.3, 0.0, 0.9),
        (5.0, 5.0, 5.0),
    ],
)
def test_points_stand_where_the_axes_say(values: tuple[float, ...]) -> None:
    svg = ElementTree.fromstring(line_chart("c", "Title", [Line("training", series(*values), "first")]))
    (polyline,) = svg.iter("polyline")
    (y_slope, _) = axis(svg, "y")
    points = read_back(svg, polyline)
    # A coordinate has one decimal: that is what reading back may be off by.
    assert [x for x, _ in points] == pytest.approx([10, 20, 30], abs=0.06)
    assert [y for _, y in points] == pytest.approx(values, abs=0.11 * abs(y_slope))


def test_long_curves_end_at_the_last_value_and_keep_their_spike() -> None:
    noise = random.Random(0)
    values = [noise.random() for _ in range(50_000)]
    values[20_000] = 30.0
    svg = ElementTree.fromstring(line_chart("c", "Title", [Line("training", series(*values), "first")]))
    (polyline,) = svg.iter("polyline")
    points = read_back(svg, polyline)
    assert len(points) <= 400
    slope = abs(axis(svg, "y")[0])
    assert points[-1][1] == pytest.approx(values[-1], abs=0.11 * slope)
    assert max(y for _, y in points) == pytest.approx(30.0, abs=0.11 * slope)


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    line = Line("training", series(1.0, 2.0, None, 3.0, 4.0, None, 5.0), "first")
    svg = ElementTree.fromstring(line_chart("c", "Title", [line]))
    assert [len(p.get("points", "").split()) for p in svg.iter("polyline")] == [2, 2, 1]
    assert len(list(svg.iter("circle"))) == 1  # the lone point can still be seen


@pytest.mark.parametrize("value", [0.0, 1e-30, -7.25, 1e90])
def test_a_single_point_lies_within_the_drawing(value: float) -> None:
    svg = ElementTree.fromstring(line_chart("c", "Title", [Line("training", series(value), "first")]))
    (circle,) = svg.iter("circle")
    assert 0 < float(circle.get("cx", "")) < 360
    assert 0 < float(circle.get("cy", "")) < 212


def test_everything_drawn_lies_within_the_drawing() -> None:
    lines = [Line("training", series(3.0, -8.0, 55.0), "first"), Line("held-out", series(1.0, 90.0), "second", True)]
    svg = ElementTree.fromstring(line_chart("c", "Title", lines, [Baseline("longer one wins", 120.0)]))
    for polyline in svg.iter("polyline"):
        for corner in polyline.get("points", "").split():
            x, y = map(float, corner.split(","))
            assert 52 <= x <= 350
            assert 10 <= y <= 172
    (base,) = (line for line in svg.iter("line") if line.get("class") == "base")
    slope, offset = axis(svg, "y")
    assert float(base.get("y1", "")) * slope + offset == pytest.approx(120.0, abs=0.11 * abs(slope))


def test_a_chart_is_told_in_words_too() -> None:
    svg = ElementTree.fromstring(line_chart("c", "Loss & more", [Line("training", series(0.7, 0.2, 0.4), "first")]))
    assert svg.get("role") == "img"
    title, desc = svg.find("title"), svg.find("desc")
    assert title is not None
    assert desc is not None
    assert svg.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    assert title.text == "Loss & more"
    assert desc.text == "training: first 0.7 at step 10, last 0.4 at step 30, lowest 0.2, highest 0.7"


def test_steps_between_ticks_are_nice_and_labels_tell_them_apart() -> None:
    assert [nice_step(raw) for raw in (0.9, 1.0, 1.1, 2.2, 3.0, 7.0)] == pytest.approx([1, 1, 2, 2.5, 5, 10])
    assert tick_labels([0.0, 2e-6, 4e-6], 2e-6) == ["0", "2e-6", "4e-6"]
    assert tick_labels([0.0, 0.25, 0.5], 0.25) == ["0.00", "0.25", "0.50"]
    assert tick_labels([-1202.0, -1201.0, -1200.0], 1.0) == ["−1,202", "−1,201", "−1,200"]
    assert tick_labels([1e6, 1.5e6, 2e6], 5e5) == ["1e6", "1.5e6", "2e6"]


def test_histogram_counts_every_value_once_and_draws_shares() -> None:
    noise = random.Random(5)
    groups = [Group("chosen", [noise.gauss(1, 1) for _ in range(500)], "first"), Group("rejected", [-2.0], "second")]
    text, bins = histogram("h", "Rewards", "reward", groups)
    assert [sum(b.counts[g] for b in bins) for g in (0, 1)] == [500, 1]
    for g, group in enumerate(groups):
        for b in bins:
            inside = sum(b.low <= value < b.high for value in group.values)
            assert b.counts[g] == inside
    svg = ElementTree.fromstring(text)
    tallest = [max(y for _, y in read_back(svg, polygon)) for polygon in svg.iter("polygon")]
    expected = [100 * max(b.counts[g] for b in bins) / len(group.values) for g, group in enumerate(groups)]
    assert tallest == pytest.approx(expected, abs=0.11 * abs(axis(svg, "y")[0]))


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-20, 2e-20], [-1e80, 1e80], [0.1 * i for i in range(11)]])
def test_histograms_of_odd_values_hold_them_all(values: list[float]) -> None:
    text, bins = histogram("h", "Rewards", "reward", [Group("chosen", values, "first")])
    assert sum(b.counts[0] for b in bins) == len(values)
    assert all(b.low < b.high and math.isfinite(b.high) for b in bins)
    ElementTree.fromstring(text)

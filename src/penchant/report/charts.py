"""Small charts as SVG: lines over the steps, and histograms. No script, no style of their own but class names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from penchant.report.figures import Number, number
from penchant.report.series import Point, Series, spread_evenly, thin

WIDTH, HEIGHT = 360, 212
LEFT, RIGHT, TOP, BOTTOM = 52, 350, 10, 172
MAX_POINTS = 400
MAX_MARKERS = 24


@dataclass(frozen=True)
class Line:
    """One curve of a chart; `kind` is the class that gives it its colour and dash."""

    label: str
    series: Series
    kind: str
    marked: bool = False


@dataclass(frozen=True)
class Baseline:
    """A level to compare with; `kind` is the class that gives its line its stroke."""

    label: str
    value: Number
    kind: str = "base"


@dataclass(frozen=True)
class Group:
    """The values of one distribution of a histogram."""

    label: str
    values: Sequence[Number]
    kind: str


@dataclass(frozen=True)
class Bin:
    """One interval of a histogram and the number of values of each group in it."""

    low: Number
    high: Number
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Scale:
    """The straight map from a quantity to a coordinate of the drawing."""

    low: Number
    high: Number
    start: Number
    end: Number
    step: Number
    """The distance of its ticks."""

    def __call__(self, value: Number) -> Number:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_step(raw: Number) -> Number:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))


def ticks(scale: Scale) -> list[Number]:
    """The multiples of the scale's step that lie on it."""
    first, last = math.ceil(scale.low / scale.step - 1e-9), math.floor(scale.high / scale.step + 1e-9)
    return [_multiple(i, scale.step) for i in range(first, last + 1)]


def tick_labels(values: Sequence[Number], step: Number) -> list[str]:
    """The values with just the digits that tell neighbours apart."""
    largest = max((abs(value) for value in values), default=0.0)
    last_digit = math.floor(math.log10(step))
    if abs(step / 10.0**last_digit - 2.5) < 0.01:
        last_digit -= 1
    if last_digit >= -4 and largest < 1e6:
        texts = [f"{abs(value):,.{max(0, -last_digit)}f}" for value in values]
    else:
        texts = [_scientific(abs(value), last_digit) for value in values]
    return [f"−{text}" if value < 0 else text for value, text in zip(values, texts, strict=True)]


def line_chart(name: str, title: str, lines: Sequence[Line], baselines: Sequence[Baseline] = ()) -> str:
    """The curves over the steps as one SVG element; each is thinned to about 400 points, its extremes kept."""
    steps = [step for line in lines for step, _ in line.series.points]
    values = [value for line in lines for _, value in line.series.finite]
    x = _step_scale(min(steps), max(steps))
    y = _value_scale([*values, *(baseline.value for baseline in baselines)])
    svg = drawing(name, title, "; ".join(_describe(line) for line in lines))
    _draw_axes(svg, x, y, "step")
    for baseline in baselines:
        height = _coordinate(y(baseline.value))
        SubElement(svg, "line", {"class": "base", "x1": str(LEFT), "x2": str(RIGHT), "y1": height, "y2": height})
    for line in sorted(lines, key=lambda line: line.marked):  # the noisy curves first, under the others
        _draw_line(svg, line, x, y)
    return tostring(svg, encoding="unicode")


def histogram(name: str, title: str, unit: str, groups: Sequence[Group]) -> tuple[str, list[Bin]]:
    """The shares of each group's values over common bins as one SVG element, and the bins."""
    bins = _count(groups)
    shares = [[100 * b.counts[g] / len(group.values) for b in bins] for g, group in enumerate(groups)]
    low, high = bins[0].low, bins[-1].high
    x = Scale(low, high, LEFT, RIGHT, nice_step((high - low) / 5))
    y = _value_scale([0.0, *(share for of_group in shares for share in of_group)])
    svg = drawing(name, title, "; ".join(_describe_group(group) for group in groups))
    _draw_axes(svg, x, y, unit)
    for group, of_group in zip(groups, shares, strict=True):
        corners = [f"{x(bins[0].low):.1f},{y(0):.1f}"]
        for b, share in zip(bins, of_group, strict=True):
            corners += [f"{x(edge):.1f},{y(share):.1f}" for edge in (b.low, b.high)]
        corners.append(f"{x(bins[-1].high):.1f},{y(0):.1f}")
        SubElement(svg, "polygon", {"class": f"area {group.kind}", "points": " ".join(corners)})
    if x.low < 0 < x.high:
        zero = _coordinate(x(0))
        SubElement(svg, "line", {"class": "zero", "x1": zero, "x2": zero, "y1": str(TOP), "y2": str(BOTTOM)})
    return tostring(svg, encoding="unicode"), bins


def swatch(kind: str, marked: bool = False, area: bool = False) -> str:
    """The key to a line or an area, for the legend beside a chart."""
    svg = Element("svg", {"class": "swatch", "viewBox": "0 0 30 10", "width": "30", "height": "10"})
    svg.set("aria-hidden", "true")
    if area:
        SubElement(svg, "rect", {"class": f"area {kind}", "x": "2", "y": "1", "width": "26", "height": "8"})
    else:
        of_line = "base" if kind == "base" else _line_class(kind, marked)
        SubElement(svg, "polyline", {"class": of_line, "points": "0,5 30,5"})
    if marked:
        _draw_marker(svg, 15, 5, kind)
    return tostring(svg, encoding="unicode")


def drawing(name: str, title: str, description: str, height: int = HEIGHT) -> Element:
    """An empty drawing that says in words what it shows."""
    ids = f"{name}-title {name}-desc"
    svg = Element("svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-labelledby": ids})
    SubElement(svg, "title", {"id": f"{name}-title"}).text = title
    SubElement(svg, "desc", {"id": f"{name}-desc"}).text = description
    return svg


def _room(low: Number, high: Number, least: Number) -> tuple[Number, Number]:
    """The range itself, or some room around it when it is a single value to the eye of a double."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = max(least, abs(low) * 0.1) / 2
    return low - half, high + half


def _value_scale(values: Sequence[Number]) -> Scale:
    low, high = _room(min(values), max(values), 0.0)
    if low == high:  # All values are 0.
        low, high = low - 0.5, high + 0.5
    step = nice_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(_multiple(first, step), _multiple(last, step), BOTTOM, TOP, step)


def _step_scale(first: Number, last: Number) -> Scale:
    low, high = _room(min(first, 0.0), last, 1.0)
    step = nice_step((high - low) / 4)
    # There is no step 2.5 of a training.
    return Scale(low, high, LEFT, RIGHT, 1.0 if step < 1 else 5.0 if step == 2.5 else step)


def _describe(line: Line) -> str:
    numbers = line.series.finite
    if not numbers:
        return f"{line.label}: no finite value"
    (first_step, first), (last_step, last) = numbers[0], numbers[-1]
    values = [value for _, value in numbers]
    return (
        f"{line.label}: first {number(first)} at step {number(int(first_step))}, "
        f"last {number(last)} at step {number(int(last_step))}, "
        f"lowest {number(min(values))}, highest {number(max(values))}"
    )


def _describe_group(group: Group) -> str:
    ordered = sorted(group.values)
    return (
        f"{group.label}: {number(len(ordered))} values, lowest {number(ordered[0])}, "
        f"median {number(ordered[len(ordered) // 2])}, highest {number(ordered[-1])}"
    )


def _draw_axes(svg: Element, x: Scale, y: Scale, unit: str) -> None:
    y_ticks, x_ticks = ticks(y), ticks(x)
    for value, label in zip(y_ticks, tick_labels(y_ticks, y.step), strict=True):
        height = _coordinate(y(value))
        SubElement(svg, "line", {"class": "grid", "x1": str(LEFT), "x2": str(RIGHT), "y1": height, "y2": height})
        place = {"class": "tick y", "x": str(LEFT - 7), "y": height, "dy": "0.32em", "text-anchor": "end"}
        SubElement(svg, "text", place).text = label
    for value, label in zip(x_ticks, tick_labels(x_ticks, x.step), strict=True):
        place = {"class": "tick x", "x": _coordinate(x(value)), "y": str(BOTTOM + 17)}
        # A label at the right edge would stand half outside the drawing.
        place["text-anchor"] = "end" if x(value) > RIGHT - 14 else "middle"
        SubElement(svg, "text", place).text = label
    middle = {"class": "unit", "x": str((LEFT + RIGHT) / 2), "y": str(HEIGHT - 5), "text-anchor": "middle"}
    SubElement(svg, "text", middle).text = unit


def _draw_line(svg: Element, line: Line, x: Scale, y: Scale) -> None:
    thinned = thin(line.series.points, MAX_POINTS)
    for run in _unbroken(thinned):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in run)
        SubElement(svg, "polyline", {"class": _line_class(line.kind, line.marked), "points": points})
        if len(run) == 1 and not line.marked:
            _draw_marker(svg, x(run[0][0]), y(run[0][1]), line.kind)
    if line.marked:
        for step, value in spread_evenly([p for run in _unbroken(thinned) for p in run], MAX_MARKERS):
            _draw_marker(svg, x(step), y(value), line.kind)


def _line_class(kind: str, marked: bool) -> str:
    return f"line {kind} held-out" if marked else f"line {kind}"


def _draw_marker(svg: Element, x: Number, y: Number, kind: str) -> None:
    if kind == "first":
        place = {"cx": _coordinate(x), "cy": _coordinate(y), "r": "2.7"}
        SubElement(svg, "circle", {"class": f"mark {kind}", **place})
    else:
        place = {"x": _coordinate(x - 2.4), "y": _coordinate(y - 2.4), "width": "4.8", "height": "4.8"}
        SubElement(svg, "rect", {"class": f"mark {kind}", **place})


def _unbroken(points: Sequence[Point]) -> Iterator[list[tuple[Number, Number]]]:
    """The stretches between values that are not finite."""
    run: list[tuple[Number, Number]] = []
    for step, value in points:
        if value is not None:
            run.append((step, value))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _count(groups: Sequence[Group], target: int = 20) -> list[Bin]:
    values = [value for group in groups for value in group.values]
    low, high = _room(min(values), max(values), 0.0)
    step = nice_step((high - low) / target) if high > low else 1.0
    start = math.floor(low / step + 1e-9)
    num_bins = max(1, math.ceil(high / step - 1e-9) - start)
    counts = [[0] * len(groups) for _ in range(num_bins)]
    for g, group in enumerate(groups):
        for value in group.values:
            counts[min(max(math.floor(value / step) - start, 0), num_bins - 1)][g] += 1
    return [
        Bin(_multiple(start + i, step), _multiple(start + i + 1, step), tuple(of_bin))
        for i, of_bin in enumerate(counts)
    ]


def _multiple(i: int, step: Number) -> Number:
    """i * step without the rounding noise of 3 * 0.1, which would otherwise stand in a label."""
    return round(i * step, 12 - math.floor(math.log10(step)))


def _scientific(value: Number, last_digit: int) -> str:
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{max(0, math.floor(math.log10(value)) - last_digit)}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"


def _coordinate(value: Number) -> str:
    return f"{value:.1f}"

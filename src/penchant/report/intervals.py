"""The chart of several accuracies, each with its interval: one row for each, as in a forest plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup
from rich.cells import cell_len

from penchant.report.charts import BOTTOM, HEIGHT, RIGHT, WIDTH, Baseline, Scale, drawing, nice_step, swatch, ticks
from penchant.report.charts import tick_labels as labels_of
from penchant.report.figures import MISSING, Number, percent
from penchant.report.units import Ends, Unit

ROW = 17
FIRST_ROW = 22
MAX_LABEL = 24
"""The longest label beside the chart, in cells of a terminal; a wide character takes two."""


@dataclass(frozen=True)
class Interval:
    """A share and the ends of its interval, None when they are unknown."""

    label: str
    share: Number
    ends: Ends | None = None


def interval_chart(name: str, title: str, unit: str, rows: Sequence[Interval], baselines: Sequence[Baseline]) -> str:
    """A mark at each share with a bar over its interval, in per cent, as one SVG element as high as its rows need."""
    labels = short_names([row.label for row in rows], MAX_LABEL)
    shares = [*(base.value for base in baselines), *(end for row in rows for end in (row.share, *(row.ends or ())))]
    x = _scale(100 * min(shares), 100 * max(shares), start=14 + 6.1 * max(map(cell_len, labels)))
    bottom = FIRST_ROW + ROW * len(rows) + 6
    svg = drawing(name, title, "; ".join(map(_describe, rows)), bottom + HEIGHT - BOTTOM)
    _draw_ticks(svg, x, bottom, unit)
    for base in baselines:
        SubElement(svg, "line", {"class": base.kind, **_upright(x(100 * base.value), bottom)})
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        _draw_row(svg, row, label, x, FIRST_ROW + ROW * (i + 0.5) + 3)
    return tostring(svg, encoding="unicode")


def accuracy_chart(
    runs: Sequence[tuple[str, Number | None, Ends | None]], baselines: Mapping[str, Number], of: Unit
) -> dict[str, Any] | None:
    """The chart of held-out accuracies with its legend, as a template shows them; None when there are none.

    A run is its name, its accuracy and the interval of that; `of` is what the accuracies were measured on.
    """
    rows = [Interval(name, share, ends) for name, share, ends in runs if share is not None]
    if not rows:
        return None
    levels = [Baseline(name, share, "zero" if name == "chance" else "base") for name, share in baselines.items()]
    legend = [(Markup(swatch("first", marked=True)), "a run and its 95% interval", "")]
    legend += [(Markup(swatch(level.kind)), level.label, percent(level.value)) for level in levels]
    unit = f"% of held-out {of.couples} with the {of.better} one ahead"
    svg = interval_chart("accuracies", "Held-out accuracy", unit, rows, levels)
    return {"svg": Markup(svg), "legend": legend, "num_missing": len(runs) - len(rows)}


def span(ends: Ends | None) -> str:
    """Both ends of an interval: 79.4–92.7%."""
    return MISSING if ends is None else f"{percent(ends[0])[:-1]}–{percent(ends[1])}"


def short_names(names: Sequence[str], limit: int) -> list[str]:
    """The names in at most `limit` cells: what all begin with goes first, then the middle of those still too long."""
    if all(cell_len(name) <= limit for name in names):
        return list(names)
    first, last = min(names), max(names)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    cut = max(first.rfind(separator, 0, shared) for separator in "-_./ ") + 1
    if cut > 3 and first != last:
        names = [f"…{name[cut:]}" for name in names]
    return [_without_middle(name, limit) for name in names]


def _without_middle(name: str, limit: int) -> str:
    if cell_len(name) <= limit:
        return name
    head, tail = name[: len(name) // 2], name[len(name) // 2 :]
    while cell_len(head) + cell_len(tail) >= limit:
        head, tail = (head[:-1], tail) if cell_len(head) > cell_len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def _scale(low: Number, high: Number, start: Number) -> Scale:
    step = nice_step(max(high - low, 1) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, max(last, first + 1) * step, start, RIGHT - 44, step)


def _draw_ticks(svg: Element, x: Scale, bottom: int, unit: str) -> None:
    """The ticks stand above and below: the rows between may fill more than a screen."""
    values = ticks(x)
    for value, label in zip(values, labels_of(values, x.step), strict=True):
        SubElement(svg, "line", {"class": "grid", **_upright(x(value), bottom)})
        for height in (FIRST_ROW - 6, bottom + 16):
            place = {"class": "tick x", "x": f"{x(value):.1f}", "y": str(height), "text-anchor": "middle"}
            SubElement(svg, "text", place).text = label
    middle = {"class": "unit", "x": str(WIDTH / 2), "y": str(bottom + 34), "text-anchor": "middle"}
    SubElement(svg, "text", middle).text = unit


def _draw_row(svg: Element, row: Interval, label: str, x: Scale, y: Number) -> None:
    group = SubElement(svg, "g")
    SubElement(group, "title").text = _describe(row)
    height, level = f"{y:.1f}", {"y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    SubElement(group, "text", {"class": "name", "x": "0", "y": height, "dy": "0.34em"}).text = label
    SubElement(group, "line", {"class": "grid", "x1": f"{x.start:.1f}", "x2": f"{x.end:.1f}", **level})
    if row.ends:
        start, end = (f"{x(100 * end):.1f}" for end in row.ends)
        SubElement(group, "line", {"class": "line first held-out", "x1": start, "x2": end, **level})
    place = {"cx": f"{x(100 * row.share):.1f}", "cy": height, "r": "3.2"}
    SubElement(group, "circle", {"class": "mark first", **place})
    value = {"class": "name", "x": str(WIDTH), "y": height, "dy": "0.34em", "text-anchor": "end"}
    SubElement(group, "text", value).text = percent(row.share)


def _upright(across: Number, bottom: int) -> dict[str, str]:
    return {"x1": f"{across:.1f}", "x2": f"{across:.1f}", "y1": str(FIRST_ROW), "y2": str(bottom)}


def _describe(row: Interval) -> str:
    between = " to ".join(map(percent, row.ends or ()))
    return f"{row.label}: {percent(row.share)}" + (f", 95% interval {between}" if between else "")

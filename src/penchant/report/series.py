"""One measurement over the steps of a run, and the thinning that keeps its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from penchant.report.figures import Number

Point = tuple[Number, Number | None]
"""A step and the value at it; None where the value was not finite."""

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """A measurement over the steps, in the order of the steps."""

    points: tuple[Point, ...]
    num_left_out: int = 0
    """How many more there are, where these are the thinned ones of many."""

    @property
    def finite(self) -> list[tuple[Number, Number]]:
        """The points whose value is a number."""
        return [(step, value) for step, value in self.points if value is not None]

    @property
    def first(self) -> Number | None:
        """The first value that is a number."""
        return next((value for _, value in self.points if value is not None), None)

    @property
    def last(self) -> Number | None:
        """The last value that is a number."""
        return next((value for _, value in reversed(self.points) if value is not None), None)

    @property
    def ends_broken(self) -> bool:
        """Whether the very last value is not finite: the run has diverged."""
        return bool(self.points) and self.points[-1][1] is None

    def scaled(self, factor: Number) -> Series:
        """The same series in another unit."""
        points = tuple((step, None if value is None else value * factor) for step, value in self.points)
        return Series(points, self.num_left_out)


def finite(value: Any) -> Number | None:
    """The value as a number; None for what is no number, not finite, or too large for the arithmetic of an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # abs() first: float() of an integer with a thousand digits would raise.
    return value if abs(value) < 1e100 else None


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` numbers of a series: of every stretch its lowest and its highest, and both ends.

    A stretch that holds a value that is not finite keeps one of those too, so that the gap stays visible.
    """
    if len(points) <= limit:
        return list(points)
    numbers = [i for i, (_, value) in enumerate(points) if value is not None]
    kept = {0, len(points) - 1, *numbers[:1], *numbers[-1:]}
    num_stretches = max(1, (limit - 4) // 2)
    for stretch in range(num_stretches):
        start, stop = (len(points) * edge // num_stretches for edge in (stretch, stretch + 1))
        low, high = math.inf, -math.inf
        lowest = highest = gap = None
        for i in range(start, stop):
            value = points[i][1]
            if value is None:
                gap = i if gap is None else gap
                continue
            if value < low:
                low, lowest = value, i
            if value > high:
                high, highest = value, i
        kept.update(i for i in (lowest, highest, gap) if i is not None)
    return [points[i] for i in sorted(kept)]


def spread_evenly(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the items at even distances, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    if limit < 2:
        return list(items[-1:])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]

"""A curve of any length in bounded memory, with its spikes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penchant.report.series import Series

Numbers = NDArray[np.float64]

_MOST_BUCKETS = 1024
"""Even, so that neighbours can always be joined two and two. More than three times the pixels that a chart is wide."""


class ThinnedCurve:
    """The values of one measurement as they come: of every stretch of points its lowest and its highest are kept.

    All stretches have the same number of points, one at first; when there are 1024 of them, neighbours become one. So
    curves up to that length are whole, of longer ones no extreme value is lost, and both ends are exact. A value that
    is not finite is nan; a stretch that has one keeps its place.
    """

    def __init__(self) -> None:
        self.num_points = 0
        self._size = 1
        # Of each stretch: step and value of the lowest, of the highest, step of the first that is not finite.
        self._stretches: Numbers = np.empty((_MOST_BUCKETS, 5))
        self._num_stretches = 0
        self._rest: Numbers = np.empty((0, 2))
        """Steps and values that do not fill a stretch yet."""
        self._first: Numbers = np.empty((0, 2))
        self._last: Numbers = np.empty((0, 2))

    def add(self, steps: Numbers, values: Numbers) -> None:
        """Takes in points, in the order of their steps."""
        if not len(steps):
            return
        points = np.column_stack([steps, np.where(np.abs(values) < 1e100, values, np.nan)])
        self.num_points += len(points)
        finite = points[np.isfinite(points[:, 1])]
        self._first = self._first if len(self._first) else finite[:1]
        self._last = finite[-1:] if len(finite) else self._last
        points = np.concatenate([self._rest, points])
        while len(points) >= self._size:
            num = min(len(points) // self._size, _MOST_BUCKETS - self._num_stretches)
            new = points[: num * self._size].reshape(num, self._size, 2)
            self._stretches[self._num_stretches : self._num_stretches + num] = _extremes(new)
            self._num_stretches += num
            points = points[num * self._size :]
            if self._num_stretches == _MOST_BUCKETS:
                self._join_neighbours()
        self._rest = points

    def series(self) -> Series:
        """What is kept, in the order of the steps."""
        kept = self._stretches[: self._num_stretches]
        lows, highs, gaps = kept[:, 0:2], kept[:, 2:4], kept[:, 4]
        gaps = np.column_stack([gaps, np.full(len(gaps), np.nan)])
        points = np.concatenate([self._first, lows, highs, gaps, self._rest, self._last])
        points = points[np.isfinite(points[:, 0])]
        points = np.unique(points, axis=0)  # also puts them in order
        steps, values = points.T
        told_steps = (steps.astype(np.int64) if (steps == np.floor(steps)).all() else steps).tolist()
        told_values = [None if value != value else value for value in values.tolist()]
        told = tuple(zip(told_steps, told_values, strict=True))
        return Series(told, max(0, self.num_points - len(told)))

    def _join_neighbours(self) -> None:
        pairs = self._stretches.reshape(-1, 2, 5)
        joined = pairs[:, 0].copy()
        for column, is_better in ((0, np.less), (2, np.greater)):
            mine, other = pairs[:, 0, column : column + 2], pairs[:, 1, column : column + 2]
            takes_other = is_better(other[:, 1], mine[:, 1]) | np.isnan(mine[:, 1])
            joined[:, column : column + 2] = np.where(takes_other[:, None], other, mine)
        joined[:, 4] = np.fmin(pairs[:, 0, 4], pairs[:, 1, 4])
        self._num_stretches = len(joined)
        self._stretches[: len(joined)] = joined
        self._size *= 2


def _extremes(stretches: Numbers) -> Numbers:
    """(n, size, 2) steps and values -> (n, 5) as they are kept; all nan where no value is finite."""
    values, every = stretches[:, :, 1], np.arange(len(stretches))
    is_gap: NDArray[np.bool_] = np.isnan(values)
    lowest = stretches[every, np.where(is_gap, np.inf, values).argmin(axis=1)]
    highest = stretches[every, np.where(is_gap, -np.inf, values).argmax(axis=1)]
    empty = is_gap.all(axis=1, keepdims=True)
    first_gap = np.where(is_gap.any(axis=1), stretches[every, is_gap.argmax(axis=1), 0], np.nan)
    return np.column_stack([np.where(empty, np.nan, lowest), np.where(empty, np.nan, highest), first_gap])

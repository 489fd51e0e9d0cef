"""The metrics of a run that may still be going on, read as they are written."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from penchant.dash.thinning import Numbers, ThinnedCurve
from penchant.disk import GrowingLines
from penchant.report.rundir import NO_MEASUREMENT, clean
from penchant.report.series import Series, finite

_LINES_AT_ONCE = 5000
_MEASURED = {float, int, type(None)}
_MOST_NAMES = 300
"""Curves that are kept; a log that names more is no log of a run."""


class FollowedMetrics:
    """metrics.jsonl of one run: every line is read once, in memory that does not grow with the file."""

    def __init__(self, path: Path) -> None:
        self.lock = threading.RLock()
        self.cut_back_at: int | None = None
        """The step down to which the log was cut when it was last begun anew, by a resumed run."""
        self._lines = GrowingLines(path)
        self._forget()

    def _forget(self) -> None:
        self.num_lines, self.num_unreadable = 0, 0
        self.step = 0
        self._curves: dict[str, ThinnedCurve] = {}
        self._clock: deque[tuple[float, float]] = deque(maxlen=200)
        self._waiting: list[bytes] = []

    def read_on(self, at_most_s: float | int) -> bool:
        """Reads what is new, for so long; whether all has been read."""
        deadline = time.monotonic() + at_most_s
        with self.lock:
            while True:
                if not self._waiting:
                    before = self.step
                    self._waiting, began_anew = self._lines.read()
                    if began_anew:
                        waiting = self._waiting
                        self._forget()
                        self.cut_back_at, self._waiting = before, waiting
                if not self._waiting:
                    return True
                self._take(self._waiting[:_LINES_AT_ONCE])
                del self._waiting[:_LINES_AT_ONCE]
                if time.monotonic() > deadline:
                    return not self._waiting and self._lines.offset == self._lines.size

    @property
    def share_read(self) -> float:
        """How much of the file has been taken in, from 0 to 1."""
        waiting = sum(map(len, self._waiting)) + len(self._waiting)
        return max(0.0, self._lines.share_read - waiting / max(1, self._lines.size))

    def series(self) -> dict[str, Series]:
        """Every measurement, thinned where it is long."""
        with self.lock:
            return {name: curve.series() for name, curve in self._curves.items()}

    def seconds_per_step(self) -> float | int | None:
        """How long steps have taken of late; None before there are two."""
        with self.lock:
            if len(self._clock) < 2 or self._clock[-1][0] <= self._clock[0][0]:
                return None
            (first, since), (last, now) = self._clock[0], self._clock[-1]
            return max(0.0, (now - since) / (last - first))

    def _take(self, lines: Sequence[bytes]) -> None:
        columns: dict[str, list[tuple[Numbers, Numbers, Numbers]]] = {}
        for rows, names, listed in _by_shape(self._parsed(lines)):
            table = dict(zip(names, listed, strict=True))
            steps = _as_numbers(table.get("step", ()))
            known = np.isfinite(steps)
            if not known.any():
                continue
            self.num_lines += int(known.sum())
            for name, column in table.items():
                there = known
                if not set(map(type, column)) <= _MEASURED:
                    there = known & np.array([type(value) in _MEASURED for value in column])
                if there.any():
                    columns.setdefault(name, []).append((rows[there], steps[there], _as_numbers(column)[there]))
        for name, parts in columns.items():
            places, steps, values = (np.concatenate([part[i] for part in parts]) for i in range(3))
            order = np.argsort(places)  # lines of one shape were put together
            steps, values = steps[order], values[order]
            if name == "step":
                self.step = int(steps[-1])
            elif name == "time_s":
                self._clock.extend(zip(steps[-200:].tolist(), values[-200:].tolist(), strict=True))
            elif name not in NO_MEASUREMENT and (name in self._curves or len(self._curves) < _MOST_NAMES):
                self._curves.setdefault(clean(name), ThinnedCurve()).add(steps, values)

    def _parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        """The rows of lines; parsed together, which is quicker, unless one of them is broken."""
        try:
            rows = from_json(b"[" + b",".join(lines) + b"]", cache_strings="keys")  # twice as fast as json.loads
        except ValueError:
            rows = [row for line in lines if (row := self._parsed_alone(line)) is not None]
        return [row for row in rows if isinstance(row, dict)]

    def _parsed_alone(self, line: bytes) -> Any:
        try:
            return from_json(line)
        except ValueError:
            self.num_unreadable += bool(line.strip())
            return None


def _by_shape(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Numbers, tuple[str, ...], list[tuple[Any, ...]]]]:
    """The rows that have the same names together: their places, these names, and a column of values for each."""
    shapes: dict[tuple[str, ...], list[int]] = {}
    for place, row in enumerate(rows):
        shapes.setdefault(tuple(row), []).append(place)
    for names, places in shapes.items():
        yield np.array(places, dtype=np.float64), names, list(zip(*(rows[i].values() for i in places), strict=True))


def _as_numbers(column: Sequence[Any]) -> Numbers:
    """As floats; nan for whatever is no number, or one with a thousand digits."""
    if set(map(type, column)) <= _MEASURED:
        with suppress(OverflowError):
            return np.array(column, dtype=np.float64)
    return np.array([np.nan if finite(value) is None else value for value in column], dtype=np.float64)

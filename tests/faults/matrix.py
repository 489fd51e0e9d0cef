"""The fault matrix: which faults were tried how often, and how often all was well afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Matrix:
    """What the tests of one session tried; rows are numbers, or numbers with a letter (`25a`)."""

    _cells: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def record(self, row: int | str, fault: str, tried: int, survived: int) -> None:
        """Adds to what was tried of a fault; where not all of it was survived, the test has failed."""
        self.add(row, fault, tried, survived)
        if tried < 1:
            pytest.fail(f"row {row}, {fault}: nothing was tried")
        if survived < tried:
            pytest.fail(f"row {row}, {fault}: survived {survived} of {tried}")

    @contextmanager
    def trial(self, row: int | str, fault: str, tried: int = 1) -> Iterator[None]:
        """One try of a fault, or several: survived when the block ends well."""
        try:
            yield
        except BaseException:
            self.add(row, fault, tried, 0)
            raise
        self.record(row, fault, tried, tried)

    def add(self, row: int | str, fault: str, tried: int, survived: int) -> None:
        """Adds to what was tried of a fault."""
        tried_before, survived_before = self._cells.get((str(row), fault), (0, 0))
        self._cells[str(row), fault] = (tried_before + tried, survived_before + survived)

    def markdown(self) -> str:
        """The table; empty where nothing was tried."""
        if not self._cells:
            return ""
        lines = ["| # | fault | tried | survived |", "|---|---|---:|---:|"]
        for row, fault in sorted(self._cells, key=lambda cell: (_number(cell[0]), *cell)):
            tried, survived = self._cells[row, fault]
            lines.append(f"| {row} | {fault} | {tried} | {survived} |")
        return "\n".join(lines) + "\n"


def some(cases: Iterable[Any], *short: Any) -> list[Any]:
    """Cases for `parametrize`: those in `short` are tried always, the others only with `--full`."""
    return [case if case in short else pytest.param(case, marks=pytest.mark.full) for case in cases]


def _number(row: str) -> int:
    found = re.match(r"\d+", row)
    return int(found.group()) if found else 0

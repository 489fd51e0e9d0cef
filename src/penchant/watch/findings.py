"""What a detector is, what it finds, and the table of all detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from penchant.watch.history import Facts, History, NothingMeasuredError

Severity = Literal["warn", "major", "stop"]
"""warn: look at it; major: the run teaches something else than it should; stop: going on is of no use."""

SEVERITIES: tuple[Severity, ...] = ("warn", "major", "stop")


@dataclass(frozen=True)
class Seen:
    """What a detector function gives back: how bad, what was seen in a sentence, and the numbers of it."""

    severity: Severity
    text: str
    values: Mapping[str, float | int] = field(default_factory=dict)
    remedy: str | None = None
    """What to do, where it is another thing than the detector's own."""


@dataclass(frozen=True)
class Finding:
    """A detector that fires: where in the run, how bad, what was seen, what it means and what to do."""

    code: str
    severity: Severity
    step: int
    seen: str
    meaning: str
    remedy: str
    values: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """All of it in sentences."""
        return f"{self.seen}. {self.meaning} {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "code": self.code,
            "severity": self.severity,
            "step": self.step,
            "seen": self.seen,
            "meaning": self.meaning,
            "remedy": self.remedy,
            "values": dict(self.values),
        }


Thresholds = Mapping[str, float | int]
"""The thresholds of a detector by their names."""

Look = Callable[[History, Facts, Thresholds], Seen | None]
"""Looks at a history with the facts of the run and the detector's thresholds."""


@dataclass(frozen=True)
class Detector:
    """One thing that goes wrong: how it is seen, what it means, what helps, and where that is known from."""

    code: str
    looks_for: str
    """In a few words, for tables."""
    runs: str
    """Which runs it is for, in words; `applies` says it for the program."""
    meaning: str
    remedy: str
    source: str
    thresholds: Thresholds
    applies: Callable[[Facts], bool]
    look: Look

    def find(self, history: History, facts: Facts, thresholds: Thresholds | None = None) -> Finding | None:
        """What is to be said of a run as it stands; `thresholds` replaces some of the detector's own.

        Nothing is said where the log does not hold what the detector looks at.
        """
        if not self.applies(facts):
            return None
        try:
            seen = self.look(history, facts, {**self.thresholds, **(thresholds or {})})
        except NothingMeasuredError:
            return None
        if seen is None:
            return None
        remedy = seen.remedy or self.remedy
        return Finding(self.code, seen.severity, history.step, seen.text, self.meaning, remedy, seen.values)


DETECTORS: dict[str, Detector] = {}
"""Every detector by its code."""


def detector(
    code: str,
    looks_for: str,
    runs: str,
    meaning: str,
    remedy: str,
    source: str,
    applies: Callable[[Facts], bool] = lambda facts: True,
    **thresholds: float | int,
) -> Callable[[Look], Look]:
    """Enters a function into the table of detectors."""

    def enter(look: Look) -> Look:
        DETECTORS[code] = Detector(code, looks_for, runs, meaning, remedy, source, thresholds, applies, look)
        return look

    return enter


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings by severity, then as they came."""
    return sorted(findings, key=lambda found: (-SEVERITIES.index(found.severity), found.step))

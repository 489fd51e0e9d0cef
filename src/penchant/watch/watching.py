"""The watch itself: takes the lines of a log as they come, and tells each finding once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penchant.watch import answering, drift, learning, methods, steps  # noqa: F401  (they enter their detectors)
from penchant.watch.findings import DETECTORS, SEVERITIES, Finding, Thresholds
from penchant.watch.history import Facts, History


class Watch:
    """Holds every detector against a growing history.

    A finding is told when it is first made, and again only when it has become worse. `thresholds` replaces thresholds
    of detectors, as `{"displaced": {"warn": 1.0}}`.
    """

    def __init__(self, facts: Facts, thresholds: Mapping[str, Thresholds] | None = None) -> None:
        self.facts, self.thresholds, self.history = facts, thresholds or {}, History()
        self.told: dict[str, Finding] = {}
        """By code the finding as it was told last."""

    def look(self, line: Mapping[str, Any]) -> list[Finding]:
        """Takes in a line of metrics; what has to be told now."""
        self.history.add(line)
        news = []
        for code, detector in DETECTORS.items():
            found = detector.find(self.history, self.facts, self.thresholds.get(code))
            if found is None:
                continue
            known = self.told.get(code)
            if known is None or SEVERITIES.index(found.severity) > SEVERITIES.index(known.severity):
                self.told[code] = found
                news.append(found)
        return news

    def to_json(self) -> dict[str, Any]:
        """The state, as a checkpoint keeps it."""
        return {"history": self.history.to_json(), "told": {code: one.as_dict() for code, one in self.told.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up a state that `to_json` gave."""
        self.history = History.from_json(state["history"])
        self.told = {code: Finding(**one) for code, one in state["told"].items()}

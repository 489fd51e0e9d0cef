"""The watch beside a run: what it sees is told, and what the run file asks for is done about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.training.logger import RunLog
from penchant.training.online import OnlineSetup
from penchant.training.setup import Setup
from penchant.watch import SEVERITIES, Facts, Finding, Watch, facts_of


class Watchman:
    """Shows every line of metrics to the watch, tells its findings, and stops or slows the run where it should.

    `stop` is the finding that ends the run, `rate_factor` what the learning rate is multiplied with.
    """

    def __init__(self, setup: Setup, log: RunLog) -> None:
        self.config, self.log = setup.config.watch, log
        self.watch = Watch(facts_about(setup), self.config.by_detector())
        self.rate_factor = 1.0
        self.stop: Finding | None = None

    def look(self, line: Mapping[str, Any]) -> None:
        """Takes in a line of metrics."""
        if not self.config.enabled:
            return
        for found in self.watch.look(line):
            self.log.event(found.severity, found.code, found.message, found.step)
            if _is_named(found, self.config.lower_learning_rate_on):
                self.rate_factor /= 2
                message = f"watch.lower_learning_rate_on: from here on {self.rate_factor:g} times the learning rate"
                self.log.event("warn", "rate-lowered", f"{message} ({found.code})", found.step)
            if self.stop is None and _is_named(found, self.config.stop_on):
                self.stop = found
                self.log.event("warn", "stopped-early", f"watch.stop_on: the run ends here ({found.code})", found.step)

    def to_json(self) -> dict[str, Any]:
        """The state, as a checkpoint keeps it."""
        stop = None if self.stop is None else self.stop.as_dict()
        return {"watch": self.watch.to_json(), "rate_factor": self.rate_factor, "stop": stop}

    def load(self, state: Mapping[str, Any] | None, goes_past: bool = False) -> None:
        """Takes up the state of a checkpoint (those of older versions have none); `goes_past` where it had stopped."""
        if state is not None:
            self.watch.load(state["watch"])
            self.rate_factor = state["rate_factor"]
            self.stop = None if goes_past or state["stop"] is None else Finding(**state["stop"])


def facts_about(setup: Setup) -> Facts:
    """What the watch has to know of a run."""
    return facts_of(
        setup.loss.settings(),
        setup.steps,
        setup.config.model_dump(),
        setup.steps_per_epoch,
        rounds_of(setup),
        len(setup.datasets.heldout.examples) or None,
    )


def rounds_of(setup: Setup) -> int | None:
    """How often the run will sample completions of its own; None where it does not."""
    return math.ceil(setup.steps / setup.steps_per_round) if isinstance(setup, OnlineSetup) else None


def _is_named(found: Finding, names: Sequence[str]) -> bool:
    """Whether its code is among the names, or a severity that it reaches."""
    levels = [SEVERITIES.index(name) for name in SEVERITIES if name in names]
    return found.code in names or (bool(levels) and SEVERITIES.index(found.severity) >= min(levels))

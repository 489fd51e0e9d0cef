"""What is known of a run at some line of its log: its settings, and each measurement's beginning and latest values."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EARLY, RECENT = 10, 64
"""How many of the first and of the latest values of a measurement are kept, so that a state never grows."""

DECAY = 0.98
"""Of the exponential mean, a line."""

WATCHED = (
    *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/saturated"),
    *("logps/chosen", "logps/rejected", "logps/accuracies", "length/chosen", "length/rejected", "length/correlation"),
    *("kl", "kl_mismatched", "entropy", "clipped", "grad_norm", "grad_clipped", "update_ratio", "learning_rate"),
    *(
        "score",
        "score_error",
        "win_rate",
        "answer_length",
        "answer_kl",
        "finished",
        "distinct_2",
        "repeated_4",
        "same_opening",
    ),
    *("samples/score", "samples/length", "samples/finished", "samples/undecided", "samples/acceptance", "samples/kl"),
    *("samples/explained", "samples/repeated_4", "samples/distinct_2", "samples/same_opening"),
)
"""The measurements that detectors look at; those on held-out examples have `eval_` before their names."""


@dataclass(frozen=True)
class Facts:
    """What detectors know of a run beside its measurements; None or nothing where it is not known."""

    losses: tuple[str, ...] = ()
    """The loss by its name, or the terms of a sum."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the loss, or of the first term."""
    total_steps: int | None = None
    warmup_steps: int = 0
    steps_per_epoch: float | int | None = None
    batch_size: int | None = None
    """Examples a step."""
    rounds: int | None = None
    """How often a run samples completions of its own; None where it does not."""
    advantages: bool = False
    """Whether sampled completions are weighed (grpo, ppo) instead of paired."""
    max_new_tokens: int | None = None
    num_heldout: int | None = None

    @property
    def beta(self) -> float | None:
        """The loss's beta."""
        value = self.settings.get("beta")
        return float(value) if isinstance(value, int | float) else None

    @property
    def is_online(self) -> bool:
        """Whether the run samples completions of its own."""
        return self.rounds is not None

    def is_any(self, *names: str) -> bool:
        """Whether the (first) loss is one of these."""
        return bool(self.losses) and self.losses[0] in names


def facts_of(
    loss: Mapping[str, Any],
    total_steps: int | None,
    run: Mapping[str, Any],
    steps_per_epoch: float | int | None = None,
    rounds: int | None = None,
    num_heldout: int | None = None,
) -> Facts:
    """From the settings of the loss and the keys of a run file, as a run directory keeps them."""
    terms: dict[str, Any] = {loss["name"]: loss} if "name" in loss else dict(loss)
    first: Any = next(iter(terms.values()), {})
    warmup = run.get("warmup_steps")
    if warmup is None:
        warmup = round((run.get("warmup_ratio") or 0.0) * (total_steps or 0))
    sampling = run.get("sampling") or {}
    return Facts(
        losses=tuple(map(str, terms)),
        settings=first if isinstance(first, Mapping) else {},
        total_steps=total_steps,
        warmup_steps=int(warmup),
        steps_per_epoch=steps_per_epoch,
        batch_size=run.get("batch_size"),
        rounds=rounds,
        advantages=any(name in ("grpo", "ppo") for name in terms),
        max_new_tokens=sampling.get("max_new_tokens"),
        num_heldout=num_heldout,
    )


class NothingMeasuredError(Exception):
    """A log does not hold what was asked for: other programs and older versions measure less."""


class Track:
    """One measurement over the steps: its first values, its latest, an exponential mean, and both extremes."""

    def __init__(self) -> None:
        self.count = 0
        self.early: list[tuple[int, float]] = []
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self.smooth = 0.0
        """Exponential mean, without the bias towards 0 that a start from nothing would give."""
        self._weight = 0.0
        self.highest: tuple[int, float] | None = None
        self.lowest: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Takes in the value at a step; a run that was gone on with at its end measures its last step once more."""
        if self.recent and step <= self.recent[-1][0]:
            return
        self.count += 1
        if len(self.early) < EARLY:
            self.early.append((step, value))
        self.recent.append((step, value))
        self._weight = DECAY * self._weight + 1 - DECAY
        self.smooth += (1 - DECAY) / self._weight * (value - self.smooth)
        if self.highest is None or value > self.highest[1]:
            self.highest = (step, value)
        if self.lowest is None or value < self.lowest[1]:
            self.lowest = (step, value)

    def __len__(self) -> int:
        return self.count

    @property
    def first(self) -> float:
        """The very first value."""
        return self.start(1)

    @property
    def last(self) -> float:
        """The latest value."""
        return self.mean(1)

    def start(self, lines: int = 3) -> float:
        """The mean of the first lines, at most EARLY."""
        return _mean([value for _, value in self.early[:lines]])

    def values(self, lines: int = RECENT) -> list[float]:
        """The latest values, at most RECENT, the oldest first."""
        return [value for _, value in self.recent][-lines:]

    def mean(self, lines: int) -> float:
        """The mean of the latest lines."""
        return _mean(self.values(lines))

    def error(self, lines: int) -> float:
        """The standard error of that mean, from how the lines scatter; endless for a single line."""
        values = self.values(lines)
        if len(values) < 2:
            return math.inf
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))

    def to_json(self) -> dict[str, Any]:
        """The state; Python writes floats so that they are read again to the bit."""
        return {
            "count": self.count,
            "early": [list(point) for point in self.early],
            "recent": [list(point) for point in self.recent],
            "smooth": [self.smooth, self._weight],
            "ends": [self.lowest, self.highest],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Track:
        """The inverse of `to_json`."""
        track = cls()
        track.count = state["count"]
        track.early = [(step, value) for step, value in state["early"]]
        track.recent.extend((step, value) for step, value in state["recent"])
        track.smooth, track._weight = state["smooth"]
        track.lowest, track.highest = (None if end is None else (end[0], end[1]) for end in state["ends"])
        return track


class History:
    """The lines of a log as far as they have come: a `Track` for each measurement that detectors look at."""

    def __init__(self) -> None:
        self.step = 0
        self._tracks: dict[str, Track] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in a line of metrics; values that are no finite numbers are passed over."""
        step = line.get("step")
        if not isinstance(step, int):
            return
        self.step = max(self.step, step)
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name.removeprefix("eval_") in WATCHED and math.isfinite(value):
                self._tracks.setdefault(name, Track()).add(step, float(value))

    def __getitem__(self, name: str) -> Track:
        return self._tracks.get(name, _NOTHING)

    def __contains__(self, name: str) -> bool:
        return name in self._tracks

    def has(self, *names: str, lines: int = 1) -> bool:
        """Whether each of these was seen on so many lines."""
        return all(len(self[name]) >= lines for name in names)

    def to_json(self) -> dict[str, Any]:
        """The state, as a checkpoint keeps it."""
        return {"step": self.step, "tracks": {name: track.to_json() for name, track in self._tracks.items()}}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> History:
        """The inverse of `to_json`."""
        history = cls()
        history.step = state["step"]
        history._tracks = {name: Track.from_json(own) for name, own in state["tracks"].items()}
        return history


_NOTHING = Track()


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise NothingMeasuredError
    return sum(values) / len(values)

"""Logs made by hand, to hold detectors against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from penchant.watch import DETECTORS, Facts, Finding, History

DPO = Facts(losses=("dpo",), settings={"beta": 0.1}, total_steps=100, batch_size=16, steps_per_epoch=100.0)
SOUND = {
    "loss": 0.6,
    "rewards/accuracies": 0.7,
    "rewards/margins": 0.5,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.4,
    "rewards/saturated": 0.0,
    "logps/chosen": -100.0,
    "length/chosen": 100.0,
    "kl": 0.02,
    "grad_norm": 1.0,
    "update_ratio": 1e-4,
}
"""A line of training that nothing is wrong with."""


def history(lines: Iterable[Mapping[str, Any]]) -> History:
    """A history of these lines."""
    made = History()
    for line in lines:
        made.add(line)
    return made


def training(number: int = 40, start: Mapping[str, Any] | None = None, **values: float | int) -> list[dict[str, Any]]:
    """Lines of training, one a step, all alike; `start` replaces values of the first one."""
    first = {"step": 1, **SOUND, **values, "loss": 0.6931, **(start or {})}
    return [first, *({"step": step, **SOUND, **values} for step in range(2, number + 1))]


def found(code: str, lines: Iterable[Mapping[str, Any]], facts: Facts = DPO) -> Finding | None:
    """What a detector says of the lines."""
    return DETECTORS[code].find(history(lines), facts)

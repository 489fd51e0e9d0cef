"""Right or wrong: whether the last number of a completion is the answer that the row of GSM8K ends with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def score(prompt: Any, completions: list[str], row: Mapping[str, Any]) -> list[float]:
    """1 for a right completion, 0.1 for a wrong one that gives its answer behind `####`, else 0."""
    right = _last_number(row["answer"])
    return [1.0 if _last_number(text) == right else 0.1 if "####" in text else 0.0 for text in completions]


def is_right(prompt: Any, completions: list[str], row: Mapping[str, Any]) -> list[float]:
    """1 for a right completion, else 0: to measure with."""
    return [float(points == 1.0) for points in score(prompt, completions, row)]


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None

"""Optional columns, the same in every row family: labels, weights, margins, scores, win probabilities, ends.

A column that is null counts as absent. Numbers come out finite; true and false are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import Any

from penchant.data.messages import RefusedError, Row, kind_of
from penchant.examples import Finished

LABELS = ("label", "kto_tag")
"""Columns that say whether a single completion is desirable; the first that is filled counts."""

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Spellings of the scores of chosen and rejected, higher is better; the first with both filled counts."""

WIN_PROBABILITIES = (
    ("chosen_win_probability", "rejected_win_probability"),
    # SPPO's data: the second is not how often chosen loses but how often rejected wins.
    ("chosen_probs_win", "chosen_probs_lose"),
)
"""Spellings of the chances of chosen and of rejected to win; the first that is filled counts."""

FINISHED = ("chosen_finished", "rejected_finished")
"""Columns that say of each completion of a pair whether it ended by itself; `finished` does of a single one."""

NUMBERS = frozenset({*LABELS, "weight", "margin", *chain(*SCORES, *WIN_PROBABILITIES), *FINISHED, "finished"})
"""The columns that hold one number, or true or false (or, of `finished`, a list of these)."""


def number_of(value: Any, name: str, code: str = "D22") -> float:
    """A field that must be a finite number; `name` and `code` are for the refusal."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RefusedError(code, f"{name} is {kind_of(value)}; write a number, or remove it")
    try:
        number = float(value)
    except OverflowError:  # whole numbers of JSON have no upper end
        number = math.inf
    if not math.isfinite(number):
        raise RefusedError(code, f"{name} is not a finite number; correct it, or remove it")
    return number


def label_of(row: Row) -> bool | None:
    """Whether the completion is desirable; None where the row does not say."""
    for name in LABELS:
        value = row.get(name)
        if value is None:
            continue
        return _truth(value, name, "D18", "write true for a desirable completion, false for the others")
    return None


def finished_of(row: Row, names: Sequence[str]) -> Finished:
    """Which completions ended by themselves, as the columns of these names say; where one says nothing, it did."""
    return finished_from([row.get(name) for name in names], names)


def finished_from(values: Sequence[Any], names: Sequence[str]) -> Finished:
    """The same from the fields, one a completion; `names` are for the refusal."""
    mend = "write true for a completion that ended by itself, false for one that was cut off"
    flags = tuple(value is None or _truth(value, name, "D29", mend) for value, name in zip(values, names, strict=True))
    return None if all(flags) else flags


def _truth(value: Any, name: str, code: str, mend: str) -> bool:
    # 0 and 1 are what true and false become in tables; 0.0 and 1.0 where the column has gaps.
    if not isinstance(value, Real) or value not in (0, 1):
        found = "another number than 0 and 1" if isinstance(value, Real) else kind_of(value)
        raise RefusedError(code, f"{name} is {found}; {mend}")
    return bool(value)


def weight_of(row: Row) -> float:
    """How much the row counts, 1 where it does not say."""
    weight = _optional(row, "weight", "D24")
    if weight is None:
        return 1.0
    if weight <= 0:
        raise RefusedError("D24", f"weight is {weight:g}; write a number above 0, or delete the row")
    return weight


def margin_of(row: Row) -> float | None:
    """By how much chosen is better: the `margin` column, or else the difference of the scores."""
    margin = _optional(row, "margin")
    if margin is not None and margin < 0:
        raise RefusedError(
            "D25", f"margin is {margin:g}, so rejected would be better; swap chosen and rejected, or delete the row"
        )
    difference = _score_difference(row)
    return difference if margin is None else margin


def _score_difference(row: Row) -> float | None:
    for names in SCORES:
        chosen, rejected = (_optional(row, name) for name in names)
        if chosen is None or rejected is None:
            continue
        if chosen < rejected:
            raise RefusedError(
                "D25",
                f"{names[0]} is {chosen:g} and {names[1]} {rejected:g}, so rejected would be better;"
                " swap chosen and rejected, or delete the row",
            )
        return number_of(chosen - rejected, f"the difference of {names[0]} and {names[1]}")
    return None


def win_probabilities_of(row: Row) -> tuple[float, float] | None:
    """Chances of chosen and of rejected to win, each in [0, 1]."""
    for names in WIN_PROBABILITIES:
        chosen, rejected = (_optional(row, name, "D26") for name in names)
        if chosen is None and rejected is None:
            continue
        if chosen is None or rejected is None:
            there, gone = names if rejected is None else names[::-1]
            raise RefusedError("D26", f"{there} stands without {gone}; fill in both, or remove both")
        for name, probability in zip(names, (chosen, rejected), strict=True):
            if not 0 <= probability <= 1:
                raise RefusedError("D26", f"{name} is {probability:g}; a probability lies between 0 and 1: correct it")
        return chosen, rejected
    return None


def _optional(row: Row, name: str, code: str = "D22") -> float | None:
    value = row.get(name)
    return None if value is None else number_of(value, name, code)

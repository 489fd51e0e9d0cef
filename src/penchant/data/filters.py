"""Pairs left out or weighed by their margin: by how much the data say that chosen is better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from penchant.data.formats import RowProblem
from penchant.errors import UserError
from penchant.examples import Example, Pair

FILTER_CHECKS: dict[str, str] = {
    "F01": "a margin below min_margin",
    "F02": "no margin where margins decide",
    "F03": "a tie, which weighs nothing",
}
"""Code of why a sound example was left out on request -> the reason in a few words."""


def filter_by_margin(
    examples: Sequence[Example], min_margin: float | None, weigh: bool
) -> tuple[list[Example], list[RowProblem]]:
    """The pairs whose margin is `min_margin` at least, weighed by it where `weigh` says so, and a problem for the rest.

    The weight is multiplied by 2 sigmoid(margin) - 1, the chance that chosen beats rejected minus the chance that it
    loses, where the margin is a difference of rewards in nats (Bradley and Terry 1952). It is 0 for a tie.

    Raises:
        UserError: no example has a margin.
    """
    kept: list[Example] = []
    problems: list[RowProblem] = []
    for example in examples:
        margin = example.margin if isinstance(example, Pair) else None
        if not isinstance(example, Pair) or margin is None:
            message = "the row has neither margin nor scores, so how sure it is is not known; add them"
            problems.append(RowProblem("F02", example.source, message))
        elif min_margin is not None and margin < min_margin:
            problems.append(RowProblem("F01", example.source, f"margin {margin:g} is below min_margin {min_margin:g}"))
        elif weigh and margin == 0:
            problems.append(RowProblem("F03", example.source, "the margin is 0, so weigh_by_margin gives it no weight"))
        elif weigh:
            kept.append(dataclasses.replace(example, weight=example.weight * math.tanh(margin / 2)))
        else:
            kept.append(example)
    if examples and all(problem.code == "F02" for problem in problems) and not kept:
        key = "min_margin" if min_margin is not None else "weigh_by_margin"
        raise UserError(
            f"{key}: no pair has a margin; add a column margin, or score_chosen and score_rejected, or leave {key} out."
        )
    return kept, problems

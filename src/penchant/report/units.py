"""The words for what a run learns from and is measured on: pairs, single completions, rankings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from penchant.report.figures import Number, number, percent, roc_interval, wilson_interval
from penchant.report.series import finite

Ends = tuple[Number, Number]
"""Both ends of an interval."""


def _no_interval(share: Number, part: Mapping[str, Any]) -> Ends | None:
    # The couples of one ranking hang together, so they are no independent trials, and their share does not tell how
    # much the rankings differ among themselves.
    return None


def _interval_of_pairs(share: Number, part: Mapping[str, Any]) -> Ends | None:
    used = finite(part.get("used"))
    return wilson_interval(share, int(used)) if used is not None and used >= 1 else None


def _interval_of_completions(share: Number, part: Mapping[str, Any]) -> Ends | None:
    used, desirable = finite(part.get("used")), finite(part.get("desirable"))
    if used is None or desirable is None or "completion" in _lengths(part):
        return None  # with unlabelled ones among them it is not told how many there are of each class
    return roc_interval(share, int(desirable), int(used - desirable))


@dataclass(frozen=True)
class Unit:
    """How to speak of one kind of example, and of the accuracy on them: a share of couples of a better and a worse one.

    The couples are the pairs themselves; any desirable and any undesirable completion; any two of a ranking.
    """

    key: str
    plural: str
    training: str
    """What a model is trained on."""
    first: str
    """The completion whose likelihood shall rise; `last` stands against it. Both are empty where nothing is judged."""
    last: str
    better: str
    """The one of a couple that should have the higher reward."""
    couples: str = "couples"
    among: str = ""
    """Leads from the share of couples to the examples they are made of."""
    in_data: str = "Completion in the data"
    """What stands beside the samples of a prompt."""
    seen: str = ""
    """What the steps of training see, where that is made from the examples and not they themselves."""
    ends_only: str = ""
    """What has to be added to the length rule where it is about other couples than the accuracy is."""
    interval: Callable[[Number, Mapping[str, Any]], Ends | None] = _no_interval
    """The 95 % interval of an accuracy, if there is one, from the findings about the examples it was measured on."""

    def counted(self, num: Number | None, kind: str = "held-out", noun: str = "") -> str:
        """`96 held-out pairs`, or `the held-out pairs` where their number is not known; so for another plural noun."""
        noun = noun or self.plural
        word = noun.removesuffix("s") if num == 1 else noun
        return " ".join(filter(None, ["the" if num is None else number(num), kind, word]))

    def agreement(self, share: Number, num: Number | None) -> str:
        """What a held-out accuracy says, in words."""
        examples = self.among + self.counted(num)
        return f"the {self.better} completion has the higher reward in {percent(share)} of {examples}"


PAIR = Unit(
    key="pair",
    plural="pairs",
    training="preference pairs",
    first="chosen",
    last="rejected",
    better="chosen",
    couples="pairs",
    in_data="Chosen in the data",
    interval=_interval_of_pairs,
)
COMPLETION = Unit(
    key="completion",
    plural="completions",
    training="single judged completions",
    first="desirable",
    last="undesirable",
    better="desirable",
    among="the couples of a desirable and an undesirable one among ",
    interval=_interval_of_completions,
)
UNJUDGED = Unit(
    key="unjudged",
    plural="completions",
    training="single completions",
    first="",
    last="",
    better="better",
    among="the couples of ",
)
RANKING = Unit(
    key="ranking",
    plural="rankings",
    training="rankings of completions",
    first="best",
    last="worst",
    better="better",
    among="the couples within ",
    in_data="Best in the data",
    ends_only=", best against worst",
)
PROMPT = Unit(
    key="prompt",
    plural="prompts",
    training="judged answers of its own",
    first="preferred",
    last="other",
    better="preferred",
    among="the couples of answers to ",
    seen="preferences",
)
EXAMPLE = Unit(
    key="example",
    plural="examples",
    training="preferences",
    first="better",
    last="worse",
    better="better",
    among="the couples of ",
)
"""Words that are true of every kind: for several at once, and where the kind is not known."""

UNITS = {unit.key: unit for unit in (PAIR, COMPLETION, UNJUDGED, RANKING, PROMPT, EXAMPLE)}


def unit_of(part: Mapping[str, Any]) -> Unit:
    """The unit of a split, from the findings about its data."""
    unit = UNITS.get(str(part.get("unit")), EXAMPLE)
    if unit is COMPLETION and not {"desirable", "undesirable"} & set(_lengths(part)):
        return UNJUDGED
    if unit is RANKING and part.get("most_completions") == 2:
        return PAIR  # a ranking of two is one
    return unit


def common(units: Iterable[Unit]) -> Unit:
    """The unit, if all are the same, else the one whose words are true of all."""
    found = set(units)
    return found.pop() if len(found) == 1 else EXAMPLE


def _lengths(part: Mapping[str, Any]) -> Mapping[str, Any]:
    lengths = part.get("lengths")
    return lengths if isinstance(lengths, Mapping) else {}

"""Ranked rows: a list of completions, and where their order comes from.

The order stands in a list beside the completions or in the completions themselves, as scores (higher is better) or as
ranks (1 is best); a list called `ranked_completions` may also simply stand in it. Scores win over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.data.columns import finished_from, number_of
from penchant.data.messages import RefusedError, Row, is_list, kind_of, text_or_messages
from penchant.examples import Finished, Text

LISTS = ("ranked_completions", "completions", "responses", "answers", "generations")
"""Columns that may hold the completions."""

SCORE_LISTS = ("scores", "ratings", "rating")
RANK_LISTS = ("ranks", "rank")
"""Columns that may hold a number for each completion."""

TEXT_KEYS = ("text", "response", "answer", "content", "completion")
SCORE_KEYS = ("score", "rating", "overall_score")
RANK_KEYS = ("rank",)
"""The same inside a completion that is an object."""


def has_completions(row: Row) -> bool:
    """Whether one of the columns for them holds a list."""
    return any(is_list(row.get(key)) for key in LISTS)


def completions_of(row: Row) -> list[Text]:
    """The completions in the order of the row, all text or all messages."""
    key, entries = _list_of(row)
    if len(entries) < 2:
        held = "one completion" if entries else "no completion"
        raise RefusedError("D20", f"{key} holds {held}; a ranking has two at least: add others or delete the row")
    completions = [_completion(entry, name) for entry, name in zip(entries, names_of(entries), strict=True)]
    if len({isinstance(completion, str) for completion in completions}) > 1:
        raise RefusedError("D04", f"{key} holds both text and messages; write all completions the same way")
    return completions


def names_of(completions: Sequence[Any]) -> list[str]:
    """What messages call the completions of a list."""
    return [f"completion {number} of {len(completions)}" for number in range(1, len(completions) + 1)]


def order_of(row: Row) -> tuple[list[int], tuple[float, ...] | None]:
    """The places of the completions in the row, the best first, and their scores in that order.

    Completions with equal scores keep the order of the row. Scores are None where the row knows ranks alone.
    """
    key, entries = _list_of(row)
    places = list(range(len(entries)))
    scores = _numbers_beside(row, SCORE_LISTS)
    ranks = _numbers_beside(row, RANK_LISTS) if scores is None else None
    if scores is None and ranks is None:
        scores = _numbers_inside(entries, SCORE_KEYS)
        ranks = _numbers_inside(entries, RANK_KEYS) if scores is None else None
    if scores is not None:
        number_of(max(scores) - min(scores), "the difference of the highest and the lowest score")
        places.sort(key=scores.__getitem__, reverse=True)
        return places, tuple(scores[place] for place in places)
    if ranks is not None:
        _check_distinct(ranks)
        return sorted(places, key=ranks.__getitem__), None
    if key == "ranked_completions":
        return places, None
    raise RefusedError(
        "D19",
        f"{key} has neither scores nor ranks, so which completion is better is not known; add a list of scores"
        " (higher is better) or ranks (1 is best), or rename it to ranked_completions where the best stands first",
    )


def finished_in_order(row: Row, order: Sequence[int]) -> Finished:
    """Which completions ended by themselves, as the list `finished` says; `order` has their places in the row."""
    if row.get("finished") is None:
        return None
    values = _list_beside(row, "finished", "D29", "true or false")
    flags = finished_from(values, [f"entry {number} of finished" for number in range(1, len(values) + 1)])
    return flags and tuple(flags[place] for place in order)


def _list_of(row: Row) -> tuple[str, Sequence[Any]]:
    key = next((key for key in LISTS if is_list(row.get(key))), None)
    if key is None:
        raise RefusedError("D14", f"there is no list of completions (looked for {', '.join(LISTS)}); add it")
    return key, row[key]


def _completion(entry: Any, name: str) -> Text:
    if isinstance(entry, Mapping) and not ("role" in entry or ("from" in entry and "value" in entry)):
        key = next((key for key in TEXT_KEYS if entry.get(key) is not None), None)
        if key is None:
            raise RefusedError(
                "D02", f"{name} has no text (looked for {', '.join(TEXT_KEYS)}); fill it in or delete the completion"
            )
        entry = entry[key]
    return text_or_messages({name: entry}, name)


def _numbers_beside(row: Row, names: Sequence[str]) -> list[float] | None:
    """The numbers in a list of their own."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    values = _list_beside(row, name, "D21", "a number")
    return [number_of(value, f"entry {number} of {name}") for number, value in enumerate(values, start=1)]


def _list_beside(row: Row, name: str, code: str, of_what: str) -> Sequence[Any]:
    """A column that must be a list with an entry for each completion."""
    key, entries = _list_of(row)
    values = row[name]
    if not is_list(values):
        raise RefusedError("D04", f"{name} is {kind_of(values)}; it must be a list with {of_what} for each of {key}")
    if len(values) != len(entries):
        raise RefusedError(
            code, f"{name} and {key} differ in length, {len(values)} against {len(entries)}; make them agree"
        )
    return values


def _numbers_inside(entries: Sequence[Any], names: Sequence[str]) -> list[float] | None:
    """The numbers that stand in the completions themselves, under the first name that any of them has."""
    objects = [entry if isinstance(entry, Mapping) else {} for entry in entries]
    name = next((name for name in names if any(entry.get(name) is not None for entry in objects)), None)
    if name is None:
        return None
    numbers = []
    for completion, entry in zip(names_of(entries), objects, strict=True):
        if entry.get(name) is None:
            raise RefusedError("D21", f"{completion} has no {name}, though others have; add it or drop the completion")
        numbers.append(number_of(entry[name], f"{name} of {completion}"))
    return numbers


def _check_distinct(ranks: Sequence[float]) -> None:
    # Without scores nothing in a `Ranking` could say that two completions are equally good.
    seen: dict[float, str] = {}
    for completion, rank in zip(names_of(ranks), ranks, strict=True):
        if rank in seen:
            raise RefusedError(
                "D23",
                f"{seen[rank]} and {completion} share rank {rank:g}; give each its own, give scores instead,"
                " or drop one of the two",
            )
        seen[rank] = completion

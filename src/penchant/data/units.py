"""Examples of one kind turned into another: pairs, single judged completions, rankings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from penchant.data.formats import RowProblem
from penchant.data.messages import RefusedError
from penchant.examples import Example, Finished, Message, Pair, Ranking, Text, Unpaired, has_answers

Unit = Literal["pair", "unpaired", "ranking"]
"""What a loss looks at: two completions, one, or an ordered list."""

Rankings = Literal["best_worst", "best_rest", "all"]
"""Which pairs a ranking becomes: the best against the worst, the best against each other, each against all worse."""

UNIT_CHECKS: dict[str, str] = {
    "U01": "a labelled completion without a counterpart of the same prompt",
    "U02": "a ranking whose completions score the same",
    "U03": "a ranking with tied scores",
    "U04": "a single completion where a ranking is needed",
    "U05": "a ranking where single completions are needed",
    "U06": "a completion without a label where a pair is needed",
}
"""Code of what can be wrong with an example when another kind is needed -> the reason in a few words."""


def unit_of(example: Example) -> Unit:
    """The kind of an example."""
    if isinstance(example, Pair):
        return "pair"
    return "unpaired" if isinstance(example, Unpaired) else "ranking"


def as_unit(
    examples: Sequence[Example],
    unit: Unit,
    rankings: Rankings = "best_worst",
) -> tuple[list[Example], list[RowProblem]]:
    """The examples as examples of one kind, in their order, and a problem for each that cannot become one.

    A pair becomes two labelled completions, or a ranking of two. Labelled completions of one prompt become pairs, the
    first desirable with the first undesirable one and so on; such a pair stands where its desirable completion stood
    and has the mean of the weights. `rankings` says which pairs a ranking becomes; completions with equal scores make
    none, and the pairs share the weight, so that a long list counts as much as a short one. An unlabelled completion
    stays as it is where single completions are wanted.
    """
    partners = _pair_up(examples) if unit == "pair" else {}
    made: list[Example] = []
    problems: list[RowProblem] = []
    for place, example in enumerate(examples):
        try:
            if isinstance(example, Unpaired):
                made += _from_unpaired(example, unit, partners.get(place))
            elif isinstance(example, Ranking):
                made += _from_ranking(example, unit, rankings)
            else:
                made += _from_pair(example, unit)
        except RefusedError as refused:
            problems.append(RowProblem(refused.code, example.source, str(refused)))
    return made, problems


def _from_pair(pair: Pair, unit: Unit) -> list[Example]:
    prompt, source, weight = pair.prompt, pair.source, pair.weight
    if unit == "unpaired":
        return [
            Unpaired(prompt, pair.chosen, True, source, weight, _finished((pair, 0))),
            Unpaired(prompt, pair.rejected, False, source, weight, _finished((pair, 1))),
        ]
    return [Ranking(prompt, pair.completions, source, weight, None, pair.finished)] if unit == "ranking" else [pair]


def _from_unpaired(single: Unpaired, unit: Unit, partner: Unpaired | None) -> list[Example]:
    if unit == "unpaired":
        return [single]
    if unit == "ranking":
        raise RefusedError(
            "U04",
            "the row holds one completion, and a ranking has two at least; give a list of completions with scores",
        )
    if single.is_desirable is None:
        raise RefusedError("U06", "the completion has no label, so it cannot be paired; add a label, true or false")
    if partner is None:
        this, other = ("desirable", "undesirable") if single.is_desirable else ("undesirable", "desirable")
        raise RefusedError(
            "U01",
            f"no {other} completion of the same prompt is left for this {this} one; add one, or choose a method for"
            " single completions (KTO, BCO)",
        )
    if not single.is_desirable:
        return []  # the pair stands where its desirable completion stood
    same_row = single.source == partner.source
    return [
        Pair(
            single.prompt,
            single.completion,
            partner.completion,
            single.source if same_row else f"{single.source} + {partner.source}",
            (single.weight + partner.weight) / 2,
            finished=_finished((single, 0), (partner, 0)),
        )
    ]


def _from_ranking(ranking: Ranking, unit: Unit, rankings: Rankings) -> list[Example]:
    if unit == "unpaired":
        raise RefusedError(
            "U05",
            "the row ranks its completions but judges none on its own; give each a row with a label, or choose a"
            " method for pairs or rankings",
        )
    if unit == "ranking":
        if ranking.scores is not None and len(set(ranking.scores)) < len(ranking.scores):
            raise RefusedError(
                "U03", "completions have equal scores, and a ranking with ties has no likelihood; drop one of the tied"
            )
        return [ranking]
    last = len(ranking.completions) - 1
    couples = {
        "best_worst": [(0, last)],
        "best_rest": [(0, worse) for worse in range(1, last + 1)],
        "all": list(combinations(range(last + 1), 2)),
    }[rankings]
    scores = ranking.scores
    if scores is not None:
        couples = [(better, worse) for better, worse in couples if scores[better] > scores[worse]]
        if not couples:
            raise RefusedError("U02", "the completions have equal scores, so none is preferred; delete the row")
    return [
        Pair(
            ranking.prompt,
            ranking.completions[better],
            ranking.completions[worse],
            ranking.source,
            ranking.weight / len(couples),
            None if scores is None else scores[better] - scores[worse],
            finished=_finished((ranking, better), (ranking, worse)),
        )
        for better, worse in couples
    ]


def _finished(*completions: tuple[Example, int]) -> Finished:
    """Of completions, each given by its example and its place there, which ended by themselves."""
    flags = tuple(example.finished is None or example.finished[place] for example, place in completions)
    return None if all(flags) else flags


def _pair_up(examples: Sequence[Example]) -> dict[int, Unpaired]:
    """Place of a labelled completion -> the one of the same prompt and the other label that it makes a pair with."""
    groups: defaultdict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    singles: dict[int, Unpaired] = {}
    for place, example in enumerate(examples):
        if isinstance(example, Unpaired) and example.is_desirable is not None:
            singles[place] = example
            groups[key_of(example.prompt)][example.is_desirable].append(place)
    partners: dict[int, Unpaired] = {}
    for undesirable, desirable in groups.values():
        # The longer list may have completions left over.
        for one, other in zip(undesirable, desirable, strict=False):
            partners[one], partners[other] = singles[other], singles[one]
    return partners


def every_answer(examples: Sequence[Example]) -> list[Example]:
    """The examples, with one for each answer of a conversation, behind all that was said before it.

    That costs more tokens than a mask over the whole conversation would, and is exact for every chat template: some
    write earlier answers otherwise than the last (without their thoughts, say), and a model answers as they do.
    """
    made: list[Example] = []
    for example in examples:
        if isinstance(example, Unpaired) and example.is_conversation:
            made += [*_earlier_answers(example), example]
        else:
            made.append(example)
    return made


def _earlier_answers(last: Unpaired) -> list[Unpaired]:
    turns: Sequence[Message] = () if isinstance(last.prompt, str) else last.prompt
    return [
        replace(
            last,
            prompt=turns[:place],
            completion=turns[place : place + 1],
            finished=None,
            is_conversation=has_answers(turns[:place]),
        )
        for place in range(1, len(turns))
        if turns[place]["role"] == "assistant" and turns[place - 1]["role"] not in ("assistant", "system")
    ]


def key_of(prompt: Text) -> Hashable:
    """What is equal for equal prompts."""
    return prompt if isinstance(prompt, str) else tuple(tuple(sorted(turn.items())) for turn in prompt)

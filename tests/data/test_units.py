"""Examples of one kind become those of another as worked out by hand; what cannot is a coded problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.formats import CHECKS
from penchant.data.units import UNIT_CHECKS, Rankings, Unit, as_unit, every_answer, unit_of
from penchant.types import Example, Pair, Ranking, Unpaired

PAIR = Pair("p", "good", "bad", "f:1", weight=2.0, margin=1.5, win_probabilities=(0.75, 0.25))
SINGLE = Unpaired("p", "alone", None, "f:2", weight=0.5)
LIST = Ranking("p", ("a", "b", "c", "d"), "f:3", weight=6.0, scores=(9.0, 5.0, 5.0, 1.0))
UNSCORED = Ranking("p", ("a", "b", "c"), "f:4", weight=3.0)


def good(prompt: Any, completion: Any, line: int, weight: float = 1.0) -> Unpaired:
    return Unpaired(prompt, completion, True, f"f:{line}", weight)


def bad(prompt: Any, completion: Any, line: int, weight: float = 1.0) -> Unpaired:
    return Unpaired(prompt, completion, False, f"f:{line}", weight)


def codes_of(examples: Sequence[Example], unit: Unit, rankings: Rankings = "best_worst") -> list[tuple[str, str]]:
    return [(problem.code, problem.source) for problem in as_unit(examples, unit, rankings)[1]]


def test_the_unit_is_the_kind_of_the_record() -> None:
    assert [unit_of(example) for example in (PAIR, SINGLE, LIST)] == ["pair", "unpaired", "ranking"]


def test_examples_of_the_kind_asked_for_stay_what_they_are() -> None:
    assert as_unit([PAIR], "pair") == ([PAIR], [])
    assert as_unit([SINGLE], "unpaired") == ([SINGLE], [])
    assert as_unit([UNSCORED], "ranking") == ([UNSCORED], [])
    assert as_unit([], "pair") == ([], [])


def test_a_pair_becomes_a_desirable_and_an_undesirable_completion_of_its_weight() -> None:
    singles = [Unpaired("p", "good", True, "f:1", 2.0), Unpaired("p", "bad", False, "f:1", 2.0)]
    assert as_unit((PAIR, SINGLE), "unpaired") == ([*singles, SINGLE], [])


def test_a_pair_becomes_a_ranking_of_two() -> None:
    assert as_unit([PAIR], "ranking") == ([Ranking("p", ("good", "bad"), "f:1", 2.0)], [])


def test_labelled_completions_of_one_prompt_pair_up_in_order_whatever_stands_between() -> None:
    examples: list[Example] = [
        bad("p", "bad 1", 1),
        good("q", "good of q", 2),
        good("p", "good 1", 3, weight=3.0),
        bad("q", "bad of q", 4, weight=2.0),
        good("p", "good 2", 5),
        PAIR,
        bad("p", "bad 2", 6),
    ]
    pairs, problems = as_unit(examples, "pair")
    assert problems == []
    assert pairs == [
        Pair("q", "good of q", "bad of q", "f:2 + f:4", 1.5),
        Pair("p", "good 1", "bad 1", "f:3 + f:1", 2.0),
        Pair("p", "good 2", "bad 2", "f:5 + f:6", 1.0),
        PAIR,
    ]


def test_prompts_of_messages_pair_up_by_content_and_never_with_text() -> None:
    def asked(content: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": content}]

    yes, no = ([{"role": "assistant", "content": word}] for word in ("Yes.", "No."))
    swapped = [{"content": "Is it?", "role": "user"}]
    examples: list[Example] = [good(asked("Is it?"), yes, 1), bad("Is it?", "No.", 2), bad(asked("Was it?"), no, 3)]
    examples.append(bad(swapped, no, 4))
    pairs, problems = as_unit(examples, "pair")
    assert pairs == [Pair(asked("Is it?"), yes, no, "f:1 + f:4")]
    assert [problem.source for problem in problems] == ["f:2", "f:3"]


def test_completions_without_a_counterpart_are_left_out_each_with_a_problem() -> None:
    examples: list[Example] = [good("p", "a", 1), good("p", "b", 2), bad("p", "c", 3), bad("q", "d", 4)]
    pairs, problems = as_unit(examples, "pair")
    assert pairs == [Pair("p", "a", "c", "f:1 + f:3")]
    assert [str(problem).split(";")[0] for problem in problems] == [
        "f:2: [U01] no undesirable completion of the same prompt is left for this desirable one",
        "f:4: [U01] no desirable completion of the same prompt is left for this undesirable one",
    ]


RANKING_PAIRS: dict[str, tuple[Ranking, Rankings, list[tuple[str, str]], float, list[float | None]]] = {
    "best and worst": (LIST, "best_worst", [("a", "d")], 6.0, [8.0]),
    "best and rest": (LIST, "best_rest", [("a", "b"), ("a", "c"), ("a", "d")], 2.0, [4.0, 4.0, 8.0]),
    "all, but for the tie of b and c": (
        LIST,
        "all",
        [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")],
        1.2,
        [4.0, 4.0, 8.0, 4.0, 4.0],
    ),
    "best and worst without scores": (UNSCORED, "best_worst", [("a", "c")], 3.0, [None]),
    "best and rest without scores": (UNSCORED, "best_rest", [("a", "b"), ("a", "c")], 1.5, [None] * 2),
    "all without scores": (UNSCORED, "all", [("a", "b"), ("a", "c"), ("b", "c")], 1.0, [None] * 3),
    "a tie for the best": (
        Ranking("p", ("a", "b", "c"), "f:5", scores=(2.0, 2.0, 1.0)),
        "best_rest",
        [("a", "c")],
        1.0,
        [1.0],
    ),
}


@pytest.mark.parametrize("case", RANKING_PAIRS)
def test_a_ranking_becomes_the_pairs_worked_out_by_hand(case: str) -> None:
    ranking, rankings, couples, weight, margins = RANKING_PAIRS[case]
    pairs = [
        Pair("p", chosen, rejected, ranking.source, weight, margin)
        for (chosen, rejected), margin in zip(couples, margins, strict=True)
    ]
    assert as_unit([ranking], "pair", rankings) == (pairs, [])


def test_the_worst_pair_is_the_default() -> None:
    assert as_unit([LIST], "pair") == as_unit([LIST], "pair", "best_worst")


@pytest.mark.parametrize("rankings", ["best_worst", "best_rest", "all"])
def test_a_ranking_of_equal_scores_gives_no_pair(rankings: Rankings) -> None:
    flat = Ranking("p", ("a", "b", "c"), "f:7", scores=(4.0, 4.0, 4.0))
    assert as_unit([flat, PAIR], "pair", rankings)[0] == [PAIR]
    assert codes_of([flat, PAIR], "pair", rankings) == [("U02", "f:7")]


def test_a_ranking_with_ties_is_no_ranking_to_a_loss() -> None:
    assert as_unit([LIST, UNSCORED], "ranking")[0] == [UNSCORED]
    assert codes_of([LIST, UNSCORED], "ranking") == [("U03", "f:3")]
    strict = Ranking("p", ("a", "b"), "f:8", scores=(1.0, 0.5))
    assert as_unit([strict], "ranking") == ([strict], [])


def test_single_completions_are_no_ranking_and_a_ranking_judges_none_alone() -> None:
    assert codes_of([SINGLE, good("p", "c", 9)], "ranking") == [("U04", "f:2"), ("U04", "f:9")]
    assert codes_of([UNSCORED, SINGLE], "unpaired") == [("U05", "f:4")]


def test_a_completion_without_a_label_makes_no_pair() -> None:
    examples = [SINGLE, good("p", "c", 1), bad("p", "d", 2)]
    assert as_unit(examples, "pair")[0] == [Pair("p", "c", "d", "f:1 + f:2")]
    assert codes_of(examples, "pair") == [("U06", "f:2")]


def test_every_code_is_given_says_a_mend_and_is_none_of_the_reading() -> None:
    flat = Ranking("p", ("a", "b"), "f:1", scores=(1.0, 1.0))
    problems = [
        *as_unit([good("p", "c", 1), SINGLE, flat], "pair")[1],
        *as_unit([flat, SINGLE], "ranking")[1],
        *as_unit([flat], "unpaired")[1],
    ]
    assert sorted(problem.code for problem in problems) == sorted(UNIT_CHECKS)
    assert not set(UNIT_CHECKS) & set(CHECKS)
    assert all(";" in problem.message for problem in problems)


TEXTS = st.text("abc", min_size=1, max_size=2)
WEIGHTS = st.sampled_from([0.5, 1.0, 3.0])
PAIRS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS, WEIGHTS), max_size=8)
"""Prompt, chosen, rejected and weight of each."""


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_pairs_taken_apart_and_paired_up_again_are_the_same_pairs(drawn: list[tuple[str, str, str, float]]) -> None:
    pairs: list[Example] = [
        Pair(f"prompt {n}", chosen, rejected, f"f:{n}", weight) for n, (_, chosen, rejected, weight) in enumerate(drawn)
    ]
    singles, _ = as_unit(pairs, "unpaired")
    assert len(singles) == 2 * len(pairs)
    assert as_unit(singles, "pair") == (pairs, [])


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_repeated_prompts_keep_the_multiset_of_judgements(
    drawn: list[tuple[str, str, str, float]], random: Any
) -> None:
    pairs = [Pair(prompt, chosen, rejected, "f", weight) for prompt, chosen, rejected, weight in drawn]
    singles, _ = as_unit(pairs, "unpaired")
    as_they_came, problems = as_unit(singles, "pair")
    assert problems == []
    assert Counter(as_they_came) == Counter(pairs)
    random.shuffle(singles)
    shuffled, problems = as_unit(singles, "pair")
    assert problems == []
    # In another order other completions meet, yet each is used once, on its own side, under its own prompt.
    for side in ("chosen", "rejected"):
        assert Counter((pair.prompt, getattr(pair, side)) for pair in shuffled) == Counter(
            (pair.prompt, getattr(pair, side)) for pair in pairs
        )
    assert sum(pair.weight for pair in shuffled) == pytest.approx(sum(pair.weight for pair in pairs))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=2, max_size=6),
    WEIGHTS,
    st.sampled_from(["best_worst", "best_rest", "all"]),
)
def test_the_pairs_of_a_ranking_share_its_weight_and_prefer_the_higher_score(
    scores: list[float], weight: float, rankings: Rankings
) -> None:
    scores.sort(reverse=True)
    texts = tuple(f"text {place}" for place in range(len(scores)))
    score_of = dict(zip(texts, scores, strict=True))
    made, problems = as_unit([Ranking("p", texts, "f:1", weight, tuple(scores))], "pair", rankings)
    if scores[0] == scores[-1]:
        assert made == []
        assert [problem.code for problem in problems] == ["U02"]
        return
    assert sum(pair.weight for pair in made) == pytest.approx(weight)
    for pair in made:
        assert isinstance(pair, Pair)
        assert pair.margin == score_of[str(pair.chosen)] - score_of[str(pair.rejected)] > 0


def test_what_was_cut_off_stays_so_in_every_kind() -> None:
    pair = Pair("p", "good", "bad", "f:1", finished=(True, False))
    assert [example.finished for example in as_unit([pair], "unpaired")[0]] == [None, (False,)]
    assert [example.finished for example in as_unit([pair], "ranking")[0]] == [(True, False)]
    singles: list[Example] = [
        Unpaired("p", "bad", False, "f:1", finished=(False,)),
        Unpaired("p", "good", True, "f:2"),
    ]
    assert [example.finished for example in as_unit(singles, "pair")[0]] == [(True, False)]


def test_pairs_of_a_ranking_take_the_flags_of_their_completions() -> None:
    ranking = Ranking("p", ("a", "b", "c"), "f:1", scores=(3.0, 2.0, 1.0), finished=(True, False, True))
    pairs = as_unit([ranking], "pair", "all")[0]
    assert {pair.completions: pair.finished for pair in pairs if isinstance(pair, Pair)} == {
        ("a", "b"): (True, False),
        ("a", "c"): None,
        ("b", "c"): (False, True),
    }


def test_every_answer_of_a_conversation_is_an_example_behind_what_was_said_before() -> None:
    turns = [{"role": role, "content": str(place)} for place, role in enumerate(("system", *("user", "assistant") * 3))]
    last = Unpaired(turns[:6], turns[6:], None, "f:1", 2.0, (False,), is_conversation=True)
    made = every_answer([SINGLE, last])
    assert made[0] == SINGLE
    assert [example.completion for example in made[1:]] == [[turns[2]], [turns[4]], [turns[6]]]
    assert [example.prompt for example in made[1:]] == [turns[:2], turns[:4], turns[:6]]
    assert [example.finished for example in made[1:]] == [None, None, (False,)]  # only the last one can be cut off
    assert {(example.source, example.weight) for example in made[1:]} == {("f:1", 2.0)}


def test_what_stands_apart_or_is_judged_keeps_its_one_answer() -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    answer = [{"role": "assistant", "content": "good"}]
    apart, judged = Unpaired(turns, answer, None), Unpaired(turns, answer, True)
    assert every_answer([apart, judged]) == [apart, judged]


def test_an_answer_nobody_asked_for_is_no_example() -> None:
    roles = ("system", "assistant", "user", "assistant", "assistant", "user")
    turns = [{"role": role, "content": str(place)} for place, role in enumerate(roles)]
    last = Unpaired(turns, [{"role": "assistant", "content": "last"}], None, is_conversation=True)
    assert [example.completion for example in every_answer([last])] == [[turns[3]], last.completion]

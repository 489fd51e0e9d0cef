"""Judged completions become the preferences worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.online.judges import Verdict
from penchant.online.pairs import Preference, choose, reject, win_probabilities

SIGMOID_ONE = 1 / (1 + math.exp(-1))

scores_or_none = st.lists(st.none() | st.integers(-3, 3).map(float), min_size=1, max_size=7)
seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_chances_to_win_by_bradley_and_terry_by_hand() -> None:
    first, second = win_probabilities(Verdict((1.0, 0.0)))
    assert first == pytest.approx((0.5 + SIGMOID_ONE) / 2)
    assert second == pytest.approx((1 - SIGMOID_ONE + 0.5) / 2)


def test_chances_to_win_of_a_judge_who_compares_are_the_means_of_the_rows() -> None:
    wins = ((0.5, 1.0, 0.75), (0.0, 0.5, 1.0), (0.25, 0.0, 0.5))
    assert win_probabilities(Verdict((9.0, 0.0, 9.0), wins)) == (0.75, 0.5, 0.25)


def test_comparisons_without_a_verdict_are_left_out_of_the_mean() -> None:
    wins = ((0.5, 1.0, None), (0.0, 0.5, None), (None, None, 0.5))
    assert win_probabilities(Verdict((1.0, 0.0, None), wins)) == (0.75, 0.25, None)
    first, second, third = win_probabilities(Verdict((1.0, None, 0.0)))
    assert second is None
    assert (first, third) == win_probabilities(Verdict((1.0, 0.0)))


def test_the_only_completion_ties_with_itself() -> None:
    assert win_probabilities(Verdict((7.0,))) == (0.5,)
    assert win_probabilities(Verdict((None,))) == (None,)
    assert win_probabilities(Verdict((7.0, None))) == (None, None)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e3, 1e308])
def test_chances_to_win_are_finite_for_scores_of_any_size(size: float) -> None:
    chances = win_probabilities(Verdict((size, -size, 0.0)))
    assert all(chance is not None and 0 <= chance <= 1 for chance in chances)
    assert sum(chance or 0 for chance in chances) == pytest.approx(1.5)  # what one wins the other loses


@given(scores_or_none)
def test_chances_to_win_average_to_one_half_over_the_scored(scores: list[float | None]) -> None:
    chances = [chance for chance in win_probabilities(Verdict(tuple(scores))) if chance is not None]
    assert not chances or sum(chances) / len(chances) == pytest.approx(0.5)


def test_the_best_meets_the_worst_by_hand() -> None:
    (one,) = choose(Verdict((0.0, 3.0, -1.0, None)), "best_worst", rng())
    assert (one.better, one.worse, one.gap) == (1, 2, 4.0)
    chances = win_probabilities(Verdict((0.0, 3.0, -1.0)))
    assert one.probabilities == (chances[1], chances[2])


def test_of_equal_scores_the_first_is_the_best_and_the_last_the_worst() -> None:
    (one,) = choose(Verdict((0.0, 1.0, 1.0, 0.0)), "best_worst", rng())
    assert (one.better, one.worse) == (1, 3)


def test_all_pairs_of_different_scores_by_hand() -> None:
    found = choose(Verdict((0.0, 2.0, 0.0, None, 1.0)), "all", rng())
    assert {(one.better, one.worse, one.gap) for one in found} == {
        (1, 4, 1.0), (1, 0, 2.0), (1, 2, 2.0), (4, 0, 1.0), (4, 2, 1.0)
    }  # fmt: skip
    assert len(found) == 5


def test_the_best_alone_has_no_partner() -> None:
    wins = ((0.5, 0.0), (1.0, 0.5))
    assert choose(Verdict((0.25, 0.75), wins), "best", rng()) == [Preference(1, None, 0.0, (0.75, 0.25))]
    assert choose(Verdict((None, 4.0)), "best", rng()) == [Preference(1, None, 0.0, (0.5, 0.5))]


@given(scores_or_none, seeds)
def test_random_pairs_are_disjoint_and_as_many_as_fit(scores: list[float | None], seed: int) -> None:
    scored = [place for place, score in enumerate(scores) if score is not None]
    distinct = tuple(score if score is None else score + place / 100 for place, score in enumerate(scores))
    pairs = choose(Verdict(distinct), "random", rng(seed))
    met = [place for pair in pairs for place in (pair.better, pair.worse)]
    assert len(met) == len(set(met)) == len(scored) // 2 * 2
    assert set(met) <= set(scored)


def test_every_matching_is_equally_likely() -> None:
    verdict = Verdict((3.0, 2.0, 1.0, 0.0))
    matchings = [
        frozenset((one.better, one.worse) for one in choose(verdict, "random", rng(seed))) for seed in range(3000)
    ]
    counts = [matchings.count(matching) for matching in set(matchings)]
    assert len(counts) == 3
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 13.8  # chi-square of 2 degrees, 1 in 1000


@given(scores_or_none, seeds, st.sampled_from(["best_worst", "random", "all"]), st.sampled_from([0.0, 1.0, 2.5]))
def test_pairs_hold_scored_completions_in_the_right_order_above_the_gap(
    scores: list[float | None], seed: int, kind: str, min_gap: float
) -> None:
    for one in choose(Verdict(tuple(scores)), kind, rng(seed), min_gap):
        assert one.worse is not None
        better, worse = scores[one.better], scores[one.worse]
        assert better is not None
        assert worse is not None
        assert one.gap == better - worse > min_gap
        assert one.probabilities[0] > one.probabilities[1]


@pytest.mark.parametrize("kind", ["best_worst", "random", "all"])
def test_nothing_is_preferred_among_equals_or_where_nothing_has_a_score(kind: str) -> None:
    for scores in [(1.0, 1.0, 1.0), (None, None), (2.0, None), (2.0,), ()]:
        assert choose(Verdict(scores), kind, rng()) == []
    assert choose(Verdict((None, None)), "best", rng()) == []


def test_a_gap_must_be_exceeded() -> None:
    assert choose(Verdict((1.0, 0.5)), "all", rng(), min_gap=0.5) == []
    assert len(choose(Verdict((1.0, 0.5)), "all", rng(), min_gap=0.49)) == 1


@pytest.mark.parametrize("kind", ["best_worst", "random", "all", "best"])
def test_accepted_completions_alone_take_part(kind: str) -> None:
    scores = (0.0, None, 1.0, 2.0, None, 3.0, 4.0)
    for seed in range(20):
        accepted = [(0, 2, 3, 5, 6)[place] for place in reject([0.0, 1.0, 2.0, 3.0, 4.0], 3, 2.0, rng(seed))]
        met = {
            place
            for one in choose(Verdict(scores), kind, rng(seed), accept=3, accept_beta=2.0)
            for place in (one.better, one.worse)
            if place is not None
        }
        assert met <= set(accepted)
        if kind == "all":
            assert met == set(accepted)


@pytest.mark.parametrize("kind", ["best_worst", "random", "all", "best"])
def test_the_same_seed_gives_the_same_preferences(kind: str) -> None:
    scores = tuple(rng(1).normal(size=12).tolist())
    one, other = (choose(Verdict(scores), kind, rng(5), accept=6, accept_beta=1.0) for _ in range(2))
    assert one == other
    assert any(choose(Verdict(scores), kind, rng(seed), accept=6, accept_beta=1.0) != one for seed in range(6, 30))


@given(st.lists(st.floats(-1e6, 1e6), max_size=12), st.integers(1, 15), st.floats(1e-3, 1e6), seeds)
def test_rejection_ends_with_so_many_different_places(scores: list[float], num: int, beta: float, seed: int) -> None:
    accepted = reject(scores, num, beta, rng(seed))
    assert len(accepted) == len(set(accepted)) == min(num, len(scores))
    assert set(accepted) <= set(range(len(scores)))


def test_rejection_lowers_its_bar_only_after_a_whole_pass() -> None:
    """Nearly no heat: each pass accepts the best of the rest and nothing else, so the order is that of the scores."""
    scores = [0.3, 5.0, -2.0, 1.0]
    order = reject(scores, 4, 1e-9, rng())
    assert all(scores[one] > scores[other] for one, other in pairwise(order))

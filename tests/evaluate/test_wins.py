"""Win rates against arithmetic by hand, other intervals and data whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.evaluate.wins import (
    RIDGE,
    difference,
    length_controlled_rate,
    mean_with_interval,
    outcome,
    win_rate,
)
from penchant.online.judges import Verdict
from penchant.report.figures import wilson_interval


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_wins_ties_losses_and_lengths_by_hand() -> None:
    rate = win_rate([1, 1, 0.5, 0, 1], [10, 20, 30, 5, 7], [5, 30, 10, 50, 7])
    assert (rate.wins, rate.ties, rate.losses, rate.num_prompts) == (3, 1, 1, 5)
    assert rate.rate.value == pytest.approx(3.5 / 5)
    # The longer answer: won, lost, tied, won (the baseline's), and one where both are equally long.
    assert rate.longer_wins == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert rate.rate_by_length == pytest.approx((1 + 0 + 1 + 0 + 0.5) / 5)
    assert (rate.mean_length, rate.baseline_mean_length) == (72 / 5, 102 / 5)


def test_exchanging_the_sides_mirrors_everything() -> None:
    rng = np.random.default_rng(0)
    outcomes, lengths, others = rng.choice([0, 0.5, 1], 60), rng.integers(1, 99, 60), rng.integers(1, 50, 60)
    one, mirrored = win_rate(outcomes, lengths, others), win_rate(1 - outcomes, others, lengths)
    assert (one.wins, one.ties, one.losses) == (mirrored.losses, mirrored.ties, mirrored.wins)
    for name in ("rate", "length_controlled"):
        this, that = getattr(one, name), getattr(mirrored, name)
        assert (this.value, this.low, this.high) == pytest.approx((1 - that.value, 1 - that.high, 1 - that.low))
    assert one.longer_wins == pytest.approx(mirrored.longer_wins)
    assert one.rate_by_length == pytest.approx(1 - mirrored.rate_by_length)


@pytest.mark.parametrize(("wins", "n"), [(50, 100), (130, 200), (300, 400)])
def test_the_interval_of_a_share_is_nearly_that_of_wilson(wins: int, n: int) -> None:
    rate = win_rate([1] * wins + [0] * (n - wins), [1] * n, [1] * n).rate
    low, high = wilson_interval(wins / n, n)
    assert rate.low == pytest.approx(low, abs=0.012)
    assert rate.high == pytest.approx(high, abs=0.012)


def test_ties_make_the_interval_narrower_than_that_of_a_share() -> None:
    """(wins + ties / 2) / n is no share of n trials: a tie varies less than a win and a loss."""
    rate = win_rate([1] * 25 + [0.5] * 50 + [0] * 25, [1] * 100, [1] * 100).rate
    low, high = wilson_interval(0.5, 100)
    assert rate.value == 0.5
    assert rate.high - rate.low == pytest.approx((high - low) / math.sqrt(2), rel=0.06)


def test_where_one_side_always_wins_the_interval_is_no_point() -> None:
    rate = win_rate([1] * 8, range(8), [3] * 8).rate
    assert (rate.low, rate.high) == wilson_interval(1.0, 8)
    assert rate.low < 0.7


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        found = mean_with_interval(rng.exponential(size=60), seed, resamples=400)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 < hits / 300 < 0.98


def test_the_interval_of_a_mean_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2500)
    found = mean_with_interval(values)
    half = 1.96 * values.std() / 50
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01)


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 10, 200)
    model, baseline = hard + rng.normal(0.5, 1, 200), hard + rng.normal(0, 1, 200)
    apart = mean_with_interval(model), mean_with_interval(baseline)
    assert apart[0].low < apart[1].high
    assert difference(model, baseline).low > 0
    assert difference(model, baseline).value == pytest.approx(apart[0].value - apart[1].value)
    # The resamples are those of both means, so the interval is that of the differences of their resampled means.
    assert difference(model, np.zeros(200)) == apart[0]


def test_seeds_decide_the_resamples_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    one = mean_with_interval(values, seed=1)
    assert one == mean_with_interval(values, seed=1) != mean_with_interval(values, seed=2)
    monkeypatch.setattr("penchant.evaluate.wins._NUMBERS_AT_ONCE", 700)
    assert mean_with_interval(values, seed=1) == one
    assert length_controlled_rate([0, 1, 1], [1, 2, 3], resamples=50).low > 0


@pytest.mark.parametrize(("constant", "slope"), [(0.0, 0.0), (0.6, 1.5), (-1.2, 2.5), (0.8, -1.0)])
def test_known_coefficients_are_recovered(constant: float, slope: float) -> None:
    rng = np.random.default_rng(4)
    lengths = rng.normal(30, 100, 8000)
    inputs = np.tanh(lengths / lengths.std())
    chances = 1 / (1 + np.exp(-(constant + slope * inputs)))
    exact = length_controlled_rate(chances, lengths, resamples=2)
    assert exact.value == pytest.approx(sigmoid(constant), abs=1e-4)
    drawn = length_controlled_rate((rng.random(8000) < chances).astype(float), lengths, resamples=100)
    assert drawn.value == pytest.approx(sigmoid(constant), abs=0.02)
    assert drawn.low - 0.01 < sigmoid(constant) < drawn.high + 0.01
    assert 0.01 < drawn.high - drawn.low < 0.06


def test_the_fit_is_the_minimum_of_its_loss() -> None:
    """Held against plain gradient descent on the same sum."""
    rng = np.random.default_rng(5)
    lengths, outcomes = rng.normal(size=40), rng.choice([0, 0.5, 1], 40)
    inputs = np.tanh(lengths / lengths.std())
    a = b = 0.0
    for _ in range(4000):
        errors = 1 / (1 + np.exp(-(a + b * inputs))) - outcomes
        a, b = a - 0.05 * (errors.sum() + RIDGE * a), b - 0.05 * ((errors * inputs).sum() + RIDGE * b)
    assert length_controlled_rate(outcomes, lengths, resamples=2).value == pytest.approx(sigmoid(a), abs=1e-6)


def test_a_judge_who_only_counts_length_says_nothing_about_quality() -> None:
    rng = np.random.default_rng(6)
    differences = rng.normal(80, 100, 500)
    rate = win_rate((differences > 0).astype(float), 1000 + differences, np.full(500, 1000), regression_resamples=200)
    assert rate.rate.value == rate.rate_by_length > 0.75
    assert rate.longer_wins == 1
    assert rate.length_controlled.value == pytest.approx(0.5, abs=0.1)
    assert rate.length_controlled.low < 0.5 < rate.length_controlled.high


def test_length_control_changes_nothing_where_lengths_are_equal() -> None:
    outcomes = [1] * 70 + [0] * 30
    found = length_controlled_rate(outcomes, [0] * 100, resamples=500)
    assert found.value == pytest.approx(0.7, abs=1e-3)
    plain = mean_with_interval(outcomes)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.02)


@pytest.mark.parametrize("outcomes", [[1.0] * 20, [0.0] * 20, [1.0], [0.5], [0.0] * 10 + [1.0] * 10])
def test_separable_data_do_no_harm(outcomes: list[float]) -> None:
    found = length_controlled_rate(outcomes, np.arange(len(outcomes)) - len(outcomes) // 2 + 0.5, resamples=300)
    assert 0 <= found.low <= found.high <= 1
    assert math.isfinite(found.value)
    if len(set(outcomes)) == 1:
        assert found.value == pytest.approx(outcomes[0], abs=0.05)
    else:
        assert found.value == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict((2.0, 1.0)), 1.0),
        (Verdict((1.0, 1.0)), 0.5),
        (Verdict((-1.0, 1.0)), 0.0),
        (Verdict((None, 1.0)), None),
        (Verdict((0.75, 0.25), wins=((0.5, 0.8), (0.2, 0.5))), 0.8),
        (Verdict((None, None), wins=((0.5, None), (None, 0.5))), None),
    ],
)
def test_a_verdict_on_two_is_an_outcome_of_the_first(verdict: Verdict, expected: float | None) -> None:
    assert outcome(verdict) == expected


def test_numbers_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one of each is needed"):
        win_rate([1, 0], [1, 2], [3])
    with pytest.raises(ValueError, match="one of each is needed"):
        win_rate([], [], [])
    with pytest.raises(ValueError, match="of the same prompts"):
        difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        mean_with_interval([])

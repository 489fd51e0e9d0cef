"""Cohen's d against its formula, and when a difference of lengths is worth a word."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penchant.doctor.lengths import Lengths


def lengths_of(better: np.ndarray, worse: np.ndarray) -> Lengths:
    lengths = Lengths()
    for one, other in zip(better.tolist(), worse.tolist(), strict=True):
        lengths.add_pair(one, other)
    return lengths


def drawn(mean: float, number: int, seed: int, spread: float = 0.5) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(mean, spread, number)).round().astype(int) + 1


def test_the_effect_is_cohens_d_of_log_length() -> None:
    better, worse = drawn(4.2, 300, 1), drawn(4.0, 300, 2)
    logs = np.log(better), np.log(worse)
    pooled = math.sqrt((logs[0].var(ddof=1) + logs[1].var(ddof=1)) / 2)
    assert lengths_of(better, worse).effect() == pytest.approx((logs[0].mean() - logs[1].mean()) / pooled, rel=1e-9)


@pytest.mark.parametrize(("shift", "severity"), [(0.0, None), (0.05, None), (0.25, "warn"), (0.7, "major")])
def test_a_bias_is_told_by_its_size(shift: float, severity: str | None) -> None:
    bias = lengths_of(drawn(4.0 + shift, 2000, 3), drawn(4.0, 2000, 4)).bias()
    assert (bias[0] if bias else None) == severity


def test_shorter_better_completions_are_a_bias_as_well() -> None:
    bias = lengths_of(drawn(4.0, 2000, 3), drawn(4.5, 2000, 4)).bias()
    assert bias is not None
    assert "-" in bias[1].partition("length ")[2]


def test_few_rows_differ_by_chance_and_nothing_is_said() -> None:
    said = [lengths_of(drawn(4.0, 24, seed), drawn(4.0, 24, 1000 + seed)).bias() for seed in range(200)]
    effects = [abs(lengths_of(drawn(4.0, 24, seed), drawn(4.0, 24, 1000 + seed)).effect()) for seed in range(200)]
    assert sum(effect >= 0.3 for effect in effects) > 50  # by its size alone, many of these would count
    assert sum(bias is not None for bias in said) <= 4


def test_of_very_few_rows_nothing_is_said_however_clear_they_look() -> None:
    assert lengths_of(np.full(19, 80), np.full(19, 20)).bias() is None
    assert lengths_of(np.full(20, 80), np.full(20, 20)).bias() is not None


def test_the_longer_one_winning_most_pairs_is_a_bias_however_small_the_difference() -> None:
    worse = drawn(4.0, 400, 5)
    bias = lengths_of(worse + 1, worse).bias()
    assert bias is not None
    assert bias[0] == "warn"
    assert "better one in 100% of the pairs" in bias[1]


def test_equal_lengths_are_no_bias() -> None:
    same = np.full(100, 7)
    assert lengths_of(same, same).bias() is None
    assert lengths_of(same, same).longer_wins == 50
    assert lengths_of(same[:1], same[:1]).bias() is None


def test_judged_completions_are_compared_by_label() -> None:
    lengths = Lengths()
    for length, is_better in [*((40, True) for _ in range(50)), *((20 + i % 2, False) for i in range(50))]:
        lengths.add(length, is_better)
    bias = lengths.bias()
    assert bias is not None
    assert bias[0] == "major"
    assert "pairs" not in bias[1]

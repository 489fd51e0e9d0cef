"""Win rates and means over prompts, each with an interval, and what length alone would explain of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.online.judges import Verdict
from penchant.report.figures import wilson_interval

Array = npt.NDArray[np.float64]
Numbers = Sequence[float | int] | npt.NDArray[Any]

RESAMPLES = 10_000
REGRESSION_RESAMPLES = 1_000
"""Of the length-controlled rate, where each resample is a regression of its own."""

RIDGE = 0.01
"""Half of it times the square of the coefficients is added to the regression's loss, a sum over prompts: too little to
be seen where the data say something, enough to keep the coefficients finite where one side always wins."""

_NUMBERS_AT_ONCE = 4_000_000
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As it stands in a summary."""
        return asdict(self)


@dataclass(frozen=True)
class WinRate:
    """How often the answers of a model are preferred to those of a baseline, prompt by prompt."""

    wins: int
    ties: int
    losses: int
    rate: Estimate
    """(wins + ties / 2) / prompts; the mean chance to win, where chances are given."""
    length_controlled: Estimate
    """What the rate would be if both sides' answers were equally long; see `length_controlled_rate`."""
    longer_wins: float
    """How often the longer answer wins, ties and equal lengths counting half; 0.5 where length does not matter."""
    rate_by_length: float
    """The rate that a judge would give who only counts length."""
    mean_length: float
    """Of the model's answers, in characters."""
    baseline_mean_length: float

    @property
    def num_prompts(self) -> int:
        """Prompts with a valid verdict."""
        return self.wins + self.ties + self.losses

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a summary."""
        return asdict(self)


def win_rate(
    outcomes: Numbers,
    lengths: Numbers,
    baseline_lengths: Numbers,
    seed: int = 0,
    resamples: int = RESAMPLES,
    regression_resamples: int = REGRESSION_RESAMPLES,
) -> WinRate:
    """The win rate over prompts, at least one.

    Args:
        outcomes: of each prompt 1 (won), 0.5 (tie) or 0 (lost), or the chance to win.
        lengths: of the model's answers, in characters.
        baseline_lengths: of the answers that they are compared with.

    Raises:
        ValueError: there is no prompt, or the numbers of outcomes and lengths differ.
    """
    won = np.asarray(outcomes, dtype=np.float64)
    length, other = np.asarray(lengths, dtype=np.float64), np.asarray(baseline_lengths, dtype=np.float64)
    if not len(won) == len(length) == len(other) > 0:
        raise ValueError(f"{len(won)} outcomes, {len(length)} and {len(other)} lengths: one of each is needed")
    by_length = (np.sign(length - other) + 1) / 2
    rate = mean_with_interval(won, seed, resamples)
    if np.all(won == won[0]):  # resamples of a single value are all the same; a share is never that certain
        rate = Estimate(rate.value, *wilson_interval(rate.value, len(won)))
    return WinRate(
        wins=int((won > 0.5).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won < 0.5).sum()),
        rate=rate,
        length_controlled=length_controlled_rate(won, length - other, seed, regression_resamples),
        longer_wins=float(0.5 + 2 * ((by_length - 0.5) * (won - 0.5)).mean()),
        rate_by_length=float(by_length.mean()),
        mean_length=float(length.mean()),
        baseline_mean_length=float(other.mean()),
    )


def outcome(verdict: Verdict) -> float | None:
    """What a verdict on two completions says of the first: 1 won, 0.5 tie, 0 lost; None where it is invalid."""
    if verdict.wins is not None:
        return verdict.wins[0][1]
    first, second = verdict.scores
    if first is None or second is None:
        return None
    return (float(np.sign(first - second)) + 1) / 2


def mean_with_interval(values: Numbers, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean over prompts and its percentile bootstrap interval: the middle 95% of the means of resampled prompts.

    Efron and Tibshirani 1993 ("An Introduction to the Bootstrap"), chapter 13. For several numbers of the same prompts
    the same seed draws the same resamples.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("a mean needs at least one value")
    means = [values[drawn].mean(axis=1) for drawn in _drawn(len(values), seed, resamples)]
    return Estimate(float(values.mean()), *_middle(np.concatenate(means)))


def difference(values: Numbers, others: Numbers, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of values less others of the same prompts, with its interval.

    It is paired: what a prompt gives to both sides (that it is hard, say) cancels out within it.

    Raises:
        ValueError: the numbers of values differ, or there is none.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values and {len(others)} others: they must be of the same prompts")
    return mean_with_interval(
        np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), seed, resamples
    )


def length_controlled_rate(
    outcomes: Numbers,
    length_differences: Numbers,
    seed: int = 0,
    resamples: int = REGRESSION_RESAMPLES,
) -> Estimate:
    """The win rate that a regression expects at equal lengths: sigmoid(a) of P(win) = sigmoid(a + b tanh(d / sd(d))).

    d is the difference of lengths of a prompt's two answers and sd(d) its standard deviation over prompts. After
    Dubois et al. 2024 (arXiv:2404.04475), equation 1, with these deviations from AlpacaEval's own number: no term for
    the difficulty of an instruction (which AlpacaEval takes from its leaderboard, for its own instructions), a small
    ridge (RIDGE) instead of cross-validation, and no pull towards the baseline. The interval is that of
    `mean_with_interval`, with one regression for each resample; sd(d) stays that of all prompts.
    """
    outcomes = np.asarray(outcomes, dtype=np.float64)
    differences = np.asarray(length_differences, dtype=np.float64)
    scale = differences.std()
    inputs = np.tanh(differences / scale) if scale > 0 else np.zeros_like(differences)
    everything = np.ones((1, len(outcomes)))
    rates = [
        _rate_at_equal_length(_counts(drawn), inputs, outcomes) for drawn in _drawn(len(outcomes), seed, resamples)
    ]
    value = _rate_at_equal_length(everything, inputs, outcomes)[0]
    return Estimate(float(value), *_middle(np.concatenate(rates)))


def _rate_at_equal_length(counts: Array, inputs: Array, outcomes: Array) -> Array:
    """sigmoid(a) of the regression in which prompt i counts counts[r, i] times, for each r."""
    return _sigmoid(_fit(counts, inputs, outcomes)[:, 0])


def _fit(counts: Array, inputs: Array, outcomes: Array) -> Array:
    """The coefficients (R, 2) of R logistic regressions on a constant and `inputs`: Newton's method, all at once.

    Where a step does not lower the loss it is halved: far from the minimum Newton's method overshoots.
    """
    design = np.stack([np.ones_like(inputs), inputs], axis=1)  # (n, 2)

    def loss(coefficients: Array) -> Array:
        logits = coefficients @ design.T
        losses = np.logaddexp(0, logits) - outcomes * logits
        return (counts * losses).sum(1) + RIDGE / 2 * (coefficients**2).sum(1)

    coefficients = np.zeros((len(counts), 2))
    losses = loss(coefficients)
    for _ in range(_NEWTON_STEPS):
        expected = _sigmoid(coefficients @ design.T)  # (R, n)
        gradient = (counts * (expected - outcomes)) @ design + RIDGE * coefficients
        curvature = np.einsum("rn,ni,nj->rij", counts * expected * (1 - expected), design, design)
        step = np.linalg.solve(curvature + RIDGE * np.eye(2), gradient[..., None])[..., 0]
        size = np.ones(len(counts))
        while True:
            tried = coefficients - size[:, None] * step
            tried_losses = loss(tried)
            is_worse = (tried_losses > losses) & (size > 1e-6)
            if not is_worse.any():
                break
            size[is_worse] /= 2
        is_better = tried_losses <= losses
        moved = np.abs(tried - coefficients)[is_better].max(initial=0.0)
        coefficients[is_better], losses[is_better] = tried[is_better], tried_losses[is_better]
        if moved < 1e-8:
            break
    return coefficients


def _drawn(num_prompts: int, seed: int, resamples: int) -> Iterator[npt.NDArray[np.int64]]:
    """Which prompts each resample has, (some resamples, prompts) at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // num_prompts)
    for start in range(0, resamples, at_once):
        yield rng.integers(num_prompts, size=(min(at_once, resamples - start), num_prompts))


def _counts(drawn: npt.NDArray[np.int64]) -> Array:
    """How often each resample has each prompt."""
    num_resamples, num_prompts = drawn.shape
    places = drawn + np.arange(num_resamples)[:, None] * num_prompts
    return np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _middle(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0, -logits))

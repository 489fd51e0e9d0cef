"""From the judged completions of one prompt to the preferences that training takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from penchant.online.judges import Verdict

Kind = Literal["best_worst", "random", "all", "best", "none"]
"""Which completions meet: the best and the worst; all in disjoint pairs, drawn at random; each two; the best alone;
none."""


@dataclass(frozen=True)
class Preference:
    """One completion preferred to another, both by their places in the verdict."""

    better: int
    worse: int | None
    """None where the better one stands alone."""
    gap: float
    """By how much the better one scores higher; 0 where it stands alone."""
    probabilities: tuple[float, float]
    """Chances of the two to beat a random one of all completions; of one that stands alone, to win and to lose."""


def choose(
    verdict: Verdict,
    kind: Kind,
    rng: np.random.Generator,
    min_gap: float = 0.0,
    accept: int | None = None,
    accept_beta: float = 0.5,
) -> list[Preference]:
    """The preferences among the completions that have a score.

    With `accept` so many of the completions are kept first, by `reject`. Pairs whose scores differ by no more than
    `min_gap` are left out, and those of equal scores always. Of completions with the same score the first is taken as
    the best, and the last as the worst.
    """
    scores = {place: score for place, score in enumerate(verdict.scores) if score is not None}
    places = list(scores)
    if accept is not None:
        places = [places[kept] for kept in reject(list(scores.values()), accept, accept_beta, rng)]
    chances = [0.5 if chance is None else chance for chance in win_probabilities(verdict)]
    ranked = sorted(places, key=lambda place: (-scores[place], place))
    if kind == "best":
        return [Preference(best, None, 0.0, (chances[best], 1 - chances[best])) for best in ranked[:1]]
    return [
        Preference(better, worse, scores[better] - scores[worse], (chances[better], chances[worse]))
        for better, worse in _couples(ranked, kind, rng)
        if scores[better] - scores[worse] > min_gap
    ]


def _couples(ranked: Sequence[int], kind: Kind, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Who meets whom of completions that stand in order, the best first; so does the better one in each couple."""
    if kind == "best_worst":
        return [(ranked[0], ranked[-1])] if ranked else []
    if kind == "all":
        return list(combinations(ranked, 2))
    order = rng.permutation(len(ranked)).tolist()
    # Of an odd number the last one drawn stays without a partner.
    return [(ranked[min(two)], ranked[max(two)]) for two in zip(order[::2], order[1::2], strict=False)]


def reject(scores: Sequence[float], num_accept: int, beta: float, rng: np.random.Generator) -> list[int]:
    """Rejection sampling from K candidates: the places of `num_accept` of them (of all, if fewer) as they are accepted.

    Algorithm 1 of Liu et al. 2024 (RSO, arXiv:2309.06657). Candidates drawn from pi become draws from
    pi exp(r / beta) / Z: in each pass one with score r is accepted with the chance exp((r - r_max) / beta) and then is
    out, where r_max is the highest score among those that the pass began with. Towards beta = 0 the best are taken,
    towards infinity any. Every pass accepts its best, so there are K passes at most.

    Two deviations, of no effect on distinct candidates drawn independently: the paper's code keys candidates by text,
    so that repeated ones become one, and visits them as they were drawn; here they are visited in random order, so that
    candidates sorted by score do no harm.
    """
    rewards = np.asarray(scores, dtype=np.float64)
    waiting = rng.permutation(len(rewards))
    accepted: list[int] = []
    while len(waiting) and len(accepted) < num_accept:
        chances = np.exp((rewards[waiting] - rewards[waiting].max()) / beta)
        is_accepted = rng.random(len(waiting)) < chances
        accepted += waiting[is_accepted].tolist()
        waiting = waiting[~is_accepted]
    return accepted[:num_accept]


def win_probabilities(verdict: Verdict) -> tuple[float | None, ...]:
    """The chance of each completion to beat a random one of the K, itself included: mean over j of P(i beats j).

    The win rate of Wu et al. 2024 (SPPO, arXiv:2405.00675, Algorithm 1). P(i beats j) is what the judge said, and for
    judges who give scores alone sigmoid(s_i - s_j) (Bradley and Terry 1952). A comparison without a verdict is left out
    of the mean; None where none but that with itself is left, unless there is nobody else (1/2).
    """
    places = range(len(verdict.scores))
    return tuple(_mean_chance(i, [_chance(verdict, i, j) for j in places]) for i in places)


def _mean_chance(place: int, chances: Sequence[float | None]) -> float | None:
    if len(chances) == 1:
        return chances[0]
    against_others = [chance for other, chance in enumerate(chances) if other != place and chance is not None]
    return (0.5 + sum(against_others)) / (1 + len(against_others)) if against_others else None


def _chance(verdict: Verdict, i: int, j: int) -> float | None:
    """P(i beats j)."""
    if verdict.wins is not None:
        return verdict.wins[i][j]
    one, other = verdict.scores[i], verdict.scores[j]
    if one is None or other is None:
        return None
    odds = math.exp(-abs(one - other))  # of the worse one: at most 1, so that nothing overflows
    return (1 if one >= other else odds) / (1 + odds)


def kl_of_best_of(n: int) -> float:
    """KL(best of n || policy) at most, in nats: log n - (n - 1) / n, reached where no two of n draws ever tie.

    A bound by Theorem 3.1 of Beirami et al. 2024 (arXiv:2401.01879), who trace the formula back in the literature.
    """
    return math.log(n) - (n - 1) / n

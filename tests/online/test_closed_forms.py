"""What the methods that sample tend to on tables of a few actions, against their closed forms, in float64."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penchant.losses.absolute import SPPOLoss
from penchant.losses.base import PairLoss
from penchant.losses.pairwise import DPOLoss, HingeLoss, IPOLoss
from penchant.online.judges import Verdict
from penchant.online.pairs import choose, kl_of_best_of, reject
from penchant.types import PairLogps

REWARDS = [1.0, -0.5, 0.3, 2.0]
REFERENCE = [0.4, 0.3, 0.2, 0.1]
BETA = 0.7


def chi_square(counts: Any, chances: Any) -> float:
    """Pearson's statistic of counts against the chances that are claimed."""
    expected = np.sum(counts) * np.asarray(chances)
    return float(np.sum((np.asarray(counts) - expected) ** 2 / expected))


# RSO: rejection sampling.


class Counting(np.random.Generator):
    """Random numbers, and how many were asked for in each pass; all are `constant` where it is given."""

    def __init__(self, seed: int, constant: float | None = None) -> None:
        super().__init__(np.random.PCG64(seed))
        self.asked: list[int] = []
        self.constant = constant

    def random(self, size: Any = None, *rest: Any, **more: Any) -> Any:
        self.asked.append(size)
        return super().random(size, *rest, **more) if self.constant is None else np.full(size, self.constant)

    @property
    def num_accepted_at_first(self) -> int:
        return self.asked[0] - (self.asked[1] if len(self.asked) > 1 else 0)


def acceptance(scores: list[float], beta: float) -> list[float]:
    return [math.exp((score - max(scores)) / beta) for score in scores]


def test_the_first_pass_accepts_with_the_chance_of_the_paper_exactly() -> None:
    """The mean over evenly spaced uniform numbers is the integral, up to half a step for each candidate."""
    num_steps = 1000
    accepted = 0
    for step in range(num_steps):
        rng = Counting(0, constant=(step + 0.5) / num_steps)
        # With one number for all, candidates below it wait; of the last ones only the best gets in.
        reject(REWARDS, len(REWARDS), BETA, rng)
        accepted += rng.num_accepted_at_first
    assert accepted / num_steps == pytest.approx(sum(acceptance(REWARDS, BETA)), abs=len(REWARDS) / 2 / num_steps)


def test_the_first_pass_accepts_with_the_chance_of_the_paper_on_average() -> None:
    chances = acceptance(REWARDS, BETA)
    found = []
    for seed in range(4000):
        rng = Counting(seed)
        reject(REWARDS, len(REWARDS), BETA, rng)
        found.append(rng.num_accepted_at_first)
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in chances) / len(found))
    assert abs(np.mean(found) - sum(chances)) < 4 * deviation


def test_who_is_accepted_first_has_the_law_counted_out_by_hand() -> None:
    """Over all orders of visit: the chance to be accepted, and that all who were visited before were not."""
    chances = acceptance(REWARDS, BETA)
    law = [0.0] * len(chances)
    for order in permutations(range(len(chances))):
        passed_over = 1.0
        for place in order:
            law[place] += passed_over * chances[place] / math.factorial(len(chances))
            passed_over *= 1 - chances[place]
    first = [reject(REWARDS, 1, BETA, np.random.default_rng(seed))[0] for seed in range(4000)]
    assert chi_square(np.bincount(first, minlength=4), law) < 16.3  # 3 degrees of freedom, 1 in 1000


def test_without_heat_the_best_are_accepted() -> None:
    rng = np.random.default_rng(0)
    for num_accept in range(1, 10):
        scores = rng.normal(size=9).tolist()
        best = sorted(range(9), key=scores.__getitem__, reverse=True)[:num_accept]
        assert sorted(reject(scores, num_accept, 1e-9, rng)) == sorted(best)


def test_in_great_heat_every_subset_is_equally_likely() -> None:
    """Whatever the order of the candidates: here they come sorted."""
    subsets = list(combinations(range(5), 2))
    found = [tuple(sorted(reject([5.0, 4.0, 3.0, 2.0, 1.0], 2, 1e9, np.random.default_rng(i)))) for i in range(5000)]
    assert chi_square([found.count(subset) for subset in subsets], [0.1] * 10) < 27.9  # 9 degrees, 1 in 1000


def test_from_many_candidates_the_accepted_follow_the_tilted_policy() -> None:
    """pi exp(r / beta) / Z, the optimum that RSO wants samples of."""
    policy, rewards = np.array(REFERENCE), np.array(REWARDS)
    tilted = policy * np.exp(rewards / BETA)
    counts = np.zeros(4)
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        actions = rng.choice(4, size=400, p=policy)
        accepted = reject(rewards[actions].tolist(), 2, BETA, rng)
        counts += np.bincount(actions[accepted], minlength=4)
    assert chi_square(counts, tilted / tilted.sum()) < 16.3
    assert chi_square(counts, policy) > 1000


def test_completions_that_say_the_same_are_candidates_each() -> None:
    assert sorted(reject([1.0, 1.0, -1e9], 2, BETA, np.random.default_rng(0))) == [0, 1]


def test_equal_scores_are_all_accepted_in_one_pass() -> None:
    rng = Counting(0)
    assert sorted(reject([2.0] * 6, 6, BETA, rng)) == list(range(6))
    assert rng.asked == [6]
    assert reject([3.0], 1, BETA, rng) == [0]
    assert reject([], 1, BETA, rng) == []


# Tables: policies over a few actions, and the loss over all pairs of them.


def tables(policy: Tensor, ref: Tensor, wins: Tensor | None = None) -> PairLogps:
    """Every ordered pair of actions, the first chosen; `wins` are the chances of each action to win."""
    num = len(policy)
    chosen, rejected = torch.cartesian_prod(torch.arange(num), torch.arange(num)).unbind(-1)
    ones = torch.ones(num * num, dtype=torch.long)
    return PairLogps(
        policy[chosen],
        policy[rejected],
        ref[chosen],
        ref[rejected],
        ones,
        ones,
        win_probabilities=None if wins is None else torch.stack([wins[chosen], wins[rejected]], -1),
    )


def expected_loss(loss: PairLoss, policy: Tensor, ref: Tensor, beats: Tensor) -> Tensor:
    """The mean over two draws from the policy and their label, where i beats j with chance `beats[i, j]`."""
    drawn = policy.detach().exp()
    weights = (drawn[:, None] * drawn[None, :] * beats).flatten()
    return 2 * (weights * loss(tables(policy, ref))).sum()


def fixed_point(loss: PairLoss, beats: Tensor, rate: float, num_steps: int) -> Tensor:
    """Where descent along the exact expected gradient ends, as probabilities; the draws move with the policy.

    Each step is divided by the probability of its action, so that rare ones move as fast as the others.
    """
    ref = torch.tensor(REFERENCE[: len(beats)], dtype=torch.float64).log().log_softmax(0)
    logits = ref.clone().requires_grad_()
    for step in range(num_steps):
        (gradient,) = torch.autograd.grad(expected_loss(loss, logits.log_softmax(0), ref, beats), logits)
        decay = min(1.0, 4 * (1 - step / num_steps))
        logits = (logits - rate * decay * gradient / logits.softmax(0)).detach().requires_grad_()
    return logits.detach().softmax(0)


def bradley_terry(rewards: list[float]) -> Tensor:
    scores = torch.tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(scores[:, None] - scores[None, :])


def tilted(rewards: Tensor, beta: float) -> Tensor:
    """The reference times exp(rewards / beta), normalised."""
    return torch.softmax(torch.tensor(REFERENCE, dtype=torch.float64).log() + rewards / beta, 0)


# Online DPO and its kin on a bandit.


def test_online_dpo_ends_at_the_tilted_reference() -> None:
    """Eq. 4 of Rafailov et al. 2023, with pairs from the moving policy and labels of Bradley and Terry."""
    found = fixed_point(DPOLoss(beta=BETA), bradley_terry(REWARDS), rate=2 / BETA**2, num_steps=300)
    expected = tilted(torch.tensor(REWARDS, dtype=torch.float64), BETA)
    assert (found - expected).abs().max() < 1e-6


def test_online_dpo_with_drawn_pairs_and_labels_gets_there_too() -> None:
    generator = torch.Generator().manual_seed(0)
    beats, loss = bradley_terry(REWARDS), DPOLoss(beta=BETA)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log()
    logits = ref.clone().requires_grad_()
    num_steps, visited = 1200, []
    for step in range(num_steps):
        policy = logits.log_softmax(0)
        drawn = torch.multinomial(policy.detach().exp(), 2 * 256, replacement=True, generator=generator).view(2, -1)
        wins = torch.rand(256, dtype=torch.float64, generator=generator) < beats[drawn[0], drawn[1]]
        chosen, rejected = torch.where(wins, drawn[0], drawn[1]), torch.where(wins, drawn[1], drawn[0])
        ones = torch.ones(256, dtype=torch.long)
        pairs = PairLogps(policy[chosen], policy[rejected], ref[chosen], ref[rejected], ones, ones)
        (gradient,) = torch.autograd.grad(loss(pairs).mean(), logits)
        logits = (logits - 10 / math.sqrt(1 + step / 50) * gradient).detach().requires_grad_()
        visited.append(logits.detach().softmax(0))
    found = torch.stack(visited[num_steps // 2 :]).mean(0)
    expected = tilted(torch.tensor(REWARDS, dtype=torch.float64), BETA)
    assert (found - expected).abs().sum() / 2 < 0.02
    assert (ref.exp() - expected).abs().sum() / 2 > 0.3, "began far away"


def test_online_ipo_ends_at_linear_preferences_over_tau() -> None:
    """Azar et al. 2023: log-ratios differ by (P(i > j) - 1/2) / tau where P is 1/2 + s_i - s_j."""
    tau, scores = 0.2, torch.tensor([0.1, -0.05, 0.2, 0.0], dtype=torch.float64)
    found = fixed_point(IPOLoss(tau, length_normalize=False), 0.5 + scores[:, None] - scores[None, :], 0.2, 200)
    assert (found - tilted(scores, tau)).abs().max() < 1e-6


def test_online_ipo_on_preferences_in_a_circle_ends_at_the_regularised_equilibrium() -> None:
    """The policy that is the reference times exp(P(y beats the policy) / tau), found here by damped iteration."""
    tau = 0.5
    advantage = torch.zeros(4, 4, dtype=torch.float64)
    for winner, loser, by in [(0, 1, 0.4), (1, 2, 0.3), (2, 0, 0.2), (3, 0, 0.1), (1, 3, 0.45), (2, 3, 0.05)]:
        advantage[winner, loser], advantage[loser, winner] = by, -by
    policy = torch.tensor(REFERENCE, dtype=torch.float64)
    for _ in range(2000):
        policy = 0.9 * policy + 0.1 * tilted(advantage @ policy, tau)
    assert (policy - tilted(advantage @ policy, tau)).abs().max() < 1e-12
    found = fixed_point(IPOLoss(tau, length_normalize=False), 0.5 + advantage, rate=0.1, num_steps=600)
    assert (found - policy).abs().max() < 1e-6


def test_online_hinge_pulls_the_margin_to_one_over_beta_however_sure_the_label() -> None:
    """(1 - q) max(0, 1 + beta h) + q max(0, 1 - beta h) falls until beta h = 1 and rises from there, for q > 1/2."""
    ref = torch.tensor(REFERENCE[:2], dtype=torch.float64)
    for chance in (0.7, 0.95):
        beats = torch.tensor([[0.5, 1 - chance], [chance, 0.5]], dtype=torch.float64)
        found = fixed_point(HingeLoss(beta=0.5), beats, rate=0.1, num_steps=300)
        margin = torch.log(found / ref)
        assert (margin[1] - margin[0]).item() == pytest.approx(2.0, abs=0.02)


# SPPO: self-play in games of preference.

ROCK_PAPER_SCISSORS = np.array([[0.0, 0.4, -0.3], [-0.4, 0.0, 0.2], [0.3, -0.2, 0.0]])
"""P(row beats column) - 1/2, in a circle."""


def random_game(seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).uniform(-0.5, 0.5, (4, 4)), 1)
    return upper - upper.T


def equilibrium(advantage: np.ndarray) -> np.ndarray:
    """The strategy that no action beats, of a game in which both have the same actions, by trying all supports."""
    num = len(advantage)
    for size in range(1, num + 1):
        for support in map(list, combinations(range(num), size)):
            rows = np.vstack([advantage[np.ix_(support, support)], np.ones(size)])
            weights, *_ = np.linalg.lstsq(rows, np.append(np.zeros(size), 1.0), rcond=None)
            strategy = np.zeros(num)
            strategy[support] = weights
            if (strategy >= 0).all() and (advantage @ strategy).max() < 1e-12 and np.isclose(strategy.sum(), 1):
                return strategy
    raise AssertionError("every such game has an equilibrium")


def self_play_loss(log_ratios: Tensor, policy: Tensor, advantage: np.ndarray, eta: float) -> Tensor:
    """SPPO's loss over two draws from `policy`, the reference, in a policy that differs from it by `log_ratios`."""
    wins = 0.5 + torch.from_numpy(advantage) @ policy
    losses = SPPOLoss(eta=eta, soft=True)(tables(policy.log() + log_ratios, policy.log(), wins))
    return ((policy[:, None] * policy[None, :]).flatten() * losses).sum()


def sppo_step(policy: Tensor, advantage: np.ndarray, eta: float) -> Tensor:
    """The minimum of the loss in log-ratios that are free, normalised.

    The loss is a sum of squares weighed by the policy, so one step over twice these weights leads to its minimum.
    """
    log_ratios = torch.zeros_like(policy, requires_grad=True)
    (gradient,) = torch.autograd.grad(self_play_loss(log_ratios, policy, advantage, eta), log_ratios)
    return torch.softmax(policy.log() - gradient / (2 * policy), 0)


def test_the_minimum_of_sppo_is_the_multiplicative_weights_step() -> None:
    """pi exp(eta (P - 1/2)), the update of Wu et al. 2024 (Section 4), where log-ratios need not be normalised."""
    for eta in (0.1, 1.0, 10.0):
        policy = torch.tensor(REFERENCE, dtype=torch.float64)
        target = eta * torch.from_numpy(random_game(0)) @ policy
        log_ratios = target.clone().requires_grad_()
        loss = self_play_loss(log_ratios, policy, random_game(0), eta)
        (gradient,) = torch.autograd.grad(loss, log_ratios)
        assert loss.item() < 1e-24
        assert gradient.abs().max() < 1e-12
        step = sppo_step(policy, random_game(0), eta)
        assert (step - policy * target.exp() / (policy * target.exp()).sum()).abs().max() < 1e-12


def test_a_normalised_policy_misses_the_step_by_the_third_order_of_eta() -> None:
    """log Z is of second order, and only how it is spread over the actions differs: halving eta leaves an eighth."""
    policy, game = torch.tensor(REFERENCE, dtype=torch.float64), random_game(0)

    def miss(eta: float) -> float:
        logits = policy.log()
        for _ in range(60):
            logits = logits.detach().requires_grad_()
            loss = self_play_loss(logits.log_softmax(0) - policy.log(), policy, game, eta)
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = logits - gradient / (2 * policy)
        assert gradient.abs().max() < 1e-13
        return (logits.detach().softmax(0) - sppo_step(policy, game, eta)).abs().max().item()

    assert 6 < miss(0.4) / miss(0.2) < 10


@pytest.mark.parametrize("game", [ROCK_PAPER_SCISSORS, random_game(1), random_game(4)], ids=["circle", "1", "4"])
def test_the_mean_of_sppos_iterates_tends_to_the_equilibrium(game: np.ndarray) -> None:
    """The most that an answer to the mean wins is at most log(1 / min pi_0) / (eta T) + eta / 8 (Hedge's regret)."""
    eta, num_steps = 0.3, 800
    policy = torch.tensor([0.7, 0.2, 0.1] if len(game) == 3 else [0.25] * 4, dtype=torch.float64)
    first, total, gaps = policy, torch.zeros_like(policy), []
    for _ in range(num_steps):
        total += policy
        gaps.append((game @ (total / total.sum()).numpy()).max())
        policy = sppo_step(policy, game, eta)
    for step, gap in enumerate(gaps, start=1):
        assert gap <= math.log(1 / first.min()) / (eta * step) + eta / 8 + 1e-12
    assert gaps[-1] < 0.01
    assert gaps[-1] < gaps[99] / 3
    assert np.abs((total / total.sum()).numpy() - equilibrium(game)).max() < 0.05


def test_without_the_mean_self_play_in_a_circle_does_not_settle() -> None:
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    distances = []
    for _ in range(300):
        policy = sppo_step(policy, ROCK_PAPER_SCISSORS, 0.3)
        distances.append(np.abs(policy.numpy() - equilibrium(ROCK_PAPER_SCISSORS)).max())
    assert min(distances[-100:]) > 0.05


# Best of n.


def law_of_best(policy: np.ndarray, n: int) -> np.ndarray:
    """The chance of each atom to be the best of n, where they stand from the worst to the best: F^n - F_before^n."""
    cumulative = np.minimum(np.cumsum(policy), 1)
    return np.diff(np.concatenate([[0.0], cumulative]) ** n)


def kl(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(one * np.log(one / other)))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_best_of_n_has_the_law_of_the_highest_order_statistic(n: int) -> None:
    """Counted out over all draws of n of three completions."""
    policy = np.array([0.5, 0.3, 0.2])
    law = np.zeros(3)
    for drawn in product(range(3), repeat=n):
        (best,) = choose(Verdict(tuple(map(float, drawn))), "best", np.random.default_rng(0))
        law[drawn[best.better]] += np.prod(policy[list(drawn)])
    assert law == pytest.approx(law_of_best(policy, n))


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_divergence_of_best_of_n_is_bounded_and_the_bound_is_reached_without_ties(n: int) -> None:
    rng = np.random.default_rng(n)
    for num_atoms in (1, 2, 5, 100):
        policy = rng.dirichlet(np.ones(num_atoms))
        assert kl(law_of_best(policy, n), policy) <= kl_of_best_of(n) + 1e-12
    short = [
        kl_of_best_of(n) - kl(law_of_best(np.full(num, 1 / num), n), np.full(num, 1 / num))
        for num in (10, 1_000, 100_000)
    ]
    if n == 1:
        assert kl_of_best_of(1) == 0
        assert max(map(abs, short)) < 1e-9
    else:
        assert short[0] > short[1] > short[2] > 0
        assert short[2] < 1e-3

"""What training with a loss ends at, where that is known in closed form: tables of logits, float64, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from penchant.losses import (
    AOTLoss,
    AOTUnpairedLoss,
    DPOLoss,
    EXOLoss,
    FDivergenceDPOLoss,
    IPOLoss,
    KTOLoss,
    LengthRegularizedDPOLoss,
    OffsetDPOLoss,
    ORPOLoss,
    PairLoss,
    PlackettLuceDPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOLoss,
)
from penchant.types import PairLogps, RankedLogps, SequenceLogps


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def minimised(total: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The logits at which `total` is least, by L-BFGS."""
    logits = start.clone().requires_grad_()
    settings = {"max_iter": 2000, "tolerance_grad": 1e-13, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], lr=1.0, history_size=30, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = total(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


def kl(wanted: Tensor, reached: Tensor) -> float:
    """The greatest KL divergence of the rows of two tables of probabilities."""
    return (wanted * (wanted / reached).log()).sum(-1).max().item()


# Two answers, of which the first is always preferred.


def two_armed(logits: Tensor, ref_logits: Tensor) -> PairLogps:
    policy, ref, one = logits.log_softmax(-1), ref_logits.log_softmax(-1), torch.ones(1, dtype=torch.long)
    return PairLogps(*policy[:, None], *ref[:, None], one, one)


UNIFORM = f64(0, 0)


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.5, 1.0, 3.0])
def test_ipo_on_the_bandit_ends_at_the_sigmoid_of_one_over_two_tau(tau: float) -> None:
    loss = IPOLoss(beta=tau, length_normalize=False)
    logits = minimised(lambda logits: loss(two_armed(logits, UNIFORM)).sum(), UNIFORM)
    assert logits.softmax(-1)[0].item() == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-4)


@pytest.mark.parametrize("preference", [0.5, 0.6, 0.9])
def test_ipo_ends_at_a_margin_that_is_linear_in_the_preference(preference: float) -> None:
    loss, ref = IPOLoss(beta=0.4, length_normalize=False), f64(0.3, -0.9)

    def total(logits: Tensor) -> Tensor:
        given, flipped = two_armed(logits, ref), two_armed(logits.flip(0), ref.flip(0))
        return (preference * loss(given) + (1 - preference) * loss(flipped)).sum()

    logits = minimised(total, ref)
    h = (logits - ref)[0] - (logits - ref)[1]
    assert h.item() == pytest.approx((2 * preference - 1) / (2 * 0.4), abs=1e-8)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 5.0])
def test_dpo_on_the_bandit_runs_away_whatever_beta(beta: float) -> None:
    loss, logits, chances = DPOLoss(beta), UNIFORM.clone(), [0.5]
    for _ in range(200):  # steps of one length: with growing margin the gradient dwindles, but it never turns
        (grad,) = torch.autograd.grad(loss(two_armed(logits.requires_grad_(), UNIFORM)).sum(), logits)
        assert grad[0] < 0 < grad[1]
        logits = (logits - 0.1 * grad / grad.norm()).detach()
        chances.append(logits.softmax(-1)[0].item())
    assert all(later > earlier for earlier, later in pairwise(chances))
    assert chances[-1] > 1 - 1e-11


@pytest.mark.parametrize("label_smoothing", [0.05, 0.2, 0.45])
@pytest.mark.parametrize("kind", [DPOLoss, EXOLoss])
def test_smoothed_labels_end_at_the_odds_of_the_labels(kind: type[PairLoss], label_smoothing: float) -> None:
    loss = kind(beta=0.5, label_smoothing=label_smoothing)
    logits = minimised(lambda logits: loss(two_armed(logits, UNIFORM)).sum(), UNIFORM)
    assert 0.5 * (logits[0] - logits[1]).item() == pytest.approx(math.log(1 / label_smoothing - 1), abs=1e-7)


def test_odpo_ends_ahead_of_the_odds_by_its_offset() -> None:
    loss, preference = OffsetDPOLoss(beta=0.5, alpha=0.7), 0.8

    def total(logits: Tensor) -> Tensor:
        given = replace(two_armed(logits, UNIFORM), margins=f64(2.0))
        flipped = replace(two_armed(logits.flip(0), UNIFORM), margins=f64(-2.0))
        return (preference * loss(given) + (1 - preference) * loss(flipped)).sum()

    logits = minimised(total, UNIFORM)
    assert 0.5 * (logits[0] - logits[1]).item() == pytest.approx(math.log(4) + 0.7 * 2, abs=1e-7)


# Tables: prompts by completions, all pairs (or rankings), each as often as the population gives its label.


@dataclass(frozen=True)
class World:
    """Rewards and reference log-probabilities of every completion of every prompt."""

    rewards: Tensor  # (X, Y)
    ref: Tensor  # (X, Y)
    lengths: Tensor  # (Y,)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt, chosen and rejected of all ordered pairs."""
        num_prompts, num_completions = self.rewards.shape
        every = torch.cartesian_prod(*(torch.arange(n) for n in (num_prompts, num_completions, num_completions)))
        return every[every[:, 1] != every[:, 2]].unbind(-1)

    def logps(self, logits: Tensor) -> PairLogps:
        prompt, chosen, rejected = self.pairs()
        policy, lengths = logits.log_softmax(-1), self.lengths
        sides = ((prompt, chosen), (prompt, rejected))
        return PairLogps(
            *(table[side] for table in (policy, self.ref) for side in sides), lengths[chosen], lengths[rejected]
        )

    def chances(self, flipped: float = 0.0) -> Tensor:
        """How often each pair is labelled so: Bradley-Terry, with a share of the labels flipped."""
        prompt, chosen, rejected = self.pairs()
        clean = torch.sigmoid(self.rewards[prompt, chosen] - self.rewards[prompt, rejected])
        return (1 - flipped) * clean + flipped * (1 - clean)

    def trained(self, loss: PairLoss, flipped: float = 0.0) -> Tensor:
        """The policy that the loss ends at, started from the reference."""
        weights = self.chances(flipped)
        return minimised(lambda logits: (weights * loss(self.logps(logits))).sum(), self.ref).softmax(-1)


WORLD = World(random(3, 5, seed=0), random(3, 5, seed=1).log_softmax(-1), torch.tensor([3, 11, 1, 7, 20]))


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_ends_at_the_reference_times_the_exponential_of_the_reward(beta: float) -> None:
    assert abs(kl((WORLD.ref + WORLD.rewards / beta).softmax(-1), WORLD.trained(DPOLoss(beta)))) < 1e-10


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_r_dpo_ends_where_every_token_costs_alpha(beta: float, alpha: float) -> None:
    wanted = (WORLD.ref + (WORLD.rewards - alpha * WORLD.lengths) / beta).softmax(-1)
    assert abs(kl(wanted, WORLD.trained(LengthRegularizedDPOLoss(beta, alpha)))) < 1e-10


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_robust_dpo_on_flipped_labels_ends_where_dpo_on_clean_ones_does(flipped: float) -> None:
    wanted = (WORLD.ref + WORLD.rewards / 0.5).softmax(-1)
    assert abs(kl(wanted, WORLD.trained(RobustDPOLoss(0.5, flipped), flipped))) < 1e-10
    assert kl(wanted, WORLD.trained(DPOLoss(0.5), flipped)) > 1e-3  # and the others on flipped ones do not
    assert kl(wanted, WORLD.trained(DPOLoss(0.5, flipped), flipped)) > 1e-3


@pytest.mark.parametrize("flipped", [0.05, 0.25, 0.4])
def test_expectation_of_robust_dpo_over_flips_is_the_loss_of_the_clean_label(flipped: float) -> None:
    logps = WORLD.logps(random(3, 5, seed=2))
    other = PairLogps(
        logps.policy_rejected_logps,
        logps.policy_chosen_logps,
        logps.ref_rejected_logps,
        logps.ref_chosen_logps,
        logps.rejected_lengths,
        logps.chosen_lengths,
    )
    loss = RobustDPOLoss(0.5, flipped)
    expectation = (1 - flipped) * loss(logps) + flipped * loss(other)
    torch.testing.assert_close(expectation, DPOLoss(0.5)(logps), rtol=1e-12, atol=1e-12)


# u = pi / pi_ref where beta f'(u) = reward - price, by inverting f' by hand.
INVERSE_SLOPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda slope, _: slope.exp(),
    "forward_kl": lambda slope, _: -1 / slope,
    "js": lambda slope, _: 1 / (2 * (-slope).exp() - 1),
    "alpha": lambda slope, alpha: (1 - alpha * slope) ** (-1 / alpha),
}
HIGHEST_SLOPE = {"reverse_kl": math.inf, "forward_kl": 0.0, "js": math.log(2), "alpha": 1 / 0.4}


@pytest.mark.parametrize("divergence", INVERSE_SLOPES)
def test_f_dpo_ends_at_the_optimum_of_reward_less_its_divergence(divergence: str) -> None:
    beta, alpha = 0.8, 0.4 if divergence == "alpha" else None
    top = WORLD.rewards.max(-1, keepdim=True).values
    lowest = -50.0 if divergence == "reverse_kl" else -beta * HIGHEST_SLOPE[divergence]
    low, high = top + lowest, top + 50
    for _ in range(200):  # the price of probability at which it adds up to 1
        price = (low + high) / 2
        u = INVERSE_SLOPES[divergence]((WORLD.rewards - price) / beta, alpha or 0.0)
        too_much = (WORLD.ref.exp() * u).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, price, low), torch.where(too_much, high, price)
    wanted = WORLD.ref.exp() * u
    assert wanted.sum(-1).tolist() == pytest.approx([1] * 3, abs=1e-12)
    assert abs(kl(wanted, WORLD.trained(FDivergenceDPOLoss(beta, divergence, alpha)))) < 1e-9


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_plackett_luce_dpo_ends_where_dpo_does(beta: float) -> None:
    rewards, ref = random(2, 3, seed=3), random(2, 3, seed=4).log_softmax(-1)
    prompts, orders = torch.tensor([0, 1]).repeat_interleave(6)[:, None], torch.tensor([*permutations(range(3))] * 2)
    ranked = rewards[prompts, orders].exp()
    chances = ranked.prod(-1) / ranked.flip(-1).cumsum(-1).prod(-1)
    assert chances.view(2, 6).sum(-1).tolist() == pytest.approx([1, 1], rel=1e-14)
    loss, ones = PlackettLuceDPOLoss(beta), torch.ones_like(orders)

    def total(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(-1)[prompts, orders]
        return (chances * loss(RankedLogps(policy, ref[prompts, orders], ones, ones.bool()))).sum()

    assert abs(kl((ref + rewards / beta).softmax(-1), minimised(total, ref).softmax(-1))) < 1e-10


def test_sppo_ends_at_log_ratios_of_eta_times_the_surplus_of_the_win_probability() -> None:
    eta, chances, ref = 0.5, f64(0.9, 0.2), f64(0.1, 0.4, -0.3).log_softmax(-1)  # the third answer takes what is left
    one = torch.ones(1, dtype=torch.long)

    def total(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(-1)[:, None]
        logps = PairLogps(policy[0], policy[1], ref[:1], ref[1:2], one, one, win_probabilities=chances[None])
        return SPPOLoss(eta, soft=True)(logps).sum()

    reached = minimised(total, ref).log_softmax(-1) - ref
    torch.testing.assert_close(reached[:2], eta * (chances - 0.5), rtol=0, atol=1e-7)


# Optimal transport.


def test_aot_is_the_cheapest_of_all_couplings_of_policy_and_reference() -> None:
    policy, ref, zero = 9 * random(5, seed=5), 9 * random(5, seed=6), torch.zeros(5, dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.long)
    costs = [
        DPOLoss(0.3)(PairLogps(policy, zero, ref[[*order]], zero, ones, ones)).mean()
        for order in permutations(range(5))
    ]
    aot = AOTLoss(0.3)(PairLogps(policy, zero, ref, zero, ones, ones)).mean()
    assert aot.item() == pytest.approx(min(costs).item(), rel=1e-14)


@pytest.mark.parametrize(("num_desirable", "num_undesirable"), [(1, 4), (2, 3), (3, 2), (3, 3)])
def test_aot_unpaired_is_the_cheapest_of_all_couplings_of_the_classes(num_desirable: int, num_undesirable: int) -> None:
    num = num_desirable + num_undesirable
    log_ratios, lengths = 9 * random(num, seed=7), torch.ones(num, dtype=torch.long)
    logps = SequenceLogps(log_ratios, torch.zeros_like(log_ratios), lengths, torch.arange(num) < num_desirable)
    copies = math.lcm(num_desirable, num_undesirable)
    good = log_ratios[:num_desirable].repeat_interleave(copies // num_desirable)
    bad = log_ratios[num_desirable:].repeat_interleave(copies // num_undesirable)
    orders = torch.tensor([*permutations(range(copies))])
    cheapest = torch.nn.functional.softplus(-0.3 * (good - bad[orders])).mean(-1).min()
    assert AOTUnpairedLoss(0.3)(logps).mean().item() == pytest.approx(cheapest.item(), rel=1e-12)


# Gradients of a table of bigrams, from logits to the mean loss, against central differences.

NUM_TOKENS = 4
CHOSEN, REJECTED = [[1, 2, 0], [3, 3, 1, 2, 0], [0]], [[2, 2, 1, 0], [1, 0], [3, 1, 0]]
PROMPTS = [[1, 2], [3], [2, 2, 1]]


def scored(table: Tensor, rows: list[list[int]], after: int = 0) -> Tensor:
    """The log-probability of each row of tokens under a table (previous token, next token)."""
    logps = table.log_softmax(-1)
    return torch.stack([sum(logps[a, b] for a, b in zip([after, *row[:-1]], row, strict=True)) for row in rows])


def lengths_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def kto(table: Tensor, ref: Tensor) -> Tensor:
    rows, is_desirable = CHOSEN + REJECTED, torch.tensor([True, False, True, False, False, True])
    logps = SequenceLogps(
        scored(table, rows), scored(ref, rows), lengths_of(rows), is_desirable, kl=torch.tensor(0.7).double()
    )
    return KTOLoss(0.5, desirable_weight=1.3, undesirable_weight=0.8)(logps).mean()


def without_reference(loss: PairLoss) -> Callable[[Tensor, Tensor], Tensor]:
    def total(table: Tensor, _: Tensor) -> Tensor:
        return loss(
            PairLogps(
                scored(table, CHOSEN),
                scored(table, REJECTED),
                None,
                None,
                lengths_of(CHOSEN),
                lengths_of(REJECTED),
                policy_prompt_logps=scored(table, PROMPTS),
                prompt_lengths=lengths_of(PROMPTS),
            )
        ).mean()

    return total


@pytest.mark.parametrize(
    "total",
    [
        pytest.param(kto, id="kto"),
        pytest.param(without_reference(SimPOLoss()), id="simpo"),
        pytest.param(without_reference(ORPOLoss()), id="orpo"),
        pytest.param(without_reference(ORPOLoss(0.5, nll_on_prompt=True)), id="orpo with the prompt"),
    ],
)
def test_gradient_of_the_logits_is_that_of_central_differences(total: Callable[[Tensor, Tensor], Tensor]) -> None:
    table, ref = random(NUM_TOKENS, NUM_TOKENS, seed=8), random(NUM_TOKENS, NUM_TOKENS, seed=9)
    (grad,) = torch.autograd.grad(total(table.requires_grad_(), ref), table)
    differences = torch.zeros_like(grad)
    for place in range(table.numel()):
        step = torch.zeros(table.numel(), dtype=torch.float64)
        step[place] = 1e-5
        up, down = (total(table.detach() + sign * step.view_as(table), ref) for sign in (1, -1))
        differences.view(-1)[place] = (up - down) / 2e-5
    torch.testing.assert_close(grad, differences, rtol=1e-7, atol=1e-9)
    assert (grad.abs() > 1e-4).sum() > NUM_TOKENS

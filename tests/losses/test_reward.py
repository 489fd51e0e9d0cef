"""The loss of reward models against arithmetic by hand, finite differences, and scores that are known."""

from __future__ import annotations

import math

import pytest
import torch

from penchant.losses import RewardLoss
from penchant.types import PairLogps


def scores(chosen: list[float], rejected: list[float], margins: list[float] | None = None) -> PairLogps:
    lengths = torch.ones(len(chosen), dtype=torch.long)
    return PairLogps(
        torch.tensor(chosen, dtype=torch.float64),
        torch.tensor(rejected, dtype=torch.float64),
        None,
        None,
        lengths,
        lengths,
        margins=None if margins is None else torch.tensor(margins, dtype=torch.float64),
    )


def test_values_by_hand() -> None:
    found = RewardLoss()(scores([1.0, 0.5], [0.0, 0.5]))
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    found = RewardLoss(alpha=2.0, centering=0.1)(scores([1.0, 0.5], [0.0, 0.5], [0.5, 1.0]))
    assert found.tolist() == pytest.approx([math.log(2) + 0.1, math.log(1 + math.exp(2)) + 0.1])


def test_gradients_by_finite_differences() -> None:
    lengths = torch.ones(4, dtype=torch.long)
    margins = torch.rand(4, dtype=torch.float64)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        logps = PairLogps(chosen, rejected, None, None, lengths, lengths, margins=margins)
        return RewardLoss(alpha=0.7, centering=0.3)(logps)

    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_minimiser_over_all_judgements_has_the_true_scores_up_to_a_constant() -> None:
    """Each couple of 6 items is judged in the shares of Bradley and Terry: the population's loss, not a sample's."""
    truth = torch.tensor([-1.5, -0.3, 0.0, 0.4, 1.1, 2.0], dtype=torch.float64)
    first, second = torch.triu_indices(6, 6, offset=1)
    share = torch.sigmoid(truth[first] - truth[second])
    found = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    lengths = torch.ones(len(first), dtype=torch.long)
    optimizer = torch.optim.LBFGS(
        [found], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        one, other = found[first], found[second]
        loss = RewardLoss()
        agreeing = loss(PairLogps(one, other, None, None, lengths, lengths))
        opposing = loss(PairLogps(other, one, None, None, lengths, lengths))
        value = (share * agreeing + (1 - share) * opposing).sum()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(found.detach() - found.detach().mean(), truth - truth.mean(), rtol=0, atol=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    for settings in ({"alpha": -1.0}, {"centering": -0.1}):
        with pytest.raises(ValueError, match="at least 0"):
            RewardLoss(**settings)
    with pytest.raises(ValueError, match="needs the margin"):
        RewardLoss(alpha=1.0)(scores([1.0], [0.0]))

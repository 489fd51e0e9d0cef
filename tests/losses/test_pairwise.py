"""DPO and IPO against arithmetic that is written out here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from penchant.losses import DPOLoss, IPOLoss, PairLoss
from penchant.types import PairLogps


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOGPS = PairLogps(
    policy_chosen_logps=f64(-12.0, -30.5),
    policy_rejected_logps=f64(-15.0, -20.25),
    ref_chosen_logps=f64(-14.0, -28.0),
    ref_rejected_logps=f64(-14.5, -21.0),
    chosen_lengths=torch.tensor([4, 10]),
    rejected_lengths=torch.tensor([5, 3]),
)
# Log-ratios: chosen 2 and -2.5, rejected -0.5 and 0.75; so h = 2.5 and -3.25.

AT_REFERENCE = PairLogps(
    policy_chosen_logps=f64(-12.0, -30.5),
    policy_rejected_logps=f64(-15.0, -20.25),
    ref_chosen_logps=f64(-12.0, -30.5),
    ref_rejected_logps=f64(-15.0, -20.25),
    chosen_lengths=torch.tensor([4, 10]),
    rejected_lengths=torch.tensor([5, 3]),
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_minus_log_sigmoid_of_beta_h() -> None:
    expected = [-math.log(sigmoid(0.3 * 2.5)), -math.log(sigmoid(0.3 * -3.25))]
    assert DPOLoss(beta=0.3)(LOGPS).tolist() == pytest.approx(expected, rel=1e-14)


def test_dpo_gradient_is_beta_times_the_probability_of_the_wrong_order() -> None:
    policy_chosen = LOGPS.policy_chosen_logps.clone().requires_grad_()
    policy_rejected = LOGPS.policy_rejected_logps.clone().requires_grad_()
    logps = replace(LOGPS, policy_chosen_logps=policy_chosen, policy_rejected_logps=policy_rejected)
    DPOLoss(beta=0.3)(logps).sum().backward()
    expected = [0.3 * sigmoid(-0.3 * 2.5), 0.3 * sigmoid(0.3 * 3.25)]
    assert policy_chosen.grad.tolist() == pytest.approx([-each for each in expected], rel=1e-14)
    assert policy_rejected.grad.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.49])
def test_dpo_at_the_reference_is_log_two(beta: float, label_smoothing: float) -> None:
    losses = DPOLoss(beta, label_smoothing)(AT_REFERENCE)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-14)


def test_conservative_dpo_mixes_the_losses_of_both_labels() -> None:
    flipped = PairLogps(
        LOGPS.policy_rejected_logps,
        LOGPS.policy_chosen_logps,
        LOGPS.ref_rejected_logps,
        LOGPS.ref_chosen_logps,
        LOGPS.rejected_lengths,
        LOGPS.chosen_lengths,
    )
    as_given, as_flipped = DPOLoss(0.3)(LOGPS).tolist(), DPOLoss(0.3)(flipped).tolist()
    expected = [0.85 * given + 0.15 * other for given, other in zip(as_given, as_flipped, strict=True)]
    assert DPOLoss(0.3, label_smoothing=0.15)(LOGPS).tolist() == pytest.approx(expected, rel=1e-14)


def test_conservative_dpo_is_least_where_the_model_doubts_as_much_as_the_labels() -> None:
    h = math.log(0.8 / 0.2) / 0.5  # sigmoid(beta h) = 1 - label_smoothing
    policy_chosen = f64(-10.0).requires_grad_()
    one = torch.ones(1, dtype=torch.long)
    logps = PairLogps(policy_chosen, f64(-10.0), f64(-10.0 - h), f64(-10.0), one, one)
    loss = DPOLoss(0.5, label_smoothing=0.2)(logps)
    loss.sum().backward()
    assert policy_chosen.grad.item() == pytest.approx(0, abs=1e-15)
    assert loss.item() == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2), rel=1e-14)


def test_dpo_rewards_are_beta_times_the_log_ratios() -> None:
    chosen, rejected = DPOLoss(beta=0.3).rewards(LOGPS)
    assert chosen.tolist() == pytest.approx([0.3 * 2, 0.3 * -2.5])
    assert rejected.tolist() == pytest.approx([0.3 * -0.5, 0.3 * 0.75])


def test_ipo_over_sums_is_the_squared_distance_of_h_from_its_target() -> None:
    expected = [(2.5 - 1 / (2 * 0.2)) ** 2, (-3.25 - 1 / (2 * 0.2)) ** 2]
    loss = IPOLoss(beta=0.2, length_normalize=False)
    assert loss(LOGPS).tolist() == pytest.approx(expected, abs=1e-13)
    chosen, rejected = loss.rewards(LOGPS)
    assert chosen.tolist() == pytest.approx([0.2 * 2, 0.2 * -2.5])
    assert rejected.tolist() == pytest.approx([0.2 * -0.5, 0.2 * 0.75])


def test_ipo_per_token_divides_each_log_ratio_by_its_own_length() -> None:
    h = [2 / 4 - -0.5 / 5, -2.5 / 10 - 0.75 / 3]
    loss = IPOLoss(beta=0.2)
    assert loss.length_normalize
    assert loss(LOGPS).tolist() == pytest.approx([(each - 1 / (2 * 0.2)) ** 2 for each in h], rel=1e-14)
    chosen, rejected = loss.rewards(LOGPS)
    assert chosen.tolist() == pytest.approx([0.2 * 2 / 4, 0.2 * -2.5 / 10])
    assert rejected.tolist() == pytest.approx([0.2 * -0.5 / 5, 0.2 * 0.75 / 3])


@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_at_the_reference_is_one_over_four_beta_squared(beta: float, length_normalize: bool) -> None:
    losses = IPOLoss(beta, length_normalize)(AT_REFERENCE)
    assert losses.tolist() == pytest.approx([1 / (4 * beta**2)] * 2, rel=1e-13)


def test_ipo_pulls_a_margin_beyond_its_target_back() -> None:
    policy_chosen = f64(-10.0).requires_grad_()
    one = torch.ones(1, dtype=torch.long)
    h = 1 / (2 * 0.1) + 3
    IPOLoss(0.1)(PairLogps(policy_chosen, f64(-10.0), f64(-10.0 - h), f64(-10.0), one, one)).sum().backward()
    assert policy_chosen.grad.item() == pytest.approx(2 * 3)


def test_ipo_takes_an_empty_completion_as_log_ratio_zero() -> None:
    policy_rejected = f64(0.0).requires_grad_()
    zero, two = torch.zeros(1, dtype=torch.long), torch.full((1,), 2)
    losses = IPOLoss(0.1)(PairLogps(f64(-3.0), policy_rejected, f64(-4.0), f64(0.0), two, zero))
    losses.sum().backward()
    assert losses.item() == pytest.approx((1 / 2 - 0 - 5) ** 2)
    assert policy_rejected.grad.item() == pytest.approx(2 * (5 - 1 / 2))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("loss", [DPOLoss, IPOLoss])
def test_beta_that_is_not_a_positive_number_is_refused(loss: type[PairLoss], beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        loss(beta=beta)


@pytest.mark.parametrize("label_smoothing", [-0.01, 0.5, 1.0, math.nan])
def test_label_smoothing_that_would_turn_the_labels_over_is_refused(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        DPOLoss(label_smoothing=label_smoothing)

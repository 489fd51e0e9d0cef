"""Losses by name and settings, as a run file gives them; and the accuracy that is logged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from penchant.errors import UserError
from penchant.losses import LOSSES, DPOLoss, IPOLoss, build_loss, preference_accuracy
from penchant.types import PairLogps


def test_loss_is_built_from_its_settings() -> None:
    assert build_loss({"name": "dpo"}) == DPOLoss(beta=0.1, label_smoothing=0.0)
    assert build_loss({"name": "dpo", "beta": 0.3, "label_smoothing": 0.1}) == DPOLoss(0.3, 0.1)
    assert build_loss({"name": "ipo", "length_normalize": False}) == IPOLoss(length_normalize=False)


def test_settings_are_left_as_they_were() -> None:
    settings = {"name": "dpo", "beta": 1}
    build_loss(settings)
    assert settings == {"name": "dpo", "beta": 1}


def test_whole_number_serves_as_a_float() -> None:
    beta = build_loss({"name": "dpo", "beta": 2}).beta
    assert beta == 2.0
    assert isinstance(beta, float)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "dpoo"}, "loss.name: there is no loss 'dpoo'; did you mean 'dpo'?"),
        ({"name": "zzz"}, "loss.name: there is no loss 'zzz'. There are: dpo, ipo"),
        ({"name": 3}, "loss.name: there is no loss '3'"),
        ({"name": ["dpo"]}, "loss.name: there is no loss"),
        ({"name": "dpo", "betta": 0.1}, "loss.betta: the loss 'dpo' has no such setting; did you mean 'beta'?"),
        ({"name": "dpo", "length_normalize": True}, "It has: beta, label_smoothing."),
        ({"name": "dpo", "beta": "0.1"}, "loss.beta: expected float, got '0.1'"),
        ({"name": "dpo", "beta": True}, "loss.beta: expected float, got True"),
        ({"name": "dpo", "beta": None}, "loss.beta: expected float, got None"),
        ({"name": "ipo", "length_normalize": 1}, "loss.length_normalize: expected bool, got 1"),
        ({"name": "ipo", "length_normalize": "no"}, "loss.length_normalize: expected bool, got 'no'"),
        ({"name": "dpo", "beta": 0}, "loss.beta: must be above 0 and finite, got 0.0"),
        ({"name": "ipo", "beta": -1.0}, "loss.beta: must be above 0 and finite, got -1.0"),
        ({"name": "dpo", "beta": math.nan}, "loss.beta: must be above 0 and finite"),
        ({"name": "dpo", "beta": math.inf}, "loss.beta: must be above 0 and finite"),
        ({"name": "dpo", "label_smoothing": 0.5}, "loss.label_smoothing: must be at least 0 and below 0.5, got 0.5"),
    ],
)
def test_setting_that_does_not_fit_is_named_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build_loss(settings)
    assert sentence in str(caught.value)


def test_higher_chosen_reward_counts_one_and_a_tie_half() -> None:
    accuracy = preference_accuracy(torch.tensor([2.0, -3.0, 0.5, -1.0]), torch.tensor([1.0, -2.0, 0.5, -1.0]))
    assert accuracy.tolist() == [1.0, 0.0, 0.5, 0.5]


def test_policy_at_its_reference_stands_at_chance() -> None:
    same, one = torch.tensor([-3.0, -4.0]), torch.ones(2, dtype=torch.long)
    for loss in LOSSES.values():
        rewards = loss().rewards(PairLogps(same, same - 5, same, same - 5, one, one))
        assert preference_accuracy(*rewards).tolist() == [0.5, 0.5]

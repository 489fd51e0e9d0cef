"""Losses by name and settings, as a run file gives them; sums of losses; and the accuracy that is logged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from penchant.errors import UserError
from penchant.losses import (
    LOSSES,
    CPOLoss,
    DPOLoss,
    IPOLoss,
    KTOLoss,
    PlackettLuceDPOLoss,
    RewardLoss,
    SFTLoss,
    WeightedSum,
    WPOLoss,
    build_loss,
    preference_accuracy,
)
from tests.losses.test_values import VALUES, as_logps


def test_loss_is_built_from_its_settings() -> None:
    assert build_loss({"name": "dpo"}) == DPOLoss(beta=0.1, label_smoothing=0.0)
    assert build_loss({"name": "dpo", "beta": 0.3, "label_smoothing": 0.1}) == DPOLoss(0.3, 0.1)
    assert build_loss({"name": "ipo", "length_normalize": False}) == IPOLoss(length_normalize=False)


def test_settings_are_left_as_they_were() -> None:
    settings = {"dpo": {"beta": 1}, "sft": {"weight": 1}}
    build_loss(settings)
    assert settings == {"dpo": {"beta": 1}, "sft": {"weight": 1}}


def test_whole_number_serves_as_a_float() -> None:
    beta = build_loss({"name": "dpo", "beta": 2}).beta
    assert beta == 2.0
    assert isinstance(beta, float)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "dpoo"}, "loss.name: there is no loss 'dpoo'; did you mean 'dpo'?"),
        ({"name": "zzz"}, f"loss.name: there is no loss 'zzz'. There are: {', '.join(LOSSES)}."),
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
        ({"name": "dpo", "label_smoothing": 0.5}, "loss.label_smoothing: must be at least 0 and below 0.5, got 0.5"),
        ({"name": "exo", "label_smoothing": 0}, "loss.label_smoothing: must be above 0 and below 0.5, got 0.0"),
        ({"name": "exo", "label_smoothing": 0.5}, "loss.label_smoothing: must be above 0 and below 0.5, got 0.5"),
        ({"name": "discopop", "tau": 0}, "loss.tau: must be above 0 and at most 1"),
        ({"name": "discopop", "tau": 1.1}, "loss.tau: must be above 0 and at most 1"),
        ({"name": "f-dpo", "divergence": "kl"}, "loss.divergence: must be reverse_kl, forward_kl, js or alpha, got kl"),
        ({"name": "f-dpo", "alpha": 0.5}, "loss.alpha: has no effect with divergence js"),
        ({"name": "f-dpo", "divergence": "alpha"}, "loss.alpha: must be between 0 and 1 for the alpha divergence"),
        ({"name": "f-dpo", "divergence": "alpha", "alpha": 0}, "loss.alpha: must be between 0 and 1 for the alpha"),
        ({"name": "f-dpo", "divergence": "alpha", "alpha": 1}, "loss.alpha: must be between 0 and 1 for the alpha"),
        ({"name": "f-dpo", "divergence": "alpha", "alpha": "a"}, "loss.alpha: expected float or null, got 'a'"),
        ({"name": "ld-dpo", "alpha": 1.5}, "loss.alpha: must be in [0, 1], got 1.5"),
        ({"name": "sft", "per": "word"}, "loss.per: must be token or sequence, got word"),
        ({}, "needs at least one"),
        ({"dpo": {}, "beta": 0.1}, "loss.beta: this loss is a sum (of dpo); say of which loss, as in loss.dpo.beta."),
        ({"dpo": {"beta": -1.0}, "sft": {}}, "loss.dpo.beta: must be above 0 and finite, got -1.0"),
        ({"dpo": {}, "sft": {"weigth": 1}}, "loss.sft.weigth: the loss 'sft' has no such setting"),
        ({"dpo": {}, "sft": {"weight": "1"}}, "loss.sft.weight: expected float, got '1'"),
        ({"dpo": {}, "sft": {"weight": -0.1}}, "loss.sft.weight: must be at least 0 and finite, got -0.1"),
        ({"dpo": {}, "sft": {"weight": math.nan}}, "loss.sft.weight: must be at least 0 and finite, got nan"),
        ({"dpo": {}, "kto": {}}, "loss.terms: the losses judge different things (dpo: pair, kto: unpaired)"),
        ({"dpo": {}, "kot": {}}, "there is no loss 'kot'; did you mean 'kto'?"),
    ],
)
def test_setting_that_does_not_fit_is_named_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build_loss(settings)
    assert sentence in str(caught.value)


DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1, "length_normalize": True},
    "hinge": {"beta": 0.05},
    "odpo": {"beta": 0.1, "alpha": 1.0},
    "dpop": {"beta": 0.3, "penalty": 50.0},
    "exo": {"beta": 0.1, "label_smoothing": 0.001},
    "discopop": {"beta": 0.05, "tau": 0.05},
    "f-dpo": {"beta": 0.1, "divergence": "js", "alpha": None},
    "wpo": {"beta": 0.01},
    "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "ln-dpo": {"beta": 5.0},
    "r-dpo": {"beta": 0.1, "alpha": 0.01},
    "ld-dpo": {"beta": 0.1, "alpha": 0.5},
    "nca": {"beta": 0.1},
    "bco-pair": {"beta": 0.1},
    "apo-zero": {"beta": 0.1},
    "apo-down": {"beta": 0.1},
    "sppo": {"eta": 1000.0, "soft": False},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
    "orpo": {"odds_ratio_weight": 0.1, "nll_on_prompt": False},
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
    "slic": {"beta": 0.05},
    "sft": {"per": "token"},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"beta": 0.1},
    "apo-zero-unpaired": {"beta": 0.1},
    "aot-unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "pl-dpo": {"beta": 0.1},
    "unlikelihood": {"alpha": 0.5},
    "reward": {"alpha": 0.0, "centering": 0.0},
    "grpo": {"clip": 0.2, "clip_high": None, "beta": 0.04, "per": "sequence", "constant": 128.0},
    "ppo": {"clip": 0.2, "clip_high": None, "value_weight": 0.1, "value_clip": 0.2},
}
"""Who changes one changes every run that leaves it out."""


def test_defaults_are_as_they_were() -> None:
    assert {name: loss().settings() for name, loss in LOSSES.items()} == {
        name: {"name": name, **fields} for name, fields in DEFAULTS.items()
    }


RPO = WeightedSum(((1.0, DPOLoss(0.3)), (0.25, SFTLoss(per="sequence"))))
INPUTS = {name: as_logps(batch, torch.float64) for name, batch in VALUES["inputs"].items()}


def test_sum_is_the_weighted_sum_of_its_terms_and_its_first_term_speaks_for_it() -> None:
    pairs = INPUTS["pairs"]
    expected = DPOLoss(0.3)(pairs) + 0.25 * SFTLoss(per="sequence")(pairs)
    torch.testing.assert_close(RPO(pairs), expected, rtol=1e-15, atol=0)
    for reward, of_dpo in zip(RPO.rewards(pairs), DPOLoss(0.3).rewards(pairs), strict=True):
        torch.testing.assert_close(reward, of_dpo, rtol=0, atol=0)


def test_sum_needs_what_any_of_its_terms_needs() -> None:
    assert RPO.needs == {"reference"}
    assert WeightedSum(((1.0, CPOLoss()), (0.1, SFTLoss()))).needs == frozenset()
    assert WeightedSum(((1.0, CPOLoss()), (0.1, WPOLoss()))).needs == {"reference", "tokens", "collisions"}


def test_sum_judges_what_all_its_terms_judge() -> None:
    unpaired = WeightedSum(((1.0, KTOLoss()), (0.5, SFTLoss())))
    assert RPO.units == ("pair",)
    assert unpaired.units == ("unpaired",)
    assert WeightedSum(((1.0, SFTLoss()),)).units == ("pair", "unpaired")
    sequences = INPUTS["sequences"]
    expected = KTOLoss()(sequences) + 0.5 * SFTLoss()(sequences)
    torch.testing.assert_close(unpaired(sequences), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("other", [KTOLoss(), PlackettLuceDPOLoss()])
def test_losses_over_different_things_are_not_added(other: Any) -> None:
    with pytest.raises(ValueError, match=rf"judge different things \(dpo: pair, {other.name}: \w+\)"):
        WeightedSum(((1.0, DPOLoss()), (1.0, other)))


def test_scores_of_a_reward_model_and_log_probabilities_are_not_added() -> None:
    with pytest.raises(ValueError, match=r"of reward, dpo only some judge scores"):
        WeightedSum(((1.0, RewardLoss()), (1.0, DPOLoss())))


def test_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum(())


def test_settings_of_a_sum_build_it_again() -> None:
    assert RPO.name == "dpo + sft"
    assert build_loss(RPO.settings()) == RPO
    assert hash(build_loss(RPO.settings())) == hash(RPO)
    assert build_loss({"dpo": {"beta": 0.3}, "sft": {"weight": 0.2}}) != RPO


def test_higher_chosen_reward_counts_one_and_a_tie_half() -> None:
    accuracy = preference_accuracy(torch.tensor([2.0, -3.0, 0.5, -1.0]), torch.tensor([1.0, -2.0, 0.5, -1.0]))
    assert accuracy.tolist() == [1.0, 0.0, 0.5, 0.5]


def test_policy_at_its_reference_stands_at_chance() -> None:
    pairs = INPUTS["token pairs"]
    sides = ("chosen", "rejected")
    at_reference = replace(
        pairs,
        **{f"ref_{side}_logps": getattr(pairs, f"policy_{side}_logps") for side in sides},
        tokens=replace(
            pairs.tokens, **{f"ref_{side}_logps": getattr(pairs.tokens, f"policy_{side}_logps") for side in sides}
        ),
    )
    for loss in (loss() for loss in LOSSES.values() if loss.units == ("pair",)):
        if "reference" in loss.needs:
            assert preference_accuracy(*loss.rewards(at_reference)).tolist() == [0.5] * 5, loss


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dpo": {}, "sft": {"name": "ipo"}}, "loss.sft.name: in a sum a loss is named by its section"),
        ({"dpo": 0.1}, "loss.dpo: the loss has no name; give it as loss.name."),
    ],
)
def test_settings_that_name_no_loss_or_two_are_told_apart(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        build_loss(settings)
    assert str(caught.value).startswith(sentence)


def test_a_loss_stands_once_in_a_sum() -> None:
    with pytest.raises(ValueError, match="once, and there are dpo, dpo"):
        WeightedSum(((1.0, DPOLoss(0.1)), (1.0, DPOLoss(0.2))))

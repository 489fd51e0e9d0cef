"""The losses against TRL 1.16.0, whose values make_trl_values.py has frozen into trl_values.json.

Where both mean the same, the batch's mean agrees to 1e-6. Where they do not, the relation between the two is asserted,
with the reason beside it: a disagreement that went away would fail too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.losses import WPOLoss, build_loss, preference_accuracy
from penchant.types import PairLogps, SequenceLogps
from tests.losses.test_values import VALUES, as_logps

FROZEN = json.loads(Path(__file__).with_name("trl_values.json").read_text())
TRL = FROZEN["rows"]
INPUTS = {**VALUES["inputs"], "far pairs": FROZEN["far pairs"]}
BOTH = ("pairs", "token pairs")


def pairs(inputs: str, dtype: torch.dtype = torch.float64) -> PairLogps:
    logps = as_logps(INPUTS[inputs], dtype)
    assert isinstance(logps, PairLogps)
    return logps


def first(number: int) -> PairLogps:
    """The first pairs of the inputs "pairs"."""
    logps = pairs("pairs")
    columns = {field.name: getattr(logps, field.name) for field in dataclasses.fields(logps)}
    return PairLogps(**{name: None if column is None else column[:number] for name, column in columns.items()})


def unpaired(logps: PairLogps) -> SequenceLogps:
    """Chosen completions as desirable ones, rejected ones as undesirable."""
    return SequenceLogps(
        torch.cat([logps.policy_chosen_logps, logps.policy_rejected_logps]),
        torch.cat([logps.ref_chosen_logps, logps.ref_rejected_logps]),
        torch.cat([logps.chosen_lengths, logps.rejected_lengths]),
        torch.arange(2 * len(logps.chosen_lengths)) < len(logps.chosen_lengths),
    )


def ours(logps: Any, settings: Mapping[str, Any]) -> float:
    return build_loss(settings)(logps).mean().item()


SAME_ON_PAIRS: dict[str, dict[str, Any]] = {
    "sigmoid 0.1": {"name": "dpo", "beta": 0.1},
    "sigmoid 0.5": {"name": "dpo", "beta": 0.5},
    "hinge 0.05": {"name": "hinge", "beta": 0.05},
    "ipo 0.1": {"name": "ipo", "beta": 0.1, "length_normalize": True},
    "exo_pair 0.1, label_smoothing 0.001": {"name": "exo", "beta": 0.1, "label_smoothing": 0.001},
    "nca_pair 0.1": {"name": "nca", "beta": 0.1},
    "robust 0.1, label_smoothing 0.1": {"name": "robust", "beta": 0.1, "label_smoothing": 0.1},
    "aot 0.1": {"name": "aot", "beta": 0.1},
    "aot 0.1, label_smoothing 0.2": {"name": "aot", "beta": 0.1, "label_smoothing": 0.2},
    "apo_zero 0.1": {"name": "apo-zero", "beta": 0.1},
    "apo_down 0.1": {"name": "apo-down", "beta": 0.1},
    "discopop 0.05, tau 0.05": {"name": "discopop", "beta": 0.05, "tau": 0.05},
    "discopop 0.1, tau 0.5": {"name": "discopop", "beta": 0.1, "tau": 0.5},
    "sft": {"name": "sft", "per": "token"},
    "sigmoid_norm 5": {"name": "ln-dpo", "beta": 5.0},
    "sigmoid 0.1 + 0.2 sft": {"dpo": {"beta": 0.1}, "sft": {"weight": 0.2, "per": "token"}},
    "forward_kl 0.1": {"name": "f-dpo", "beta": 0.1, "divergence": "forward_kl"},
    "js_divergence 0.1": {"name": "f-dpo", "beta": 0.1, "divergence": "js"},
}


@pytest.mark.parametrize("inputs", BOTH)
@pytest.mark.parametrize("name", SAME_ON_PAIRS)
def test_loss_over_pairs_agrees(name: str, inputs: str) -> None:
    assert ours(pairs(inputs), SAME_ON_PAIRS[name]) == pytest.approx(TRL[f"dpo: {name}: {inputs}"]["loss"], rel=1e-6)


def test_ld_dpo_agrees() -> None:
    settings = {"name": "ld-dpo", "beta": 0.1, "alpha": 0.3}
    assert ours(pairs("token pairs"), settings) == pytest.approx(
        TRL["dpo: ld_alpha 0.3, 0.1: token pairs"]["loss"], rel=1e-6
    )


@pytest.mark.parametrize("inputs", BOTH)
def test_aot_unpaired_agrees_where_both_classes_are_equally_many(inputs: str) -> None:
    settings = {"name": "aot-unpaired", "beta": 0.1, "label_smoothing": 0.2}
    theirs = TRL[f"dpo: aot_unpaired 0.1, label_smoothing 0.2: {inputs}"]["loss"]
    assert ours(unpaired(pairs(inputs)), settings) == pytest.approx(theirs, rel=1e-6)


SAME_WITHOUT_REFERENCE: dict[str, dict[str, Any]] = {
    "sigmoid 0.02, cpo_alpha 0": {"name": "cpo", "beta": 0.02, "nll_weight": 0.0},
    "hinge 0.05, cpo_alpha 0": {"name": "slic", "beta": 0.05},
    "simpo 2, gamma 1, cpo_alpha 0": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
}


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("name", SAME_WITHOUT_REFERENCE)
def test_loss_without_a_reference_agrees(name: str, number: int) -> None:
    theirs = TRL[f"cpo: {name}: first {number}"]["loss"]
    assert ours(first(number), SAME_WITHOUT_REFERENCE[name]) == pytest.approx(theirs, rel=1e-6)


def test_likelihood_terms_agree_on_a_single_pair() -> None:
    cpo, orpo = {"name": "cpo", "beta": 0.1, "nll_weight": 1.0}, {"name": "orpo", "nll_on_prompt": True}
    assert ours(first(1), cpo) == pytest.approx(TRL["cpo: sigmoid 0.1, cpo_alpha 1: first 1"]["loss"], rel=1e-6)
    assert ours(first(1), orpo) == pytest.approx(TRL["orpo: 0.1: first 1"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("0.1, 1, 1", {"name": "kto", "beta": 0.1}),
        ("0.5, 1.33, 0.4", {"name": "kto", "beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.4}),
    ],
)
@pytest.mark.parametrize("kl", ["above", "below"])
def test_kto_agrees_given_the_same_estimate_of_the_divergence(name: str, settings: dict[str, Any], kl: str) -> None:
    theirs = TRL[f"kto: {name}: kl {kl}"]
    logps = dataclasses.replace(
        as_logps(INPUTS["sequences"], torch.float64), kl=torch.tensor(theirs["kl"], dtype=torch.float64)
    )
    assert ours(logps, settings) == pytest.approx(theirs["loss"], rel=1e-6)


def test_apo_zero_unpaired_agrees() -> None:
    logps = as_logps(INPUTS["sequences"], torch.float64)
    settings = {"name": "apo-zero-unpaired", "beta": 0.1}
    assert ours(logps, settings) == pytest.approx(TRL["kto: apo_zero_unpaired 0.1"]["loss"], rel=1e-6)


def without_shift(logps: PairLogps) -> Tensor:
    chosen, rejected = logps.log_ratios()
    return (-F.logsigmoid(0.1 * chosen) - F.logsigmoid(-0.1 * rejected)).mean()


def without_cut_off(logps: PairLogps) -> Tensor:
    tokens, weight = logps.tokens, 1
    for side in ("chosen", "rejected"):
        surplus = getattr(tokens, f"policy_{side}_logps") - getattr(tokens, f"policy_{side}_log_collisions")
        weight = weight * torch.exp(surplus.sum(-1) / getattr(logps, f"{side}_lengths"))
    assert (weight > 1).any()
    assert WPOLoss().weights(logps).max() == 1
    return (weight * build_loss({"name": "dpo", "beta": 0.1})(logps)).mean()


def cpo_by_token(logps: PairLogps) -> Tensor:
    return build_loss({"cpo": {"beta": 0.1, "nll_weight": 0.0}, "sft": {"per": "token"}})(logps).mean()


def simpo_with_nll(logps: PairLogps) -> Tensor:
    simpo = {"beta": 2.0, "gamma_beta_ratio": 0.5}
    return build_loss({"simpo": simpo, "sft": {"per": "token"}})(logps).mean()


def orpo_by_token(logps: PairLogps) -> Tensor:
    chosen, rejected = build_loss({"name": "orpo"}).rewards(logps)
    likelihood = logps.policy_chosen_logps.sum() + logps.policy_prompt_logps.sum()
    nll = -likelihood / (logps.chosen_lengths.sum() + logps.prompt_lengths.sum())
    return nll - 0.1 * F.logsigmoid(chosen - rejected).mean()


Relation = Callable[[PairLogps], Any]
DISAGREEMENTS: list[tuple[str, PairLogps, dict[str, Any], Relation, str]] = [
    *(
        (
            f"dpo: sigmoid 0.1, label_smoothing 0.2: {inputs}",
            pairs(inputs),
            {"name": "dpo", "beta": 0.1, "label_smoothing": 0.2},
            lambda logps: build_loss({"name": "dpo", "beta": 0.1})(logps).mean(),
            "TRL's sigmoid loss ignores label_smoothing, so conservative DPO cannot be had there.",
        )
        for inputs in BOTH
    ),
    *(
        (
            f"dpo: bco_pair 0.1: {inputs}",
            pairs(inputs),
            {"name": "bco-pair", "beta": 0.1},
            without_shift,
            "TRL has dropped the reward shift of BCO's paper.",
        )
        for inputs in BOTH
    ),
    *(
        (
            f"dpo: sppo_hard {beta}: {inputs}",
            pairs(inputs),
            {"name": "sppo", "eta": 1 / beta},
            lambda logps, eta=1 / beta: 2 * build_loss({"name": "sppo", "eta": eta})(logps).mean(),
            "TRL adds both squares where the authors' code halves the sum; its beta is 1 / eta.",
        )
        for inputs in BOTH
        for beta in (0.001, 0.05)
    ),
    *(
        (
            f"dpo: alpha_divergence 0.1, coef 0.3, float32: {inputs}",
            pairs(inputs),
            {"name": "f-dpo", "beta": 0.1, "divergence": "alpha", "alpha": 0.3},
            lambda logps: build_loss({"name": "f-dpo", "beta": 0.1, "divergence": "alpha", "alpha": 0.7})(logps).mean(),
            "TRL's coefficient is 1 - alpha: 1 is its reverse KL, where in the paper 0 is.",
        )
        for inputs in BOTH
    ),
    (
        "dpo: use_weighting 0.1: token pairs",
        pairs("token pairs"),
        {"name": "wpo", "beta": 0.1},
        without_cut_off,
        "TRL multiplies by WPO's weights as they are, where the authors' code cuts their product off at 1.",
    ),
    (
        "cpo: sigmoid 0.1, cpo_alpha 1: first 8",
        first(8),
        {"name": "cpo", "beta": 0.1, "nll_weight": 1.0},
        cpo_by_token,
        "TRL averages CPO's likelihood over all tokens of the batch, so long completions count more.",
    ),
    *(
        (
            f"cpo: simpo 2, gamma 1, cpo_alpha 1: first {number}",
            first(number),
            {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
            simpo_with_nll,
            "TRL's SimPO has CPO's likelihood term unless cpo_alpha is set to 0, and gamma itself, not gamma / beta.",
        )
        for number in (1, 8)
    ),
    *(
        (
            "orpo: 0.1: first 8",
            first(8),
            {"name": "orpo", "nll_on_prompt": on_prompt},
            orpo_by_token,
            "TRL's likelihood is of prompt and completion, averaged over all tokens of the batch.",
        )
        for on_prompt in (True, False)
    ),
]


@pytest.mark.parametrize(
    ("name", "logps", "settings", "relation", "reason"), DISAGREEMENTS, ids=[row[0] for row in DISAGREEMENTS]
)
def test_loss_disagrees_as_the_reason_says(
    name: str, logps: PairLogps, settings: dict[str, Any], relation: Relation, reason: str
) -> None:
    theirs = TRL[name]["loss"]
    assert float(relation(logps)) == pytest.approx(theirs, rel=1e-6), reason
    assert ours(logps, settings) != pytest.approx(theirs, rel=1e-3), f"no longer true: {reason}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("discopop 0.05, tau 0.05", {"name": "discopop", "beta": 0.05}),
        ("forward_kl 0.1", {"name": "f-dpo", "beta": 0.1, "divergence": "forward_kl"}),
    ],
)
def test_trl_has_no_number_far_on_the_wrong_side_where_ours_is_finite(name: str, settings: dict[str, Any]) -> None:
    assert TRL[f"dpo: {name}: far pairs, float32"]["loss"] is None
    assert build_loss(settings)(pairs("far pairs", torch.float32)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ipo 0.1", SAME_ON_PAIRS["ipo 0.1"]),
        ("sigmoid_norm 5", SAME_ON_PAIRS["sigmoid_norm 5"]),
        ("js_divergence 0.1", SAME_ON_PAIRS["js_divergence 0.1"]),
    ],
)
def test_trl_logs_beta_r_whatever_the_loss_where_ours_logs_the_loss_s_own_reward(
    name: str, settings: dict[str, Any]
) -> None:
    logps, logged = pairs("pairs"), TRL[f"dpo: {name}: pairs"]["logged"]
    for side, log_ratio, reward in zip(
        ("chosen", "rejected"), logps.log_ratios(), build_loss(settings).rewards(logps), strict=True
    ):
        assert logged[side] == pytest.approx((settings["beta"] * log_ratio).mean().item(), rel=1e-6)
        assert logged[side] != pytest.approx(reward.mean().item(), rel=1e-3)


def test_trl_counts_a_tie_as_wrong_where_ours_counts_it_half() -> None:
    logps = pairs("far pairs")  # one pair is wrong, one tied
    assert TRL["dpo: sigmoid 0.1: far pairs, float32"]["logged"]["accuracies"] == 0
    assert preference_accuracy(*build_loss({"name": "dpo"}).rewards(logps)).mean() == 0.25


def test_every_frozen_value_is_compared() -> None:
    compared = {f"dpo: {name}: {inputs}" for name in SAME_ON_PAIRS for inputs in BOTH}
    compared |= {f"cpo: {name}: first {number}" for name in SAME_WITHOUT_REFERENCE for number in (1, 8)}
    compared |= {name for name, *_ in DISAGREEMENTS}
    rest = {name for name in TRL if name not in compared and not name.startswith("kto") and "far" not in name}
    assert rest == {
        "dpo: ld_alpha 0.3, 0.1: token pairs",
        "dpo: aot_unpaired 0.1, label_smoothing 0.2: pairs",
        "dpo: aot_unpaired 0.1, label_smoothing 0.2: token pairs",
        "cpo: sigmoid 0.1, cpo_alpha 1: first 1",
        "orpo: 0.1: first 1",
    }

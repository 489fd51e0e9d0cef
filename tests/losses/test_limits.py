"""Losses where their value is known: at the reference, where one becomes another, at the ends of their range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.losses import (
    LOSSES,
    AOTLoss,
    APODownLoss,
    APOZeroLoss,
    APOZeroUnpairedLoss,
    BCOLoss,
    BCOPairLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    DPOPLoss,
    FDivergenceDPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    LengthDesensitizedDPOLoss,
    LengthNormalizedDPOLoss,
    LengthRegularizedDPOLoss,
    Loss,
    OffsetDPOLoss,
    ORPOLoss,
    PlackettLuceDPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SLiCLoss,
    WPOLoss,
    build_loss,
)
from penchant.types import Logps, PairLogps, RankedLogps, RolloutLogps, SequenceLogps
from tests.losses.test_values import VALUES, as_logps


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs(name: str) -> Any:
    return as_logps(VALUES["inputs"][name], torch.float64)


ZERO, ONE = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
PAIRS, TOKEN_PAIRS, UNEVEN = inputs("pairs"), inputs("token pairs"), inputs("uneven sequences")


def one_pair(chosen: Tensor, rejected: Tensor, ref: tuple[Tensor, Tensor] | None = None) -> PairLogps:
    """Completions of one token; the reference is certain of them unless it is given."""
    return PairLogps(chosen, rejected, *(ref or (f64(0.0), f64(0.0))), ONE, ONE)


# At the reference.


def at_reference(logps: Any) -> Any:
    """The same batch with the policy's numbers in the reference's place."""
    if not isinstance(logps, PairLogps):
        kl = {"kl": torch.zeros_like(logps.kl)} if isinstance(logps, SequenceLogps) else {}
        if isinstance(logps, RolloutLogps):  # a completion's advantages are the same at all its tokens
            of_completions = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
            kl = {"old_logps": logps.policy_logps, "advantages": of_completions[logps.sequence_ids]}
        return replace(logps, ref_logps=logps.policy_logps, **kl)
    tokens = logps.tokens and replace(
        logps.tokens,
        ref_chosen_logps=logps.tokens.policy_chosen_logps,
        ref_rejected_logps=logps.tokens.policy_rejected_logps,
    )
    refs = {"ref_chosen_logps": logps.policy_chosen_logps, "ref_rejected_logps": logps.policy_rejected_logps}
    return replace(logps, **refs, tokens=tokens)


LN2 = math.log(2)
AT_REFERENCE: list[tuple[dict[str, Any], Any]] = [
    ({"name": "dpo", "beta": 0.3}, LN2),
    ({"name": "dpo", "beta": 5.0, "label_smoothing": 0.2}, LN2),
    ({"name": "robust", "beta": 0.3, "label_smoothing": 0.4}, LN2),
    ({"name": "ipo", "beta": 0.2}, 1 / (4 * 0.2**2)),
    ({"name": "ipo", "beta": 0.5, "length_normalize": False}, 1 / (4 * 0.5**2)),
    ({"name": "hinge"}, 1),
    ({"name": "odpo", "alpha": 0.7}, (0.7 * PAIRS.margins).exp().log1p()),
    ({"name": "dpop"}, LN2),
    ({"name": "exo", "label_smoothing": 0.01}, -LN2 - (math.log(0.99) + math.log(0.01)) / 2),
    ({"name": "discopop"}, (LN2 + 1) / 2),
    *(({"name": "f-dpo", "divergence": divergence}, LN2) for divergence in ("reverse_kl", "forward_kl", "js")),
    ({"name": "f-dpo", "divergence": "alpha", "alpha": 0.3}, LN2),
    ({"name": "wpo"}, WPOLoss().weights(TOKEN_PAIRS) * LN2),
    ({"name": "aot"}, LN2),
    ({"name": "ln-dpo"}, LN2),
    (
        {"name": "r-dpo", "alpha": 0.02},
        (-0.02 * (PAIRS.chosen_lengths - PAIRS.rejected_lengths).double()).exp().log1p(),
    ),
    ({"name": "ld-dpo"}, LN2),
    ({"name": "nca"}, 2 * LN2),
    ({"name": "bco-pair"}, 2 * LN2),
    ({"name": "apo-zero"}, 1),
    ({"name": "apo-down"}, 1),
    ({"name": "sppo", "eta": 40.0}, 40**2 / 4),
    ({"name": "sppo", "eta": 40.0, "soft": True}, 40**2 * ((PAIRS.win_probabilities - 0.5) ** 2).mean(-1)),
    ({"name": "kto"}, 1 / 2),
    ({"name": "bco"}, LN2),
    ({"name": "apo-zero-unpaired"}, 1 / 2),
    ({"name": "aot-unpaired"}, LN2 * (10 / 12 + (10 / 8 - 10 / 12) * UNEVEN.is_desirable.double())),
    ({"name": "pl-dpo"}, f64(*(math.log(math.factorial(num)) for num in (3, 5, 2, 4)))),
    ({"name": "grpo"}, f64(-1.0, 0.5, -2.0, 1.5)),
]


@pytest.mark.parametrize(("settings", "value"), AT_REFERENCE, ids=[str(row[0]) for row in AT_REFERENCE])
def test_loss_at_the_reference_is_the_known_one(settings: dict[str, Any], value: Any) -> None:
    loss = build_loss(settings)
    (unit,) = loss.units
    by_unit = {"pair": TOKEN_PAIRS if "tokens" in loss.needs else PAIRS}
    others = {"unpaired": UNEVEN, "ranking": inputs("rankings"), "rollout": inputs("rollouts")}
    logps = by_unit.get(unit) or others[unit]
    losses = loss(at_reference(logps))
    torch.testing.assert_close(
        losses, torch.as_tensor(value, dtype=torch.float64).expand_as(losses), rtol=1e-12, atol=0
    )


def test_every_loss_with_a_reference_has_its_value_there() -> None:
    with_reference = {name for name, loss in LOSSES.items() if "reference" in loss().needs}
    assert {settings["name"] for settings, _ in AT_REFERENCE} == with_reference


# Where one loss becomes another.

SAME: list[tuple[Loss, Loss, Logps]] = [
    (RobustDPOLoss(0.3, 0.0), DPOLoss(0.3), PAIRS),
    (OffsetDPOLoss(0.3, 0.5), DPOLoss(0.3), replace(PAIRS, margins=torch.zeros_like(PAIRS.margins))),
    (DPOPLoss(0.3, 0.0), DPOLoss(0.3), PAIRS),
    (FDivergenceDPOLoss(0.3, "reverse_kl"), DPOLoss(0.3), PAIRS),
    (FDivergenceDPOLoss(0.3, "alpha", 1e-9), DPOLoss(0.3), PAIRS),
    (FDivergenceDPOLoss(0.3, "alpha", 1 - 1e-9), FDivergenceDPOLoss(0.3, "forward_kl"), TOKEN_PAIRS),
    (AOTLoss(0.3, 0.1), DPOLoss(0.3, 0.1), one_pair(f64(-3.0), f64(-4.0), (f64(-5.0), f64(-1.0)))),
    (LengthRegularizedDPOLoss(0.3, 0.0), DPOLoss(0.3), PAIRS),
    (LengthDesensitizedDPOLoss(0.3, 1.0), DPOLoss(0.3), TOKEN_PAIRS),
    (
        LengthNormalizedDPOLoss(0.3),
        DPOLoss(0.3),
        replace(PAIRS, chosen_lengths=torch.ones(8).long(), rejected_lengths=torch.ones(8).long()),
    ),
    (
        IPOLoss(0.3),
        IPOLoss(0.3, length_normalize=False),
        replace(PAIRS, chosen_lengths=torch.ones(8).long(), rejected_lengths=torch.ones(8).long()),
    ),
    (
        SLiCLoss(0.05),
        HingeLoss(0.05),
        replace(PAIRS, ref_chosen_logps=torch.zeros(8).double(), ref_rejected_logps=torch.zeros(8).double()),
    ),
    (
        CPOLoss(0.3, 0.0),
        DPOLoss(0.3),
        replace(PAIRS, ref_chosen_logps=torch.zeros(8).double(), ref_rejected_logps=torch.zeros(8).double()),
    ),
    (
        SimPOLoss(5.0, 0.0),
        LengthNormalizedDPOLoss(5.0),
        replace(PAIRS, ref_chosen_logps=torch.zeros(8).double(), ref_rejected_logps=torch.zeros(8).double()),
    ),
    (KTOLoss(0.3), APOZeroUnpairedLoss(0.3), replace(inputs("sequences"), kl=torch.zeros(()).double())),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "other", "logps"), SAME, ids=[f"{loss} is {other}" for loss, other, _ in SAME])
def test_loss_becomes_the_other(loss: Loss, other: Loss, logps: Logps) -> None:
    torch.testing.assert_close(loss(logps), other(logps), rtol=1e-6 if "1e-09" in str(loss) else 1e-12, atol=1e-7)


def test_ranking_of_two_is_a_pair() -> None:
    policy, ref = (
        torch.stack([getattr(PAIRS, f"{model}_{side}_logps") for side in ("chosen", "rejected")], -1)
        for model in ("policy", "ref")
    )
    ones = torch.ones(8, 2, dtype=torch.long)
    losses = PlackettLuceDPOLoss(0.3)(RankedLogps(policy, ref, ones, ones.bool()))
    torch.testing.assert_close(losses, DPOLoss(0.3)(PAIRS), rtol=1e-14, atol=0)


def test_apo_zero_on_a_pair_is_the_sum_of_its_sides() -> None:
    sides = SequenceLogps(
        torch.cat([PAIRS.policy_chosen_logps, PAIRS.policy_rejected_logps]),
        torch.cat([PAIRS.ref_chosen_logps, PAIRS.ref_rejected_logps]),
        torch.ones(16).long(),
        torch.arange(16) < 8,
    )
    chosen, rejected = APOZeroUnpairedLoss(0.3)(sides).chunk(2)
    torch.testing.assert_close(APOZeroLoss(0.3)(PAIRS), chosen + rejected, rtol=1e-14, atol=0)
    chosen, rejected = BCOLoss(0.3)(sides).chunk(2)  # equally many of both classes, so the shift is the same
    torch.testing.assert_close(BCOPairLoss(0.3)(PAIRS), chosen + rejected, rtol=1e-14, atol=0)


# Gradients by hand, and the ends of the range.


def gradients(loss: Loss, logps: PairLogps) -> tuple[Tensor, Tensor]:
    chosen, rejected = logps.policy_chosen_logps.clone(), logps.policy_rejected_logps.clone()
    moved = replace(logps, policy_chosen_logps=chosen.requires_grad_(), policy_rejected_logps=rejected.requires_grad_())
    return torch.autograd.grad(loss(moved).sum(), (chosen, rejected), materialize_grads=True)


def test_dpo_gradient_is_beta_times_the_probability_of_the_wrong_order() -> None:
    won, lost = PAIRS.log_ratios()
    chosen, rejected = gradients(DPOLoss(0.3), PAIRS)
    torch.testing.assert_close(rejected, 0.3 * torch.sigmoid(0.3 * (lost - won)), rtol=1e-13, atol=0)
    torch.testing.assert_close(chosen, -rejected, rtol=0, atol=0)


def test_ipo_pulls_a_margin_beyond_its_target_back() -> None:
    beyond = one_pair(f64(1 / (2 * 0.1) + 3), f64(0.0))
    chosen, rejected = gradients(IPOLoss(0.1), beyond)
    assert chosen.item() == pytest.approx(2 * 3)
    assert rejected.item() == pytest.approx(-2 * 3)


def test_hinge_is_content_from_one_over_beta_on() -> None:
    for h, slope in ((9.99, -0.1), (10.01, 0.0)):
        assert gradients(HingeLoss(0.1), one_pair(f64(h), f64(0.0)))[0].item() == pytest.approx(slope)


def test_dpop_pulls_chosen_up_by_the_penalty_only_below_the_reference() -> None:
    for r, slope in ((-0.001, 0.3 * 51 * 0.5), (0.001, 0.3 * 0.5)):
        chosen, rejected = gradients(DPOPLoss(0.3, 50.0), one_pair(f64(r), f64(0.0)))
        assert chosen.item() == pytest.approx(-slope, rel=0.02)
        assert rejected.item() == pytest.approx(0.3 * 0.5, rel=0.02)


def test_apo_down_at_the_reference_leaves_chosen_and_pushes_rejected_down() -> None:
    chosen, rejected = gradients(APODownLoss(0.4), at_reference(PAIRS))
    torch.testing.assert_close(chosen, torch.zeros(8).double(), rtol=0, atol=1e-16)
    torch.testing.assert_close(rejected, torch.full((8,), 0.1).double())


def test_discopop_with_its_default_tau_rises_with_the_margin_around_the_reference() -> None:
    for h, sign in ((-3.0, -1), (-1.0, 1), (0.0, 1), (1.0, 1), (2.0, -1)):
        assert gradients(DiscoPOPLoss(), one_pair(f64(h), f64(0.0)))[0].sign() == sign


def test_shift_of_bco_has_no_gradient() -> None:
    won, lost = PAIRS.log_ratios()
    shift = 0.3 * torch.cat([won, lost]).mean()
    chosen, rejected = gradients(BCOPairLoss(0.3), PAIRS)
    torch.testing.assert_close(chosen, -0.3 * torch.sigmoid(shift - 0.3 * won), rtol=1e-12, atol=0)
    torch.testing.assert_close(rejected, 0.3 * torch.sigmoid(0.3 * lost - shift), rtol=1e-12, atol=0)

    logps = UNEVEN
    rewards, good = 0.3 * logps.log_ratios(), logps.is_desirable
    shift = (rewards[good].mean() + rewards[~good].mean()) / 2
    policy = logps.policy_logps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(BCOLoss(0.3)(replace(logps, policy_logps=policy)).sum(), policy)
    expected = torch.where(good, -0.3 * torch.sigmoid(shift - rewards), 0.3 * torch.sigmoid(rewards - shift))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_weights_of_wpo_have_no_gradient_and_reach_one_at_most() -> None:
    tokens = TOKEN_PAIRS.tokens
    leaves = [tokens.policy_chosen_logps.clone().requires_grad_(), tokens.policy_chosen_log_collisions.clone()]
    logps = replace(
        TOKEN_PAIRS,
        tokens=replace(tokens, policy_chosen_logps=leaves[0], policy_chosen_log_collisions=leaves[1].requires_grad_()),
    )
    weights = WPOLoss().weights(logps)
    assert not weights.requires_grad
    assert weights.max() == 1
    assert weights.min() < 0.5
    torch.testing.assert_close(WPOLoss(0.3)(logps), weights * DPOLoss(0.3)(logps), rtol=1e-14, atol=0)


def test_empty_completion_has_log_ratio_zero_per_token() -> None:
    logps = PairLogps(f64(-3.0), f64(0.0), f64(-4.0), f64(0.0), torch.full_like(ONE, 2), ZERO)
    assert IPOLoss(0.1)(logps).item() == pytest.approx((1 / 2 - 0 - 5) ** 2)
    assert LengthNormalizedDPOLoss(2.0)(logps).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert SimPOLoss(2.0, 0.0)(logps).item() == pytest.approx(math.log1p(math.exp(3)))
    assert all(grad.isfinite().all() for grad in gradients(IPOLoss(0.1), logps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-8, -1e-6, -1e-3, -0.6931471, -0.6931473, -5.0, -90.0, -1e4])
def test_odds_are_right_from_certain_to_impossible(logp: float, dtype: torch.dtype) -> None:
    value = torch.tensor([logp], dtype=dtype).requires_grad_()
    logps = one_pair(value, value.detach() * 0 - 1)
    odds, _ = ORPOLoss().rewards(logps)
    (grad,) = torch.autograd.grad(odds.sum(), value)
    exact = min(value.item(), -1e-7)
    assert odds.item() == pytest.approx(exact - math.log(-math.expm1(exact)), rel=2e-6, abs=2e-7)
    slope = 0.0 if value.item() > -1e-7 else 1 / -math.expm1(exact)
    assert grad.item() == pytest.approx(slope, rel=5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("settings", [{"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.5}], ids=str)
def test_f_dpo_stands_still_beyond_an_exponent_of_forty(settings: dict[str, Any]) -> None:
    loss, exponent = FDivergenceDPOLoss(0.1, **settings), 1 / settings.get("alpha", 1.0)
    inside, edge, beyond = (one_pair(f64(-h * exponent), f64(0.0)) for h in (39.0, 40.0, 500.0))
    assert loss(inside) < loss(edge)
    assert loss(beyond) == loss(edge)
    assert gradients(loss, inside)[0] < 0
    assert gradients(loss, beyond)[0] == 0


def test_what_stands_behind_the_end_of_a_ranking_does_not_count() -> None:
    logps = inputs("rankings")
    other = replace(
        logps,
        policy_logps=torch.where(logps.is_present, logps.policy_logps, 123.0).requires_grad_(),
        ref_logps=torch.where(logps.is_present, logps.ref_logps, -77.0),
    )
    loss = PlackettLuceDPOLoss(0.3)
    torch.testing.assert_close(loss(other), loss(logps), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(loss(other).sum(), other.policy_logps)
    assert (grad[~logps.is_present] == 0).all()
    torch.testing.assert_close(grad.sum(-1), torch.zeros(4).double(), rtol=0, atol=1e-15)


def test_a_single_completion_is_no_ranking() -> None:
    one = torch.ones(2, 3, dtype=torch.long)
    policy = -f64(1, 2, 3).repeat(2, 1).requires_grad_()
    losses = PlackettLuceDPOLoss()(RankedLogps(policy, policy.detach() + 1, one, torch.arange(3) < one[:, :1]))
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == [0, 0]
    assert not grad.any()


def test_likelihood_per_token_is_that_of_the_whole_batch_however_it_is_cut() -> None:
    loss, logps = build_loss({"name": "sft"}), PAIRS
    whole = loss(logps).mean().item()
    tokens_per_pair = logps.chosen_lengths.sum().item() / 8
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        sides = (logps.policy_chosen_logps[rows], logps.policy_rejected_logps[rows], None, None)
        lengths = (logps.chosen_lengths[rows], logps.rejected_lengths[rows])
        parts.append(loss(PairLogps(*sides, *lengths, tokens_per_example=tokens_per_pair)))
    assert torch.cat(parts).mean().item() == pytest.approx(whole, rel=1e-14)
    assert whole == pytest.approx(-(logps.policy_chosen_logps.sum() / logps.chosen_lengths.sum()).item(), rel=1e-14)


def test_a_batch_of_one_class_alone_teaches_aot_nothing() -> None:
    logps = inputs("desirable sequences")
    policy = logps.policy_logps.clone().requires_grad_()
    losses = build_loss({"name": "aot-unpaired"})(replace(logps, policy_logps=policy))
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == [0, 0, 0]
    assert not grad.any()


def test_log_two_of_ties_does_not_depend_on_how_they_are_sorted() -> None:
    logps = replace(PAIRS, policy_chosen_logps=PAIRS.policy_rejected_logps, ref_chosen_logps=PAIRS.ref_rejected_logps)
    torch.testing.assert_close(AOTLoss()(logps), F.softplus(torch.zeros(8).double()), rtol=1e-15, atol=0)

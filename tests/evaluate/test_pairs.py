"""Held-out evaluation: means over pairs whatever the batches, each pair's rewards by its index, nothing learned."""

from __future__ import annotations

import copy

import pytest
import torch

from penchant.evaluate.pairs import evaluate_pairs
from penchant.losses import DPOLoss
from penchant.scoring.layout import PADDED
from penchant.scoring.reference import FrozenModel, pair_logps

from ..training.test_step import moved_policy, ragged_pairs


def test_means_and_rewards_do_not_depend_on_the_batches() -> None:
    policy, reference = moved_policy()
    pairs, loss, seen = ragged_pairs(), DPOLoss(beta=0.3), []
    whole = evaluate_pairs(policy, reference, loss, [PADDED.collate(pairs)], seen.append)
    parts = [PADDED.collate(pairs[4:]), PADDED.collate(pairs[:1]), PADDED.collate(pairs[1:4])]
    cut = evaluate_pairs(policy, reference, loss, parts, seen.append)
    assert seen == [6, 2, 1, 3]
    assert cut.metrics == pytest.approx(whole.metrics)
    assert sorted(cut.rewards) == [0, 1, 2, 3, 4, 5]
    for index, rewards in whole.rewards.items():
        assert cut.rewards[index] == pytest.approx(rewards)


def test_the_metrics_are_those_of_the_formulas() -> None:
    policy, reference = moved_policy()
    pairs, loss = ragged_pairs(), DPOLoss(beta=0.3)
    batch = PADDED.collate(pairs)
    found = evaluate_pairs(policy, reference, loss, [batch], lambda pairs: None)
    with torch.no_grad():
        policy_logps = policy.token_logps(batch, with_entropies=True)
        (ref_logps,) = reference.token_logps([batch])
    logps = pair_logps(batch, policy_logps.logps, ref_logps)
    chosen = 0.3 * (logps.policy_chosen_logps - logps.ref_chosen_logps)
    rejected = 0.3 * (logps.policy_rejected_logps - logps.ref_rejected_logps)
    ratio = ref_logps - policy_logps.logps
    expected = {
        "loss": torch.log1p(torch.exp(rejected - chosen)).mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logps.policy_chosen_logps.mean(),
        "logps/rejected": logps.policy_rejected_logps.mean(),
        "length/chosen": torch.tensor([len(pair.chosen_ids) for pair in pairs]).double().mean(),
        "length/rejected": torch.tensor([len(pair.rejected_ids) for pair in pairs]).double().mean(),
        "entropy": policy_logps.entropies.mean(),
        "kl": (ratio**2 / 2).mean(),
    }
    assert found.metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-6)


def test_nothing_is_learned_and_the_mode_is_kept() -> None:
    policy, reference = moved_policy()
    policy.model.train()
    before = copy.deepcopy(policy.model.state_dict())
    evaluate_pairs(policy, reference, DPOLoss(), [PADDED.collate(ragged_pairs())], lambda pairs: None)
    assert policy.model.training
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_a_policy_at_its_reference_stands_at_chance() -> None:
    policy, _ = moved_policy()
    reference = FrozenModel.copy_of(policy)
    metrics = evaluate_pairs(policy, reference, DPOLoss(), [PADDED.collate(ragged_pairs())], lambda pairs: None).metrics
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["loss"] == pytest.approx(0.69314718)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-12)

"""Held-out evaluation: means over examples whatever the batches, rewards by index, nothing learned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from penchant.data.loader import mismatched
from penchant.evaluate.heldout import evaluate
from penchant.losses import DPOLoss, build_loss
from penchant.scoring.layout import PADDED
from penchant.scoring.records import pair_logps
from penchant.scoring.reference import FrozenModel

from ..scoring.alone import scores_alone
from ..scoring.samples import LAYOUTS, cut, moved_policy, plain_models, ragged


def ignore(_: int) -> None:
    """Nobody watches."""


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"name": "dpo", "beta": 0.3}, "pair"),
        ({"name": "wpo"}, "pair"),
        ({"name": "aot"}, "pair"),
        ({"name": "orpo", "nll_on_prompt": True}, "pair"),
        ({"name": "kto"}, "pair"),
        ({"name": "kto"}, "unpaired"),
        ({"name": "bco"}, "unpaired"),
        ({"name": "sft"}, "unlabelled"),
        ({"name": "pl-dpo"}, "ranking"),
        ({"name": "pl-dpo"}, "pair"),
    ],
    ids=str,
)
def test_means_and_rewards_do_not_depend_on_the_batches(settings: dict[str, Any], kind: str) -> None:
    policy, reference = moved_policy()
    loss, examples, told = build_loss(settings), ragged(kind), []
    found = []
    for layout in LAYOUTS:
        for sizes in ([6], [2, 1, 3]):
            kl_batches = cut(mismatched(examples, 24), sizes, layout) if "kl" in loss.needs else []
            batches = cut(examples, sizes, layout, "prompts" in loss.needs)
            ref = reference if "reference" in loss.needs else None
            found.append(evaluate(policy, ref, loss, batches, told.append, kl_batches))
    assert told == [6, 2, 1, 3] * 3
    assert sorted(found[0].rewards) == [10, 11, 12, 13, 14, 15]
    for other in found[1:]:
        assert other.metrics == pytest.approx(found[0].metrics, rel=1e-9)
        for index, rewards in found[0].rewards.items():
            assert other.rewards[index] == pytest.approx(rewards, rel=1e-9)


def test_the_metrics_are_those_of_the_formulas() -> None:
    policy, reference = moved_policy()
    pairs, loss = ragged("pair"), DPOLoss(beta=0.3)
    batch = PADDED.collate(pairs)
    found = evaluate(policy, reference, loss, [batch], ignore)
    with torch.no_grad():
        policy_logps = policy.token_logps(batch, with_entropies=True)
        (ref_logps,) = reference.token_logps([batch])
    logps = pair_logps(batch, policy_logps, ref_logps)
    chosen = 0.3 * (logps.policy_chosen_logps - logps.ref_chosen_logps)
    rejected = 0.3 * (logps.policy_rejected_logps - logps.ref_rejected_logps)
    ratio = ref_logps - policy_logps.logps
    weights = torch.tensor([pair.weight for pair in pairs]).double()
    surplus = torch.tensor([len(pair.completion_ids[0]) - len(pair.completion_ids[1]) for pair in pairs]).double()
    ranked = logps.policy_chosen_logps > logps.policy_rejected_logps
    expected = {
        "loss": (torch.log1p(torch.exp(rejected - chosen)) * weights).sum() / weights.sum(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logps.policy_chosen_logps.mean(),
        "logps/rejected": logps.policy_rejected_logps.mean(),
        "length/chosen": torch.tensor([len(pair.completion_ids[0]) for pair in pairs]).double().mean(),
        "length/rejected": torch.tensor([len(pair.completion_ids[1]) for pair in pairs]).double().mean(),
        "entropy": policy_logps.entropies.mean(),
        "kl": (ratio**2 / 2).mean(),
        "rewards/saturated": (torch.sigmoid(rejected - chosen) < 0.01).double().mean(),
        "logps/accuracies": ranked.double().mean(),
        "length/correlation": torch.corrcoef(torch.stack([(chosen - rejected).double(), surplus]))[0, 1],
    }
    assert found.metrics == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-6)


@pytest.mark.parametrize("kind", ["unpaired", "pair"])
def test_rewards_and_loss_of_kto_are_those_of_single_sequences(kind: str) -> None:
    examples, others = ragged(kind), mismatched(ragged("unpaired"), 24)
    policy_model, ref_model = plain_models()

    def log_ratios(some: Any) -> list[float]:
        pairs = zip(scores_alone(policy_model, some), scores_alone(ref_model, some), strict=True)
        return [(policy.sum() - ref.sum()).item() for policy, ref in pairs]

    shift = sum(log_ratios(others)) / len(log_ratios(others))
    assert shift > 0.01
    ratios = log_ratios(examples)
    labels = [example.is_desirable if kind == "unpaired" else k == 0 for example in examples for k in range(2)]
    labels = labels[::2] if kind == "unpaired" else labels
    weights = [example.weight for example in examples for _ in example.completion_ids]
    signed = torch.tensor([0.1 * (r - shift) * (1 if good else -1) for r, good in zip(ratios, labels, strict=True)])
    expected = ((1 - signed.sigmoid()) * torch.tensor(weights)).sum() / sum(weights)

    policy, reference = moved_policy()
    kl_batches = [PADDED.collate(others)]
    found = evaluate(policy, reference, build_loss({"name": "kto"}), [PADDED.collate(examples)], ignore, kl_batches)
    assert found.metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    rewards = [reward for index in range(10, 16) for reward in found.rewards[index]]
    assert rewards == pytest.approx([0.1 * ratio for ratio in ratios], rel=1e-9)


def test_nothing_is_learned_and_the_mode_is_kept() -> None:
    policy, reference = moved_policy()
    before = copy.deepcopy(policy.model.state_dict())
    for training in (True, False):
        policy.model.train(training)
        evaluate(policy, reference, DPOLoss(), [PADDED.collate(ragged("pair"))], ignore)
        assert policy.model.training is training
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_a_policy_at_its_reference_stands_at_chance() -> None:
    policy, _ = moved_policy()
    reference = FrozenModel.copy_of(policy)
    expected = {"dpo": ("pair", 0.69314718), "kto": ("unpaired", 0.5), "pl-dpo": ("pair", 0.69314718)}
    for name, (kind, at_reference) in expected.items():
        examples = ragged(kind)
        kl_batches = [PADDED.collate(mismatched(examples, 24))]
        loss, batches = build_loss({"name": name}), [PADDED.collate(examples)]
        metrics = evaluate(policy, reference, loss, batches, ignore, kl_batches).metrics
        assert metrics["rewards/accuracies"] == 0.5
        assert metrics["loss"] == pytest.approx(at_reference)
        assert metrics["kl"] == pytest.approx(0.0, abs=1e-12)

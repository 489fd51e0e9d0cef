"""How a policy judges held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from penchant.losses import PairLoss
from penchant.scoring.metrics import Means, observe
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference, pair_logps
from penchant.types import Batch


@dataclass(frozen=True)
class PairEvaluation:
    """Means over the pairs, and each pair's implicit rewards (chosen, rejected) by its index."""

    metrics: dict[str, float | None]
    rewards: dict[int, tuple[float, float]]


@torch.no_grad()
def evaluate_pairs(
    policy: Policy,
    reference: Reference | None,
    loss: PairLoss,
    batches: Iterable[Batch],
    advance: Callable[[int], None],
) -> PairEvaluation:
    """Scores pairs without learning from them; calls `advance(pairs)` after each batch."""
    means = Means()
    rewards: dict[int, tuple[float, float]] = {}
    was_training = policy.model.training
    policy.model.eval()
    for batch in batches:
        batch = batch.to(policy.device)
        ref_logps = reference.token_logps([batch])[0] if reference is not None else None
        policy_logps = policy.token_logps(batch, with_entropies=True)
        logps = pair_logps(batch, policy_logps.logps, ref_logps)
        observe(means, loss, logps, loss(logps), policy_logps, ref_logps)
        chosen_rewards, rejected_rewards = loss.rewards(logps)
        values = zip(chosen_rewards.tolist(), rejected_rewards.tolist(), strict=True)
        rewards.update(zip(batch.indices, values, strict=True))
        advance(len(batch.indices))
    policy.model.train(was_training)
    return PairEvaluation(means.means(), rewards)

"""What is seen of a batch: the numbers that training logs and evaluation reports.

Names are those that other tools log, so that curves can be laid over each other.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from penchant.losses import PairLoss, preference_accuracy
from penchant.types import PairLogps, TokenLogps


class Means:
    """Running means of named numbers, each over its own count (pairs or tokens)."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Float[Tensor, " n"]) -> None:
        """Takes n values into the mean of `name`."""
        self._sums[name] = self._sums.get(name, 0.0) + values.detach().double().sum().item()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def means(self) -> dict[str, float | None]:
        """The means so far; None where one is not finite (JSON knows no nan)."""
        means = {name: self._sums[name] / self._counts[name] for name in self._sums if self._counts[name]}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}


@torch.no_grad()
def observe(
    means: Means,
    loss: PairLoss,
    logps: PairLogps,
    losses: Float[Tensor, " B"],
    policy: TokenLogps,
    ref_logps: Float[Tensor, " M"] | None,
) -> None:
    """Takes a microbatch into the means.

    `loss`; `rewards/*`: the loss's own implicit reward; `logps/*`: summed over a completion, in nats; `length/*`:
    completion tokens; `entropy`: of the policy's next-token distribution, nats a token; `kl`: how far the policy
    has moved from the reference on these completions, nats a token, always at least 0: the mean of d^2 / 2,
    d = log pi - log pi_ref (estimator k2 of Schulman 2020, "Approximating KL divergence"). The tokens are the data's,
    not the policy's own samples, so it measures displacement on the data, not the KL of the objective. (The estimator
    k3, exp(-d) - 1 + d, explodes here: a rejected token that became e^10 times less likely counts as 22,000 nats.)
    """
    chosen_rewards, rejected_rewards = loss.rewards(logps)
    means.add("loss", losses)
    means.add("rewards/chosen", chosen_rewards)
    means.add("rewards/rejected", rejected_rewards)
    means.add("rewards/accuracies", preference_accuracy(chosen_rewards, rejected_rewards))
    means.add("rewards/margins", chosen_rewards - rejected_rewards)
    means.add("logps/chosen", logps.policy_chosen_logps)
    means.add("logps/rejected", logps.policy_rejected_logps)
    means.add("length/chosen", logps.chosen_lengths.float())
    means.add("length/rejected", logps.rejected_lengths.float())
    if policy.entropies is not None:
        means.add("entropy", policy.entropies)
    if ref_logps is not None:
        means.add("kl", (policy.logps - ref_logps).square() / 2)

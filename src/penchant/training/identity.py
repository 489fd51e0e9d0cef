"""The check before the first step: a policy that has not moved must equal its reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from penchant.errors import UserError
from penchant.losses import PairLoss
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference, pair_logps
from penchant.types import Batch

TOLERANCE = {"float32": 0.01, "bf16": 0.6}
"""Largest mean |log pi - log pi_ref| of a completion, in nats. Rounding alone, between two passes over the same pair in
different company, was seen to make 1e-4 in float32 and 0.2 to 0.3 under bf16; dropout or other weights make several."""


@torch.no_grad()
def check_identity(
    policy: Policy, reference: Reference, loss: PairLoss, batches: Iterable[Batch]
) -> tuple[float, float]:
    """Scores a few pairs before the first step.

    Returns:
        The mean loss, and the mean loss that policy = reference gives exactly (log 2 for DPO).

    Raises:
        UserError: the reference is the policy's own start and yet they differ; the message says why that may be.
    """
    found: list[Tensor] = []
    expected: list[Tensor] = []
    deviations: list[Tensor] = []
    policy.model.train()  # as the first step will be: dropout left on must show here
    for batch in batches:
        batch = batch.to(policy.device)
        (ref_logps,) = reference.token_logps([batch])
        logps = pair_logps(batch, policy.token_logps(batch).logps, ref_logps)
        same = dataclasses.replace(
            logps, ref_chosen_logps=logps.policy_chosen_logps, ref_rejected_logps=logps.policy_rejected_logps
        )
        found.append(loss(logps))
        expected.append(loss(same))
        deviations.extend(ratio.abs() for ratio in logps.log_ratios())
    mean_found, mean_expected = torch.cat(found).mean().item(), torch.cat(expected).mean().item()
    deviation = torch.cat(deviations).mean().item()
    if reference.is_start_of_policy and not deviation <= TOLERANCE[policy.precision]:
        raise UserError(
            f"reference: before the first step policy and reference must agree, and the loss must be "
            f"{mean_expected:.4f}; it is {mean_found:.4f}, and their log-probabilities of a completion differ by "
            f"{deviation:.3g} nats on average. Usual causes: dropout that is still on in the model's own code, or "
            "weights that already hold nan."
        )
    return mean_found, mean_expected

"""The check before the first step: a policy that has not moved must equal its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.errors import UserError
from penchant.losses import Loss
from penchant.scoring.policy import Policy
from penchant.scoring.records import logps_for
from penchant.scoring.reference import Reference, mean_kl
from penchant.types import Batch, TokenLogps

TOLERANCE = {"float32": 0.01, "bf16": 0.6}
"""Largest mean |log pi - log pi_ref| of a completion, in nats. Rounding alone, between two passes over the same pair in
different company, was seen to make 1e-4 in float32 and 0.2 to 0.3 under bf16; dropout or other weights make several."""


@torch.no_grad()
def check_identity(
    policy: Policy, reference: Reference, loss: Loss, batches: Sequence[Batch], kl_batches: Sequence[Batch] = ()
) -> tuple[float, float]:
    """Scores a few examples before the first step.

    Returns:
        The mean loss, and the mean loss that policy = reference gives exactly (log 2 for DPO).

    Raises:
        UserError: the reference is the policy's own start and yet they differ; the message says why that may be.
    """
    policy.model.train()  # as the first step will be: dropout left on must show here
    batches = [batch.to(policy.device) for batch in batches]
    whole, ref = Batch.join(batches), torch.cat(reference.token_logps(batches))
    scored = TokenLogps.join([policy.token_logps(b, with_collisions="collisions" in loss.needs) for b in batches])
    kl = mean_kl(policy, reference, kl_batches) if "kl" in loss.needs else None
    found = loss(logps_for(loss, whole, scored, ref, kl)).mean().item()
    no_kl = None if kl is None else torch.zeros_like(kl)
    expected = loss(logps_for(loss, whole, scored, scored.logps, no_kl)).mean().item()
    log_ratios = whole.sum_by_sequence(scored.logps - ref)[whole.is_completion]
    deviation = log_ratios.abs().mean().item()
    if reference.is_start_of_policy and not deviation <= TOLERANCE[policy.precision]:
        raise UserError(
            f"reference: before the first step policy and reference must agree, and the loss must be "
            f"{expected:.4f}; it is {found:.4f}, and their log-probabilities of a completion differ by "
            f"{deviation:.3g} nats on average. Usual causes: dropout that is still on in the model's own code, or "
            "weights that already hold nan."
        )
    return found, expected

"""One optimizer step: microbatches in, a changed policy out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from penchant.losses import PairLoss
from penchant.scoring.metrics import Means, observe
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference, pair_logps
from penchant.types import Batch


def train_step(
    policy: Policy,
    reference: Reference | None,
    loss: PairLoss,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    means: Means,
) -> bool:
    """Accumulates the gradient over the microbatches of one optimizer batch and takes the step.

    The loss is the sum over pairs divided by the number of pairs of the whole batch, so the gradient does not depend
    on how the batch was cut. Takes what was seen into `means`.

    Returns:
        False where the loss or the gradient was not finite: then the weights are as they were.
    """
    accumulate_gradient(policy, reference, loss, batches, means)
    grad_norm = nn.utils.clip_grad_norm_(trainable_parameters(policy.model), max_grad_norm)
    means.add("grad_norm", grad_norm.reshape(1))
    is_finite = bool(torch.isfinite(grad_norm))
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return is_finite


def accumulate_gradient(
    policy: Policy, reference: Reference | None, loss: PairLoss, batches: Sequence[Batch], means: Means
) -> None:
    """Adds the gradient of the mean loss over all pairs of the microbatches to the policy's parameters."""
    num_pairs = sum(len(batch.indices) for batch in batches)
    batches = [batch.to(policy.device) for batch in batches]
    ref_logps = reference.token_logps(batches) if reference is not None else [None] * len(batches)
    for batch, batch_ref_logps in zip(batches, ref_logps, strict=True):
        policy_logps = policy.token_logps(batch, with_entropies=True)
        logps = pair_logps(batch, policy_logps.logps, batch_ref_logps)
        losses = loss(logps)
        (losses.sum() / num_pairs).backward()
        observe(means, loss, logps, losses, policy_logps, batch_ref_logps)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

"""One optimizer step: microbatches in, a changed policy out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from penchant import distributed, stopping
from penchant.errors import UserError
from penchant.losses import Loss
from penchant.scoring.metrics import Means, observe
from penchant.scoring.policy import Policy, gathered_logps
from penchant.scoring.records import logps_for, weights_of
from penchant.scoring.reference import Reference, mean_kl
from penchant.training import hardware
from penchant.training.optim import trainable_parameters
from penchant.types import Batch, TokenLogps

_WEIGHTS_WATCHED = 2**20
"""About how many weights are copied before a step to see how far it goes."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to: its mean loss, the gradient's norm before clipping, and whether the step was taken."""

    loss: float
    grad_norm: float
    is_taken: bool

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; a step that is not finite is never taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    policy: Policy,
    reference: Reference | None,
    loss: Loss,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    means: Means,
    kl_batches: Sequence[Batch] = (),
    accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
    rewards: dict[int, tuple[float, ...]] | None = None,
) -> StepOutcome:
    """Accumulates the gradient over the microbatches of one optimizer batch and takes the step.

    The loss is the weighted sum over examples divided by the weights of the whole batch, so the gradient does not
    depend on how the batch was cut. Takes what was seen into `means`. `kl_batches` are the mismatched completions of a
    loss that needs the KL divergence. The weights stay as they were where loss or gradient is not finite, and where
    `accepts(loss, grad_norm)` says no. Into `rewards` go those of each example's completions before the step, by its
    index.

    Beside what `observe` sees: `grad_norm` before it is clipped, `grad_clipped` (the share of steps where it was), and
    `update_ratio`, the norm of the step over the norm of the weights, measured on about a million trained weights.

    Raises:
        StopRequested: between two microbatches; the weights are as they were.
        UserError: memory ran out in the optimizer; the weights are of no use any more.
    """
    try:
        mean_loss = accumulate_gradient(policy, reference, loss, batches, means, kl_batches, rewards)
        trained = trainable_parameters(policy)
        distributed.sum_gradients(trained)
        grad_norm = distributed.clip_gradients(trained, max_grad_norm)
        means.add("grad_norm", grad_norm.reshape(1))
        means.add("grad_clipped", (grad_norm > max_grad_norm).double().reshape(1))
        outcome = StepOutcome(mean_loss, grad_norm.item(), is_taken=False)
        if outcome.is_finite and accepts(outcome.loss, outcome.grad_norm):
            before = _some_weights(policy)
            _take(optimizer)
            means.add("update_ratio", _share_moved(before, _some_weights(policy)))
            outcome = replace(outcome, is_taken=True)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return outcome


@torch.no_grad()
def _some_weights(policy: Policy) -> list[Tensor]:
    """Copies of the first weights of every trained tensor, the same share of each, a million or so in all.

    Of sharded tensors those of them that this process keeps.
    """
    weights = trainable_parameters(policy.model)
    share = min(1.0, _WEIGHTS_WATCHED / max(1, sum(own.numel() for own in weights)))
    return [distributed.first_of(own, math.ceil(share * own.numel())).clone() for own in weights]


def _share_moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> Float[Tensor, " 1"]:
    """||after - before|| / ||before||, over all tensors together."""
    moved = torch.stack([(new - old).double().square().sum() for old, new in zip(before, after, strict=True)]).sum()
    size = torch.stack([old.double().square().sum() for old in before]).sum()
    moved, size = distributed.sum_of(torch.stack([moved, size])).unbind()
    return (moved / size.clamp(min=1e-30)).sqrt().reshape(1)


def _take(optimizer: torch.optim.Optimizer) -> None:
    """Changes the weights. Where memory runs out half-way some of them are changed: this is never tried again."""
    try:
        optimizer.step()
    except RuntimeError as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise UserError(
            f"memory: there is no room for the optimizer's moments ({str(error).splitlines()[0]}); train with "
            "lora.rank, or with optimizer rmsprop, which keeps one moment instead of two."
        ) from error


def accumulate_gradient(
    policy: Policy,
    reference: Reference | None,
    loss: Loss,
    batches: Sequence[Batch],
    means: Means,
    kl_batches: Sequence[Batch] = (),
    rewards: dict[int, tuple[float, ...]] | None = None,
) -> float:
    """Adds the gradient of the mean loss over all examples of the microbatches to the policy's parameters.

    Returns:
        That mean loss.
    """
    batches = [batch.to(policy.device) for batch in batches]
    whole = Batch.join(batches)
    refs = reference.token_logps(batches) if reference is not None else [None] * len(batches)
    whole_ref = None if reference is None else torch.cat(refs)  # type: ignore[arg-type]
    kl = mean_kl(policy, reference, kl_batches) if "kl" in loss.needs else None
    total_weight = weights_of(loss, whole).sum()
    with_collisions = "collisions" in loss.needs

    def mean_loss(batch: Batch, scored: TokenLogps, ref: Float[Tensor, " M"] | None) -> Float[Tensor, ""]:
        losses = loss(logps_for(loss, batch, scored, ref, kl, whole.examples))
        return (losses * weights_of(loss, batch)).sum() / total_weight

    slopes: Sequence[Tensor | None] = [None] * len(batches)
    if "whole_batch" in loss.needs and len(batches) > 1:
        # No part of the batch knows its loss. So the gradient is first taken with respect to the log-probabilities of
        # all tokens, from a pass without activations, and then carried through one microbatch at a time: exact.
        with torch.no_grad():
            first_pass = TokenLogps.join(policy.score_all(batches, with_collisions=with_collisions))
        first_pass.logps.requires_grad_(True)
        (slope,) = torch.autograd.grad(mean_loss(whole, first_pass, whole_ref), first_pass.logps)
        slopes = slope.split([len(batch.target_ids) for batch in batches])
    turns, scored_by_turn = distributed.turns(len(batches)), []
    for turn in turns:
        stopping.check()
        batch, ref, own_slope = batches[turn.place], refs[turn.place], slopes[turn.place]
        scored = policy.token_logps(batch, with_entropies=True, with_collisions=with_collisions)
        if own_slope is None:
            (mean_loss(batch, scored, ref) * turn.counts).backward()
        else:
            scored.logps.backward(own_slope * turn.counts)
        scored_by_turn.append(scored.detached())
    seen = gathered_logps(turns, scored_by_turn, batches)
    with torch.no_grad():
        logps = logps_for(loss, whole, TokenLogps.join(seen), whole_ref, kl)
        losses = loss(logps)
        found = iter(observe(means, loss, whole, logps, losses, TokenLogps.join(seen), whole_ref).tolist())
        if rewards is not None:
            rewards |= {example.index: tuple(next(found) for _ in example.completion_ids) for example in whole.examples}
        return ((losses * weights_of(loss, whole)).sum() / total_weight).item()

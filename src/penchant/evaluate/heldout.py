"""How a policy judges held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from penchant.losses import Loss
from penchant.scoring.metrics import Means, observe
from penchant.scoring.policy import Policy
from penchant.scoring.records import logps_for
from penchant.scoring.reference import Reference, mean_kl
from penchant.types import Batch, TokenLogps


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples, and by the index of each what was seen of its completions."""

    metrics: dict[str, float | None]
    rewards: dict[int, tuple[float, ...]]
    """The implicit rewards."""
    token_log_ratios: Mapping[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t) of every token, in nats; empty without a reference."""


@torch.no_grad()
def evaluate(
    policy: Policy,
    reference: Reference | None,
    loss: Loss,
    batches: Iterable[Batch],
    advance: Callable[[int], None],
    kl_batches: Sequence[Batch] = (),
) -> Evaluation:
    """Scores examples, at least one, without learning from them; calls `advance(examples)` after each batch.

    All of them are taken as one batch by losses that look at the whole of it.
    """
    was_training = policy.model.training
    policy.model.eval()
    seen = [batch.to(policy.device) for batch in batches]
    refs = [] if reference is None else reference.token_logps(seen)
    scored = policy.score_all(seen, with_entropies=True, with_collisions="collisions" in loss.needs, advance=advance)
    kl = mean_kl(policy, reference, kl_batches) if "kl" in loss.needs else None
    policy.model.train(was_training)

    whole, whole_scored = Batch.join(seen), TokenLogps.join(scored)
    whole_ref = torch.cat(refs) if refs else None
    logps = logps_for(loss, whole, whole_scored, whole_ref, kl)
    means = Means()
    rewards = iter(observe(means, loss, whole, logps, loss(logps), whole_scored, whole_ref).tolist())
    by_index = {example.index: tuple(next(rewards) for _ in example.completion_ids) for example in whole.examples}
    ratios = {} if whole_ref is None else _by_token(whole, whole_scored.logps, whole_ref)
    return Evaluation(means.means(), by_index, ratios)


def _by_token(
    batch: Batch, policy: Float[Tensor, " M"], ref: Float[Tensor, " M"]
) -> dict[int, tuple[Float[Tensor, " _"], ...]]:
    """The log-ratios of the tokens of each example's completions."""
    # In float64: the difference of two close float32 numbers is exact there, and so are sums of it.
    parts = (policy.double() - ref.double()).cpu().split(batch.lengths.tolist())
    each = iter([part for part, is_one in zip(parts, batch.is_completion.tolist(), strict=True) if is_one])
    return {example.index: tuple(next(each) for _ in example.completion_ids) for example in batch.examples}

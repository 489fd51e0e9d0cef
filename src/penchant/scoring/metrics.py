"""What is seen of a batch: the numbers that training logs and evaluation reports.

Names are those that other tools log, so that curves can be laid over each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from penchant.losses import Loss, PPOLoss, RolloutLoss, preference_accuracy
from penchant.losses.policy_gradient import kl_k3
from penchant.scoring.records import rewards_of, sequence_logps, weights_of
from penchant.types import Batch, Logps, RolloutLogps, SequenceLogps, TokenLogps

SATURATED = math.log(99)
"""The margin from which on a pair teaches next to nothing: sigmoid(-margin), its weight in DPO's gradient, is 0.01."""


class Means:
    """Running means of named numbers, each over its own count (pairs or tokens) or weight, and correlations."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._moments: dict[str, list[float]] = {}
        """Of two numbers x and y: how many, and the sums of x, y, x^2, y^2 and x y."""

    def add(self, name: str, values: Float[Tensor, " n"], weights: Float[Tensor, " n"] | None = None) -> None:
        """Takes n values into the mean of `name`."""
        values = values.detach().double()
        weights = torch.ones_like(values) if weights is None else weights.double()
        self._sums[name] = self._sums.get(name, 0.0) + (values * weights).sum().item()
        self._weights[name] = self._weights.get(name, 0.0) + weights.sum().item()

    def correlate(self, name: str, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> None:
        """Takes n couples of numbers into the correlation `name`."""
        x, y = x.detach().double(), y.detach().double()
        sums = [len(x), *(each.sum().item() for each in (x, y, x * x, y * y, x * y))]
        known = self._moments.get(name, [0.0] * len(sums))
        self._moments[name] = [float(old + new) for old, new in zip(known, sums, strict=True)]

    def means(self) -> dict[str, float | None]:
        """The means and correlations so far; None where one is not finite (JSON knows no nan).

        There is no correlation where one of the two numbers is always the same.
        """
        means = {name: self._sums[name] / self._weights[name] for name in self._sums if self._weights[name]}
        means |= {
            name: found for name, moments in self._moments.items() if (found := _correlation(*moments)) is not None
        }
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def include(self, other: Means) -> None:
        """Takes in what another one has seen."""
        for name in other._sums:
            self._sums[name] = self._sums.get(name, 0.0) + other._sums[name]
            self._weights[name] = self._weights.get(name, 0.0) + other._weights[name]
        for name, moments in other._moments.items():
            known = self._moments.get(name, [0.0] * len(moments))
            self._moments[name] = [old + new for old, new in zip(known, moments, strict=True)]

    def to_json(self) -> dict[str, list[str]]:
        """All that was seen, as hexadecimal floats: sum and weight of each mean, moments of each correlation."""
        moments = {name: [value.hex() for value in values] for name, values in self._moments.items()}
        return {name: [self._sums[name].hex(), self._weights[name].hex()] for name in self._sums} | moments

    @classmethod
    def from_json(cls, seen: Mapping[str, Sequence[str]]) -> Means:
        """The inverse of `to_json`."""
        means = cls()
        for name, kept in seen.items():
            values = [float.fromhex(value) for value in kept]
            if len(values) == 2:
                means._sums[name], means._weights[name] = values
            else:
                means._moments[name] = values
        return means


@torch.no_grad()
def observe_rollouts(
    means: Means,
    loss: RolloutLoss,
    batch: Batch,
    logps: RolloutLogps,
    losses: Float[Tensor, " N"],
    policy: TokenLogps,
) -> None:
    """Takes a batch of sampled completions into the means.

    `loss`; `entropy`: of the policy's next-token distribution, nats a token; `kl`: from the reference, nats a token
    (estimator k3 of Schulman 2020, the tokens being the policy's own); `old_kl`: from the policy that sampled, likewise
    (0 in the first step after); `clipped`: the share of tokens that teach nothing any more; `value_error`: the clipped
    error of the value head, where there is one.
    """
    means.add("loss", losses, weights_of(loss, batch))
    means.add("old_kl", kl_k3(logps.old_logps, logps.policy_logps))
    means.add("clipped", loss.is_clipped(logps).double())
    if policy.entropies is not None:
        means.add("entropy", policy.entropies)
    if logps.ref_logps is not None:
        means.add("kl", kl_k3(logps.policy_logps, logps.ref_logps))
    if isinstance(loss, PPOLoss):
        means.add("value_error", loss.value_errors(logps))


@torch.no_grad()
def observe(
    means: Means,
    loss: Loss,
    batch: Batch,
    logps: Logps,
    losses: Float[Tensor, " B"],
    policy: TokenLogps,
    ref: Float[Tensor, " M"] | None,
) -> Float[Tensor, " N"]:
    """Takes a batch into the means and gives back the implicit rewards of its completions.

    `loss`; `rewards/*`: the loss's own implicit reward; `logps/*`: summed over a completion, in nats; `length/*`:
    completion tokens. Of a pair these speak of chosen and rejected, of a ranking of its best and its worst, of single
    completions of the desirable and the others. `rewards/accuracies`: the share of judgements that the rewards agree
    with, ties counting half: pairs, couples of a ranking, or (the area under the ROC curve) couples of one desirable
    and one undesirable completion. `rewards/margins`: chosen less rejected.

    Of pairs and rankings alone: `rewards/saturated`: the share whose margin is above SATURATED; `logps/accuracies`: the
    share in which the policy finds chosen likelier than rejected, ties counting half, which before training is the
    ranking accuracy of the reference (Chen et al. 2024, arXiv:2405.19534); `length/correlation`: between the margin
    and how many tokens longer chosen is. `kl_mismatched`: KTO's estimate of the KL divergence, nats a completion.

    `entropy`: of the policy's next-token distribution, nats a token; `kl`: how far the policy has moved from the
    reference on these completions, nats a token, always at least 0: the mean of d^2 / 2, d = log pi - log pi_ref
    (estimator k2 of Schulman 2020, "Approximating KL divergence"). The tokens are the data's, not the policy's own
    samples, so it measures displacement on the data, not the KL of the objective. (The estimator k3, exp(-d) - 1 + d,
    explodes here: a rejected token that became e^10 times less likely counts as 22,000 nats.)

    Of completions that the policy sampled itself `observe_rollouts` says what is seen.
    """
    if isinstance(logps, RolloutLogps):
        assert isinstance(loss, RolloutLoss)
        observe_rollouts(means, loss, batch, logps, losses, policy)
        return loss.rewards(logps)
    rewards = rewards_of(loss, logps)
    means.add("loss", losses, weights_of(loss, batch))
    sequences = sequence_logps(batch, policy.logps, ref)
    firsts, lasts = _places(batch)
    if all(len(example.completion_ids) == 1 for example in batch.examples):
        is_desirable = sequences.is_desirable
        firsts, lasts = is_desirable.nonzero().flatten(), (~is_desirable).nonzero().flatten()
        if len(firsts) and len(lasts):
            means.add("rewards/accuracies", _share_below(rewards[firsts], rewards[lasts]))
            means.add("rewards/margins", (rewards[firsts].mean() - rewards[lasts].mean()).reshape(1))
    else:
        means.add("rewards/accuracies", _accuracies(batch, rewards))
        _observe_pairs(means, rewards[firsts] - rewards[lasts], sequences, firsts, lasts, "scores" in loss.needs)
    if isinstance(logps, SequenceLogps) and logps.kl is not None:
        means.add("kl_mismatched", logps.kl.reshape(1))
    by_completion = {
        "rewards": rewards,
        "logps": sequences.policy_logps,
        "length": sequences.lengths.float(),
    }
    if "scores" in loss.needs:
        del by_completion["logps"]  # there are none
    for name, values in by_completion.items():
        means.add(f"{name}/chosen", values[firsts])
        means.add(f"{name}/rejected", values[lasts])
    of_completions = batch.is_completion[batch.sequence_ids]
    if policy.entropies is not None:
        means.add("entropy", policy.entropies[of_completions])
    if ref is not None:
        means.add("kl", (policy.logps - ref)[of_completions].square() / 2)
    return rewards


def _observe_pairs(
    means: Means,
    margins: Float[Tensor, " B"],
    sequences: SequenceLogps,
    firsts: Int[Tensor, " B"],
    lasts: Int[Tensor, " B"],
    are_scores: bool,
) -> None:
    """What is seen of the first and the last completion of each example beside the rewards themselves."""
    lengths = sequences.lengths.double()
    means.add("rewards/margins", margins)
    means.add("rewards/saturated", (margins > SATURATED).double())
    means.correlate("length/correlation", margins, lengths[firsts] - lengths[lasts])
    if not are_scores:  # a reward model has no log-probabilities
        logps = sequences.policy_logps
        means.add("logps/accuracies", preference_accuracy(logps[firsts], logps[lasts]))


def _correlation(number: float, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    """Pearson's, from moments; None where one of the two hardly varies, so that rounding would be all there is."""
    spread_x, spread_y = xx - x * x / number, yy - y * y / number
    if spread_x <= 1e-9 * xx or spread_y <= 1e-9 * yy:
        return None
    return (xy - x * y / number) / math.sqrt(spread_x * spread_y)


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where among the completions the first and the last one of each example stand."""
    counts = torch.tensor([len(example.completion_ids) for example in batch.examples], device=batch.lengths.device)
    ends = counts.cumsum(0)
    return ends - counts, ends - 1


def _accuracies(batch: Batch, rewards: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
    """Of each example the share of its couples, the better one first, that the rewards agree with."""
    shares = []
    for own in rewards.split([len(example.completion_ids) for example in batch.examples]):
        better, worse = torch.triu_indices(len(own), len(own), offset=1, device=own.device)
        shares.append(preference_accuracy(own[better], own[worse]).mean())
    return torch.stack(shares)


def _share_below(values: Float[Tensor, " n"], others: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
    """Of each value the share of the others that are below it, equal ones counting half."""
    others = others.sort().values
    below, up_to = torch.searchsorted(others, values), torch.searchsorted(others, values, right=True)
    return (below + up_to) / (2 * len(others))

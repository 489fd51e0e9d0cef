"""Losses over single completions, each desirable or not.

Everywhere r(y) = log pi(y|x) - log pi_ref(y|x) in nats, summed over the completion's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import UnpairedLoss, require_not_negative, require_positive, require_share
from penchant.losses.pairwise import smoothed_logistic
from penchant.types import SequenceLogps


@dataclass(frozen=True)
class LogRatioUnpairedLoss(UnpairedLoss):
    """A loss over single completions whose implicit reward is beta (log pi - log pi_ref)."""

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    reads = frozenset({"reference", "labels"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def rewards(self, logps: SequenceLogps) -> Float[Tensor, " N"]:
        """beta (log pi - log pi_ref)."""
        return self.beta * logps.log_ratios()


@dataclass(frozen=True)
class KTOLoss(LogRatioUnpairedLoss, name="kto"):
    """Kahneman-Tversky Optimization: weight (1 - sigmoid(beta [r(y) - z])), for undesirable ones of beta [z - r(y)].

    Eq. 8 of Ethayarajh et al. 2024 (arXiv:2402.01306; Eq. 7 of its first version). z is an estimate of KL(policy ||
    reference), at least 0 and without gradient: the mean log-ratio of completions that belong to other prompts, over
    the whole optimizer batch (the paper takes it over a microbatch). At policy = reference it is weight / 2.
    """

    desirable_weight: float = 1.0
    """The paper's lambda_D."""
    undesirable_weight: float = 1.0
    """The paper's lambda_U."""
    reads = frozenset({"reference", "labels", "kl"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("desirable_weight", self.desirable_weight)
        require_not_negative("undesirable_weight", self.undesirable_weight)

    def __call__(self, logps: SequenceLogps) -> Float[Tensor, " N"]:
        if logps.kl is None:
            raise ValueError("kto needs an estimate of the KL divergence from the reference")
        surplus = self.beta * (logps.log_ratios() - logps.kl)
        return torch.where(
            logps.is_desirable,
            self.desirable_weight * torch.sigmoid(-surplus),
            self.undesirable_weight * torch.sigmoid(surplus),
        )


@dataclass(frozen=True)
class BCOLoss(LogRatioUnpairedLoss, name="bco"):
    """Binary classifier optimization: -log sigmoid(beta r(y) - d), for undesirable ones -log sigmoid(d - beta r(y)).

    Eq. 8 of Jung et al. 2024 (arXiv:2404.04656), in which both classes weigh the same; here every completion does. The
    reward shift d, Eq. 7, is the mean of the mean rewards of both classes, without gradient; the paper keeps an
    exponential moving average of it, here it is that of the whole optimizer batch, so that a step depends on nothing
    but its batch. The reweighting of prompts by an embedding in its first version (underlying distribution matching)
    is not part of it. At policy = reference it is log 2.
    """

    reads = frozenset({"reference", "labels", "whole_batch"})

    def __call__(self, logps: SequenceLogps) -> Float[Tensor, " N"]:
        rewards = self.rewards(logps)
        sides = (rewards[logps.is_desirable], rewards[~logps.is_desirable])
        means = torch.stack([side.mean() for side in sides if len(side)])
        surplus = rewards - means.mean().detach()
        return -F.logsigmoid(torch.where(logps.is_desirable, surplus, -surplus))


@dataclass(frozen=True)
class APOZeroUnpairedLoss(LogRatioUnpairedLoss, name="apo-zero-unpaired"):
    """Anchored preference optimization, zero: 1 - sigmoid(beta r(y)), for undesirable ones sigmoid(beta r(y)).

    Eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266), one side at a time; KTO with z = 0. At policy = reference it
    is 1/2.
    """

    def __call__(self, logps: SequenceLogps) -> Float[Tensor, " N"]:
        rewards = self.rewards(logps)
        return torch.sigmoid(torch.where(logps.is_desirable, -rewards, rewards))


@dataclass(frozen=True)
class AOTUnpairedLoss(LogRatioUnpairedLoss, name="aot-unpaired"):
    """Alignment via Optimal Transport on single completions: -log sigmoid(beta d), d between quantiles of r(y).

    The unpaired form of Melnyk et al. 2024 (arXiv:2406.05882): the sorted log-ratios of the desirable completions of a
    batch are held against the sorted ones of the undesirable. Where the two differ in number, their quantile functions
    are (each couple by the mass that the optimal transport moves between them), a case that their code in TRL does not
    have. Half of a couple's loss stands at each of its two completions. A batch of one class alone has loss 0. At
    policy = reference its mean is log 2.
    """

    label_smoothing: float = 0.0
    """Assumed probability that a label is flipped, in [0, 0.5)."""
    reads = frozenset({"reference", "labels", "whole_batch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("label_smoothing", self.label_smoothing)

    def __call__(self, logps: SequenceLogps) -> Float[Tensor, " N"]:
        rewards = self.rewards(logps)
        (desirable,), (undesirable,) = (
            logps.is_desirable.nonzero(as_tuple=True),
            (~logps.is_desirable).nonzero(as_tuple=True),
        )
        losses = 0 * rewards
        if not len(desirable) or not len(undesirable):
            return losses
        desirable = desirable[rewards[desirable].argsort()]
        undesirable = undesirable[rewards[undesirable].argsort()]
        first, second, mass = _transport(len(desirable), len(undesirable))
        first, second = desirable[first.to(rewards.device)], undesirable[second.to(rewards.device)]
        moved = smoothed_logistic(rewards[first] - rewards[second], self.label_smoothing)
        moved = moved * mass.to(rewards) * len(rewards) / 2
        return losses.index_add(0, first, moved).index_add(0, second, moved)


def _transport(num_first: int, num_second: int) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal transport on a line between two sorted sets of equal mass 1: places in both, and the mass moved.

    Reckoned in units of 1 / (num_first * num_second), in which all edges are whole numbers.
    """
    edges = torch.cat(
        [
            torch.arange(0, num_first * num_second, num_second),
            torch.arange(0, num_first * num_second, num_first),
            torch.tensor([num_first * num_second]),
        ]
    ).unique()
    starts, widths = edges[:-1], edges.diff()
    return starts // num_second, starts // num_first, widths.double() / (num_first * num_second)

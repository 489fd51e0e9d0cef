"""Losses over pairs that judge each side by itself, so that they also say whether chosen shall go up.

Everywhere r(y) = log pi(y|x) - log pi_ref(y|x) in nats, summed over the completion's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import LogRatioLoss, PairLoss, require_positive
from penchant.types import PairLogps


@dataclass(frozen=True)
class NCALoss(LogRatioLoss, name="nca"):
    """Noise contrastive alignment on pairs: -ls(r_w) - 1/2 ls(-r_w) - 1/2 ls(-r_l), r_y = beta r(y), ls = log sigmoid.

    Chen et al. 2024 (arXiv:2402.05369), NCA on a pair with a hard preference, as in the authors' code. At policy =
    reference it is 2 log 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCOPairLoss(LogRatioLoss, name="bco-pair"):
    """Binary classifier optimization on pairs: -log sigmoid(beta r(chosen) - d) - log sigmoid(d - beta r(rejected)).

    Jung et al. 2024 (arXiv:2404.04656): Eq. 8 on pairs. The reward shift d is Eq. 7, the mean of the mean rewards of
    both sides, without gradient. The paper keeps an exponential moving average of it; here it is that of the whole
    optimizer batch, so that a step depends on nothing but its batch. At policy = reference it is 2 log 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    reads = frozenset({"reference", "whole_batch"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        shift = (chosen.mean() + rejected.mean()).detach() / 2
        return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


@dataclass(frozen=True)
class APOZeroLoss(LogRatioLoss, name="apo-zero"):
    """Anchored preference optimization, zero: 1 - sigmoid(beta r(chosen)) + sigmoid(beta r(rejected)).

    Eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266): chosen up and rejected down, for pairs whose chosen side is
    better than what the model writes itself. At policy = reference it is 1.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODownLoss(LogRatioLoss, name="apo-down"):
    """Anchored preference optimization, down: sigmoid(beta r(chosen)) + 1 - sigmoid(beta h).

    Eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266) plus 1, which keeps it positive: both sides down and rejected
    further, for pairs whose chosen side is worse than what the model writes itself. At policy = reference it is 1.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class SPPOLoss(PairLoss, name="sppo"):
    """Self-play preference optimization: 1/2 sum over both sides of (r(y) - eta (P(y) - 1/2))^2.

    Eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675), a mean over completions, on a winner and a loser: hence the factor
    1/2, which the authors' code has too (its beta is 1/eta). P(y) is the chance that y beats the policy which is the
    reference. `soft`: P comes with the data, as in the paper; hard: P is 1 for chosen and 0 for rejected. At policy =
    reference it is eta^2 mean of (P - 1/2)^2, hard eta^2 / 4.
    """

    eta: float = 1000.0
    """The paper's eta: log-ratios are pulled towards eta (P - 1/2) nats."""
    soft: bool = False
    """Take win probabilities from the data (chosen_win_probability, rejected_win_probability)."""

    def __post_init__(self) -> None:
        require_positive("eta", self.eta)

    @property
    def needs(self) -> frozenset[str]:
        return self.reads | {"win_probabilities"} if self.soft else self.reads

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        if self.soft and logps.win_probabilities is None:
            raise ValueError("sppo with soft: true needs the win probabilities of every pair")
        chosen, rejected = logps.log_ratios()
        won, lost = logps.win_probabilities.unbind(-1) if self.soft else (1.0, 0.0)  # type: ignore[union-attr]
        return ((chosen - self.eta * (won - 0.5)) ** 2 + (rejected - self.eta * (lost - 0.5)) ** 2) / 2

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The log-ratio over eta: an estimate of P - 1/2."""
        chosen, rejected = logps.log_ratios()
        return chosen / self.eta, rejected / self.eta

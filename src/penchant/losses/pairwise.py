"""Losses on pairs that compare the policy with a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import PairLoss
from penchant.types import PairLogps


@dataclass(frozen=True)
class DPOLoss(PairLoss, name="dpo"):
    """Direct Preference Optimization: -log sigmoid(beta h), h the difference of the two log-ratios.

    Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290). With `label_smoothing` e above 0 it is conservative DPO,
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), Eq. 3 of Mitchell 2023 ("A note on DPO with noisy
    preferences and relationship to IPO"). At policy = reference it is log 2 for every beta and e.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference; smaller lets the policy move further."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is flipped, in [0, 0.5); above 0 this is conservative DPO."""

    def __post_init__(self) -> None:
        _require_positive_beta(self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: must be at least 0 and below 0.5, got {self.label_smoothing}")

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        margin = chosen - rejected
        return -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta (log pi - log pi_ref): Eq. 5 of the DPO paper up to a constant of the prompt."""
        chosen, rejected = logps.log_ratios()
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True)
class IPOLoss(PairLoss, name="ipo"):
    """Identity Preference Optimization: (h - 1 / (2 beta))^2, h the difference of the two log-ratios.

    Eq. 17 of Azar et al. 2023 (arXiv:2310.12036), whose tau is `beta` here. With `length_normalize` each log-ratio is
    first divided by the number of its completion's tokens: not in the paper, but what its authors recommended
    afterwards and what most implementations do; beta then acts on nats per token, so values of the two modes are not
    comparable. At policy = reference it is 1 / (4 beta^2).
    """

    beta: float = 0.1
    """The paper's tau: the margin is pulled towards 1 / (2 beta), so smaller lets the policy move further."""
    length_normalize: bool = True
    """Compare log-ratios per token; false is the paper's sum over tokens."""

    def __post_init__(self) -> None:
        _require_positive_beta(self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self._log_ratios(logps)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta times the log-ratio that the loss compares (per token when `length_normalize`)."""
        chosen, rejected = self._log_ratios(logps)
        return self.beta * chosen, self.beta * rejected

    def _log_ratios(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        chosen, rejected = logps.log_ratios()
        if self.length_normalize:
            # An empty completion has log-ratio 0; the clamp keeps 0/0 out of the batch.
            chosen = chosen / logps.chosen_lengths.clamp(min=1)
            rejected = rejected / logps.rejected_lengths.clamp(min=1)
        return chosen, rejected


def _require_positive_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: must be above 0 and finite, got {beta}")

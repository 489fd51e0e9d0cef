"""Losses on the margin of a pair that reckon with how long the completions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from penchant.losses.base import LogRatioLoss, PairLoss, per_token, require_not_negative, require_positive
from penchant.types import PairLogps


@dataclass(frozen=True)
class LengthNormalizedDPOLoss(PairLoss, name="ln-dpo"):
    """DPO on log-ratios per token: -log sigmoid(beta [r(chosen)/|chosen| - r(rejected)/|rejected|]).

    Eq. 6 of Lambert et al. 2024 ("Tulu 3", arXiv:2411.15124). beta acts on nats per token, so it is some fifty times
    DPO's. At policy = reference it is log 2.
    """

    beta: float = 5.0
    """Strength of the KL anchor to the reference, against nats per token."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return -F.logsigmoid(chosen - rejected)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta times the log-ratio per token."""
        chosen, rejected = logps.log_ratios()
        return (
            self.beta * per_token(chosen, logps.chosen_lengths),
            self.beta * per_token(rejected, logps.rejected_lengths),
        )


@dataclass(frozen=True)
class LengthRegularizedDPOLoss(LogRatioLoss, name="r-dpo"):
    """DPO with a price on length: -log sigmoid(beta h + alpha (|chosen| - |rejected|)).

    Eq. 9 of Park et al. 2024 (arXiv:2403.19159). With a price alpha per token in the reward the optimal policy's reward
    is beta (log pi - log pi_ref) + alpha |y|, which fixes the sign: where chosen is the longer one its length already
    explains the choice and less is learned. The rewards that are logged leave the length out. At policy = reference it
    is -log sigmoid(alpha (|chosen| - |rejected|)).
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    alpha: float = 0.01
    """Price of a token, in units of reward."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_not_negative("alpha", self.alpha)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        surplus = (logps.chosen_lengths - logps.rejected_lengths).to(logps.policy_chosen_logps.dtype)
        return -F.logsigmoid(self.margin(logps) + self.alpha * surplus)


@dataclass(frozen=True)
class LengthDesensitizedDPOLoss(PairLoss, name="ld-dpo"):
    """DPO in which the surplus of the longer completion counts less: -log sigmoid(beta h').

    In h' the tokens of a completion behind the length of the shorter one count alpha times: Liu et al. 2024
    (arXiv:2409.06411). With alpha 1 it is DPO. At policy = reference it is log 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    alpha: float = 0.5
    """How much a token beyond the length of the shorter completion counts, in [0, 1]."""
    reads = frozenset({"reference", "tokens"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: must be in [0, 1], got {self.alpha}")

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return -F.logsigmoid(chosen - rejected)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta times the log-ratio whose surplus tokens count alpha times."""
        tokens = logps.tokens
        if tokens is None or tokens.ref_chosen_logps is None or tokens.ref_rejected_logps is None:
            raise ValueError("ld-dpo needs log-probabilities of policy and reference token by token")
        shorter = torch.minimum(logps.chosen_lengths, logps.rejected_lengths)
        return (
            self.beta * self._sum(tokens.policy_chosen_logps - tokens.ref_chosen_logps, shorter),
            self.beta * self._sum(tokens.policy_rejected_logps - tokens.ref_rejected_logps, shorter),
        )

    def _sum(self, values: Float[Tensor, "B C"], shorter: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        is_shared = torch.arange(values.shape[1], device=values.device) < shorter[:, None]  # (B, C)
        return torch.where(is_shared, values, self.alpha * values).sum(-1)

"""Losses over rankings: several completions of one prompt, the best first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import RankedLoss, require_positive
from penchant.types import RankedLogps


@dataclass(frozen=True)
class PlackettLuceDPOLoss(RankedLoss, name="pl-dpo"):
    """DPO on rankings: - sum over k of [s_k - log sum over j >= k of exp(s_j)], s = beta (log pi - log pi_ref).

    Eq. 20 of Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3, the likelihood of a ranking under the
    Plackett-Luce model. With two completions it is DPO. At policy = reference it is log K!.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: RankedLogps) -> Float[Tensor, " B"]:
        lowest = torch.finfo(logps.policy_logps.dtype).min  # finite, so that no gradient is nan
        scores = self.rewards(logps).masked_fill(~logps.is_present, lowest)  # (B, K)
        behind = scores.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]  # of all places behind each
        # log(1 + exp(behind - score)) is log sum over j >= k less the score, without the cancellation of a difference.
        return (-F.logsigmoid(scores[:, :-1] - behind) * logps.is_present[:, 1:]).sum(-1)

    def rewards(self, logps: RankedLogps) -> Float[Tensor, "B K"]:
        """beta (log pi - log pi_ref)."""
        return self.beta * logps.log_ratios()

"""The loss of reward models."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import PairLoss, require_not_negative
from penchant.types import PairLogps


@dataclass(frozen=True)
class RewardLoss(PairLoss, name="reward"):
    """Reward model: -log sigmoid(R(chosen) - R(rejected) - alpha m), R the model's score, m the data's margin.

    The likelihood of the judgements under Bradley & Terry (1952), as in Eq. 2 of Rafailov et al. 2023
    (arXiv:2305.18290); the margin is that of Touvron et al. 2023 ("Llama 2", arXiv:2307.09288), Eq. 2. The judgements
    do not say where R is zero; `centering` holds it there: + centering (R(chosen) + R(rejected))^2, Eq. 2 of Eisenstein
    et al. 2023 (arXiv:2312.09244). At equal scores and without margin it is log 2.
    """

    alpha: float = 0.0
    """Scale of the data's margin, by which the scores must differ before the loss is content; 0 needs none."""
    centering: float = 0.0
    """Weight of the term that keeps scores near 0 (0.01 in its paper)."""
    reads = frozenset({"scores"})

    def __post_init__(self) -> None:
        require_not_negative("alpha", self.alpha)
        require_not_negative("centering", self.centering)

    @property
    def needs(self) -> frozenset[str]:
        return self.reads | ({"margins"} if self.alpha else frozenset())

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        surplus = chosen - rejected
        if self.alpha:
            if logps.margins is None:
                raise ValueError("reward with alpha needs the margin of every pair")
            surplus = surplus - self.alpha * logps.margins
        return -F.logsigmoid(surplus) + self.centering * (chosen + rejected).square()

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The model's scores, which stand in the place of log-probabilities."""
        return logps.policy_chosen_logps, logps.policy_rejected_logps

"""Losses of reinforcement learning: sampled tokens, each weighed by how much better it did than was expected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from penchant.losses.base import RolloutLoss, require_not_negative, require_positive
from penchant.types import RolloutLogps

_FARTHEST = 20.0
"""Nats beyond which a ratio of probabilities grows no more: e^20 is 5e8, and e^89 no float32."""


@dataclass(frozen=True)
class ClippedLoss(RolloutLoss):
    """The clipped surrogate -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) of each token, A its advantage.

    Eq. 7 of Schulman et al. 2017 (arXiv:1707.06347); rho = pi / pi_old, pi_old the policy that sampled the token. The
    upper end of its own is that of Yu et al. 2025 ("DAPO", arXiv:2503.14476).
    """

    clip: float = 0.2
    """How far a token's probability may fall (and, without clip_high, rise), as a share, before it teaches no more."""
    clip_high: float | None = None
    """How far it may rise, where that is another share."""

    def __post_init__(self) -> None:
        require_positive("clip", self.clip)
        if self.clip_high is not None:
            require_positive("clip_high", self.clip_high)

    def surrogate(self, logps: RolloutLogps) -> Float[Tensor, " M"]:
        """The loss of each token."""
        ratio, clipped = self._ratios(logps)
        return -torch.minimum(ratio * logps.advantages, clipped * logps.advantages)

    def is_clipped(self, logps: RolloutLogps) -> Bool[Tensor, " M"]:
        """Where the clipped ratio is the smaller of both, so that no gradient flows."""
        ratio, clipped = self._ratios(logps)
        return clipped * logps.advantages < ratio * logps.advantages

    def _ratios(self, logps: RolloutLogps) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        ratio = (logps.policy_logps - logps.old_logps).clamp(max=_FARTHEST).exp()
        high = self.clip if self.clip_high is None else self.clip_high
        return ratio, ratio.clamp(1 - self.clip, 1 + high)


@dataclass(frozen=True)
class GRPOLoss(ClippedLoss, name="grpo"):
    """Group Relative Policy Optimization: the clipped surrogate + beta KL(pi || pi_ref), both token by token.

    Eq. 3 of Shao et al. 2024 ("DeepSeekMath", arXiv:2402.03300) less its sign; the KL estimate is its Eq. 4,
    e^(-d) - 1 + d with d = log pi - log pi_ref, with gradient. The advantages are those of a completion within its
    group (the run file's section advantage). Tokens become a loss in one of three ways (`per`):
    sequence: the mean over each completion's tokens, then over completions, as in the paper, which favours short good
    and long bad completions; token: the mean over all tokens of the optimizer batch (DAPO); constant: the sum over a
    completion's tokens / `constant`, which favours no length (Liu et al. 2025, "Dr. GRPO", arXiv:2503.20783).
    In the first step after sampling, with beta 0 and centred advantages, the loss per sequence is exactly 0, and its
    gradient is not.
    """

    beta: float = 0.04
    """Weight of the KL divergence from the reference; 0 needs no reference."""
    per: str = "sequence"
    """How tokens become a loss: sequence, token or constant."""
    constant: float = 128.0
    """What a completion's sum is divided by with per constant: the longest completion there may be, say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("beta", self.beta)
        require_positive("constant", self.constant)
        if self.per not in ("sequence", "token", "constant"):
            raise ValueError(f"per: must be sequence, token or constant, got {self.per}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"} if self.beta else ())

    def __call__(self, logps: RolloutLogps) -> Float[Tensor, " N"]:
        losses = self.surrogate(logps)
        if self.beta:
            if logps.ref_logps is None:
                raise ValueError("grpo with beta compares with a reference, and the log-probabilities carry none")
            losses = losses + self.beta * kl_k3(logps.policy_logps, logps.ref_logps)
        sums = logps.sum_by_sequence(losses)
        if self.per == "sequence":
            return sums / logps.lengths.clamp(min=1)
        return sums / (self.constant if self.per == "constant" else _tokens_per_example(logps))


@dataclass(frozen=True)
class PPOLoss(ClippedLoss, name="ppo"):
    """Proximal Policy Optimization: the clipped surrogate + value_weight times the value head's clipped square error.

    Eq. 7 and 9 of Schulman et al. 2017 (arXiv:1707.06347), without entropy bonus, as a mean over all tokens of the
    optimizer batch. The error of a token is 1/2 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)
    with R the return, as OpenAI's baselines have it. The KL divergence from the reference is part of the returns, not
    of the loss (advantage.kl_weight), as in Ziegler et al. 2019 (arXiv:1909.08593), Eq. 2.
    """

    value_weight: float = 0.1
    """Weight of the value head's error."""
    value_clip: float = 0.2
    """How far a value may move from what it was when sampled before its error teaches no more."""
    reads = frozenset({"values"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("value_weight", self.value_weight)
        require_positive("value_clip", self.value_clip)

    def __call__(self, logps: RolloutLogps) -> Float[Tensor, " N"]:
        losses = self.surrogate(logps) + self.value_weight * self.value_errors(logps)
        return logps.sum_by_sequence(losses) / _tokens_per_example(logps)

    def value_errors(self, logps: RolloutLogps) -> Float[Tensor, " M"]:
        """The value head's clipped error at each token."""
        if logps.values is None or logps.old_values is None or logps.returns is None:
            raise ValueError("ppo needs a value head, and returns to hold it against")
        near = logps.old_values + (logps.values - logps.old_values).clamp(-self.value_clip, self.value_clip)
        return torch.maximum((logps.values - logps.returns).square(), (near - logps.returns).square()) / 2


def kl_k3(policy_logps: Float[Tensor, " M"], ref_logps: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """An estimate of KL(pi || pi_ref) from tokens that pi sampled: unbiased, never below 0, in nats a token.

    k3 of Schulman 2020 ("Approximating KL divergence").
    """
    difference = ref_logps - policy_logps
    return torch.expm1(difference.clamp(max=_FARTHEST)) - difference


def _tokens_per_example(logps: RolloutLogps) -> float | Float[Tensor, ""]:
    if logps.tokens_per_example is not None:
        return logps.tokens_per_example
    return logps.lengths.to(logps.policy_logps.dtype).mean()

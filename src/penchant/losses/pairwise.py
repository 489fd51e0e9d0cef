"""Losses on the margin of a pair: how far apart policy and reference set chosen and rejected.

Everywhere r(y) = log pi(y|x) - log pi_ref(y|x) in nats, summed over the completion's tokens, and h = r(chosen) -
r(rejected).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import (
    LogRatioLoss,
    PairLoss,
    per_token,
    require_not_negative,
    require_positive,
    require_share,
)
from penchant.types import PairLogps


@dataclass(frozen=True)
class DPOLoss(LogRatioLoss, name="dpo"):
    """Direct Preference Optimization: -log sigmoid(beta h).

    Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290). With `label_smoothing` e above 0 it is conservative DPO,
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), Eq. 3 of Mitchell 2023 ("A note on DPO with noisy
    preferences and relationship to IPO"). At policy = reference it is log 2 for every beta and e. RSO's sigmoid-norm
    loss (Liu et al. 2023, arXiv:2309.06657, Eq. 8) is the same equation with its gamma as beta.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference; smaller lets the policy move further."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is flipped, in [0, 0.5); above 0 this is conservative DPO."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_share("label_smoothing", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        return smoothed_logistic(self.margin(logps), self.label_smoothing)


@dataclass(frozen=True)
class RobustDPOLoss(LogRatioLoss, name="robust"):
    """Robust DPO: [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e), e = `label_smoothing`.

    Chowdhury et al. 2024 (arXiv:2403.00409): an unbiased estimate of DPO's loss on clean labels when a share e of them
    is flipped. It is not bounded below. At policy = reference it is log 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    label_smoothing: float = 0.1
    """Probability that a label is flipped, in [0, 0.5)."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_share("label_smoothing", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        margin, flipped = self.margin(logps), self.label_smoothing
        return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)


@dataclass(frozen=True)
class IPOLoss(PairLoss, name="ipo"):
    """Identity Preference Optimization: (h - 1 / (2 beta))^2.

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
        require_positive("beta", self.beta)

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
            return per_token(chosen, logps.chosen_lengths), per_token(rejected, logps.rejected_lengths)
        return chosen, rejected


@dataclass(frozen=True)
class HingeLoss(LogRatioLoss, name="hinge"):
    """Hinge on the margin: max(0, 1 - beta h).

    The hinge-norm loss of RSO, Eq. 10 of Liu et al. 2023 (arXiv:2309.06657), whose gamma is `beta` ("norm" means
    normalised by the reference, not by length). At policy = reference it is 1.
    """

    beta: float = 0.05
    """Slope of the hinge; the loss is 0 from h = 1 / beta on."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        return F.relu(1 - self.margin(logps))


@dataclass(frozen=True)
class OffsetDPOLoss(LogRatioLoss, name="odpo"):
    """DPO with an offset: -log sigmoid(beta h - alpha m), m the data's margin of the pair.

    Amini et al. 2024 (arXiv:2402.10571), whose offset is alpha f(score(chosen) - score(rejected)), f the logarithm in
    their code: m is f of the difference, so give that, or any other measure of how much better chosen is, as the
    margin. At policy = reference it is log(1 + exp(alpha m)).
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    alpha: float = 1.0
    """Scale of the data's margin; the rewards must differ by alpha m before the loss is content."""
    reads = frozenset({"reference", "margins"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_positive("alpha", self.alpha)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        if logps.margins is None:
            raise ValueError("odpo needs the margin of every pair")
        return -F.logsigmoid(self.margin(logps) - self.alpha * logps.margins)


@dataclass(frozen=True)
class DPOPLoss(LogRatioLoss, name="dpop"):
    """DPO-Positive: -log sigmoid(beta (h - penalty * max(0, -r(chosen)))).

    Eq. 3 of Pal et al. 2024 ("Smaug", arXiv:2402.13228), whose lambda is `penalty`: the chosen completion may not
    become less likely than under the reference. At policy = reference it is log 2.
    """

    beta: float = 0.3
    """Strength of the KL anchor to the reference."""
    penalty: float = 50.0
    """Weight of each nat by which the chosen completion has become less likely."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_not_negative("penalty", self.penalty)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        lost = F.relu(-logps.log_ratios()[0])
        return -F.logsigmoid(self.margin(logps) - self.beta * self.penalty * lost)


@dataclass(frozen=True)
class EXOLoss(LogRatioLoss, name="exo"):
    """Efficient Exact Optimization on pairs: KL((s(beta h), s(-beta h)) || (1 - e, e)), s the sigmoid.

    Eq. 16 of Ji et al. 2024 (arXiv:2402.00856): the reverse of the KL that DPO minimises, with labels smoothed by e so
    that it is finite. The authors' own repository takes 0 and -10 for log(1 - e) and log e instead. At policy =
    reference it is -log 2 - (log(1 - e) + log e) / 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    label_smoothing: float = 0.001
    """Probability that the label gives to rejected, in (0, 0.5)."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: must be above 0 and below 0.5, got {self.label_smoothing}")

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        margin = self.margin(logps)
        log_chosen, log_rejected = F.logsigmoid(margin), F.logsigmoid(-margin)
        return log_chosen.exp() * (log_chosen - math.log1p(-self.label_smoothing)) + log_rejected.exp() * (
            log_rejected - math.log(self.label_smoothing)
        )


@dataclass(frozen=True)
class DiscoPOPLoss(LogRatioLoss, name="discopop"):
    """Discovered Preference Optimization: (1 - g) (-log sigmoid(beta h)) + g exp(-beta h), g = sigmoid(beta h / tau).

    Eq. 5 of Lu et al. 2024 (arXiv:2406.08414), found by a search over programs: logistic where the pair is wrong,
    exponential where it is right. At policy = reference it is (log 2 + 1) / 2. It does not fall everywhere: with the
    default tau it rises with the margin for beta h between about -0.12 and 0.07, so that the first steps from the
    reference go the wrong way.
    """

    beta: float = 0.05
    """Strength of the KL anchor to the reference."""
    tau: float = 0.05
    """Width of the change from one to the other, in units of beta h."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        if not 0 < self.tau <= 1:
            raise ValueError(
                f"tau: must be above 0 and at most 1 (or the loss explodes on wrong pairs), got {self.tau}"
            )

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        margin = self.margin(logps)
        share = torch.sigmoid(margin / self.tau)
        # share * exp(-margin) in logarithms: far below 0 the factors are 0 and infinity, their product is finite.
        exponential = torch.exp(F.logsigmoid(margin / self.tau) - margin)
        return (1 - share) * -F.logsigmoid(margin) + exponential


_MOST_EXPONENT = 40.0
"""exp of what is at most this, squared, still fits into float32."""


@dataclass(frozen=True)
class FDivergenceDPOLoss(PairLoss, name="f-dpo"):
    """DPO anchored by another divergence: -log sigmoid(beta [f'(u_chosen) - f'(u_rejected)]), u = pi / pi_ref.

    Wang et al. 2023 (arXiv:2309.16240). f'(u), up to constants that cancel: reverse_kl log u (plain DPO), forward_kl
    -1/u, js log(2u / (1 + u)), alpha (1 - u^-a) / a with a in (0, 1). They are taken of whole sequences, of which 1/u
    overflows within a few dozen nats: unlike in the authors' code exponents are clamped at 40, beyond which the
    gradient is 0. At policy = reference it is log 2.
    """

    beta: float = 0.1
    """Strength of the anchor to the reference."""
    divergence: str = "js"
    """reverse_kl, forward_kl, js or alpha."""
    alpha: float | None = None
    """Order of the alpha divergence, in (0, 1): towards 0 it is the reverse, towards 1 the forward KL."""

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        if self.divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
            raise ValueError(f"divergence: must be reverse_kl, forward_kl, js or alpha, got {self.divergence}")
        if self.divergence != "alpha" and self.alpha is not None:
            raise ValueError(f"alpha: has no effect with divergence {self.divergence}")
        if self.divergence == "alpha" and (self.alpha is None or not 0 < self.alpha < 1):
            raise ValueError(f"alpha: must be between 0 and 1 for the alpha divergence, got {self.alpha}")

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return -F.logsigmoid(chosen - rejected)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta f'(u), up to the prompt's constant."""
        chosen, rejected = logps.log_ratios()
        return self.beta * self._slope(chosen), self.beta * self._slope(rejected)

    def _slope(self, log_u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        if self.divergence == "forward_kl":
            return -torch.exp((-log_u).clamp(max=_MOST_EXPONENT))
        if self.divergence == "js":
            return math.log(2) + F.logsigmoid(log_u)
        if self.divergence == "alpha":
            alpha = self.alpha or 0.0
            return -torch.expm1((-alpha * log_u).clamp(max=_MOST_EXPONENT)) / alpha
        return log_u


@dataclass(frozen=True)
class WPOLoss(LogRatioLoss, name="wpo"):
    """Weighted Preference Optimization: -w(chosen) w(rejected) log sigmoid(beta h).

    Eq. 1 of Zhou et al. 2024 (arXiv:2406.11827) with the weights of Eq. 2 ("sampled alignment"): w(y) = exp(mean over
    y's tokens of [log pi(y_t) - log sum_v pi(v)^2]), so that a completion which the policy samples itself weighs about
    1 and an unlikely one little. The weights carry no gradient. Their product is cut off at 1, which the authors' code
    does and the paper does not say.
    """

    beta: float = 0.01
    """Strength of the KL anchor to the reference."""
    reads = frozenset({"reference", "tokens", "collisions"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        return -self.weights(logps) * F.logsigmoid(self.margin(logps))

    @torch.no_grad()
    def weights(self, logps: PairLogps) -> Float[Tensor, " B"]:
        """The weight of each pair, at most 1."""
        tokens = logps.tokens
        if (
            tokens is None
            or tokens.policy_chosen_log_collisions is None
            or tokens.policy_rejected_log_collisions is None
        ):
            raise ValueError("wpo needs log-probabilities and log-collisions token by token")
        chosen = (tokens.policy_chosen_logps - tokens.policy_chosen_log_collisions).sum(-1)
        rejected = (tokens.policy_rejected_logps - tokens.policy_rejected_log_collisions).sum(-1)
        log_weights = per_token(chosen, logps.chosen_lengths) + per_token(rejected, logps.rejected_lengths)
        return log_weights.exp().clamp(max=1)


@dataclass(frozen=True)
class AOTLoss(LogRatioLoss, name="aot"):
    """Alignment via Optimal Transport on pairs: -log sigmoid(beta d), d the sorted policy less the sorted reference.

    The i-th smallest log pi(chosen) - log pi(rejected) of the batch is held against the i-th smallest of the reference:
    the paired form of Melnyk et al. 2024 (arXiv:2406.05882), whose loss asks for first-order stochastic dominance. It
    depends on the whole batch. The loss stands at the place of the policy's pair. At policy = reference it is log 2.
    """

    beta: float = 0.1
    """Strength of the KL anchor to the reference."""
    label_smoothing: float = 0.0
    """Assumed probability that a label is flipped, in [0, 0.5)."""
    reads = frozenset({"reference", "whole_batch"})

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_share("label_smoothing", self.label_smoothing)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        if logps.ref_chosen_logps is None or logps.ref_rejected_logps is None:
            raise ValueError("aot compares with a reference, and the log-probabilities carry none")
        policy = logps.policy_chosen_logps - logps.policy_rejected_logps
        ref = logps.ref_chosen_logps - logps.ref_rejected_logps
        ranks = policy.argsort().argsort()
        return smoothed_logistic(self.beta * (policy - ref.sort().values[ranks]), self.label_smoothing)


def smoothed_logistic(margin: Float[Tensor, " B"], label_smoothing: float) -> Float[Tensor, " B"]:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)

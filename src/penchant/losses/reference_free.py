"""Losses over pairs without a reference, and plain likelihood.

Everywhere lp(y) = log pi(y|x) in nats, summed over the completion's |y| tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from penchant.losses.base import Loss, PairLoss, per_token, require_not_negative, require_positive
from penchant.types import PairLogps, SequenceLogps


@dataclass(frozen=True)
class SimPOLoss(PairLoss, name="simpo"):
    """Simple Preference Optimization: -log sigmoid(beta [lp(chosen)/|chosen| - lp(rejected)/|rejected|] - gamma).

    Eq. 6 of Meng et al. 2024 (arXiv:2405.14734), with gamma given as a ratio of beta, as the authors' settings do.
    There is no likelihood term in it.
    """

    beta: float = 2.0
    """Scale of the reward, per token."""
    gamma_beta_ratio: float = 0.5
    """gamma / beta: by how many nats a token chosen must be ahead."""
    reads = frozenset()

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_not_negative("gamma_beta_ratio", self.gamma_beta_ratio)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return -F.logsigmoid(chosen - rejected - self.beta * self.gamma_beta_ratio)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta lp(y)/|y|."""
        chosen, rejected = logps.policy_chosen_logps, logps.policy_rejected_logps
        return (
            self.beta * per_token(chosen, logps.chosen_lengths),
            self.beta * per_token(rejected, logps.rejected_lengths),
        )


@dataclass(frozen=True)
class ORPOLoss(PairLoss, name="orpo"):
    """Odds Ratio Preference Optimization: NLL(chosen) - weight * log sigmoid(log odds(chosen) - log odds(rejected)).

    Eq. 3 to 7 of Hong et al. 2024 (arXiv:2403.07691), whose lambda is `odds_ratio_weight`: odds p / (1 - p) of
    p = exp(lp(y)/|y|); NLL is the mean over the completion's tokens, the paper's "reference tokens" as read here.
    `nll_on_prompt` takes it over prompt and completion together, as TRL does and the authors' code unless told not to;
    both average over all tokens of a microbatch, this over those of each example.
    """

    odds_ratio_weight: float = 0.1
    """The paper's lambda."""
    nll_on_prompt: bool = False
    """Train the likelihood of the prompt's tokens too."""
    reads = frozenset()

    def __post_init__(self) -> None:
        require_not_negative("odds_ratio_weight", self.odds_ratio_weight)

    @property
    def needs(self) -> frozenset[str]:
        return self.reads | {"prompts"} if self.nll_on_prompt else self.reads

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        likelihood, num_tokens = logps.policy_chosen_logps, logps.chosen_lengths
        if self.nll_on_prompt:
            if logps.policy_prompt_logps is None or logps.prompt_lengths is None:
                raise ValueError("orpo with nll_on_prompt: true needs the log-probabilities of the prompts")
            likelihood, num_tokens = likelihood + logps.policy_prompt_logps, num_tokens + logps.prompt_lengths
        return -per_token(likelihood, num_tokens) - self.odds_ratio_weight * F.logsigmoid(chosen - rejected)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The log-odds."""
        return (
            log_odds(per_token(logps.policy_chosen_logps, logps.chosen_lengths)),
            log_odds(per_token(logps.policy_rejected_logps, logps.rejected_lengths)),
        )


@dataclass(frozen=True)
class CPOLoss(PairLoss, name="cpo"):
    """Contrastive Preference Optimization: -log sigmoid(beta [lp(chosen) - lp(rejected)]) + nll_weight NLL(chosen).

    Eq. 3 and 5 of Xu et al. 2024 (arXiv:2401.08417): DPO with a uniform reference, and a likelihood term that keeps
    the policy near the data. The paper's NLL is a sum over tokens. Here it is the mean over those of the completion, in
    the authors' code over those of a microbatch.
    """

    beta: float = 0.1
    """Scale of the difference of log-probabilities."""
    nll_weight: float = 1.0
    """Weight of the likelihood term."""
    reads = frozenset()

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_not_negative("nll_weight", self.nll_weight)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        nll = -per_token(logps.policy_chosen_logps, logps.chosen_lengths)
        return -F.logsigmoid(chosen - rejected) + self.nll_weight * nll

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta lp(y)."""
        return self.beta * logps.policy_chosen_logps, self.beta * logps.policy_rejected_logps


@dataclass(frozen=True)
class SLiCLoss(PairLoss, name="slic"):
    """Sequence likelihood calibration: max(0, 1 - beta [lp(chosen) - lp(rejected)]).

    Zhao et al. 2023 (arXiv:2305.10425) in the form of Eq. 9 of Liu et al. 2023 (RSO, arXiv:2309.06657), whose gamma is
    `beta`. SLiC's likelihood term is a term of its own: `loss: {slic: {}, sft: {weight: ...}}`.
    """

    beta: float = 0.05
    """Slope of the hinge; the loss is 0 once chosen is 1 / beta nats ahead."""
    reads = frozenset()

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        chosen, rejected = self.rewards(logps)
        return F.relu(1 - (chosen - rejected))

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta lp(y)."""
        return self.beta * logps.policy_chosen_logps, self.beta * logps.policy_rejected_logps


@dataclass(frozen=True)
class SFTLoss(Loss, name="sft"):
    """Supervised fine-tuning: the negative log-likelihood of the chosen (or desirable) completions.

    `per` token: summed and divided by the number of those tokens in the optimizer batch, so that long completions count
    more; `per` sequence: each completion's mean over its own tokens, the likelihood term of RPO's loss, Eq. 1 of
    Pang et al. 2024 (arXiv:2404.19733).
    On pairs the rejected side is only looked at; completions that are not desirable have loss 0.
    """

    per: str = "token"
    """What the likelihood is averaged over: token or sequence."""
    units = ("pair", "unpaired")
    reads = frozenset()

    def __post_init__(self) -> None:
        if self.per not in ("token", "sequence"):
            raise ValueError(f"per: must be token or sequence, got {self.per}")

    def __call__(self, logps: PairLogps | SequenceLogps) -> Float[Tensor, " B"]:
        if isinstance(logps, PairLogps):
            likelihood, lengths = logps.policy_chosen_logps, logps.chosen_lengths
            is_trained = torch.ones_like(lengths, dtype=torch.bool)
        else:
            likelihood, lengths, is_trained = logps.policy_logps, logps.lengths, logps.is_desirable
        if self.per == "sequence":
            return -per_token(likelihood, lengths) * is_trained
        tokens_per_example = logps.tokens_per_example
        if tokens_per_example is None:  # these examples are the whole batch
            tokens_per_example = (lengths * is_trained).sum().item() / len(lengths)
        return -likelihood * is_trained / max(tokens_per_example, 1e-6)

    def rewards(self, logps: PairLogps | SequenceLogps) -> object:
        """lp(y)/|y|."""
        if isinstance(logps, SequenceLogps):
            return per_token(logps.policy_logps, logps.lengths)
        return (
            per_token(logps.policy_chosen_logps, logps.chosen_lengths),
            per_token(logps.policy_rejected_logps, logps.rejected_lengths),
        )


@dataclass(frozen=True)
class UnlikelihoodLoss(PairLoss, name="unlikelihood"):
    """Unlikelihood: -log pi(chosen) - alpha sum over the rejected tokens of log(1 - pi(token)).

    The baseline of section 6 of Rafailov et al. 2023 (arXiv:2305.18290), with the token-level term of Welleck et al.
    2019 (arXiv:1908.04319), Eq. 4, which unlike log pi(rejected) itself is bounded from below.
    """

    alpha: float = 0.5
    """Weight of the rejected completion's tokens; the DPO paper tries values from 0 to 1."""
    reads = frozenset({"tokens"})

    def __post_init__(self) -> None:
        require_not_negative("alpha", self.alpha)

    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        if logps.tokens is None:
            raise ValueError("unlikelihood needs log-probabilities token by token")
        rejected = logps.tokens.policy_rejected_logps  # (B, R)
        is_there = torch.arange(rejected.shape[1], device=rejected.device) < logps.rejected_lengths[:, None]
        # What fills a row up has log-probability 0, whose complement is log 0: another number stands in its place.
        complements = log1mexp(rejected.where(is_there, rejected.new_tensor(-1.0)))
        return -logps.policy_chosen_logps - self.alpha * (complements * is_there).sum(-1)

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """log pi."""
        return logps.policy_chosen_logps, logps.policy_rejected_logps


def log1mexp(logps: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 - p) of log p, in float32 or better; p = 1, whose complement is log 0, counts as 1 - 1e-7.

    1 - p is taken as -expm1(log p) above p = 1/2 and the logarithm as log1p(-p) below: either alone loses all digits at
    one end.
    """
    if logps.dtype in (torch.float16, torch.bfloat16):
        logps = logps.float()
    logps = logps.clamp(max=-1e-7)
    is_likely = logps > -math.log(2)
    # Each branch sees only arguments that are safe for it: `where` would spread the other one's nan to the gradient.
    above = torch.log(-torch.expm1(torch.where(is_likely, logps, -0.5)))
    below = torch.log1p(-torch.exp(torch.where(is_likely, -1.0, logps)))
    return torch.where(is_likely, above, below)


def log_odds(logps: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(p / (1 - p)) of log p, in float32 or better; p = 1, whose odds are infinite, counts as 1 - 1e-7."""
    if logps.dtype in (torch.float16, torch.bfloat16):
        logps = logps.float()
    return logps.clamp(max=-1e-7) - log1mexp(logps)

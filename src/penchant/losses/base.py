"""What every loss is, and the registry that the command line and the run file read."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from penchant.types import Logps, PairLogps, RankedLogps, RolloutLogps, SequenceLogps

LOSSES: dict[str, type[Loss]] = {}
"""Every loss by the word that selects it: `loss.name` in a run file."""


NEEDS = {
    "reference": "log-probabilities of a reference",
    "labels": "whether each unpaired completion is desirable",
    "kl": "an estimate of KL(policy || reference), made from mismatched completions",
    "margins": "the data's margin of every pair",
    "win_probabilities": "the data's win probabilities of every pair",
    "prompts": "log-probabilities of the prompts",
    "tokens": "log-probabilities token by token",
    "collisions": "log-collisions token by token",
    "values": "what a value head expects, token by token",
    "scores": "a reward model, whose scores stand in the place of log-probabilities",
    "whole_batch": "all examples of the optimizer batch at once, since one's loss depends on the others",
}
"""What a loss may ask for beyond the policy's log-probabilities and the lengths of completions."""


@dataclasses.dataclass(frozen=True)
class Loss(ABC):
    """A loss: fields are hyperparameters, calling it gives one loss per example, unreduced.

    A subclass registers itself: `class DPOLoss(PairLoss, name="dpo")`.
    """

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]] = ()
    """What it judges: "pair" (`PairLogps`), "unpaired" (`SequenceLogps`), "ranking" (`RankedLogps`), or what the policy
    has sampled itself: "rollout" (`RolloutLogps`)."""
    reads: ClassVar[frozenset[str]] = frozenset({"reference"})
    """What it asks for, of NEEDS, whatever its hyperparameters."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            LOSSES[name] = cls

    @property
    def needs(self) -> frozenset[str]:
        """What it asks for, of NEEDS, with these hyperparameters."""
        return self.reads

    @abstractmethod
    def __call__(self, logps: Any) -> Float[Tensor, " B"]:
        """The loss of each example."""

    @abstractmethod
    def rewards(self, logps: Any) -> Any:
        """The implicit reward that this loss assigns to each completion.

        Logged accuracy and margins compare these, so they speak of the loss that is optimised.
        """

    def settings(self) -> dict[str, Any]:
        """The loss as a run file describes it."""
        return {"name": self.name, **dataclasses.asdict(self)}


class PairLoss(Loss):
    """A loss over pairs; `rewards` gives those of chosen and of rejected, (B,) each."""

    units = ("pair",)

    @abstractmethod
    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]: ...

    @abstractmethod
    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]: ...


class UnpairedLoss(Loss):
    """A loss over single completions, desirable or not; `rewards` gives (N,)."""

    units = ("unpaired",)

    @abstractmethod
    def __call__(self, logps: SequenceLogps) -> Float[Tensor, " N"]: ...

    @abstractmethod
    def rewards(self, logps: SequenceLogps) -> Float[Tensor, " N"]: ...


class RankedLoss(Loss):
    """A loss over rankings; `rewards` gives (B, K)."""

    units = ("ranking",)

    @abstractmethod
    def __call__(self, logps: RankedLogps) -> Float[Tensor, " B"]: ...

    @abstractmethod
    def rewards(self, logps: RankedLogps) -> Float[Tensor, "B K"]: ...


class RolloutLoss(Loss):
    """A loss over completions that the policy sampled itself, each token with an advantage."""

    units = ("rollout",)

    @abstractmethod
    def __call__(self, logps: RolloutLogps) -> Float[Tensor, " N"]: ...

    @abstractmethod
    def is_clipped(self, logps: RolloutLogps) -> Bool[Tensor, " M"]:
        """The tokens that teach nothing any more, since the policy has moved as far on them as it may."""

    def rewards(self, logps: RolloutLogps) -> Float[Tensor, " N"]:
        """How much likelier each completion has become since it was sampled, in nats."""
        return logps.sum_by_sequence(logps.policy_logps - logps.old_logps)


@dataclasses.dataclass(frozen=True)
class LogRatioLoss(PairLoss):
    """A loss over pairs whose implicit reward is beta (log pi - log pi_ref), as DPO's: Eq. 5 of its paper."""

    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """beta (log pi - log pi_ref), in which the prompt's constant is left out."""
        beta: float = self.beta  # type: ignore[attr-defined]
        chosen, rejected = logps.log_ratios()
        return beta * chosen, beta * rejected

    def margin(self, logps: PairLogps) -> Float[Tensor, " B"]:
        """Reward of chosen less reward of rejected."""
        chosen, rejected = self.rewards(logps)
        return chosen - rejected


@dataclasses.dataclass(frozen=True)
class WeightedSum(Loss):
    """A weighted sum of losses over the same examples; the first term's rewards speak for it.

    RPO, for one, is DPO plus a likelihood term on the chosen completion (Eq. 1 of Pang et al. 2024, arXiv:2404.19733).

    Raises:
        ValueError: the terms judge different things (pairs, unpaired completions, rankings), or there is none, or one
            stands twice, or a weight is below 0 or not finite.
    """

    terms: tuple[tuple[float, Loss], ...]
    name: str = dataclasses.field(init=False)  # type: ignore[misc]
    units: tuple[str, ...] = dataclasses.field(init=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms: a weighted sum needs at least one")
        for weight, loss in self.terms:
            require_not_negative(f"{loss.name}.weight", weight)
        losses = [loss for _, loss in self.terms]
        names = [loss.name for loss in losses]
        if len(set(names)) < len(names):
            raise ValueError(f"terms: a loss can stand in a sum once, and there are {', '.join(names)}")
        units = tuple(unit for unit in losses[0].units if all(unit in loss.units for loss in losses))
        if not units:
            judged = ", ".join(f"{loss.name}: {' or '.join(loss.units)}" for loss in losses)
            raise ValueError(f"terms: the losses judge different things ({judged}) and cannot be added")
        if len({"scores" in loss.needs for loss in losses}) > 1:
            raise ValueError(
                f"terms: of {', '.join(names)} only some judge scores of a reward model; they cannot be added"
            )
        object.__setattr__(self, "name", " + ".join(names))
        object.__setattr__(self, "units", units)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(loss.needs for _, loss in self.terms))

    def __call__(self, logps: Logps) -> Float[Tensor, " B"]:
        return torch.stack([weight * loss(logps) for weight, loss in self.terms]).sum(0)

    def rewards(self, logps: Logps) -> Any:
        return self.terms[0][1].rewards(logps)

    def settings(self) -> dict[str, Any]:
        return {
            loss.name: {"weight": weight, **{key: value for key, value in loss.settings().items() if key != "name"}}
            for weight, loss in self.terms
        }

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {loss}" for weight, loss in self.terms)


def preference_accuracy(
    chosen_rewards: Float[Tensor, " B"], rejected_rewards: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """1 where the chosen reward is the higher, 0 where it is the lower, 1/2 where both are equal.

    Ties count half so that a policy that has not moved from its reference stands at chance.
    """
    return (chosen_rewards > rejected_rewards).float() / 2 + (chosen_rewards >= rejected_rewards).float() / 2


def require_positive(name: str, value: float) -> None:
    """Refuses a hyperparameter that must be above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: must be above 0 and finite, got {value}")


def require_share(name: str, value: float, below: float = 0.5) -> None:
    """Refuses a hyperparameter that must be at least 0 and less than `below`."""
    if not 0 <= value < below:
        raise ValueError(f"{name}: must be at least 0 and below {below:g}, got {value}")


def require_not_negative(name: str, value: float) -> None:
    """Refuses a hyperparameter that must be at least 0 and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: must be at least 0 and finite, got {value}")


def per_token(values: Float[Tensor, " N"], lengths: Any) -> Float[Tensor, " N"]:
    """Sums over a completion as means over its tokens; an empty completion, whose sum is 0, stays 0."""
    return values / lengths.clamp(min=1)

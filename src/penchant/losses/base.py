"""What every loss over pairs is, and the registry that the command line and the run file read."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from penchant.errors import UserError, nearest
from penchant.types import PairLogps

LOSSES: dict[str, type[PairLoss]] = {}
"""Every loss by the word that selects it: `loss.name` in a run file."""


@dataclasses.dataclass(frozen=True)
class PairLoss(ABC):
    """A loss over pairs: fields are hyperparameters, calling it gives one loss per pair, unreduced.

    A subclass registers itself: `class DPOLoss(PairLoss, name="dpo")`.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = True

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        LOSSES[name] = cls

    @abstractmethod
    def __call__(self, logps: PairLogps) -> Float[Tensor, " B"]:
        """The loss of each pair."""

    @abstractmethod
    def rewards(self, logps: PairLogps) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The implicit reward that this loss assigns to chosen and rejected.

        Logged accuracy and margins compare these two, so they speak of the loss that is optimised.
        """


def preference_accuracy(
    chosen_rewards: Float[Tensor, " B"], rejected_rewards: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """1 where the chosen reward is the higher, 0 where it is the lower, 1/2 where both are equal.

    Ties count half so that a policy that has not moved from its reference stands at chance.
    """
    return (chosen_rewards > rejected_rewards).float() / 2 + (chosen_rewards >= rejected_rewards).float() / 2


def build_loss(settings: Mapping[str, Any]) -> PairLoss:
    """The loss that `{"name": "dpo", "beta": 0.1, ...}` describes.

    Raises:
        UserError: an unknown name or field (the nearest is named), or a value that the loss refuses.
    """
    fields = dict(settings)
    name = str(fields.pop("name"))
    if name not in LOSSES:
        raise UserError(f"loss.name: there is no loss '{name}'{nearest(name, LOSSES)}. There are: {', '.join(LOSSES)}.")
    known = {field.name: field for field in dataclasses.fields(LOSSES[name])}
    for key, value in fields.items():
        if key not in known:
            raise UserError(
                f"loss.{key}: the loss '{name}' has no such setting{nearest(key, known)}. It has: {', '.join(known)}."
            )
        fields[key] = _coerced(f"loss.{key}", value, known[key].default)
    try:
        return LOSSES[name](**fields)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None


def _coerced(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default; a float field takes an integer, nothing else is converted."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{key}: expected {type(default).__name__}, got {value!r}")
    return value

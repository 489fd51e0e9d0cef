"""Where the reference's log-probabilities come from.

Each kind answers the same question: the log-probabilities of the completion tokens of some batches. Token by token, so
that the layout and the methods that need more than a sum stay free; `pair_logps` adds them up.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant.models.adapters import adapter_off
from penchant.scoring.policy import Policy
from penchant.types import Batch, PairLogps


class Reference(ABC):
    """The frozen model that the policy is anchored to."""

    description: str
    """One sentence for people: what the reference is and where it lives."""
    is_start_of_policy: bool
    """Whether it is the policy as it was before the first step, so that the log-ratios must begin at 0."""

    @abstractmethod
    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        """log pi_ref of the completion tokens of each batch, on the batch's device; no gradient.

        Takes all microbatches of a step at once, so that an offloaded reference moves once a step.
        """


class FrozenModel(Reference):
    """A model kept beside the policy: a frozen copy of its weights, or another model."""

    def __init__(self, policy: Policy, is_start_of_policy: bool, offload: bool = False) -> None:
        self._scorer = policy
        self._offload = offload
        self._device = policy.device
        self.is_start_of_policy = is_start_of_policy
        self.description = "frozen copy of the starting weights" if is_start_of_policy else "another model"
        policy.model.requires_grad_(False).eval()
        if offload:
            policy.model.to("cpu")
            self.description += ", kept in host memory between steps"

    @classmethod
    def copy_of(cls, policy: Policy, offload: bool = False) -> FrozenModel:
        """A copy of the very weights in hand. With `offload` it lives in host memory and visits the device to score."""
        model: nn.Module = copy.deepcopy(policy.model)
        return cls(Policy(model, policy.tokenizer, policy.precision), is_start_of_policy=True, offload=offload)

    @torch.no_grad()
    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        with self._on_device():
            return [self._scorer.token_logps(batch).logps for batch in batches]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self._offload:
            self._scorer.model.to(self._device)
        try:
            yield
        finally:
            if self._offload:
                self._scorer.model.to("cpu")


class AdapterOff(Reference):
    """The policy's own base model, with its LoRA adapter switched off: a reference without a second copy."""

    description = "the policy with its adapter switched off"
    is_start_of_policy = True

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        with adapter_off(self._policy.model):
            return [self._policy.token_logps(batch).logps for batch in batches]


class Precomputed(Reference):
    """Log-probabilities computed once, before training; the model that made them may be gone.

    Kept in host memory, 4 bytes a completion token.
    """

    def __init__(self, is_start_of_policy: bool) -> None:
        self.is_start_of_policy = is_start_of_policy
        origin = "the starting weights" if is_start_of_policy else "another model"
        self.description = f"precomputed once from {origin}"
        self._logps: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_batches(
        cls,
        source: Policy,
        batches: Iterable[Batch],
        is_start_of_policy: bool,
        advance: Callable[[int], None],
    ) -> Precomputed:
        """Scores every pair of `batches` with `source` as it stands; calls `advance(pairs)` as it goes."""
        reference = cls(is_start_of_policy)
        for batch in batches:
            with torch.no_grad():
                logps = source.token_logps(batch).logps.cpu()
            sequences = logps.split(batch.lengths.tolist())
            num_pairs = len(batch.indices)
            for place, index in enumerate(batch.indices):
                reference._logps[index] = (sequences[place], sequences[num_pairs + place])
            advance(num_pairs)
        return reference

    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        return [self._lookup(batch) for batch in batches]

    def _lookup(self, batch: Batch) -> Float[Tensor, " M"]:
        chosen = [self._logps[index][0] for index in batch.indices]
        rejected = [self._logps[index][1] for index in batch.indices]
        return torch.cat(chosen + rejected).to(batch.target_ids.device)


def pair_logps(batch: Batch, policy: Float[Tensor, " M"], ref: Float[Tensor, " M"] | None) -> PairLogps:
    """Adds token log-probabilities of a batch of pairs up to the record that losses consume."""
    num_pairs = len(batch.indices)

    def halves(values: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = values.split(num_pairs)
        return chosen, rejected

    policy_chosen, policy_rejected = halves(batch.sum_by_sequence(policy))
    ref_chosen, ref_rejected = (None, None) if ref is None else halves(batch.sum_by_sequence(ref))
    chosen_lengths, rejected_lengths = halves(batch.lengths)
    return PairLogps(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)

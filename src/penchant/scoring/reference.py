"""Where the reference's log-probabilities come from.

Each kind answers the same question: the log-probabilities of the scored tokens of some batches. Token by token, so
that the layout and the methods that need more than a sum stay free; `scoring.records` adds them up.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from penchant import distributed
from penchant.errors import UserError
from penchant.models.adapters import adapter_off
from penchant.models.load import copy_of_model
from penchant.scoring.logps_store import LogpsStore
from penchant.scoring.policy import Policy
from penchant.types import Batch, TokenizedExample

_SECONDS_BETWEEN_WRITES = 2.0
"""What a kill may cost; each write waits for the disk."""


class Reference(ABC):
    """The frozen model that the policy is anchored to."""

    description: str
    """One sentence for people: what the reference is and where it lives."""
    is_start_of_policy: bool
    """Whether it is the policy as it was before the first step, so that the log-ratios must begin at 0."""

    @abstractmethod
    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        """log pi_ref of the scored tokens of each batch, on the batch's device; no gradient.

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
        return cls(
            Policy(copy_of_model(policy.model), policy.tokenizer, policy.precision),
            is_start_of_policy=True,
            offload=offload,
        )

    @torch.no_grad()
    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        with self._on_device():
            return [scored.logps for scored in self._scorer.score_all(batches)]

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
            return [scored.logps for scored in self._policy.score_all(batches)]


class LogpsCache:
    """Log-probabilities of completions under one model, by their content: the ids of prompt and completion.

    Neither loss nor order nor batch matter, so runs of one model share it. Kept in host memory, 4 bytes a token; with
    a `store` on the disk, from where each batch reads what it needs.
    """

    def __init__(self, store: LogpsStore | None = None) -> None:
        self._store = store
        self._logps: dict[bytes, Tensor] = {}  # with a store: what it has not taken

    def new_troubles(self) -> list[str]:
        """What went wrong with the store since this was asked last, in sentences for people."""
        if self._store is None:
            return []
        troubles, self._store.troubles = self._store.troubles, []
        return troubles

    def missing(self, examples: Iterable[TokenizedExample]) -> list[TokenizedExample]:
        """Those of which a completion is not there yet, each content once."""
        wanted = _by_keys(examples)
        known = self._read([key for keys in wanted for key in keys]).keys()
        return [example for keys, example in wanted.items() if not known >= set(keys)]

    @torch.no_grad()
    def fill(self, source: Policy, batches: Iterable[Batch], advance: Callable[[int], None]) -> None:
        """Scores the examples of `batches` with `source` as it stands; calls `advance(examples)` as it goes.

        Several processes share the work, and each keeps all of it.
        """
        written_at, left = time.monotonic(), iter(batches)
        try:
            while at_once := [*islice(left, distributed.world().size)]:
                for batch, scored in zip(at_once, source.score_all(at_once), strict=True):
                    sequences = iter(scored.logps.cpu().split(batch.lengths.tolist()))
                    for example in batch.examples:
                        self._logps.update(zip(_keys(example), sequences, strict=False))
                    advance(len(batch.examples))
                if time.monotonic() - written_at >= _SECONDS_BETWEEN_WRITES:
                    self._write()
                    written_at = time.monotonic()
        finally:
            self._write()

    def lookup(self, batch: Batch) -> Float[Tensor, " M"]:
        """The log-probabilities of a batch's scored tokens; nan for those of prompts, which no reference is asked for.

        Raises:
            KeyError: a completion was never scored.
            UserError: the store has lost one since.
        """
        keys = [list(_keys(example)) for example in batch.examples]
        logps = self._read([key for own in keys for key in own])
        pieces = []
        try:
            for own, example in zip(keys, batch.examples, strict=True):
                pieces += [logps[key] for key in own]
                if batch.with_prompts:
                    pieces.append(torch.full((len(example.prompt_ids) - 1,), torch.nan))
        except KeyError:
            if self._store is None:
                raise
            why = self.new_troubles() or [f"reference.cache: '{self._store.path}' has lost numbers that the run needs"]
            raise UserError(f"{why[-1]}. `penchant resume` goes on, and computes first what is missing.") from None
        return torch.cat(pieces).to(batch.target_ids.device)

    def flat(self, examples: Iterable[TokenizedExample]) -> Float[Tensor, " M"]:
        """The log-probabilities of all completions of these examples, one behind the other."""
        keys = [key for example in examples for key in _keys(example)]
        logps = self._read(keys)
        return torch.cat([logps[key] for key in keys]) if keys else torch.zeros(0)

    def put(self, examples: Sequence[TokenizedExample], logps: Float[Tensor, " M"]) -> None:
        """Takes in what `flat` gave for the same examples."""
        keys = [key for example in examples for key in _keys(example)]
        lengths = [len(ids) for example in examples for ids in example.completion_ids]
        self._logps.update(zip(keys, logps.split(lengths), strict=True))
        self._write()

    def clear(self) -> None:
        """Forgets what is in memory: the model that made it is no longer the one that is meant."""
        self._logps.clear()

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Those of these keys that are there."""
        found = {key: self._logps[key] for key in keys if key in self._logps}
        if self._store is not None and len(found) < len(keys):
            found |= self._store.read(key for key in keys if key not in found)
        return found

    def _write(self) -> None:
        """Hands what is in memory to the store; what that cannot take stays."""
        if self._store is not None and self._logps and self._store.add(self._logps):
            self._logps.clear()


class Precomputed(Reference):
    """Log-probabilities computed once, before training; the model that made them may be gone."""

    def __init__(self, cache: LogpsCache, is_start_of_policy: bool) -> None:
        self.cache = cache
        self.is_start_of_policy = is_start_of_policy
        origin = "the starting weights" if is_start_of_policy else "another model"
        self.description = f"precomputed once from {origin}"

    def token_logps(self, batches: Sequence[Batch]) -> list[Float[Tensor, " M"]]:
        return [self.cache.lookup(batch) for batch in batches]


@torch.no_grad()
def mean_kl(policy: Policy, reference: Reference | None, batches: Sequence[Batch]) -> Float[Tensor, ""]:
    """The mean log-ratio of mismatched completions, at least 0: KTO's estimate of KL(policy || reference), in nats.

    Raises:
        ValueError: there is no reference or no batch.
    """
    if reference is None or not batches:
        raise ValueError("an estimate of the KL divergence needs a reference and mismatched completions")
    batches = [batch.to(policy.device) for batch in batches]
    ratios = [
        batch.sum_by_sequence(scored.logps - ref)
        for batch, scored, ref in zip(batches, policy.score_all(batches), reference.token_logps(batches), strict=True)
    ]
    return torch.cat(ratios).mean().clamp(min=0)


def distinct(examples: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """Each content once: what else examples of the same ids carry does not change their log-probabilities."""
    return list(_by_keys(examples).values())


def _by_keys(examples: Iterable[TokenizedExample]) -> dict[tuple[bytes, ...], TokenizedExample]:
    """The first example of each content."""
    found: dict[tuple[bytes, ...], TokenizedExample] = {}
    for example in examples:
        found.setdefault(tuple(_keys(example)), example)
    return found


def _keys(example: TokenizedExample) -> Iterator[bytes]:
    """A name for each completion that depends on its and its prompt's ids alone."""
    prompt = np.asarray(example.prompt_ids, dtype=np.int64)
    for completion in example.completion_ids:
        content = np.concatenate([[len(prompt)], prompt, np.asarray(completion, dtype=np.int64)])
        yield hashlib.blake2b(content.tobytes(), digest_size=16).digest()

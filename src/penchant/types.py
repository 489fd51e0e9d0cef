"""The vocabulary: the records that the rooms of the house hand to each other.

Shapes, used everywhere: B examples (pairs, say), N completions (for pairs 2B: chosen and rejected in turn), S sequences
(the completions, and the prompts where they are scored too), K completions of one prompt, C and R tokens of chosen and
rejected, T tokens of a row, M scored tokens of a batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from penchant.examples import Example as Example
from penchant.examples import Message as Message
from penchant.examples import Pair as Pair
from penchant.examples import Ranking as Ranking
from penchant.examples import Rollout as Rollout
from penchant.examples import Text as Text
from penchant.examples import TokenizedExample as TokenizedExample
from penchant.examples import Unpaired as Unpaired


@dataclass(frozen=True)
class Spans:
    """Consecutive stretches of tokens: where each begins and the last one ends, and the tokens of the longest."""

    bounds: Int[Tensor, " n"]
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Spans:
        """Stretches of these lengths, one behind the other."""
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths))


@dataclass(frozen=True)
class SharedSpans:
    """Which packed tokens are completions with a prompt in common (`asking`), and which are these prompts (`asked`)."""

    asking: Int[Tensor, " m"]
    asked: Int[Tensor, " n"]
    of_asking: Spans
    of_asked: Spans


@dataclass(frozen=True)
class Segments:
    """Who sees whom where sequences stand one behind the other in a single row, sharing prompts where they can.

    Each of `bounds` is a group of consecutive tokens: (start, end of its first segment, end of the next, ..., end). A
    token sees itself and what stands before it in its own segment; behind a group's first segment, the prompt, it sees
    all of that as well. A group of one segment is a sequence by itself.
    """

    bounds: tuple[tuple[int, ...], ...]
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> Segments:
        """The same on another device."""
        return Segments(self.bounds, device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, its prompt included."""
        return max(
            bounds[1] - bounds[0] + max((end - start for start, end in pairwise(bounds[1:])), default=0)
            for bounds in self.bounds
        )

    @cached_property
    def rows(self) -> tuple[Int[Tensor, "N L"], Int[Tensor, " T"]]:
        """The packed tokens of each sequence in a row of its own, and where in these rows, flattened, a token stands.

        What fills a row up behind its end is any token; a prompt is looked for in the row of one of its sequences.
        """
        sequences = [
            [*range(bounds[0], bounds[1]), *range(start, end)]
            for bounds in self.bounds
            for start, end in pairwise(bounds[1:] if len(bounds) > 2 else (bounds[1], bounds[1]))
        ]
        gather = torch.zeros(len(sequences), self.longest, dtype=torch.long)
        scatter = torch.zeros(self.bounds[-1][-1], dtype=torch.long)
        for number, places in enumerate(sequences):
            gather[number, : len(places)] = torch.tensor(places)
            scatter[torch.tensor(places)] = torch.arange(len(places)) + number * self.longest
        return gather.to(self.device), scatter.to(self.device)

    @cached_property
    def own_spans(self) -> Spans:
        """All segments."""
        return Spans.of([end - start for bounds in self.bounds for start, end in pairwise(bounds)], self.device)

    @cached_property
    def shared_spans(self) -> SharedSpans | None:
        """The completions of each group and their prompt; None where no group has any."""
        groups = [bounds for bounds in self.bounds if len(bounds) > 2]
        if not groups:
            return None
        asking = [range(bounds[1], bounds[-1]) for bounds in groups]
        asked = [range(bounds[0], bounds[1]) for bounds in groups]
        return SharedSpans(
            torch.tensor([*chain(*asking)], device=self.device),
            torch.tensor([*chain(*asked)], device=self.device),
            Spans.of([*map(len, asking)], self.device),
            Spans.of([*map(len, asked)], self.device),
        )

    @cached_property
    def members(self) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " T"]]:
        """Of each packed token its group, the number of its segment (0 of a prompt), and its place in its sequence."""
        groups: list[int] = []
        segments: list[int] = []
        places: list[int] = []
        for group, bounds in enumerate(self.bounds):
            prompt = bounds[1] - bounds[0]
            for number, (start, end) in enumerate(pairwise(bounds)):
                groups += [group] * (end - start)
                segments += [number] * (end - start)
                places += range(prompt * (number > 0), prompt * (number > 0) + end - start)
        group_ids, segment_ids, position_ids = (torch.tensor(each) for each in (groups, segments, places))
        return group_ids.to(self.device), segment_ids.to(self.device), position_ids.to(self.device)


@dataclass(frozen=True)
class Batch:
    """N sequences laid out for one forward pass, whatever the layout, and the way back from tokens to sequences.

    `model_inputs` goes to the model as keyword arguments. Flatten the model's (rows, T, D) hidden states to
    (rows * T, D): row `hidden_rows[m]` predicts token `target_ids[m]`, which belongs to sequence `sequence_ids[m]`.
    The M targets of a sequence are consecutive and in order, and the S sequences follow each other: the completions of
    the first example, of the second, ... With prompts, each example's completions are followed by its prompt, scored
    from its second token on (nothing predicts the first). Row `last_rows[s]` is that of a sequence's own last token.
    """

    model_inputs: dict[str, Any]
    hidden_rows: Int[Tensor, " M"]
    last_rows: Int[Tensor, " S"]
    target_ids: Int[Tensor, " M"]
    sequence_ids: Int[Tensor, " M"]
    lengths: Int[Tensor, " S"]
    examples: tuple[TokenizedExample, ...]
    with_prompts: bool = False

    @property
    def is_completion(self) -> Bool[Tensor, " S"]:
        """Which sequences are completions; the others are prompts."""
        kinds = [
            kind
            for example in self.examples
            for kind in [True] * len(example.completion_ids) + [False] * self.with_prompts
        ]
        return torch.tensor(kinds, device=self.lengths.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            model_inputs={name: value.to(device) for name, value in self.model_inputs.items()},
            hidden_rows=self.hidden_rows.to(device),
            last_rows=self.last_rows.to(device),
            target_ids=self.target_ids.to(device),
            sequence_ids=self.sequence_ids.to(device),
            lengths=self.lengths.to(device),
            examples=self.examples,
            with_prompts=self.with_prompts,
        )

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """The sequences of several batches as one, for what no longer needs the model: it has no `model_inputs`."""
        offsets = [0, *accumulate(len(batch.lengths) for batch in batches)]
        return cls(
            model_inputs={},
            hidden_rows=torch.cat([batch.hidden_rows for batch in batches]),
            last_rows=torch.cat([batch.last_rows for batch in batches]),
            target_ids=torch.cat([batch.target_ids for batch in batches]),
            sequence_ids=torch.cat([b.sequence_ids + offset for b, offset in zip(batches, offsets, strict=False)]),
            lengths=torch.cat([batch.lengths for batch in batches]),
            examples=tuple(example for batch in batches for example in batch.examples),
            with_prompts=batches[0].with_prompts,
        )

    def sum_by_sequence(self, values: Float[Tensor, " M"]) -> Float[Tensor, " S"]:
        """Adds up a value of every scored token within each sequence: the map from tokens back to sequences."""
        sums = torch.zeros(self.lengths.shape[0], dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.sequence_ids, values)


@dataclass(frozen=True)
class TokenLogps:
    """What a model says about the M scored tokens of a batch, in nats.

    `logps[m]` is log pi(y_t | x, y_<t); `entropies[m]` the entropy of that whole distribution; `log_collisions[m]` the
    log of the sum over the vocabulary of pi(v | x, y_<t)^2; both carry no gradient and are None where nobody asked.
    `values[m]` is what a value head expects to come, before the token; None without one.
    """

    logps: Float[Tensor, " M"]
    entropies: Float[Tensor, " M"] | None = None
    log_collisions: Float[Tensor, " M"] | None = None
    values: Float[Tensor, " M"] | None = None

    def as_tuple(self) -> tuple[Tensor | None, ...]:
        """The fields in their order."""
        return self.logps, self.entropies, self.log_collisions, self.values

    def detached(self) -> TokenLogps:
        """The same numbers without their gradients."""
        values = None if self.values is None else self.values.detach()
        return TokenLogps(self.logps.detach(), self.entropies, self.log_collisions, values)

    @classmethod
    def join(cls, parts: Sequence[TokenLogps]) -> TokenLogps:
        """What was said about several batches, one behind the other; fields that any of them lacks are None."""

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if len(there) == len(tensors) else None

        return cls(
            torch.cat([part.logps for part in parts]),
            joined([part.entropies for part in parts]),
            joined([part.log_collisions for part in parts]),
            joined([part.values for part in parts]),
        )


@dataclass(frozen=True)
class PairTokens:
    """Token by token what `PairLogps` adds up, for the few losses that need it; 0 behind the end of a completion."""

    policy_chosen_logps: Float[Tensor, "B C"]
    policy_rejected_logps: Float[Tensor, "B R"]
    ref_chosen_logps: Float[Tensor, "B C"] | None
    ref_rejected_logps: Float[Tensor, "B R"] | None
    policy_chosen_log_collisions: Float[Tensor, "B C"] | None = None
    policy_rejected_log_collisions: Float[Tensor, "B R"] | None = None


@dataclass(frozen=True)
class PairLogps:
    """The waist of the house: sequence log-probabilities of B pairs under policy and reference.

    Everything above (data, layouts, models) produces it, everything below (losses, metrics) consumes it. Each
    log-probability is the sum over the completion's tokens of log pi(y_t | x, y_<t), in nats; lengths count those
    tokens. Without a reference `ref_chosen_logps` and `ref_rejected_logps` are None. The fields after the lengths are
    None unless the loss asks for them or the data have them.
    """

    policy_chosen_logps: Float[Tensor, " B"]
    policy_rejected_logps: Float[Tensor, " B"]
    ref_chosen_logps: Float[Tensor, " B"] | None
    ref_rejected_logps: Float[Tensor, " B"] | None
    chosen_lengths: Int[Tensor, " B"]
    rejected_lengths: Int[Tensor, " B"]
    margins: Float[Tensor, " B"] | None = None
    """The data's `margin` column."""
    win_probabilities: Float[Tensor, "B 2"] | None = None
    """The data's win probabilities of chosen and rejected."""
    policy_prompt_logps: Float[Tensor, " B"] | None = None
    """Summed over the prompt's tokens but the first."""
    prompt_lengths: Int[Tensor, " B"] | None = None
    """How many tokens that sum has."""
    tokens_per_example: float | None = None
    """Chosen tokens per pair of the whole optimizer batch, where this is a part of one."""
    tokens: PairTokens | None = None

    def log_ratios(self) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """log pi - log pi_ref of the chosen and of the rejected completion, in nats.

        Raises:
            ValueError: there is no reference.
        """
        if self.ref_chosen_logps is None or self.ref_rejected_logps is None:
            raise ValueError("this loss compares with a reference, and the log-probabilities carry none")
        return (
            self.policy_chosen_logps - self.ref_chosen_logps,
            self.policy_rejected_logps - self.ref_rejected_logps,
        )


@dataclass(frozen=True)
class SequenceLogps:
    """The waist's sibling for unpaired methods: sequence log-probabilities of N judged completions, in nats."""

    policy_logps: Float[Tensor, " N"]
    ref_logps: Float[Tensor, " N"] | None
    lengths: Int[Tensor, " N"]
    is_desirable: Bool[Tensor, " N"]
    kl: Float[Tensor, ""] | None = None
    """Estimate of KL(policy || reference) by mismatched completions, in nats, at least 0, no gradient (KTO's z0)."""
    tokens_per_example: float | None = None
    """Desirable tokens per completion of the whole optimizer batch, where this is a part of one."""

    def log_ratios(self) -> Float[Tensor, " N"]:
        """log pi - log pi_ref of each completion, in nats.

        Raises:
            ValueError: there is no reference.
        """
        if self.ref_logps is None:
            raise ValueError("this loss compares with a reference, and the log-probabilities carry none")
        return self.policy_logps - self.ref_logps


@dataclass(frozen=True)
class RankedLogps:
    """The waist's sibling for rankings: B prompts with up to K completions, the best first, in nats.

    Where a ranking is shorter than K, `is_present` is false and the numbers are 0.
    """

    policy_logps: Float[Tensor, "B K"]
    ref_logps: Float[Tensor, "B K"] | None
    lengths: Int[Tensor, "B K"]
    is_present: Bool[Tensor, "B K"]

    def log_ratios(self) -> Float[Tensor, "B K"]:
        """log pi - log pi_ref of each completion, in nats.

        Raises:
            ValueError: there is no reference.
        """
        if self.ref_logps is None:
            raise ValueError("this loss compares with a reference, and the log-probabilities carry none")
        return self.policy_logps - self.ref_logps


@dataclass(frozen=True)
class RolloutLogps:
    """The waist's sibling for policy gradients: the M tokens of N sampled completions, one completion behind the other.

    Token m belongs to completion `sequence_ids[m]`. Log-probabilities are in nats; only `policy_logps` and `values`
    carry gradients.
    """

    policy_logps: Float[Tensor, " M"]
    old_logps: Float[Tensor, " M"]
    """Under the policy that sampled them."""
    ref_logps: Float[Tensor, " M"] | None
    advantages: Float[Tensor, " M"]
    sequence_ids: Int[Tensor, " M"]
    lengths: Int[Tensor, " N"]
    values: Float[Tensor, " M"] | None = None
    old_values: Float[Tensor, " M"] | None = None
    returns: Float[Tensor, " M"] | None = None
    tokens_per_example: float | None = None
    """Tokens per completion of the whole optimizer batch, where this is a part of one."""

    def sum_by_sequence(self, values: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
        """Adds up a value of every token within each completion."""
        sums = torch.zeros(self.lengths.shape[0], dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.sequence_ids, values)


Logps = PairLogps | SequenceLogps | RankedLogps | RolloutLogps
"""What a loss consumes."""

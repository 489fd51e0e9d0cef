"""The vocabulary: the records that the rooms of the house hand to each other.

Shapes, used everywhere: B pairs, N sequences (2B for pairs: the B chosen ones first, then the B rejected ones),
T tokens of a row, M completion tokens of a batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""

Text = str | Sequence[Message]
"""What stands in a prompt or a completion: plain text, or whole messages (rendered by the chat template)."""


@dataclass(frozen=True)
class Pair:
    """One human judgement: for `prompt`, `chosen` was preferred to `rejected`.

    Prompt and completions are all plain text or all messages. `source` names the row (`file:line`) in messages.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    source: str = ""


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; each completion ends with its end-of-turn token.

    `prompt_ids + chosen_ids` is one sequence, `prompt_ids + rejected_ids` the other. `index` names the pair within a
    run, wherever numbers are kept for it (a precomputed reference, for one).
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    index: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def num_scored_tokens(self) -> int:
        """Tokens of both sequences, the prompt counted twice: what any layout has to account for."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class SharedRows:
    """How packed tokens spread into attention rows, for layouts in which sequences share tokens.

    Row n of attention is sequence n, prompt included: its place t holds packed token `gather[n, t]` (places behind its
    end hold any token). Packed token p takes its result from place `scatter[p]` of the flattened rows.
    """

    gather: Int[Tensor, "N L"]
    scatter: Int[Tensor, " T"]

    def to(self, device: torch.device | str) -> SharedRows:
        """The same map on another device."""
        return SharedRows(self.gather.to(device), self.scatter.to(device))


@dataclass(frozen=True)
class Batch:
    """N sequences laid out for one forward pass, whatever the layout, and the way back from tokens to sequences.

    `model_inputs` goes to the model as keyword arguments. Flatten the model's (rows, T, D) hidden states to
    (rows * T, D): row `hidden_rows[m]` predicts token `target_ids[m]`, which belongs to sequence `sequence_ids[m]`.
    The M targets of a sequence are consecutive and in order, and the sequences follow each other. `indices` names the
    pairs in the order of the sequences.
    """

    model_inputs: dict[str, Any]
    hidden_rows: Int[Tensor, " M"]
    target_ids: Int[Tensor, " M"]
    sequence_ids: Int[Tensor, " M"]
    lengths: Int[Tensor, " N"]
    indices: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            model_inputs={name: value.to(device) for name, value in self.model_inputs.items()},
            hidden_rows=self.hidden_rows.to(device),
            target_ids=self.target_ids.to(device),
            sequence_ids=self.sequence_ids.to(device),
            lengths=self.lengths.to(device),
            indices=self.indices,
        )

    def sum_by_sequence(self, values: Float[Tensor, " M"]) -> Float[Tensor, " N"]:
        """Adds up a value of every completion token within each sequence: the map from tokens back to sequences."""
        sums = torch.zeros(self.lengths.shape[0], dtype=values.dtype, device=values.device)
        return sums.index_add(0, self.sequence_ids, values)


@dataclass(frozen=True)
class TokenLogps:
    """What a model says about the M completion tokens of a batch, in nats.

    `logps[m]` is log pi(y_t | x, y_<t); `entropies[m]` the entropy of that whole distribution (no
    gradient; None where nobody asked).
    """

    logps: Float[Tensor, " M"]
    entropies: Float[Tensor, " M"] | None


@dataclass(frozen=True)
class PairLogps:
    """The waist of the house: sequence log-probabilities of B pairs under policy and reference.

    Everything above (data, layouts, models) produces it, everything below (losses, metrics) consumes it. Each
    log-probability is the sum over the completion's tokens of log pi(y_t | x, y_<t), in nats; lengths count those
    tokens. Without a reference `ref_chosen_logps` and `ref_rejected_logps` are None.
    """

    policy_chosen_logps: Float[Tensor, " B"]
    policy_rejected_logps: Float[Tensor, " B"]
    ref_chosen_logps: Float[Tensor, " B"] | None
    ref_rejected_logps: Float[Tensor, " B"] | None
    chosen_lengths: Int[Tensor, " B"]
    rejected_lengths: Int[Tensor, " B"]

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

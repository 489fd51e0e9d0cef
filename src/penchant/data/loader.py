"""The order in which examples are trained on, and how a batch is cut into microbatches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from penchant.data.flat import LazyExamples, Reordered
from penchant.examples import TokenizedExample


@dataclass(frozen=True)
class Draw:
    """The examples of one optimizer step and, where they were asked for, as many mismatched ones."""

    examples: list[TokenizedExample]
    mismatched: list[TokenizedExample]
    seen: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What was seen when the examples were made, by the name of the metric: values to take the mean of."""


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The examples' positions in the order of one epoch: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()


def draws(
    examples: Sequence[TokenizedExample],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    mismatch_within: int | None = None,
) -> Iterator[Draw]:
    """Optimizer batches without end, from step `start_step` on; the last batch of an epoch may be smaller.

    With `mismatch_within` (a length in tokens) each comes with its mismatched examples.
    """
    per_epoch = steps_per_epoch(len(examples), batch_size)
    step, drawn_epoch = start_step, -1
    ordered: Sequence[TokenizedExample] = ()
    others: Sequence[TokenizedExample] = ()
    while True:
        epoch, place = divmod(step, per_epoch)
        if epoch != drawn_epoch:
            ordered = Reordered(examples, epoch_order(len(examples), seed, epoch))
            others = mismatched(ordered, mismatch_within) if mismatch_within is not None else ()
            drawn_epoch = epoch
        part = slice(place * batch_size, (place + 1) * batch_size)
        yield Draw([*ordered[part]], [*others[part]])
        step += 1


@dataclass(frozen=True)
class Mismatched(LazyExamples):
    """The prompt of each example with the completions of another one, its partner."""

    examples: Sequence[TokenizedExample]
    partners: Sequence[int]
    max_length: int

    def __len__(self) -> int:
        return len(self.partners)

    def at(self, place: int) -> TokenizedExample:
        example, partner = self.examples[place], self.examples[self.partners[place]]
        room = self.max_length - len(example.prompt_ids)
        return dataclasses.replace(example, completion_ids=tuple(ids[:room] for ids in partner.completion_ids))


def mismatched(examples: Sequence[TokenizedExample], max_length: int) -> Mismatched:
    """Each prompt with the completions of the next example (of the first, behind the last) that has another prompt.

    What KTO estimates the KL divergence from. The examples come in shuffled order, so that partners are drawn anew in
    every epoch, and do not depend on the size of a batch. Completions are cut at `max_length`.

    Raises:
        ValueError: all prompts are the same.
    """
    prompts = [_digest(example.prompt_ids) for example in examples]
    if len(set(prompts)) < 2:
        raise ValueError("completions of other prompts are needed, and there is one prompt only")
    number = len(examples)
    partners = [0] * number
    following = 0  # behind the place in hand, the next one with another prompt; the first round leaves it right
    for place in reversed(range(2 * number)):
        here, after = place % number, (place + 1) % number
        if prompts[here] != prompts[after]:
            following = after
        partners[here] = following
    return Mismatched(examples, partners, max_length)


def _digest(ids: Sequence[int]) -> bytes:
    """What is equal for equal ids, and smaller: those of all prompts are held at once."""
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps that visit every example once."""
    return -(-num_examples // batch_size)


def microbatches(
    examples: Sequence[TokenizedExample], max_tokens: int, cost: Callable[[Sequence[TokenizedExample]], int]
) -> list[list[TokenizedExample]]:
    """Cuts a batch into microbatches of at most `max_tokens` by the layout's `cost`, longest examples first.

    Examples of like length share a microbatch, so little is filled up. The step's loss is a sum over examples, so the
    cut changes no gradient. A single example above the limit makes a microbatch of its own. The longest come first, so
    that memory trouble shows at once.
    """
    cut: list[list[TokenizedExample]] = []
    for example in sorted(examples, key=lambda example: (-example.num_tokens, example.index)):
        if cut and cost([*cut[-1], example]) <= max_tokens:
            cut[-1].append(example)
        else:
            cut.append([example])
    return cut

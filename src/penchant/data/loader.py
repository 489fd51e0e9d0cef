"""The order in which pairs are trained on, and how a batch is cut into microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from penchant.types import TokenizedPair


def epoch_order(num_pairs: int, seed: int, epoch: int) -> list[int]:
    """The pairs' positions in the order of one epoch: a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_pairs).tolist()


def batches(
    pairs: Sequence[TokenizedPair], batch_size: int, seed: int, start_step: int = 0
) -> Iterator[list[TokenizedPair]]:
    """Optimizer batches without end, from step `start_step` on; the last batch of an epoch may be smaller."""
    per_epoch = steps_per_epoch(len(pairs), batch_size)
    step = start_step
    while True:
        epoch, place = divmod(step, per_epoch)
        order = epoch_order(len(pairs), seed, epoch)
        yield [pairs[i] for i in order[place * batch_size : (place + 1) * batch_size]]
        step += 1


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Optimizer steps that visit every pair once."""
    return -(-num_pairs // batch_size)


def microbatches(
    pairs: Sequence[TokenizedPair], max_tokens: int, cost: Callable[[Sequence[TokenizedPair]], int]
) -> list[list[TokenizedPair]]:
    """Cuts a batch into microbatches of at most `max_tokens` by the layout's `cost`, longest pairs first.

    Pairs of like length share a microbatch, so little is filled up. The step's loss is a sum over pairs, so the cut
    changes no gradient. A single pair above the limit makes a microbatch of its own. The longest come first, so that
    memory trouble shows at once.
    """
    cut: list[list[TokenizedPair]] = []
    for pair in sorted(pairs, key=lambda pair: (-pair.num_tokens, pair.index)):
        if cut and cost([*cut[-1], pair]) <= max_tokens:
            cut[-1].append(pair)
        else:
            cut.append([pair])
    return cut

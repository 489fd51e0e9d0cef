"""The order of the pairs is a function of seed and epoch, and cutting a batch loses and doubles nothing."""

from __future__ import annotations

from itertools import chain, islice, pairwise

import pytest

from penchant.data.loader import batches, epoch_order, microbatches, steps_per_epoch
from penchant.layouts import padded
from penchant.types import TokenizedPair

# Fixed beforehand: a run that is continued with another version must go on in the same order.
ORDER_OF_SEED_0 = {0: [3, 2, 5, 4, 0, 1], 1: [1, 4, 3, 0, 2, 5]}


def make_pairs(lengths: list[int]) -> list[TokenizedPair]:
    """Pairs of 2 prompt tokens whose longer sequence has the given number of tokens; chosen and rejected in turn."""
    made = []
    for index, length in enumerate(lengths):
        long, short = [7] * (length - 2), [8]
        chosen, rejected = (long, short) if index % 2 else (short, long)
        made.append(TokenizedPair([5, 6], chosen, rejected, index))
    return made


PAIRS = make_pairs([5, 9, 3, 12, 4, 7, 6])


def indices(batch: list[TokenizedPair]) -> list[int]:
    return [pair.index for pair in batch]


def first(num_steps: int, batch_size: int = 3, seed: int = 0, start_step: int = 0) -> list[list[int]]:
    return [indices(batch) for batch in islice(batches(PAIRS, batch_size, seed, start_step), num_steps)]


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    assert epoch_order(50, seed=3, epoch=2) == epoch_order(50, seed=3, epoch=2)
    orders = [epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9  # seed and epoch are not added up
    assert first(6) == first(6)
    assert first(6) != first(6, seed=1)


@pytest.mark.parametrize("epoch", ORDER_OF_SEED_0)
def test_order_is_the_one_that_earlier_versions_made(epoch: int) -> None:
    assert epoch_order(6, seed=0, epoch=epoch) == ORDER_OF_SEED_0[epoch]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
def test_each_epoch_visits_every_pair_once(batch_size: int) -> None:
    per_epoch = steps_per_epoch(len(PAIRS), batch_size)
    steps = first(3 * per_epoch, batch_size)
    for epoch in range(3):
        visited = [*chain(*steps[epoch * per_epoch : (epoch + 1) * per_epoch])]
        assert visited == epoch_order(len(PAIRS), 0, epoch)
    assert all(len(step) <= batch_size for step in steps)


@pytest.mark.parametrize(("num_pairs", "batch_size", "steps"), [(7, 3, 3), (6, 3, 2), (1, 32, 1), (33, 32, 2)])
def test_last_batch_of_an_epoch_may_be_smaller(num_pairs: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(num_pairs, batch_size) == steps


@pytest.mark.parametrize("start_step", range(8))
def test_run_that_starts_later_goes_on_in_the_same_order(start_step: int) -> None:
    assert first(4, start_step=start_step) == first(start_step + 4)[start_step:]


@pytest.mark.parametrize("max_tokens", [1, 10, 24, 30, 50, 10_000])
def test_microbatches_hold_every_pair_once_within_the_limit(max_tokens: int) -> None:
    parts = microbatches(PAIRS, max_tokens, padded.cost)
    assert sorted(chain(*map(indices, parts))) == list(range(len(PAIRS)))
    assert all(len(part) == 1 or padded.cost(part) <= max_tokens for part in parts)
    assert all(padded.cost([*part, following[0]]) > max_tokens for part, following in pairwise(parts))


def test_longest_pairs_come_first() -> None:
    for max_tokens in (1, 30, 10_000):
        parts = microbatches(PAIRS, max_tokens, padded.cost)
        assert [pair.num_tokens for part in parts for pair in part] == [12, 9, 7, 6, 5, 4, 3]


def test_pair_above_the_limit_stands_alone() -> None:
    # 2 rows of 12 are above 20; 4 rows of 5 are 20; with the pair of 3 they would be 6 rows of 5.
    assert [indices(part) for part in microbatches(PAIRS, 20, padded.cost)] == [[3], [1], [5], [6], [0, 4], [2]]


def test_cut_does_not_depend_on_the_order_of_the_batch() -> None:
    equally_long = make_pairs([6] * 5)
    for pairs in (PAIRS, equally_long):
        assert microbatches(pairs[::-1], 30, padded.cost) == microbatches(pairs, 30, padded.cost)


def test_empty_batch_has_no_microbatches() -> None:
    assert microbatches([], 30, padded.cost) == []

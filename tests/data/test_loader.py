"""The order of the examples is a function of seed and epoch, and cutting a batch loses and doubles nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice, pairwise

import pytest

from penchant.data.loader import draws, epoch_order, microbatches, mismatched, steps_per_epoch
from penchant.layouts import padded
from penchant.types import TokenizedExample

# Fixed beforehand: a run that is continued with another version must go on in the same order.
ORDER_OF_SEED_0 = {0: [3, 2, 5, 4, 0, 1], 1: [1, 4, 3, 0, 2, 5]}


def make_pairs(lengths: list[int]) -> list[TokenizedExample]:
    """Pairs of 2 prompt tokens whose longer sequence has the given number of tokens; chosen and rejected in turn."""
    made = []
    for index, length in enumerate(lengths):
        long, short = [7] * (length - 2), [8]
        chosen, rejected = (long, short) if index % 2 else (short, long)
        made.append(TokenizedExample([5, 6], (chosen, rejected), index))
    return made


PAIRS = make_pairs([5, 9, 3, 12, 4, 7, 6])


def indices(batch: Sequence[TokenizedExample]) -> list[int]:
    return [example.index for example in batch]


def first(num_steps: int, batch_size: int = 3, seed: int = 0, start_step: int = 0) -> list[list[int]]:
    return [indices(draw.examples) for draw in islice(draws(PAIRS, batch_size, seed, start_step), num_steps)]


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


# Mismatched completions. Prompts and completions of the singles hold the number of their group and of the row.


def make_singles(groups: Sequence[int], num_tokens: int = 3) -> list[TokenizedExample]:
    """One completion each, `100 + row` written several times; the prompt is `[group, group]`."""
    return [
        TokenizedExample([group, group], ([100 + row] * num_tokens,), row, weight=row + 0.5, is_desirable=row % 2 == 0)
        for row, group in enumerate(groups)
    ]


def row_of(example: TokenizedExample) -> int:
    """The row that the completion was written for."""
    return example.completion_ids[0][0] - 100


def next_with_another_prompt(groups: Sequence[int], row: int) -> int:
    """By walking on, round and round, until the prompt changes."""
    place = row
    while groups[place] == groups[row]:
        place = (place + 1) % len(groups)
    return place


@pytest.mark.parametrize(
    ("groups", "partners"),
    [
        ([1, 2], [1, 0]),
        ([1, 2, 3, 4], [1, 2, 3, 0]),
        ([1, 1, 2, 2, 3], [2, 2, 4, 4, 0]),
        ([1, 2, 2, 1, 1], [1, 3, 3, 1, 1]),
        ([3, 3, 3, 1], [3, 3, 3, 0]),
        ([1, 3, 3, 3], [1, 0, 0, 0]),
    ],
)
def test_partner_is_the_next_example_round_the_circle_that_has_another_prompt(
    groups: list[int], partners: list[int]
) -> None:
    assert [row_of(example) for example in mismatched(make_singles(groups), 100)] == partners


def test_partners_are_those_of_walking_on_whatever_the_prompts() -> None:
    generator = random.Random(0)
    for _ in range(200):
        groups = [generator.randrange(3) for _ in range(generator.randrange(2, 9))]
        if len(set(groups)) > 1:
            found = [row_of(example) for example in mismatched(make_singles(groups), 100)]
            assert found == [next_with_another_prompt(groups, row) for row in range(len(groups))]


def test_mismatched_example_is_the_example_with_nothing_but_the_completions_of_another() -> None:
    pairs = [TokenizedExample([4], ([5, 6], [7]), 3, margin=0.5), TokenizedExample([8, 9], ([1], [2, 3, 4]), 5)]
    assert list(mismatched(pairs, 100)) == [
        TokenizedExample([4], ([1], [2, 3, 4]), 3, margin=0.5),
        TokenizedExample([8, 9], ([5, 6], [7]), 5),
    ]


@pytest.mark.parametrize(("max_length", "lengths"), [(3, [2, 1]), (4, [3, 2]), (5, [4, 3]), (6, [5, 4]), (7, [5, 5])])
def test_mismatched_completion_is_cut_where_prompt_and_completion_reach_max_length(
    max_length: int, lengths: list[int]
) -> None:
    examples = [
        TokenizedExample([1], ([11, 12, 13, 14, 15],), 0),
        TokenizedExample([2, 3], ([21, 22, 23, 24, 25],), 1),
    ]
    found = mismatched(examples, max_length)
    assert found[0].completion_ids == ([21, 22, 23, 24, 25][: lengths[0]],)
    assert found[1].completion_ids == ([11, 12, 13, 14, 15][: lengths[1]],)
    assert all(example.num_tokens <= max_length for example in found)


@pytest.mark.parametrize("groups", [[], [1], [1, 1, 1]])
def test_one_prompt_alone_has_no_mismatched_completions(groups: list[int]) -> None:
    with pytest.raises(ValueError, match="one prompt only"):
        mismatched(make_singles(groups), 100)


def partners_by_row(
    batch_size: int, seed: int = 0, epoch: int = 0, groups: Sequence[int] = (1, 1, 2, 3, 3, 4, 5)
) -> dict[int, int]:
    """The partner of every row in one epoch."""
    per_epoch = steps_per_epoch(len(groups), batch_size)
    some = draws(make_singles(groups), batch_size, seed, epoch * per_epoch, mismatch_within=100)
    drawn = list(islice(some, per_epoch))
    assert all(indices(draw.examples) == indices(draw.mismatched) for draw in drawn)
    return {example.index: row_of(example) for draw in drawn for example in draw.mismatched}


def test_every_draw_has_a_partner_of_another_prompt_for_each_of_its_examples() -> None:
    groups = [1, 1, 2, 3, 3, 4, 5]
    for batch_size in (1, 2, 7, 20):
        partners = partners_by_row(batch_size, groups=groups)
        assert sorted(partners) == list(range(7))
        assert all(groups[row] != groups[partner] for row, partner in partners.items())


def test_partners_depend_on_seed_and_epoch_and_not_on_the_batch_size() -> None:
    by_size = [partners_by_row(batch_size) for batch_size in (1, 2, 3, 7, 20)]
    assert all(partners == by_size[0] for partners in by_size)
    drawn = [partners_by_row(3, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(sorted(partners.items())) for partners in drawn}) == 9


def test_partners_follow_the_shuffled_order() -> None:
    groups = [1, 2, 3, 4, 5, 6]
    order = epoch_order(6, seed=4, epoch=1)
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    assert partners_by_row(2, seed=4, epoch=1, groups=groups) == following
    assert Counter(following.values()) == Counter(range(6))


def test_run_that_starts_later_draws_the_same_partners() -> None:
    singles = make_singles([1, 1, 2, 3, 3])
    whole = list(islice(draws(singles, 2, 0, mismatch_within=100), 7))
    for start in range(7):
        assert next(draws(singles, 2, 0, start, mismatch_within=100)) == whole[start]


def test_nothing_is_mismatched_unless_it_is_asked_for() -> None:
    same_prompt = make_singles([1, 1, 1])
    assert next(draws(same_prompt, 2, 0)).mismatched == []
    with pytest.raises(ValueError, match="one prompt only"):
        next(draws(same_prompt, 2, 0, mismatch_within=100))

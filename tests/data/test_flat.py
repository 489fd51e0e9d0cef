"""Examples in flat arrays are the examples they were made of, however they are asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.data.flat import FlatExamples, Reordered, flat_columns, flattened, has_column, in_parts, num_tokens_of
from penchant.types import TokenizedExample

# Types are checked at run time, of lists an entry drawn at random, which Hypothesis would rather draw itself.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

IDS = st.lists(st.integers(0, 70_000), min_size=1, max_size=6)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
CHANCES = st.floats(0, 1)


@st.composite
def tokenized_examples(draw: st.DrawFn, most: int = 6) -> list[TokenizedExample]:
    """Bare prompts, single completions, pairs and rankings, numbered in their order."""
    indices = sorted(draw(st.sets(st.integers(0, 2**40), max_size=most)))
    return [
        TokenizedExample(
            draw(IDS),
            tuple(draw(st.lists(IDS, max_size=4))),
            index,
            weight=draw(NUMBERS),
            margin=draw(st.none() | NUMBERS),
            win_probabilities=draw(st.none() | st.tuples(CHANCES, CHANCES)),
            is_desirable=draw(st.none() | st.booleans()),
        )
        for index in indices
    ]


def as_lists(example: TokenizedExample) -> TokenizedExample:
    """The example with its ids in lists, which alone are equal to lists."""
    ids = tuple([*ids] for ids in example.completion_ids)
    return dataclasses.replace(example, prompt_ids=[*example.prompt_ids], completion_ids=ids)


@given(tokenized_examples())
def test_flat_examples_are_what_they_were_made_of(examples: list[TokenizedExample]) -> None:
    flat = flattened(examples)
    assert [as_lists(example) for example in flat] == examples
    assert [as_lists(flat[place]) for place in range(-len(examples), 0)] == examples
    assert [as_lists(example) for example in flat[1::2]] == examples[1::2]
    assert len(flat) == len(examples)
    with pytest.raises(IndexError):
        flat[len(examples)]


@given(tokenized_examples(), st.integers(1, 4))
def test_it_does_not_matter_in_which_parts_they_were_flattened(examples: list[TokenizedExample], size: int) -> None:
    joined = FlatExamples.joined(flat_columns(part) for part in in_parts(examples, size))
    assert [as_lists(example) for example in joined] == examples


@given(tokenized_examples())
def test_columns_tell_what_the_examples_would(examples: list[TokenizedExample]) -> None:
    flat = flattened(examples)
    assert flat.prompt_lengths.tolist() == [len(example.prompt_ids) for example in examples]
    assert flat.num_tokens.tolist() == [example.num_tokens for example in examples] == num_tokens_of(examples).tolist()
    assert flat.most_completions == max((len(example.completion_ids) for example in examples), default=0)
    for name in ("margin", "win_probabilities"):
        assert has_column(flat, name) == has_column(examples, name)
    if all(example.completion_ids for example in examples):
        assert flat.first_lengths.tolist() == [len(example.completion_ids[0]) for example in examples]
        assert flat.last_lengths.tolist() == [len(example.completion_ids[-1]) for example in examples]


@given(tokenized_examples(), st.data())
def test_some_can_be_left_out_and_the_rest_reordered(examples: list[TokenizedExample], data: st.DataObject) -> None:
    places = range(len(examples))
    left_out = data.draw(st.sets(st.sampled_from(places)) if examples else st.just(set()))
    rest = [example for place, example in enumerate(examples) if place not in left_out]
    assert [as_lists(example) for example in flattened(examples).without(left_out)] == rest
    order = data.draw(st.permutations(places))
    reordered = Reordered(flattened(examples), order)
    assert [as_lists(example) for example in reordered] == [examples[place] for place in order]
    assert [as_lists(example) for example in reordered[:2]] == [examples[place] for place in order[:2]]


@pytest.mark.parametrize(("largest", "num_bytes"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4), (2**32 - 1, 4)])
def test_an_id_takes_the_bytes_that_the_largest_needs(largest: int, num_bytes: int) -> None:
    examples = [TokenizedExample([0, 1], ([2], [largest]), 0)]
    flat = flattened(examples)
    assert flat.columns["ids"].nbytes == 4 * num_bytes
    assert [as_lists(example) for example in flat] == examples


def test_ids_are_ints_of_python_and_do_not_overflow() -> None:
    prompt_ids = flattened([TokenizedExample([65_535, 1], ([2],), 0)])[0].prompt_ids
    assert prompt_ids[0] + prompt_ids[1] == 65_536
    assert {type(index) for index in prompt_ids} == {int}


def test_ids_of_all_examples_are_views_of_one_array() -> None:
    flat = flattened([TokenizedExample([number], ([number + 1],), number) for number in range(5)])
    assert all(np.shares_memory(np.asarray(example.prompt_ids), flat.columns["ids"]) for example in flat)

"""What is remembered of rows: names come back as they were, opposite judgements are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penchant.doctor.duplicates import words_of
from penchant.doctor.memory import RowMemory, Sources, joined, sides_of
from penchant.examples import Example, Pair, Ranking, Unpaired


def remembered(*examples: Example) -> RowMemory:
    memory = RowMemory()
    for example in examples:
        memory.add(example, [words_of(joined(side)) for side in sides_of(example)])
    return memory


@given(st.lists(st.one_of(st.text(), st.from_regex(r"[a-z.]{1,3}:[0-9]{1,25}( \+ b:[0-9]+)?"))))
def test_names_of_rows_come_back_as_they_were(names: list[str]) -> None:
    sources = Sources()
    for name in names:
        sources.append(name)
    assert [sources[place] for place in range(len(sources))] == names


def test_the_opposite_judgement_of_a_pair_contradicts_it_on_the_same_prompt_alone() -> None:
    memory = remembered(
        Pair("p", "a", "b"), Pair("q", "b", "a"), Pair("p", " b", "a "), Pair("p", "a", "c"),
        Ranking("q", ("a", "x", "b")),
    )  # fmt: skip
    assert memory.contradictions() == [0, 1, 2, 4]


def test_the_opposite_label_of_a_completion_contradicts_it_and_no_label_contradicts_nothing() -> None:
    memory = remembered(
        Unpaired("p", "a", True), Unpaired("p", "a", True), Unpaired("p", "b", None), Unpaired("p", "b", True),
        Unpaired("p", "c", False), Unpaired("p", "c", True),
    )  # fmt: skip
    assert memory.contradictions() == [4, 5]


def test_swapped_sides_are_no_repetition_and_labels_tell_completions_apart() -> None:
    long = "one answer that goes on for quite a while and says little"
    other = "another answer, which is about something else altogether"
    assert remembered(Pair("p q r", long, other), Pair("p q r", other, long)).repeats(0.8) == {}
    assert remembered(Unpaired("p", long, True), Unpaired("p", long, False)).repeats(0.8) == {}
    assert remembered(Unpaired("p", long, True), Unpaired("p", long, True)).repeats(0.8) == {1: 0}


def test_a_system_message_that_all_rows_share_makes_no_prompts_alike() -> None:
    system = {"role": "system", "content": "you are a helpful assistant and " * 30}
    asked = [[system, {"role": "user", "content": text}] for text in ("why is the sky blue", "who wrote Faust")]
    one, other = (remembered(Pair(prompt, "because", "nobody knows")) for prompt in asked)
    assert one.with_prompts_of(other, 0.9) == []
    assert one.with_prompts_of(one, 0.9) == [0]


def test_prompts_are_looked_for_among_those_of_others() -> None:
    ours = remembered(Pair("hi", "a", "b"), Pair("what is the time", "c", "d"))
    theirs = remembered(Pair("who are you", "a", "b"), Pair("hi", "x", "y"))
    assert ours.with_prompts_of(theirs, 0.9) == [0]
    assert theirs.with_prompts_of(ours, 0.9) == [1]
    assert ours.with_prompts_of(RowMemory(), 0.9) == []

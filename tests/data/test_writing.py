"""What is written reads back as the same examples; what a family cannot hold is refused, and no file is left."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.formats import examples_from_rows, read_examples
from penchant.data.writing import WRITTEN, write_rows
from penchant.errors import UserError
from penchant.examples import Example, Pair, Ranking, Unpaired
from tests.data.turns import NO, QUESTION, YES, assistant, said, user

PLAIN = Pair("p", " c\n", "r\u2028", weight=2.0, margin=0.0, win_probabilities=(0.75, 0.25))
CHAT = Pair([said("system", "S"), QUESTION, YES, user("Sure?")], [YES], [NO], margin=1.5)
LONG = Pair([QUESTION], [YES, user("Sure?"), YES], [NO])
JUDGED = Unpaired([QUESTION], [NO], False, weight=0.5)
CUT = Pair([QUESTION], [YES], [NO], finished=(True, False))
CUT_SINGLE = Unpaired([QUESTION], [NO], False, finished=(False,))
HOLDS: dict[str, list[Example]] = {
    "trl": [PLAIN, CHAT, LONG, JUDGED, CUT, CUT_SINGLE, Unpaired("p", "c", True), Unpaired("p", "c", None)],
    "sharegpt": [CHAT, JUDGED, CUT, CUT_SINGLE, Unpaired([QUESTION], [YES], None)],
    "openai": [CHAT, LONG, CUT],
}


def without_source(examples: list[Example]) -> list[Example]:
    return [replace(example, source="") for example in examples]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("family", WRITTEN)
def test_what_is_written_reads_back_as_it_was(family: str, name: str, tmp_path: Path) -> None:
    assert write_rows(HOLDS[family], tmp_path / name, family) == len(HOLDS[family])
    data = read_examples(tmp_path / name)
    assert without_source(data.examples) == HOLDS[family]
    assert data.problems == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_rows_are_those_that_the_other_programs_read(tmp_path: Path) -> None:
    pair = Pair([said("system", "S"), QUESTION], [YES], [NO], "f:1")
    system = {"from": "system", "value": "S"}
    rows = {
        "trl": {"prompt": [said("system", "S"), QUESTION], "chosen": [YES], "rejected": [NO]},
        "sharegpt": {
            "conversations": [system, {"from": "human", "value": "Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        "openai": {
            "input": {"messages": [said("system", "S"), QUESTION], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
    }
    for family, row in rows.items():
        write_rows([pair], tmp_path / "rows.jsonl", family)
        assert json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8")) == row
        assert examples_from_rows([row]).families == {family: 1}


CANNOT_HOLD: dict[str, tuple[str, Example, str]] = {
    "a ranking": ("trl", Ranking("p", ("a", "b")), "holds pairs and single completions, no rankings"),
    "a single completion as openai": ("openai", JUDGED, "holds pairs alone"),
    "text as sharegpt": ("sharegpt", PLAIN, "holds messages, no plain text"),
    "text as openai": ("openai", PLAIN, "holds messages, no plain text"),
    "a long completion as sharegpt": ("sharegpt", LONG, "holds completions of one message"),
    "text that would be read as a dialogue": (
        "trl",
        Pair("\n\nHuman: a\n\nAssistant:", "b", "c"),
        "would be read as another example",
    ),
    "a message with more than text": (
        "trl",
        Pair([{**QUESTION, "name": "ann"}], [YES], [NO]),
        "would be read as another example",
    ),
    "sides that are the same": (
        "trl",
        Pair("p", "c", "c"),
        "could not be read again: chosen and rejected are identical",
    ),
    "half a surrogate pair": ("openai", Pair([QUESTION], [assistant("\ud83d")], [NO]), "U+D83D"),
    "a margin below zero": ("trl", replace(PLAIN, margin=-1.0), "margin is -1"),
    "a weight that is no number": ("trl", replace(PLAIN, weight=float("nan")), "weight is not a finite number"),
}


@pytest.mark.parametrize("case", CANNOT_HOLD)
def test_an_example_that_the_family_cannot_hold_is_refused_and_the_old_file_stays(case: str, tmp_path: Path) -> None:
    family, example, words = CANNOT_HOLD[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(UserError) as fault:
        write_rows([CHAT, replace(example, source="f:7")], path, family)
    assert str(fault.value).startswith(f"f:7: cannot be written as {family}, ")
    assert words in str(fault.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def examples() -> Iterator[Example]:
        yield PLAIN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(examples(), tmp_path / "rows.jsonl.gz", "trl")
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_rows([PLAIN], tmp_path / name, "trl")
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert packed == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress(packed).count(b"\n") == 1


def test_wrong_words_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written as 'opnai'; did you mean 'openai'"):
        write_rows([], tmp_path / "rows.jsonl", "opnai")
    with pytest.raises(UserError, match=r"end in \.jsonl or \.jsonl\.gz"):
        write_rows([], tmp_path / "rows.csv", "trl")
    with pytest.raises(UserError, match="cannot be written"):
        write_rows([], tmp_path / "nowhere" / "rows.jsonl", "trl")


CONTENTS = st.text(min_size=1, max_size=6)
TURNS = st.lists(st.builds(user, CONTENTS), min_size=1, max_size=2)
ANSWERS = st.lists(st.builds(assistant, CONTENTS), min_size=1, max_size=2)


DRAWN = st.one_of(
    st.tuples(st.just(Pair), CONTENTS, CONTENTS, CONTENTS),
    st.tuples(st.just(Pair), TURNS, ANSWERS, ANSWERS, st.just(""), st.floats(0.1, 9), st.none() | st.floats(0, 9)),
    st.tuples(st.just(Unpaired), TURNS, ANSWERS, st.none() | st.booleans()),
)
"""A kind of example and its fields."""


@settings(max_examples=100, deadline=None)
@given(st.lists(DRAWN, max_size=4), st.sampled_from(WRITTEN))
def test_any_examples_read_back_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Any, ...]], family: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-rows.jsonl"
    written: list[Example] = []
    for kind, *fields in drawn:
        try:
            write_rows([kind(*fields)], path, family)
        except UserError:
            continue
        written.append(kind(*fields))
    if written:
        write_rows(written, path, family)
        assert without_source(read_examples(path).examples) == written


def test_flags_are_written_where_something_was_cut_off(tmp_path: Path) -> None:
    write_rows([replace(CUT, finished=(True, True)), CUT, CUT_SINGLE], tmp_path / "rows.jsonl", "trl")
    whole, cut, single = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert whole.keys() == {"prompt", "chosen", "rejected"}
    assert (cut["chosen_finished"], cut["rejected_finished"]) == (True, False)
    assert single["finished"] is False

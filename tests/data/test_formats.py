"""Rows one at a time or all together: each is an example or a coded problem, whatever it holds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.families import OTHERS, PAIRS
from penchant.data.formats import (
    CHECKS,
    ExampleData,
    RowProblem,
    examples_from_rows,
    read_examples,
    stream_examples,
    stream_rows,
)
from penchant.examples import Pair, Ranking, Unpaired
from tests.data.turns import GOOD_ROW


def test_pairs_single_completions_and_rankings_may_stand_in_one_file() -> None:
    single = {"prompt": "p", "completion": "c", "label": True}
    ranked = {"prompt": "p", "ranked_completions": ["a", "b"]}
    data = examples_from_rows([ranked, GOOD_ROW, single, ranked])
    assert [type(example) for example in data.examples] == [Ranking, Pair, Unpaired, Ranking]
    assert data.families == {"ranked": 2, "trl": 1, "unpaired": 1}


def test_rows_stream_one_at_a_time_with_their_family() -> None:
    asked = []

    def rows() -> Iterator[Any]:
        for row in (GOOD_ROW, {"question": "q"}, {"prompt": "p", "completion": ""}, 7):
            asked.append(row)
            yield row

    stream = stream_rows(rows(), "mine")
    assert asked == []
    assert next(stream) == ("trl", Pair("2 + 2 =", " 4", " 5", "mine[0]"))
    assert len(asked) == 1
    rest = [(family, found.source, isinstance(found, RowProblem) and found.code) for family, found in stream]
    assert rest == [("", "mine[1]", "D03"), ("unpaired", "mine[2]", "D06"), ("", "mine[3]", "D01")]


def test_what_is_read_at_once_is_what_streams(tmp_path: Path) -> None:
    rows = [GOOD_ROW, {"prompt": "p"}, {"prompt": "p", "completion": "c", "label": True}, GOOD_ROW]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed = list(stream_examples(path))
    data = read_examples(path)
    assert data.examples == [found for _, found in streamed if not isinstance(found, RowProblem)]
    assert data.problems == [found for _, found in streamed if isinstance(found, RowProblem)]
    assert [family for family, _ in streamed] == ["trl", "prompt only", "unpaired", "trl"]


def test_families_count_rows_the_most_frequent_first() -> None:
    alpaca = {"instruction": "i", "chosen": "c", "rejected": "r"}
    rows: list[dict[str, Any]] = [
        alpaca,
        GOOD_ROW,
        {"prompt": "p"},
        {**GOOD_ROW, "chosen": ""},
        GOOD_ROW,
        alpaca,
        {},
    ]
    assert list(examples_from_rows(rows).families.items()) == [("trl", 3), ("alpaca", 2), ("prompt only", 1)]


def test_no_rows_in_memory_is_no_fault() -> None:
    assert examples_from_rows([]) == ExampleData([], [], {})


def test_a_row_of_ten_megabytes_is_read() -> None:
    row = {**GOOD_ROW, "chosen": "word " * 2_000_000}
    assert examples_from_rows([row]).examples[0].completions == (row["chosen"], " 5")


KEYS = ["prompt", "chosen", "rejected", "conversations", "messages", "instruction", "input", "system", "history"]
KEYS += ["question", "chosen_response", "rejected_response", "preferred_output", "non_preferred_output", "tools"]
KEYS += ["completion", "output", "completions", "responses", "answers", "generations", "ranked_completions"]
NUMBERS = [
    "scores",
    "ratings",
    "rating",
    "ranks",
    "rank",
    "weight",
    "margin",
    "score_chosen",
    "score_rejected",
    "label",
    "kto_tag",
]
NUMBERS += ["chosen_win_probability", "rejected_win_probability"]
INNER = [*KEYS, *NUMBERS, "role", "content", "from", "value", "type", "text", "score", "tool_calls"]
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:"])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400)
VALUES = st.recursive(
    ATOMS | WORDS | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": WORDS, "content": WORDS}), max_size=3)
SIDES = VALUES | MESSAGES
LISTS = st.lists(MESSAGES | st.text(max_size=3) | st.fixed_dictionaries({"text": WORDS, "score": ATOMS}), max_size=3)
ROWS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(KEYS, SIDES | LISTS) | dict.fromkeys(NUMBERS, ATOMS | st.lists(ATOMS, max_size=3))
)
JSON = st.recursive(
    ATOMS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def check_any_row(row: Any, family: str | None = None) -> None:
    data = examples_from_rows([row], family=family)
    assert data.num_rows == 1
    for problem in data.problems:
        assert isinstance(problem, RowProblem)
        assert problem.code in CHECKS
        assert str(problem).encode("utf-8").decode().isprintable()
    for example in data.examples:
        assert len({isinstance(text, str) for text in (example.prompt, *example.completions)}) == 1
        assert math.isfinite(example.weight)
        assert example.weight > 0


@settings(max_examples=2000, deadline=None)
@given(JSON)
def test_any_json_value_is_an_example_or_a_problem(row: Any) -> None:
    check_any_row(row)


@settings(max_examples=700, deadline=None)
@given(VALUES | ROWS)
def test_any_value_under_the_keys_of_the_families_is_an_example_or_a_problem(row: Any) -> None:
    check_any_row(row)


@settings(max_examples=500, deadline=None)
@given(ROWS, st.sampled_from([family.name for family in PAIRS + OTHERS]))
def test_any_row_read_as_any_family_is_an_example_or_a_problem(row: Any, family: str) -> None:
    check_any_row(row, family)


COLUMN_VALUES = ATOMS | st.text(max_size=2) | st.lists(ATOMS, max_size=2) | st.floats(-2, 2)
FILLED_ROWS = st.sampled_from(
    [
        GOOD_ROW,
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "ranked_completions": ["a", "b"]},
        {"prompt": "p", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
    ]
)


@settings(max_examples=300, deadline=None)
@given(FILLED_ROWS, st.fixed_dictionaries({}, optional=dict.fromkeys(NUMBERS, COLUMN_VALUES)))
def test_any_value_in_an_optional_column_is_an_example_or_a_problem(row: dict[str, Any], columns: Any) -> None:
    check_any_row({**row, **columns})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3) | st.floats(-3, 3), min_size=2, max_size=8))
def test_a_ranking_is_sorted_by_score_and_keeps_each_score_with_its_completion(scores: list[float]) -> None:
    texts = [f"text {place}" for place in range(len(scores))]
    (ranking,) = examples_from_rows([{"prompt": "p", "completions": texts, "scores": scores}]).examples
    assert isinstance(ranking, Ranking)
    assert ranking.scores is not None
    assert all(better >= worse for better, worse in itertools.pairwise(ranking.scores))
    assert sorted(zip(ranking.completions, ranking.scores, strict=True)) == sorted(zip(texts, scores, strict=True))

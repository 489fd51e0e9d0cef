"""Row families become the pairs worked out by hand; a bad row becomes one coded problem, never an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.formats import CHECKS, PairData, RowProblem, pairs_from_rows, read_pairs
from penchant.types import Pair


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return said("user", content)


def assistant(content: str) -> dict[str, str]:
    return said("assistant", content)


GOOD_ROW = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
QUESTION, YES, NO = user("Is it?"), assistant("Yes."), assistant("No.")

GOOD_ROWS: dict[str, tuple[str, dict[str, Any], tuple[Any, Any, Any]]] = {
    "trl text": ("trl", GOOD_ROW, ("2 + 2 =", " 4", " 5")),
    "trl text keeps blanks and world text": (
        "trl",
        {"prompt": " Où ?\r\n", "chosen": "là\u2028", "rejected": "ici 🙂"},
        (" Où ?\r\n", "là\u2028", "ici 🙂"),
    ),
    "trl messages": (
        "trl",
        {"prompt": [said("system", "Be brief."), QUESTION], "chosen": [YES], "rejected": [NO]},
        ([said("system", "Be brief."), QUESTION], [YES], [NO]),
    ),
    "trl implicit prompt": (
        "trl",
        {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        ([QUESTION], [YES], [NO]),
    ),
    "trl implicit prompt of three turns": (
        "trl",
        {"chosen": [QUESTION, YES, user("Sure?"), YES], "rejected": [QUESTION, YES, user("Sure?"), NO]},
        ([QUESTION, YES, user("Sure?")], [YES], [NO]),
    ),
    "trl implicit prompt, completions of several turns": (
        "trl",
        {"chosen": [QUESTION, YES, user("Sure?"), YES], "rejected": [QUESTION, NO, user("Sure?"), YES]},
        ([QUESTION], [YES, user("Sure?"), YES], [NO, user("Sure?"), YES]),
    ),
    "trl implicit prompt, one answer begins the other": (
        "trl",
        {
            "chosen": [QUESTION, assistant("The sky is blue")],
            "rejected": [QUESTION, assistant("The sky is blue and")],
        },
        ([QUESTION], [assistant("The sky is blue")], [assistant("The sky is blue and")]),
    ),
    "trl messages that repeat the prompt": (
        "trl",
        {"prompt": [QUESTION], "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        ([QUESTION], [YES], [NO]),
    ),
    "trl prompt of messages, answers of text": (
        "trl",
        {"prompt": [QUESTION], "chosen": "Yes.", "rejected": "No."},
        ([QUESTION], [YES], [NO]),
    ),
    "trl prompt of text, answers of messages": (
        "trl",
        {"prompt": "Is it?", "chosen": [YES], "rejected": [NO]},
        ([QUESTION], [YES], [NO]),
    ),
    "ultrafeedback": (
        "trl",
        {
            "prompt": "Is it?",
            "prompt_id": "7f",
            "messages": [QUESTION, YES],
            "chosen": [QUESTION, YES],
            "rejected": [QUESTION, NO],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        ([QUESTION], [YES], [NO]),
    ),
    "ultrafeedback with a system message": (
        "trl",
        {
            "prompt": "Is it?",
            "chosen": [said("system", "S"), QUESTION, YES],
            "rejected": [said("system", "S"), QUESTION, NO],
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "trl text with a system column": (
        "trl",
        {"system": "S", "prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "text parts are joined and extra keys dropped": (
        "trl",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}],
                }
            ],
            "chosen": [{**YES, "name": "ann", "weight": 1}],
            "rejected": [NO],
        },
        ([QUESTION], [YES], [NO]),
    ),
    "tool turns": (
        "trl",
        {"prompt": [QUESTION, YES, said("tool", "42")], "chosen": [YES], "rejected": [NO]},
        ([QUESTION, YES, said("tool", "42")], [YES], [NO]),
    ),
    "text with a dialogue inside stays text": (
        "trl",
        {"prompt": "Go on.", "chosen": "a\n\nHuman: b", "rejected": "c"},
        ("Go on.", "a\n\nHuman: b", "c"),
    ),
    "hh": (
        "hh",
        {"chosen": "\n\nHuman: Is it?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it?\n\nAssistant: No."},
        ([QUESTION], [YES], [NO]),
    ),
    "hh of four turns with paragraphs": (
        "hh",
        {
            "chosen": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e\n\nf",
            "rejected": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: g",
        },
        ([user("a\n\nb"), assistant("c"), user("d")], [assistant("e\n\nf")], [assistant("g")]),
    ),
    "hh with turns of one role in a row": (
        "hh",
        {
            "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: e",
        },
        ([user("a\n\nb")], [assistant("c\n\nd")], [assistant("e")]),
    ),
    "hh with text before the first turn": (
        "hh",
        {
            "chosen": "S\n\nHuman: Is it?\n\nAssistant: Yes.",
            "rejected": "S\n\nHuman: Is it?\n\nAssistant: No.",
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "hh with a prompt that ends in the cue": (
        "hh",
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
        ([QUESTION], [YES], [NO]),
    ),
    "hh with a prompt without the cue": (
        "hh",
        {"prompt": "\n\nHuman: Is it?", "chosen": "\n\nAssistant: Yes.", "rejected": "No."},
        ([QUESTION], [YES], [NO]),
    ),
    "hh with a prompt that both sides repeat": (
        "hh",
        {
            "prompt": "Human: Is it?\n\nAssistant:",
            "chosen": "Human: Is it?\n\nAssistant: Yes.",
            "rejected": "Human: Is it?\n\nAssistant: No.",
        },
        ([QUESTION], [YES], [NO]),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Is it?"},
                {"from": "gpt", "value": "Yes."},
                {"from": "human", "value": "Sure?"},
            ],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        ([said("system", "S"), QUESTION, YES, user("Sure?")], [YES], [NO]),
    ),
    "sharegpt with a system column": (
        "sharegpt",
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "sharegpt whose own system message wins": (
        "sharegpt",
        {
            "system": "column",
            "conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        ([said("system", "own"), QUESTION], [YES], [NO]),
    ),
    "sharegpt in the spelling role, content": (
        "sharegpt",
        {"messages": [QUESTION], "chosen": YES, "rejected": NO},
        ([QUESTION], [YES], [NO]),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Is it?", "chosen": "Yes.", "rejected": "No."},
        ([QUESTION], [YES], [NO]),
    ),
    "alpaca with everything": (
        "alpaca",
        {
            "system": "S",
            "history": [["h1", "a1"], ["h2", "a2"]],
            "instruction": "Add",
            "input": "1 1",
            "chosen": "2",
            "rejected": "3",
        },
        (
            [said("system", "S"), user("h1"), assistant("a1"), user("h2"), assistant("a2"), user("Add\n1 1")],
            [assistant("2")],
            [assistant("3")],
        ),
    ),
    "alpaca with empty extras": (
        "alpaca",
        {
            "system": None,
            "history": None,
            "instruction": "Is it?",
            "input": "",
            "chosen": "Yes.",
            "rejected": "No.",
        },
        ([QUESTION], [YES], [NO]),
    ),
}

BAD_ROWS: dict[str, tuple[str, Any]] = {
    "a number": ("D01", 7),
    "null": ("D01", None),
    "a list": ("D01", [GOOD_ROW]),
    "text": ("D01", "prompt"),
    "no keys": ("D03", {}),
    "keys of another family": ("D03", {"question": "q", "good_answer": "g", "bad_answer": "b"}),
    "chosen missing": ("D02", {"prompt": "p", "rejected": "r"}),
    "rejected missing": ("D02", {"prompt": "p", "chosen": "c"}),
    "chosen null": ("D02", {**GOOD_ROW, "chosen": None}),
    "rejected null": ("D02", {**GOOD_ROW, "rejected": None}),
    "prompt null": ("D02", {**GOOD_ROW, "prompt": None}),
    "instruction null": ("D02", {"instruction": None, "chosen": "c", "rejected": "r"}),
    "hh side null": ("D02", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": None}),
    "chosen a number": ("D04", {**GOOD_ROW, "chosen": 3}),
    "prompt true": ("D04", {**GOOD_ROW, "prompt": True}),
    "a list of texts": ("D04", {**GOOD_ROW, "chosen": ["c"]}),
    "sides of two kinds": ("D04", {**GOOD_ROW, "chosen": [YES]}),
    "content a number": ("D04", {"prompt": [said("user", 5)], "chosen": [YES], "rejected": [NO]}),  # type: ignore[arg-type]
    "history of the wrong shape": (
        "D04",
        {"instruction": "i", "history": [["h"]], "chosen": "c", "rejected": "r"},
    ),
    "history a text": ("D04", {"instruction": "i", "history": "h", "chosen": "c", "rejected": "r"}),
    "input a number": ("D04", {"instruction": "i", "input": 5, "chosen": "c", "rejected": "r"}),
    "system a list": ("D04", {**GOOD_ROW, "system": []}),
    "hh side a list": ("D04", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": [NO]}),
    "identical texts": ("D05", {**GOOD_ROW, "rejected": " 4"}),
    "identical after strip": ("D05", {**GOOD_ROW, "rejected": "4\n"}),
    "identical messages": ("D05", {"prompt": [QUESTION], "chosen": [YES], "rejected": [YES]}),
    "identical conversations": ("D05", {"chosen": [QUESTION, YES], "rejected": [QUESTION, YES]}),
    "identical hh": (
        "D05",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b "},
    ),
    "chosen empty": ("D06", {**GOOD_ROW, "chosen": ""}),
    "rejected blank": ("D06", {**GOOD_ROW, "rejected": " \n\t"}),
    "chosen without messages": ("D06", {"prompt": [QUESTION], "chosen": [], "rejected": [NO]}),
    "implicit rejected without messages": ("D06", {"chosen": [QUESTION, YES], "rejected": []}),
    "a blank message": ("D06", {"prompt": [QUESTION], "chosen": [assistant(" ")], "rejected": [NO]}),
    "hh blank answer": (
        "D06",
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    ),
    "hh side empty": ("D06", {"chosen": "", "rejected": "\n\nHuman: a\n\nAssistant: b"}),
    "hh prompt repeated and nothing more": (
        "D06",
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "b"},
    ),
    "prompt empty": ("D07", {**GOOD_ROW, "prompt": ""}),
    "prompt blank": ("D07", {**GOOD_ROW, "prompt": "  "}),
    "prompt without messages": ("D07", {"prompt": [], "chosen": [YES], "rejected": [NO]}),
    "prompt with a blank last message": ("D07", {"prompt": [user("")], "chosen": [YES], "rejected": [NO]}),
    "alpaca blank": ("D07", {"instruction": "", "system": "S", "chosen": "c", "rejected": "r"}),
    "hh without a question": ("D07", {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}),
    "unknown role": ("D08", {"prompt": [said("wizard", "hm")], "chosen": [YES], "rejected": [NO]}),
    "role in upper case": ("D08", {"prompt": [said("User", "hm")], "chosen": [YES], "rejected": [NO]}),
    "role missing": ("D08", {"prompt": [{"content": "hm"}], "chosen": [YES], "rejected": [NO]}),
    "role an object": ("D08", {"prompt": [{"role": {}, "content": "hm"}], "chosen": [YES], "rejected": [NO]}),
    "content missing": ("D08", {"prompt": [QUESTION], "chosen": [{"role": "assistant"}], "rejected": [NO]}),
    "content null": (
        "D08",
        {"prompt": [{"role": "user", "content": None}], "chosen": [YES], "rejected": [NO]},
    ),
    "prompt ends with the assistant": ("D09", {"prompt": [QUESTION, YES], "chosen": [YES], "rejected": [NO]}),
    "implicit prompt ends with the assistant": (
        "D09",
        {"chosen": [QUESTION, YES, YES], "rejected": [QUESTION, YES, NO]},
    ),
    "roles reversed": ("D09", {"prompt": [YES], "chosen": [QUESTION], "rejected": [user("?")]}),
    "completion of the user": ("D10", {"prompt": [QUESTION], "chosen": [user("Yes.")], "rejected": [NO]}),
    "completion repeats another prompt": (
        "D10",
        {"prompt": [QUESTION], "chosen": [user("x"), YES], "rejected": [NO]},
    ),
    "completion ends with the user": (
        "D11",
        {"prompt": [QUESTION], "chosen": [YES, QUESTION], "rejected": [NO]},
    ),
    "hh ends with the human": (
        "D11",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
    ),
    "hh without an answer": ("D11", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"}),
    "NUL": ("D12", {**GOOD_ROW, "chosen": "a\0b"}),
    "lone surrogate": ("D12", {**GOOD_ROW, "prompt": "a\ud83d"}),
    "NUL in a message": ("D12", {"prompt": [QUESTION], "chosen": [YES], "rejected": [assistant("\0")]}),
    "trl unpaired": ("D13", {"prompt": "p", "completion": "c", "label": True}),
    "messages and label": ("D13", {"messages": [QUESTION, YES], "label": False}),
    "kto_tag": ("D13", {"conversations": [], "kto_tag": True}),
    "a supervised row": ("D13", {"instruction": "i", "output": "o"}),
    "prompt only": ("D14", {"prompt": "p"}),
    "prompt only, messages": ("D14", {"prompt": [QUESTION], "id": 5}),
    "implicit prompt in text": ("D15", {"chosen": "Paris is", "rejected": "Paris was"}),
    "one side begins the other": (
        "D15",
        {"chosen": [QUESTION, YES], "rejected": [QUESTION, YES, QUESTION, NO]},
    ),
    "questions differ": ("D16", {"chosen": [QUESTION, YES], "rejected": [user("Was it?"), NO]}),
    "later questions differ": (
        "D16",
        {"chosen": [QUESTION, YES, user("x"), YES], "rejected": [QUESTION, YES, user("y"), NO]},
    ),
    "prompt is not what the sides repeat": (
        "D16",
        {"prompt": "Was it?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    ),
    "hh questions differ": (
        "D16",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
    ),
    "an image": (
        "D17",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": [YES], "rejected": [NO]},
    ),
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_each_family_gives_the_pair_worked_out_by_hand(case: str) -> None:
    family, row, (prompt, chosen, rejected) = GOOD_ROWS[case]
    data = pairs_from_rows([row])
    assert data == PairData([Pair(prompt, chosen, rejected, "rows[0]")], [], {family: 1})


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_problem_and_its_neighbours_are_read(case: str) -> None:
    code, row = BAD_ROWS[case]
    data = pairs_from_rows([GOOD_ROW, row, GOOD_ROW], name="mine")
    assert [pair.source for pair in data.pairs] == ["mine[0]", "mine[2]"]
    assert [(problem.code, problem.source) for problem in data.problems] == [(code, "mine[1]")]
    assert data.num_rows == 3


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_in_a_file_is_named_by_its_line_and_explained_in_printable_text(case: str, tmp_path: Path) -> None:
    code, row = BAD_ROWS[case]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (GOOD_ROW, row, GOOD_ROW)), encoding="utf-8")
    data = read_pairs(path)
    assert len(data.pairs) == 2
    sentence = str(data.problems[0])
    assert sentence.startswith(f"{path}:2: [{code}] ")
    assert sentence.encode("utf-8").decode().isprintable()


BAD_LINES = {
    "half a line": '{"prompt": "p", "chosen": "c", "rej',
    "cut between fields": '{"prompt": "p",',
    "not JSON": "prompt,chosen,rejected",
    "two objects": "{} {}",
    "single quotes": "{'prompt': 'p'}",
    "a NUL byte": "\0",
    "a number too long": '{"prompt": ' + "1" * 5000 + "}",
    "brackets too deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_not_json_is_one_problem(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD_ROW)
    path.write_text(f"{good}\n\n{BAD_LINES[case]}\n{good}\n", encoding="utf-8")
    data = read_pairs(path)
    assert [pair.source for pair in data.pairs] == [f"{path}:1", f"{path}:4"]
    assert [(problem.code, problem.source) for problem in data.problems] == [("D01", f"{path}:3")]


def test_every_code_has_a_bad_row_and_no_other_code_is_given() -> None:
    assert {code for code, _ in BAD_ROWS.values()} == set(CHECKS)


def test_a_missing_field_and_the_keys_found_are_named() -> None:
    problems = pairs_from_rows([{"prompt": "p", "rejected": "r"}, {"question": "q", "a\ud800": 1}]).problems
    assert str(problems[0]) == "rows[0]: [D02] chosen is missing; fill it in or delete the row"
    assert "'question', 'a\\ud800'" in problems[1].message


def test_unpaired_and_prompt_only_rows_name_the_methods_that_want_them() -> None:
    problems = pairs_from_rows([{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p"}]).problems
    assert "KTO and BCO" in problems[0].message
    assert "online methods" in problems[1].message


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
    assert list(pairs_from_rows(rows).families.items()) == [("trl", 3), ("alpaca", 2), ("prompt only", 1)]


def test_no_rows_in_memory_is_no_fault() -> None:
    assert pairs_from_rows([]) == PairData([], [], {})


def test_a_row_of_ten_megabytes_is_read() -> None:
    row = {**GOOD_ROW, "chosen": "word " * 2_000_000}
    assert pairs_from_rows([row]).pairs[0].chosen == row["chosen"]


KEYS = [
    "prompt",
    "chosen",
    "rejected",
    "conversations",
    "messages",
    "instruction",
    "input",
    "system",
    "history",
]
KEYS += ["completion", "label", "kto_tag", "role", "content", "from", "value", "type", "text"]
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
SIDES = VALUES | st.lists(st.fixed_dictionaries({"role": WORDS, "content": WORDS}), max_size=3)
ROWS = VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS[:9], SIDES))


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_any_json_value_is_a_pair_or_a_problem(row: Any) -> None:
    data = pairs_from_rows([row])
    assert data.num_rows == 1
    for problem in data.problems:
        assert isinstance(problem, RowProblem)
        assert problem.code in CHECKS
        str(problem).encode("utf-8")
    for pair in data.pairs:
        assert len({isinstance(side, str) for side in (pair.prompt, pair.chosen, pair.rejected)}) == 1

"""A bad row becomes one coded problem with its place and a mend, never an exception, and its neighbours are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.data.formats import CHECKS, examples_from_rows, read_examples
from tests.data.turns import GOOD_ROW, NO, QUESTION, YES, assistant, said, user

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
    "prompt null": ("D15", {**GOOD_ROW, "prompt": None}),
    "instruction null": ("D15", {"instruction": None, "chosen": "c", "rejected": "r"}),
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
    "prompt only": ("D14", {"prompt": "p"}),
    "prompt only, messages": ("D14", {"prompt": [QUESTION], "id": 5}),
    "implicit prompt in text": ("D15", {"chosen": "Paris is", "rejected": "Paris was"}),
    "one side begins the other": (
        "D15",
        {"chosen": [QUESTION, YES], "rejected": [QUESTION, YES, QUESTION, NO]},
    ),
    "the other side begins one": (
        "D15",
        {"chosen": [QUESTION, YES, QUESTION, NO], "rejected": [QUESTION, YES]},
    ),
    "an answer against a question": (
        "D10",
        {"chosen": [QUESTION, user("Sure?"), YES], "rejected": [QUESTION, NO]},
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
    "ranked without a prompt": ("D15", {"prompt": None, "completions": ["a", "b"], "scores": [1, 2]}),
    "ranked with a null": ("D02", {"prompt": "p", "completions": ["a", None], "scores": [1, 2]}),
    "ranked with an object without text": (
        "D02",
        {"prompt": "p", "answers": [{"rank": 1}, {"answer": "a", "rank": 2}]},
    ),
    "ranked with a number": ("D04", {"prompt": "p", "completions": ["a", 7], "scores": [1, 2]}),
    "ranked text and messages": ("D04", {"prompt": [QUESTION], "completions": ["a", [YES]], "scores": [1, 2]}),
    "scores a number": ("D04", {"prompt": "p", "completions": ["a", "b"], "scores": 3}),
    "ranks an object": ("D04", {"prompt": "p", "completions": ["a", "b"], "ranks": {"a": 1, "b": 2}}),
    "ranked twice the same": ("D05", {"prompt": "p", "completions": ["a", "b", " a"], "scores": [1, 2, 3]}),
    "ranked conversations twice the same": (
        "D05",
        {"completions": [[QUESTION, YES], [QUESTION, NO], [QUESTION, YES]], "scores": [1, 2, 3]},
    ),
    "ranked and blank": ("D06", {"prompt": "p", "completions": ["a", " "], "scores": [1, 2]}),
    "ranked for a blank prompt": ("D07", {"prompt": " ", "completions": ["a", "b"], "scores": [1, 2]}),
    "ranked answer of a wizard": (
        "D08",
        {"prompt": [QUESTION], "completions": [[YES], [said("wizard", "hm")]], "scores": [1, 2]},
    ),
    "ranked after an assistant turn": ("D09", {"prompt": [QUESTION, YES], "completions": ["a", "b"], "scores": [1, 2]}),
    "ranked answer of the user": ("D10", {"prompt": [QUESTION], "completions": [[YES], [user("x")]], "scores": [1, 2]}),
    "ranked answer that goes on": (
        "D11",
        {"prompt": [QUESTION], "completions": [[YES], [NO, user("Why?")]], "scores": [1, 2]},
    ),
    "ranked NUL": ("D12", {"prompt": "p", "completions": ["a", "\0"], "scores": [1, 2]}),
    "ranked texts without a prompt": ("D15", {"completions": ["Paris is", "Paris was"], "scores": [1, 2]}),
    "ranked, one begins the others": (
        "D15",
        {"completions": [[QUESTION, YES], [QUESTION, YES, QUESTION, NO], [QUESTION, YES, NO]], "scores": [1, 2, 3]},
    ),
    "ranked answers to different questions": (
        "D16",
        {"completions": [[QUESTION, YES], [QUESTION, NO], [user("Was it?"), NO]], "scores": [1, 2, 3]},
    ),
    "unpaired without a prompt": ("D02", {"completion": "c", "label": True}),
    "unpaired without a completion": ("D02", {"prompt": "p", "completion": None, "label": True}),
    "a tag and nothing else": ("D02", {"kto_tag": True}),
    "output without instruction": ("D02", {"output": "o", "label": True}),
    "instruction without output": ("D02", {"instruction": "i", "output": None, "kto_tag": True}),
    "a conversation of text": ("D04", {"messages": "Is it?", "label": True}),
    "unpaired number": ("D04", {"prompt": "p", "completion": 3}),
    "a conversation without messages": ("D06", {"conversations": [], "kto_tag": True}),
    "a conversation with a blank end": ("D06", {"messages": [QUESTION, assistant("")], "label": True}),
    "unpaired blank": ("D06", {"prompt": "p", "completion": " "}),
    "unpaired without messages": ("D06", {"prompt": "p", "completion": []}),
    "unpaired that repeats the prompt alone": ("D06", {"prompt": "Is it?", "completion": [QUESTION], "label": True}),
    "a conversation of one answer": ("D07", {"messages": [YES], "label": True}),
    "a conversation that ends with two answers": ("D09", {"messages": [QUESTION, YES, NO], "label": True}),
    "a conversation that ends with a question": ("D11", {"messages": [QUESTION, YES, user("Why?")], "label": True}),
    "unpaired that repeats another prompt": (
        "D16",
        {"prompt": "Was it?", "completion": [QUESTION, YES], "label": True},
    ),
    "a flag of text": ("D29", {**GOOD_ROW, "chosen_finished": "no"}),
    "a list of flags for one completion": ("D29", {"prompt": "p", "completion": "c", "finished": [True]}),
    "fewer flags than completions": ("D29", {"prompt": "p", "ranked_completions": ["a", "b"], "finished": [True]}),
    "a flag among flags that is none": (
        "D29",
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], "finished": [True, 0.5]},
    ),
    "one flag for a list": ("D04", {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], "finished": True}),
    "a label of text": ("D18", {"prompt": "p", "completion": "c", "label": "true"}),
    "a label of two": ("D18", {"prompt": "p", "completion": "c", "label": 2}),
    "a label that is no number": ("D18", {"prompt": "p", "completion": "c", "label": float("nan")}),
    "a tag in a list": ("D18", {"messages": [QUESTION, YES], "kto_tag": [True]}),
    "completions in no known order": ("D19", {"prompt": "p", "completions": ["a", "b"]}),
    "objects in no known order": ("D19", {"prompt": "p", "responses": [{"text": "a"}, {"text": "b"}], "scores": None}),
    "no completion": ("D20", {"prompt": "p", "completions": [], "scores": []}),
    "a ranking of one": ("D20", {"prompt": "p", "ranked_completions": ["a"]}),
    "more scores than completions": ("D21", {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2, 3]}),
    "fewer ranks than completions": ("D21", {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2]}),
    "an object without a score": ("D21", {"prompt": "p", "answers": [{"text": "a", "score": 1}, {"text": "b"}]}),
    "a text among objects": ("D21", {"prompt": "p", "answers": [{"text": "a", "rank": 1}, "b"]}),
    "a score of null": ("D22", {"prompt": "p", "generations": ["a", "b"], "ratings": [1, None]}),
    "a score of text": ("D22", {"prompt": "p", "generations": ["a", "b"], "ratings": [1, "5"]}),
    "a score of true": ("D22", {"prompt": "p", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": True}]}),
    "an infinite score": ("D22", {"prompt": "p", "completions": ["a", "b"], "scores": [1, float("inf")]}),
    "a rank that is no number": ("D22", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, float("nan")]}),
    "scores too far apart": ("D22", {"prompt": "p", "completions": ["a", "b"], "scores": [1e308, -1e308]}),
    "ranks that tie": ("D23", {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 1]}),
    "weight of a pair": ("D24", {**GOOD_ROW, "weight": 0}),
    "weight of a completion": ("D24", {"prompt": "p", "completion": "c", "weight": -1}),
    "weight of a ranking": ("D24", {"prompt": "p", "ranked_completions": ["a", "b"], "weight": "1"}),
    "margin of text": ("D22", {**GOOD_ROW, "margin": "much"}),
    "margin below zero": ("D25", {**GOOD_ROW, "margin": -1}),
    "scores inverted": ("D25", {**GOOD_ROW, "score_chosen": 2, "score_rejected": 3}),
    "average ratings inverted": (
        "D25",
        {**GOOD_ROW, "chosen_avg_rating": 1.5, "rejected_avg_rating": 4.5},
    ),
    "half a win probability": ("D26", {**GOOD_ROW, "chosen_win_probability": 0.5}),
    "a win probability above one": ("D26", {**GOOD_ROW, "chosen_probs_win": 1.5, "chosen_probs_lose": 0.5}),
    "openai without input": ("D02", {"preferred_output": [YES], "non_preferred_output": [NO]}),
    "openai without messages": ("D02", {"input": {"messages": None}, "chosen": [YES], "rejected": [NO]}),
    "openai without an output": ("D02", {"input": {"messages": [QUESTION]}, "preferred_output": [YES]}),
    "openai whose input is text": ("D04", {"input": "p", "preferred_output": [YES], "non_preferred_output": [NO]}),
    "openai outputs identical": (
        "D05",
        {"input": {"messages": [QUESTION]}, "preferred_output": [YES], "non_preferred_output": [YES]},
    ),
    "openai output empty": (
        "D06",
        {"input": {"messages": [QUESTION]}, "preferred_output": [YES], "non_preferred_output": []},
    ),
    "openai prompt empty": (
        "D07",
        {"input": {"messages": []}, "preferred_output": [YES], "non_preferred_output": [NO]},
    ),
    "openai output of the user": (
        "D10",
        {"input": {"messages": [QUESTION]}, "preferred_output": [user("x")], "non_preferred_output": [NO]},
    ),
    "openai with tools": (
        "D27",
        {
            "input": {"messages": [QUESTION], "tools": [{"type": "function"}]},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
    ),
    "a column of tools": ("D27", {**GOOD_ROW, "tools": '[{"name": "clock"}]'}),
    "a call of a tool": (
        "D27",
        {"prompt": [QUESTION], "chosen": [{**assistant(""), "tool_calls": [{"id": "1"}]}], "rejected": [NO]},
    ),
    "argilla, one response null": ("D02", {"instruction": "i", "chosen_response": "c", "rejected_response": None}),
    "argilla, one response blank": ("D06", {"input": "i", "chosen_response": "c", "rejected_response": " "}),
    "a question that is a number": ("D04", {"question": 7, "chosen": "c", "rejected": "r"}),
    "a question that is blank": ("D07", {"question": "", "system": "S", "chosen": "c", "rejected": "r"}),
    "a question that the sides do not repeat": (
        "D16",
        {"question": "Was it?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    ),
    "a label and no completion": ("D02", {"prompt": "p", "label": True}),
    "a completion that is a conversation without an answer": ("D11", {"completion": [QUESTION], "label": True}),
    "a rating for all": ("D04", {"input": "i", "generations": ["a", "b"], "rating": 4}),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_problem_and_its_neighbours_are_read(case: str) -> None:
    code, row = BAD_ROWS[case]
    data = examples_from_rows([GOOD_ROW, row, GOOD_ROW], name="mine")
    assert [example.source for example in data.examples] == ["mine[0]", "mine[2]"]
    assert [(problem.code, problem.source) for problem in data.problems] == [(code, "mine[1]")]
    assert data.num_rows == 3


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_in_a_file_is_named_by_its_line_and_explained_in_printable_text(case: str, tmp_path: Path) -> None:
    code, row = BAD_ROWS[case]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (GOOD_ROW, row, GOOD_ROW)), encoding="utf-8")
    data = read_examples(path)
    assert len(data.examples) == 2
    sentence = str(data.problems[0])
    assert sentence.startswith(f"{path}:2: [{code}] ")
    assert sentence.encode("utf-8").decode().isprintable()
    assert ";" in sentence, "says no mend"


BAD_LINES = {
    "half a line": '{"prompt": "p", "chosen": "c", "rej',
    "cut between fields": '{"prompt": "p",',
    "not JSON": "prompt,chosen,rejected",
    "two objects": "{} {}",
    "single quotes": "{'prompt': 'p'}",
    "a NUL byte": "\0",
    "text that is not UTF-8": '{"prompt": "\udcff"}',
    "a number too long": '{"prompt": ' + "1" * 5000 + "}",
    "brackets too deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_not_json_is_one_problem(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD_ROW)
    content = f"{good}\n\n{BAD_LINES[case]}\n{good}\n"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    data = read_examples(path)
    assert [example.source for example in data.examples] == [f"{path}:1", f"{path}:4"]
    assert [(problem.code, problem.source) for problem in data.problems] == [("D01", f"{path}:3")]
    assert ";" in data.problems[0].message, "says no mend"


def test_every_code_has_a_bad_row_and_no_other_code_is_given() -> None:
    elsewhere = {"D13", "D28"}  # a row without a label can be read; lines alone have a length
    assert {code for code, _ in BAD_ROWS.values()} == set(CHECKS) - elsewhere


def test_a_missing_field_and_the_keys_found_are_named() -> None:
    problems = examples_from_rows([{"prompt": "p", "rejected": "r"}, {"question": "q", "a\ud800": 1}]).problems
    assert str(problems[0]) == "rows[0]: [D02] chosen is missing or null; fill it in or delete the row"
    assert "'question', 'a\\ud800'" in problems[1].message


def test_prompt_only_rows_name_the_methods_that_want_them() -> None:
    (problem,) = examples_from_rows([{"prompt": "p"}]).problems
    assert "online methods" in problem.message


SENTENCES: dict[str, tuple[dict[str, Any], str]] = {
    "a pair": ({**GOOD_ROW, "rejected": ""}, "[D06] rejected is empty; fill it in or delete the row"),
    "one completion": (
        {"prompt": "p", "completion": ""},
        "[D06] completion is empty; fill it in or delete the row",
    ),
    "a conversation": (
        {"messages": [QUESTION, YES, QUESTION]},
        "[D11] messages ends with a user turn; cut it off or add the answer",
    ),
    "a conversation with a blank end": (
        {"messages": [QUESTION, assistant(" ")]},
        "[D06] the last turn of messages is empty; fill it in or delete the row",
    ),
    "a ranking, in the order of the row": (
        {"prompt": "p", "completions": ["a", "", "c"], "scores": [1, 2, 3]},
        "[D06] completion 2 of 3 is empty; fill it in or delete the row",
    ),
    "identical sides": (
        {**GOOD_ROW, "rejected": "4"},
        "[D05] chosen and rejected are identical, so nothing is preferred; delete the row",
    ),
    "identical completions of many": (
        {"prompt": "p", "completions": ["a", "b", "a "], "scores": [3, 2, 1]},
        "[D05] completion 1 of 3 and completion 3 of 3 are identical, so nothing is preferred; delete one of the two",
    ),
    "a label": (
        {"prompt": "p", "completion": "c", "label": "good"},
        "[D18] label is text; write true for a desirable completion, false for the others",
    ),
    "lengths": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1]},
        "[D21] scores and completions differ in length, 1 against 2; make them agree",
    ),
    "a number missing inside": (
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
        "[D21] completion 2 of 2 has no rank, though others have; add it or drop the completion",
    ),
    "tied ranks": (
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]},
        "[D23] completion 1 of 2 and completion 2 of 2 share rank 1; give each its own, give scores instead,"
        " or drop one of the two",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_problem_names_the_completion_and_the_mend(case: str) -> None:
    row, sentence = SENTENCES[case]
    (problem,) = examples_from_rows([row]).problems
    assert str(problem) == f"rows[0]: {sentence}"


def test_a_list_in_no_known_order_says_which_columns_would_order_it() -> None:
    (problem,) = examples_from_rows([{"prompt": "p", "generations": ["a", "b"]}]).problems
    assert problem.code == "D19"
    for word in ("generations", "scores", "ranks", "ranked_completions"):
        assert word in problem.message

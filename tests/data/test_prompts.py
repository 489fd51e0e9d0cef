"""Prompts come out of rows of every shape, once each, and rows without one become problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.data.formats import RowProblem, examples_from_rows
from penchant.data.prompts import PromptData, read_prompts
from penchant.errors import UserError
from penchant.examples import Prompt
from tests.data.test_families import GOOD_ROWS, RANKED_ROWS, UNPAIRED_ROWS
from tests.data.turns import GOOD_ROW, NO, QUESTION, YES, assistant, said, user

ROWS_WITH_COMPLETIONS = {
    **{name: row for name, (_, row, _) in GOOD_ROWS.items()},
    **{name: row for name, (row, *_) in {**UNPAIRED_ROWS, **RANKED_ROWS}.items()},
}
SYSTEM = said("system", "Be brief.")

PROMPTS_ALONE: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({"prompt": " 2 + 2 = "}, " 2 + 2 = "),
    "text with a system column": ({"prompt": "Is it?", "system": "Be brief."}, [SYSTEM, QUESTION]),
    "text with an empty system column": ({"prompt": "Is it?", "system": ""}, "Is it?"),
    "messages": ({"prompt": [SYSTEM, QUESTION]}, [SYSTEM, QUESTION]),
    "hh": ({"prompt": "\n\nHuman: Is it?\n\nAssistant:"}, [QUESTION]),
    "instruction": ({"instruction": "Is it?"}, [QUESTION]),
    "instruction with input": ({"instruction": "Sum up:", "input": "abc"}, [user("Sum up:\nabc")]),
    "instruction with history": (
        {"instruction": "Sure?", "history": [["Is it?", "Yes."]]},
        [QUESTION, YES, user("Sure?")],
    ),
    "question with a system column": ({"question": "Is it?", "system": "Be brief."}, [SYSTEM, QUESTION]),
    "question with an answer of another name": ({"question": "Is it?", "answer": "Yes."}, [QUESTION]),
    "input": ({"input": "Is it?"}, [QUESTION]),
    "openai": ({"input": {"messages": [SYSTEM, QUESTION]}}, [SYSTEM, QUESTION]),
    "conversation": ({"messages": [QUESTION, YES, user("Sure?")]}, [QUESTION, YES, user("Sure?")]),
    "conversation that ends with an answer": (
        {"messages": [QUESTION, YES, user("Sure?"), NO]},
        [QUESTION, YES, user("Sure?")],
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Is it?"}], "system": "Be brief."}, [SYSTEM, QUESTION]),
    "a label without a completion": ({"prompt": "Is it?", "label": True}, "Is it?"),
    "an empty output": ({"instruction": "Is it?", "output": ""}, [QUESTION]),
    "null completions": ({"prompt": "Is it?", "chosen": None, "rejected": None}, "Is it?"),
}


@pytest.mark.parametrize("case", ROWS_WITH_COMPLETIONS)
def test_a_row_of_preferences_gives_the_prompt_that_training_sees(case: str) -> None:
    row = ROWS_WITH_COMPLETIONS[case]
    (example,) = examples_from_rows([row]).examples
    assert read_prompts([row]) == PromptData([Prompt(example.prompt, "data[0]")], [], 1, 0)


@pytest.mark.parametrize("case", PROMPTS_ALONE)
def test_a_prompt_alone_is_read_as_worked_out_by_hand(case: str) -> None:
    row, prompt = PROMPTS_ALONE[case]
    assert read_prompts([row]).prompts == [Prompt(prompt, "data[0]")]


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD_ROW, "rejected": GOOD_ROW["chosen"]},
        {**GOOD_ROW, "chosen": ""},
        {**GOOD_ROW, "rejected": "a\0b"},
        {**GOOD_ROW, "score_chosen": 1, "score_rejected": 2},
        {**GOOD_ROW, "weight": -1},
        {"prompt": GOOD_ROW["prompt"], "completions": ["a", "b"]},
    ],
)
def test_faults_of_the_completions_do_not_spoil_the_prompt(row: dict[str, Any]) -> None:
    assert len(examples_from_rows([row]).problems) == 1
    assert read_prompts([row]).prompts == [Prompt(GOOD_ROW["prompt"], "data[0]")]


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("D01", 5),
        ("D02", {"instruction": None, "prompt": None, "system": "S", "output": "a"}),
        ("D03", {"text": "Is it?"}),
        ("D04", {"prompt": 5}),
        ("D04", {"messages": "Is it?"}),
        ("D07", {"prompt": " "}),
        ("D07", {"messages": []}),
        ("D07", {"messages": [YES]}),
        ("D08", {"prompt": [said("wizard", "hm")]}),
        ("D09", {"prompt": [QUESTION, YES]}),
        ("D09", {"messages": [QUESTION, YES, NO]}),
        ("D12", {"prompt": "a\0b"}),
        ("D15", {"chosen": "a", "rejected": "b"}),
        ("D27", {"prompt": "Is it?", "tools": [{"name": "f"}]}),
    ],
)
def test_rows_without_a_usable_prompt_are_problems_with_the_codes_of_rows(code: str, row: Any) -> None:
    data = read_prompts([row], name="mine")
    assert (data.prompts, [(problem.code, problem.source) for problem in data.problems]) == ([], [(code, "mine[0]")])


def test_a_repeated_prompt_stands_once_at_its_first_place() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {**GOOD_ROW, "prompt": "a"}, {"prompt": ""}, {"instruction": "a"}]
    data = read_prompts(rows)
    assert data.prompts == [Prompt("a", "data[0]"), Prompt("b", "data[1]"), Prompt([user("a")], "data[4]")]
    assert (data.num_rows, data.num_repeated, len(data.problems)) == (5, 1, 1)


def test_prompts_of_a_file_name_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([json.dumps({"prompt": "a"}), "{", "", json.dumps({"prompt": "b"})]))
    for source in (file, str(file)):
        data = read_prompts(source)
        assert data.prompts == [Prompt("a", f"{file}:1"), Prompt("b", f"{file}:4")]
        assert [(problem.code, problem.source) for problem in data.problems] == [("D01", f"{file}:2")]


def test_csv_files_give_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,system\nIs it?,\n"Is it?",Be brief.\n')
    assert [prompt.text for prompt in read_prompts(file).prompts] == ["Is it?", [SYSTEM, QUESTION]]


def test_a_family_that_is_named_reads_every_row() -> None:
    rows = [{"prompt": "Is it?", "instruction": "Was it?", "chosen": "Yes.", "rejected": "No."}, {"prompt": "p"}]
    assert read_prompts(rows[:1], family="alpaca").prompts == [Prompt([user("Was it?")], "data[0]")]
    (problem,) = read_prompts(rows[1:], family="ranked").problems
    assert problem == RowProblem("D14", "data[0]", problem.message)
    with pytest.raises(UserError, match="no row family 'ranekd'; did you mean 'ranked'"):
        read_prompts(rows, family="ranekd")


def test_a_prompt_alone_still_trains_nothing() -> None:
    (problem,) = examples_from_rows([{"prompt": "Is it?"}]).problems
    assert problem.code == "D14"
    assert "online methods train on prompts alone" in problem.message
    (problem,) = examples_from_rows([{"messages": [QUESTION]}]).problems
    assert problem.code == "D11"


def test_the_refusal_of_a_prompt_that_ends_with_an_answer_names_no_single_completion() -> None:
    (problem,) = read_prompts([{"prompt": [QUESTION, assistant("Perhaps")]}]).problems
    assert problem.message.startswith("the prompt ends with an assistant turn, which the completions would continue")

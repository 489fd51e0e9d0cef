"""Row families become the examples worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from penchant.data.columns import SCORES
from penchant.data.families import PAIRS
from penchant.data.formats import ExampleData, examples_from_rows, stream_examples, stream_rows
from penchant.errors import UserError
from penchant.examples import Pair, Ranking, Unpaired
from tests.data.turns import GOOD_ROW, NO, QUESTION, YES, assistant, said, user

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
    "tulu, the prompt is the last of several questions": (
        "trl",
        {
            "id": "7",
            "prompt": "Sure?",
            "chosen": [QUESTION, YES, user("Sure?"), YES],
            "rejected": [QUESTION, YES, user("Sure?"), NO],
            "chosen_model": "a",
            "rejected_model": "b",
        },
        ([QUESTION, YES, user("Sure?")], [YES], [NO]),
    ),
    "axolotl's argilla_chat, the prompt stands first in both": (
        "trl",
        {"dataset": "own", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO], "chosen_model": "a"},
        ([QUESTION], [YES], [NO]),
    ),
    "axolotl's prompt_pairs": (
        "trl",
        {"system": "", "prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
        ("Is it?", "Yes.", "No."),
    ),
    "axolotl's ultra": (
        "trl",
        {"system": "S", "prompt": "Is it?", "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "a null column is no column": (
        "trl",
        {"prompt": None, "completion": None, "chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
        ([QUESTION], [YES], [NO]),
    ),
    "openai": (
        "openai",
        {
            "input": {
                "messages": [said("system", "S"), QUESTION, YES, user("Sure?")],
                "tools": [],
                "parallel_tool_calls": True,
            },
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        ([said("system", "S"), QUESTION, YES, user("Sure?")], [YES], [NO]),
    ),
    "openai as text and single messages": (
        "openai",
        {"input": {"messages": "Is it?"}, "preferred_output": "Yes.", "non_preferred_output": "No."},
        ([QUESTION], [YES], [NO]),
    ),
    "argilla": (
        "argilla",
        {"source": "own", "instruction": "Is it?", "chosen_response": "Yes.", "rejected_response": "No."},
        ([QUESTION], [YES], [NO]),
    ),
    "argilla with a prompt": (
        "trl",
        {"prompt": "Is it?", "chosen_response": "Yes.", "rejected_response": "No."},
        ("Is it?", "Yes.", "No."),
    ),
    "distilabel's input beside the lists it came from": (
        "argilla",
        {
            "system": "S",
            "input": "Is it?",
            "chosen": "Yes.",
            "rejected": "No.",
            "generations": ["No.", "Yes."],
            "order": ["rejected", "chosen"],
            "rating": [2.0, 9.0],
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "axolotl's intel": (
        "intel",
        {"system": "S", "question": "Is it?", "chosen": "Yes.", "rejected": "No."},
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "a question that both sides repeat": (
        "intel",
        {
            "question": "Is it?",
            "chosen": [said("system", "S"), QUESTION, YES],
            "rejected": [said("system", "S"), QUESTION, NO],
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
    "alpaca with answers of messages": (
        "alpaca",
        {"instruction": "Is it?", "chosen": [YES], "rejected": NO},
        ([QUESTION], [YES], [NO]),
    ),
    "hh with a system column": (
        "hh",
        {
            "system": "S",
            "chosen": "\n\nHuman: Is it?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Is it?\n\nAssistant: No.",
        },
        ([said("system", "S"), QUESTION], [YES], [NO]),
    ),
}

UNPAIRED_ROWS: dict[str, tuple[dict[str, Any], Unpaired]] = {
    "trl text": (
        {"prompt": "2 + 2 =", "completion": " 4", "label": True},
        Unpaired("2 + 2 =", " 4", True, "rows[0]"),
    ),
    "trl messages": (
        {"prompt": [QUESTION], "completion": [NO], "label": False},
        Unpaired([QUESTION], [NO], False, "rows[0]"),
    ),
    "trl messages that repeat the prompt": (
        {"prompt": [QUESTION], "completion": [QUESTION, YES, user("Sure?"), NO], "label": False},
        Unpaired([QUESTION], [YES, user("Sure?"), NO], False, "rows[0]"),
    ),
    "a prompt of text that the messages repeat": (
        {"prompt": "Is it? ", "completion": [said("system", "S"), QUESTION, YES, user("Sure?"), YES], "label": 1},
        Unpaired([said("system", "S"), QUESTION], [YES, user("Sure?"), YES], True, "rows[0]"),
    ),
    "a prompt of text, an answer in one message": (
        {"prompt": "Is it?", "completion": YES, "label": True},
        Unpaired([QUESTION], [YES], True, "rows[0]"),
    ),
    "text with a system column": (
        {"system": "S", "prompt": "Is it?", "completion": "No.", "label": 0},
        Unpaired([said("system", "S"), QUESTION], [NO], False, "rows[0]"),
    ),
    "a prompt of dialogue text": (
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "completion": " Yes.", "label": True},
        Unpaired([QUESTION], [YES], True, "rows[0]"),
    ),
    "messages": (
        {"messages": [QUESTION, YES, user("Sure?"), NO], "label": False},
        Unpaired([QUESTION, YES, user("Sure?")], [NO], False, "rows[0]"),
    ),
    "messages beside a prompt, which is their first turn": (
        {"prompt": "Is it?", "messages": [QUESTION, YES, user("Sure?"), NO]},
        Unpaired([QUESTION, YES, user("Sure?")], [NO], None, "rows[0]", is_conversation=True),
    ),
    "conversations with a tag and a system column": (
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}],
            "kto_tag": True,
        },
        Unpaired([said("system", "S"), QUESTION], [YES], True, "rows[0]"),
    ),
    "alpaca with everything": (
        {
            "system": "S",
            "history": [["h1", "a1"]],
            "instruction": "Add",
            "input": "1 1",
            "output": "3",
            "kto_tag": False,
        },
        Unpaired(
            [said("system", "S"), user("h1"), assistant("a1"), user("Add\n1 1")], [assistant("3")], False, "rows[0]"
        ),
    ),
    "a question with its worked answer": (
        {"question": "Is it?", "answer": "Yes."},
        Unpaired([QUESTION], [YES], None, "rows[0]"),
    ),
    "alpaca without a label": (
        {"instruction": "Is it?", "input": "", "output": "Yes."},
        Unpaired([QUESTION], [YES], None, "rows[0]"),
    ),
    "a null label is none, and the tag beside it counts": (
        {"prompt": "p", "completion": "c", "label": None, "kto_tag": False, "weight": 2},
        Unpaired("p", "c", False, "rows[0]", 2.0),
    ),
    "a single completion says more than the list it came from": (
        {"prompt": "p", "completion": "c", "generations": ["c", "d"], "label": True},
        Unpaired("p", "c", True, "rows[0]"),
    ),
    "so does an output": (
        {"instruction": "Is it?", "output": "Yes.", "generations": ["Yes.", "No."]},
        Unpaired([QUESTION], [YES], None, "rows[0]"),
    ),
    "and a conversation": (
        {"messages": [QUESTION, YES], "generations": ["Yes.", "No."]},
        Unpaired([QUESTION], [YES], None, "rows[0]"),
    ),
    "axolotl's argilla for single completions": (
        {"system": "S", "instruction": "Is it?", "completion": "Yes.", "label": True},
        Unpaired([said("system", "S"), QUESTION], [YES], True, "rows[0]"),
    ),
    "axolotl's intel for single completions": (
        {"question": "Is it?", "completion": "No.", "label": False},
        Unpaired([QUESTION], [NO], False, "rows[0]"),
    ),
    "axolotl's argilla_chat for single completions": (
        {"completion": [QUESTION, NO], "label": False},
        Unpaired([QUESTION], [NO], False, "rows[0]"),
    ),
    "null columns of a table of many families": (
        {"prompt": "p", "chosen": None, "rejected": None, "completion": "c", "label": True, "kto_tag": None},
        Unpaired("p", "c", True, "rows[0]"),
    ),
}

RANKED_ROWS: dict[str, tuple[dict[str, Any], Ranking]] = {
    "completions and scores": (
        {"prompt": "p", "completions": ["low", "high", "mid"], "scores": [-1, 3, 0.5]},
        Ranking("p", ("high", "mid", "low"), "rows[0]", 1.0, (3.0, 0.5, -1.0)),
    ),
    "equal scores keep the order of the row": (
        {"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 2, 1, 2]},
        Ranking("p", ("b", "d", "a", "c"), "rows[0]", 1.0, (2.0, 2.0, 1.0, 1.0)),
    ),
    "responses and ranks": (
        {"prompt": "p", "responses": ["third", "first", "second"], "ranks": [3, 1, 2]},
        Ranking("p", ("first", "second", "third"), "rows[0]"),
    ),
    "answers and rank": (
        {"prompt": "p", "answers": ["second", "first"], "rank": [2.0, 1.0], "scores": None, "weight": 0.5},
        Ranking("p", ("first", "second"), "rows[0]", 0.5),
    ),
    "scores win over ranks": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]},
        Ranking("p", ("b", "a"), "rows[0]", 1.0, (2.0, 1.0)),
    ),
    "a list beside the completions wins over what stands in them": (
        {"prompt": "p", "completions": [{"text": "a", "score": 9}, {"text": "b", "score": 1}], "ranks": [2, 1]},
        Ranking("p", ("b", "a"), "rows[0]"),
    ),
    "best first by name": (
        {"prompt": "p", "ranked_completions": ["first", "second", "third"]},
        Ranking("p", ("first", "second", "third"), "rows[0]"),
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Is it?\n\nAssistant: ",
            "answers": [
                {"answer": "No.", "model": "a", "rank": 2.0},
                {"answer": "Yes.", "model": "b", "rank": 1.0},
                {"answer": "Maybe.", "model": "c", "rank": 3.0},
            ],
            "num_responses": 3,
        },
        Ranking([QUESTION], ([YES], [NO], [assistant("Maybe.")]), "rows[0]"),
    ),
    "ultrafeedback before it was made binary": (
        {
            "source": "own",
            "instruction": "Is it?",
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": "No.", "overall_score": 3.5, "critique": "Wrong."},
                {"model": "b", "response": "Yes.", "overall_score": 8.0, "critique": "Right."},
            ],
        },
        Ranking([QUESTION], ([YES], [NO]), "rows[0]", 1.0, (8.0, 3.5)),
    ),
    "distilabel": (
        {"system": "S", "instruction": "Is it?", "generations": ["No.", "Yes.", "Maybe."], "ratings": [1, 5, 3]},
        Ranking([said("system", "S"), QUESTION], ([YES], [assistant("Maybe.")], [NO]), "rows[0]", 1.0, (5.0, 3.0, 1.0)),
    ),
    "distilabel's input and rating": (
        {"system": "S", "input": "Is it?", "generations": ["No.", "Yes."], "rating": [2.0, 9.0]},
        Ranking([said("system", "S"), QUESTION], ([YES], [NO]), "rows[0]", 1.0, (9.0, 2.0)),
    ),
    "a prompt counts before an instruction": (
        {"prompt": "p", "instruction": "i", "completions": ["a", "b"], "ranks": [1, 2]},
        Ranking("p", ("a", "b"), "rows[0]"),
    ),
    "objects that say who wrote them": (
        {"prompt": "p", "completions": [{"from": "model 1", "text": "a", "rank": 2}, {"text": "b", "rank": 1}]},
        Ranking("p", ("b", "a"), "rows[0]"),
    ),
    "messages, one or a list": (
        {"prompt": [QUESTION], "completions": [NO, [YES, user("Sure?"), YES]], "scores": [0, 1]},
        Ranking([QUESTION], ([YES, user("Sure?"), YES], [NO]), "rows[0]", 1.0, (1.0, 0.0)),
    ),
    "messages that carry their scores": (
        {"prompt": [QUESTION], "responses": [{**NO, "score": 0}, {"from": "gpt", "value": "Yes.", "score": 1}]},
        Ranking([QUESTION], ([YES], [NO]), "rows[0]", 1.0, (1.0, 0.0)),
    ),
    "texts for a prompt of messages": (
        {"prompt": [QUESTION], "completions": ["No.", "Yes."], "scores": [0, 1]},
        Ranking([QUESTION], ([YES], [NO]), "rows[0]", 1.0, (1.0, 0.0)),
    ),
    "conversations that repeat the prompt": (
        {
            "prompt": "Is it?",
            "completions": [[QUESTION, NO], [QUESTION, YES], [QUESTION, assistant("Maybe.")]],
            "scores": [0, 2, 1],
        },
        Ranking([QUESTION], ([YES], [assistant("Maybe.")], [NO]), "rows[0]", 1.0, (2.0, 1.0, 0.0)),
    ),
    "conversations that imply the prompt": (
        {
            "completions": [
                [QUESTION, YES, user("Sure?"), NO],
                [QUESTION, YES, user("Sure?"), YES],
                [QUESTION, YES, user("Sure?"), assistant("Maybe.")],
            ],
            "ranks": [3, 1, 2],
        },
        Ranking([QUESTION, YES, user("Sure?")], ([YES], [assistant("Maybe.")], [NO]), "rows[0]"),
    ),
    **{
        f"an object with {key}": (
            {"prompt": "p", "completions": [{key: "a", "rating": 1}, {key: "b", "rating": 2}]},
            Ranking("p", ("b", "a"), "rows[0]", 1.0, (2.0, 1.0)),
        )
        for key in ("text", "response", "answer", "content", "completion")
    },
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_each_family_gives_the_pair_worked_out_by_hand(case: str) -> None:
    family, row, (prompt, chosen, rejected) = GOOD_ROWS[case]
    data = examples_from_rows([row])
    assert data == ExampleData([Pair(prompt, chosen, rejected, "rows[0]")], [], {family: 1})


@pytest.mark.parametrize("case", UNPAIRED_ROWS)
def test_one_completion_is_read_as_worked_out_by_hand(case: str) -> None:
    row, example = UNPAIRED_ROWS[case]
    assert examples_from_rows([row]) == ExampleData([example], [], {"unpaired": 1})


@pytest.mark.parametrize("case", RANKED_ROWS)
def test_a_list_of_completions_is_read_best_first_as_worked_out_by_hand(case: str) -> None:
    row, example = RANKED_ROWS[case]
    assert examples_from_rows([row]) == ExampleData([example], [], {"ranked": 1})


def test_ultrafeedback_gives_the_difference_of_its_scores_as_margin() -> None:
    row = {
        "prompt": "Is it?",
        "prompt_id": "7f",
        "messages": [QUESTION, YES],
        "chosen": [QUESTION, YES],
        "rejected": [QUESTION, NO],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    pair = Pair([QUESTION], [YES], [NO], "rows[0]", margin=6.5)
    assert examples_from_rows([row]) == ExampleData([pair], [], {"trl": 1})


@pytest.mark.parametrize("family", ["trl", "hh", "sharegpt", "openai", "argilla", "alpaca", "intel"])
def test_every_family_of_pairs_takes_the_optional_columns(family: str) -> None:
    row = next(row for name, row, _ in GOOD_ROWS.values() if name == family)
    columns = {"weight": 3, "margin": 0, "chosen_win_probability": 0.75, "rejected_win_probability": 0.25}
    (plain,), (pair,) = examples_from_rows([row]).examples, examples_from_rows([{**row, **columns}]).examples
    assert isinstance(plain, Pair)
    assert pair == Pair(plain.prompt, plain.chosen, plain.rejected, "rows[0]", 3.0, 0.0, (0.75, 0.25))


def test_flags_of_the_completions_go_with_them_into_their_order() -> None:
    row = {"prompt": "p", "completions": ["low", "high", "mid"], "scores": [1, 3, 2]}
    for flags, finished in {
        (True, True, False): (True, False, True),
        (False, 1, None): (True, True, False),
        (False, False, False): (False, False, False),
        (True, None, True): None,
    }.items():
        (ranking,) = examples_from_rows([{**row, "finished": list(flags)}]).examples
        assert ranking == Ranking("p", ("high", "mid", "low"), "rows[0]", 1.0, (3.0, 2.0, 1.0), finished)


def test_a_single_completion_and_the_sides_of_a_pair_have_a_flag_each() -> None:
    single = {"prompt": "p", "completion": "c", "label": True}
    for flag, finished in {True: None, False: (False,), None: None}.items():
        assert examples_from_rows([{**single, "finished": flag}]).examples == [
            Unpaired("p", "c", True, "rows[0]", finished=finished)
        ]
    (pair,) = examples_from_rows([{**GOOD_ROW, "rejected_finished": False}]).examples
    assert pair == Pair("2 + 2 =", " 4", " 5", "rows[0]", finished=(True, False))


@pytest.mark.parametrize(("chosen", "rejected"), SCORES)
def test_every_spelling_of_scores_gives_their_difference_as_margin(chosen: str, rejected: str) -> None:
    row = {"instruction": "Is it?", "chosen_response": "Yes.", "rejected_response": "No.", chosen: 4.75, rejected: 1.5}
    assert examples_from_rows([row]).examples == [Pair([QUESTION], [YES], [NO], "rows[0]", margin=3.25)]


def test_a_family_that_is_named_reads_every_row() -> None:
    row = {"prompt": "Is it?", "instruction": "Was it?", "chosen": "Yes.", "rejected": "No."}
    as_it_is, as_alpaca = (examples_from_rows([row], family=family) for family in (None, "alpaca"))
    assert as_it_is == ExampleData([Pair("Is it?", "Yes.", "No.", "rows[0]")], [], {"trl": 1})
    assert as_alpaca == ExampleData([Pair([user("Was it?")], [YES], [NO], "rows[0]")], [], {"alpaca": 1})


def test_rows_that_do_not_fit_the_named_family_are_problems() -> None:
    data = examples_from_rows([GOOD_ROW, {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}], family="ranked")
    assert [example.source for example in data.examples] == ["rows[1]"]
    assert [(problem.code, problem.source) for problem in data.problems] == [("D14", "rows[0]")]
    assert data.families == {"ranked": 2}


def test_an_unknown_family_is_refused_at_once_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no row family 'sharegtp'; did you mean 'sharegpt'"):
        stream_rows([], family="sharegtp")
    with pytest.raises(UserError, match=r"there are sharegpt, openai, .*, unpaired$"):
        stream_examples("no such file", family="prompt only")


def test_every_family_has_a_row_here() -> None:
    assert {name for name, _, _ in GOOD_ROWS.values()} == {family.name for family in PAIRS}

"""Row families become the examples worked out by hand; a bad row becomes one coded problem, never an exception."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data.formats import CHECKS, ExampleData, RowProblem, examples_from_rows, read_examples
from penchant.types import Pair, Ranking, Unpaired


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
    "ranked without a prompt": ("D02", {"prompt": None, "completions": ["a", "b"], "scores": [1, 2]}),
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
    "half a win probability": ("D26", {**GOOD_ROW, "chosen_win_probability": 0.5}),
    "a win probability above one": ("D26", {**GOOD_ROW, "chosen_probs_win": 1.5, "chosen_probs_lose": 0.5}),
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
        Unpaired([QUESTION, YES, user("Sure?")], [NO], None, "rows[0]"),
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


@pytest.mark.parametrize("family", ["trl", "hh", "sharegpt", "alpaca"])
def test_every_family_of_pairs_takes_the_optional_columns(family: str) -> None:
    row = next(row for name, row, _ in GOOD_ROWS.values() if name == family)
    columns = {"weight": 3, "margin": 0, "chosen_win_probability": 0.75, "rejected_win_probability": 0.25}
    (plain,), (pair,) = examples_from_rows([row]).examples, examples_from_rows([{**row, **columns}]).examples
    assert isinstance(plain, Pair)
    assert pair == Pair(plain.prompt, plain.chosen, plain.rejected, "rows[0]", 3.0, 0.0, (0.75, 0.25))


def test_pairs_single_completions_and_rankings_may_stand_in_one_file() -> None:
    single = {"prompt": "p", "completion": "c", "label": True}
    ranked = {"prompt": "p", "ranked_completions": ["a", "b"]}
    data = examples_from_rows([ranked, GOOD_ROW, single, ranked])
    assert [type(example) for example in data.examples] == [Ranking, Pair, Unpaired, Ranking]
    assert data.families == {"ranked": 2, "trl": 1, "unpaired": 1}


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
    data = read_examples(path)
    assert [example.source for example in data.examples] == [f"{path}:1", f"{path}:4"]
    assert [(problem.code, problem.source) for problem in data.problems] == [("D01", f"{path}:3")]


def test_every_code_has_a_bad_row_and_no_other_code_is_given() -> None:
    needs_training = {"D13"}  # a row without a label can be read
    assert {code for code, _ in BAD_ROWS.values()} == set(CHECKS) - needs_training


def test_a_missing_field_and_the_keys_found_are_named() -> None:
    problems = examples_from_rows([{"prompt": "p", "rejected": "r"}, {"question": "q", "a\ud800": 1}]).problems
    assert str(problems[0]) == "rows[0]: [D02] chosen is missing; fill it in or delete the row"
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
KEYS += ["completion", "output", "completions", "answers", "generations", "ranked_completions"]
NUMBERS = ["scores", "ranks", "weight", "margin", "score_chosen", "score_rejected", "label", "kto_tag"]
NUMBERS += ["chosen_win_probability", "rejected_win_probability"]
INNER = [*KEYS, *NUMBERS, "role", "content", "from", "value", "type", "text", "score", "rank"]
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
ROWS = VALUES | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(KEYS, SIDES | LISTS) | dict.fromkeys(NUMBERS, ATOMS | st.lists(ATOMS, max_size=3))
)


def check_any_row(row: Any) -> None:
    data = examples_from_rows([row])
    assert data.num_rows == 1
    for problem in data.problems:
        assert isinstance(problem, RowProblem)
        assert problem.code in CHECKS
        assert str(problem).encode("utf-8").decode().isprintable()
    for example in data.examples:
        assert len({isinstance(text, str) for text in (example.prompt, *example.completions)}) == 1
        assert math.isfinite(example.weight)
        assert example.weight > 0


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_any_json_value_is_an_example_or_a_problem(row: Any) -> None:
    check_any_row(row)


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

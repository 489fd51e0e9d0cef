"""Optional columns come out as plain numbers, or as one coded refusal that names the column and the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penchant.data.columns import FINISHED, finished_of, label_of, margin_of, number_of, weight_of, win_probabilities_of
from penchant.data.messages import RefusedError

Reader = Callable[[dict[str, Any]], Any]
READERS: dict[str, Reader] = {
    "label": label_of,
    "weight": weight_of,
    "margin": margin_of,
    "win probabilities": win_probabilities_of,
    "finished": lambda row: finished_of(row, FINISHED),
}

GOOD: list[tuple[str, dict[str, Any], Any]] = [
    ("label", {}, None),
    ("label", {"label": None, "kto_tag": None}, None),
    ("label", {"label": True}, True),
    ("label", {"label": False}, False),
    ("label", {"label": 1}, True),
    ("label", {"label": 0}, False),
    ("label", {"label": 1.0}, True),
    ("label", {"kto_tag": False}, False),
    ("label", {"label": False, "kto_tag": True}, False),
    ("label", {"label": None, "kto_tag": True}, True),
    ("weight", {}, 1.0),
    ("weight", {"weight": None}, 1.0),
    ("weight", {"weight": 2}, 2.0),
    ("weight", {"weight": 0.25}, 0.25),
    ("margin", {}, None),
    ("margin", {"margin": None, "score_chosen": None, "score_rejected": None}, None),
    ("margin", {"margin": 0}, 0.0),
    ("margin", {"margin": 1.5}, 1.5),
    ("margin", {"score_chosen": 8, "score_rejected": 5.5}, 2.5),
    ("margin", {"score_chosen": -3, "score_rejected": -3}, 0.0),
    ("margin", {"chosen_score": 1, "rejected_score": -2}, 3.0),
    ("margin", {"chosen_rating": 5, "rejected_rating": 4}, 1.0),
    ("margin", {"chosen-rating": 4.75, "rejected-rating": 4.5}, 0.25),
    ("margin", {"margin": 7, "score_chosen": 2, "score_rejected": 1}, 7.0),
    ("margin", {"score_chosen": 2}, None),
    ("margin", {"score_rejected": 2, "chosen_score": 9}, None),
    ("margin", {"score_chosen": None, "score_rejected": 4, "chosen_score": 3, "rejected_score": 1}, 2.0),
    ("win probabilities", {}, None),
    ("win probabilities", {"chosen_win_probability": None, "rejected_win_probability": None}, None),
    ("win probabilities", {"chosen_win_probability": 0.75, "rejected_win_probability": 0.5}, (0.75, 0.5)),
    ("win probabilities", {"chosen_probs_win": 1, "chosen_probs_lose": 0}, (1.0, 0.0)),
    (
        "win probabilities",
        {"chosen_win_probability": None, "chosen_probs_win": 0.5, "chosen_probs_lose": 0.5},
        (0.5, 0.5),
    ),
    ("finished", {}, None),
    ("finished", {"chosen_finished": None, "rejected_finished": None}, None),
    ("finished", {"chosen_finished": True, "rejected_finished": True}, None),
    ("finished", {"chosen_finished": True, "rejected_finished": False}, (True, False)),
    ("finished", {"chosen_finished": 0, "rejected_finished": 1.0}, (False, True)),
    ("finished", {"rejected_finished": False}, (True, False)),
]

BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("finished", {"chosen_finished": "yes"}, "D29", "chosen_finished is text"),
    ("finished", {"chosen_finished": True, "rejected_finished": 2}, "D29", "rejected_finished is another number"),
    ("finished", {"rejected_finished": [False]}, "D29", "rejected_finished is a list"),
    ("label", {"label": 2}, "D18", "label is another number than 0 and 1"),
    ("label", {"label": -1}, "D18", "label is another number than 0 and 1"),
    ("label", {"label": 0.5}, "D18", "label is another number than 0 and 1"),
    ("label", {"label": float("nan")}, "D18", "label is another number than 0 and 1"),
    ("label", {"label": "true"}, "D18", "label is text"),
    ("label", {"label": []}, "D18", "label is a list"),
    ("label", {"kto_tag": {"value": True}}, "D18", "kto_tag is an object"),
    ("weight", {"weight": 0}, "D24", "weight is 0"),
    ("weight", {"weight": -2.5}, "D24", "weight is -2.5"),
    ("weight", {"weight": True}, "D24", "weight is true or false"),
    ("weight", {"weight": "2"}, "D24", "weight is text"),
    ("weight", {"weight": float("inf")}, "D24", "weight is not a finite number"),
    ("weight", {"weight": float("nan")}, "D24", "weight is not a finite number"),
    ("weight", {"weight": 10**400}, "D24", "weight is not a finite number"),
    ("margin", {"margin": "1"}, "D22", "margin is text"),
    ("margin", {"margin": False}, "D22", "margin is true or false"),
    ("margin", {"margin": [1]}, "D22", "margin is a list"),
    ("margin", {"margin": float("-inf")}, "D22", "margin is not a finite number"),
    ("margin", {"score_chosen": "8", "score_rejected": 1}, "D22", "score_chosen is text"),
    ("margin", {"score_chosen": 8, "score_rejected": True}, "D22", "score_rejected is true or false"),
    ("margin", {"rejected_score": {}}, "D22", "rejected_score is an object"),
    ("margin", {"chosen_rating": float("nan"), "rejected_rating": 1}, "D22", "chosen_rating is not a finite number"),
    (
        "margin",
        {"score_chosen": 1e308, "score_rejected": -1e308},
        "D22",
        "the difference of score_chosen and score_rejected is not a finite number",
    ),
    ("margin", {"margin": -0.5}, "D25", "margin is -0.5, so rejected would be better; swap chosen and rejected"),
    ("margin", {"score_chosen": 1, "score_rejected": 2.5}, "D25", "score_chosen is 1 and score_rejected 2.5"),
    ("margin", {"chosen-rating": 1, "rejected-rating": 2}, "D25", "chosen-rating is 1 and rejected-rating 2"),
    ("margin", {"margin": 1, "chosen_score": 1, "rejected_score": 2}, "D25", "chosen_score is 1"),
    ("win probabilities", {"chosen_win_probability": 0.5}, "D26", "stands without rejected_win_probability"),
    ("win probabilities", {"chosen_probs_lose": 0.5}, "D26", "chosen_probs_lose stands without chosen_probs_win"),
    (
        "win probabilities",
        {"chosen_win_probability": 0.5, "chosen_probs_lose": 0.5},
        "D26",
        "stands without rejected_win_probability",
    ),
    ("win probabilities", {"chosen_probs_win": 1.25, "chosen_probs_lose": 0}, "D26", "chosen_probs_win is 1.25"),
    ("win probabilities", {"chosen_probs_win": 1, "chosen_probs_lose": -0.1}, "D26", "chosen_probs_lose is -0.1"),
    (
        "win probabilities",
        {"chosen_probs_win": True, "chosen_probs_lose": 0},
        "D26",
        "chosen_probs_win is true or fals",
    ),
    ("win probabilities", {"chosen_probs_win": 1, "chosen_probs_lose": "0"}, "D26", "chosen_probs_lose is text"),
    ("win probabilities", {"chosen_probs_win": float("nan"), "chosen_probs_lose": 0}, "D26", "is not a finite number"),
]


@pytest.mark.parametrize(("reader", "row", "value"), GOOD)
def test_a_column_gives_the_value_worked_out_by_hand(reader: str, row: dict[str, Any], value: Any) -> None:
    found = READERS[reader](row)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("reader", "row", "code", "words"), BAD)
def test_a_column_that_cannot_be_meant_is_refused_by_name(
    reader: str, row: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        READERS[reader](row)
    assert refused.value.code == code
    assert words in str(refused.value)
    assert "; " in str(refused.value) or ": " in str(refused.value), "says no mend"


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert number_of(numpy.float32(0.5), "score") == 0.5
    assert type(number_of(numpy.int64(3), "score")) is float

"""Rows of CSV: types where JSON has them, quoted texts of many lines, and a named problem for a row that is broken."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from penchant.data.files import read_rows
from penchant.data.formats import read_examples
from penchant.data.streams import Unreadable
from penchant.errors import UserError
from penchant.examples import Pair, Unpaired
from tests.data.turns import NO, QUESTION, YES

HEADER = "prompt,chosen,rejected\n"


def written(tmp_path: Path, text: str, name: str = "data.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_texts_stay_as_they_are_and_rows_are_named_by_the_line_they_begin_in(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'a\n\nb, "c"', "chosen": "", "rejected": " 5 "},
        {"prompt": "true", "chosen": "7", "rejected": "[brackets, no list"},
    ]
    path = written(tmp_path, as_csv(rows))
    assert list(read_rows(path)) == [(f"{path}:2", rows[0]), (f"{path}:5", rows[1])]


def test_lists_and_objects_of_json_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": json.dumps([QUESTION]), "chosen": json.dumps(YES), "rejected": " " + json.dumps([NO])}]
    path = written(tmp_path, as_csv(rows))
    assert read_examples(path).examples == [Pair([QUESTION], [YES], [NO], f"{path}:2")]


def test_columns_of_numbers_are_numbers_and_nothing_where_they_are_empty(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER[:-1] + ",score_chosen,score_rejected,weight\np,c,r,8.5,2,\np,c,r,,,0.5\n")
    assert read_examples(path).examples == [
        Pair("p", "c", "r", f"{path}:2", margin=6.5),
        Pair("p", "c", "r", f"{path}:3", weight=0.5),
    ]


@pytest.mark.parametrize(("text", "label"), [("true", True), ("False", False), ("1", True), ("0.0", False), ("", None)])
def test_a_label_in_text_is_a_label(text: str, label: bool | None, tmp_path: Path) -> None:
    path = written(tmp_path, f"prompt,completion,label\np,c,{text}\n")
    assert read_examples(path).examples == [Unpaired("p", "c", label, f"{path}:2")]


def test_tabs_separate_where_the_name_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt\tchosen\trejected\na, b\tc\tr\n", "data.tsv")
    assert read_examples(path).examples == [Pair("a, b", "c", "r", f"{path}:2")]


BROKEN: dict[str, tuple[str, str, str]] = {
    "a column too few": ("p,c", "D01", "the row has 2 of 3 columns"),
    "a column too many": ("p,c,r,x", "D01", "the row has 4 of 3 columns"),
    "a quote in the middle": ('p,"c"c,r', "D01", "the row is not CSV"),
    "messages as Python shows them": (
        "\"[{'role': 'user', 'content': 'Is it?'}]\",c,r",
        "D04",
        "prompt is a list as Python shows it",
    ),
    "an array of numpy": (
        "\"[{'content': 'Is it?', 'role': 'user'}\n {'content': 'No.', 'role': 'assistant'}]\",c,r",
        "D04",
        "prompt is a list as Python shows it",
    ),
    "a number of text": ("p,c,r", "D22", "margin is text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_one_problem_and_its_neighbours_are_read(case: str, tmp_path: Path) -> None:
    row, code, words = BROKEN[case]
    header, good = HEADER, "p,c,r\n"
    if code == "D22":
        header, good, row = HEADER[:-1] + ",margin\n", "p,c,r,1\n", row + ",much"
    path = written(tmp_path, f"{header}{good}{row}\n{good}")
    data = read_examples(path)
    assert [example.source for example in data.examples] == [f"{path}:2", f"{path}:{4 + row.count(chr(10))}"]
    assert [(problem.code, problem.source) for problem in data.problems] == [(code, f"{path}:3")]
    assert words in data.problems[0].message
    assert ";" in data.problems[0].message, "says no mend"


def test_a_quote_that_is_never_closed_is_one_problem_at_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, f'{HEADER}p,c,r\np,"c,r\np,c,r\n')
    first, (source, row) = read_rows(path)
    assert first == (f"{path}:2", {"prompt": "p", "chosen": "c", "rejected": "r"})
    assert source == f"{path}:3"
    assert isinstance(row, Unreadable)


def test_a_line_far_too_long_stops_the_reading(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}p,c,{'r' * 10_000_000}\n")
    with pytest.raises(UserError, match=r"line 2 has 10 MB or more; check the line breaks"):
        list(read_rows(path))


def test_flags_in_text_are_flags_alone_and_in_lists(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt,completion,finished\np,c,False\np,c,\n")
    assert [example.finished for example in read_examples(path).examples] == [(False,), None]
    path = written(tmp_path, 'prompt,ranked_completions,finished\np,"[""a"", ""b""]","[false, true]"\n')
    assert [example.finished for example in read_examples(path).examples] == [(False, True)]

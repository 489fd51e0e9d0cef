"""Files are read row by row; a fault of the whole file is one sentence with the file's name and the mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from penchant.data.files import Unreadable, read_rows
from penchant.data.formats import ExampleData, read_examples
from penchant.errors import UserError

ROWS = [{"prompt": "p", "chosen": f"c{index}", "rejected": "r"} for index in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", LINES),
        ("DATA.JSONL", LINES),
        ("data.jsonl.gz", gzip.compress(LINES)),
        ("data.jsonl", b"\xef\xbb\xbf" + LINES),
        ("data.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("data.jsonl", LINES.rstrip(b"\n")),
    ],
    ids=["plain", "upper case", "gz", "BOM", "CRLF", "no last newline"],
)
def test_lines_are_named_by_their_number(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert list(read_rows(path)) == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", ARRAY),
        ("data.json.gz", gzip.compress(ARRAY)),
        ("data.json", b"\xef\xbb\xbf" + ARRAY),
        ("data.json", json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode()),
        ("data.json", json.dumps({"version": 2, "data": ROWS}).encode()),
    ],
    ids=["plain", "gz", "BOM", "indented with CRLF", "inside an object"],
)
def test_rows_of_an_array_are_named_by_their_number(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert list(read_rows(path)) == [(f"{path} row {number}", row) for number, row in enumerate(ROWS, start=1)]


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n \r\n{}\n\n[]\n")
    assert list(read_rows(path)) == [(f"{path}:3", {}), (f"{path}:5", [])]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\u0085c"}\n'.encode())
    assert list(read_rows(path)) == [(f"{path}:1", {"prompt": "a\u2028b\u0085c"})]


def test_half_a_line_says_so_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "p", "cho\n{}\n')
    (_, first), second = read_rows(path)
    assert isinstance(first, Unreadable)
    assert "ends in the middle" in first.reason
    assert second == (f"{path}:2", {})


def test_pairs_are_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    def chosen(data: ExampleData) -> list[object]:
        return [pair.chosen for pair in data.examples]

    contents = {
        "a.jsonl": LINES,
        "a.jsonl.gz": gzip.compress(LINES),
        "a.json": ARRAY,
        "a.json.gz": gzip.compress(ARRAY),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert chosen(read_examples(str(tmp_path / name))) == ["c0", "c1", "c2"]


WHOLE_FILE_FAULTS = {
    "empty": ("data.jsonl", b"", "is empty"),
    "empty array file": ("data.json", b" \n", "is empty"),
    "blank lines": ("data.jsonl", b"\n\n", "holds no row"),
    "nothing in the gzip": ("data.jsonl.gz", gzip.compress(b""), "holds no row"),
    "empty array": ("data.json", b"[]", "holds no row"),
    "an extension that is not read": ("data.parquet", b"PAR1", ".jsonl, .jsonl.gz, .json, .json.gz"),
    "no extension": ("data", LINES, ".jsonl, .jsonl.gz, .json, .json.gz"),
    "not gzip": ("data.jsonl.gz", LINES, "not gzip data"),
    "gzip cut off": ("data.jsonl.gz", gzip.compress(LINES)[:-12], "cut off or damaged"),
    "gzip under a plain name": ("data.jsonl", gzip.compress(LINES), "rename it to data.jsonl.gz"),
    "not UTF-8": ("data.jsonl", b'{}\n{}\n{"a": "\xff"}\n', "line 3 is not UTF-8"),
    "not UTF-8 in an array": ("data.json", b'[{},\n{"a": "\xff"}]', "line 2 is not UTF-8"),
    "UTF-16": ("data.jsonl", LINES.decode().encode("utf-16"), "line 1 is not UTF-8"),
    "array under a lines name": ("data.jsonl", json.dumps(ROWS, indent=2).encode(), "end in .json"),
    "lines under an array name": ("data.json", LINES, "end in .jsonl"),
    "half an array": ("data.json", ARRAY[:-9], "is not JSON"),
    "brackets too deep": ("data.json", b"[" * 100_000, "is not usable JSON"),
    "a number": ("data.json", b"5", "neither an array of rows"),
    "a single row": ("data.json", json.dumps(ROWS[0]).encode(), "single row"),
    "an object without an array": ("data.json", b'{"a": 1}', "0 arrays"),
    "an object with two arrays": ("data.json", b'{"train": [{}], "test": [{}]}', "2 arrays"),
}


@pytest.mark.parametrize("case", WHOLE_FILE_FAULTS)
def test_a_fault_of_the_whole_file_names_the_file_and_the_mend(case: str, tmp_path: Path) -> None:
    name, content, explanation = WHOLE_FILE_FAULTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as fault:
        read_examples(path)
    assert str(fault.value).startswith(f"{path}: ")
    assert explanation in str(fault.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match=r"did you mean .*/train\.jsonl\?"):
        read_examples(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="check the path"):
        read_examples(tmp_path / "qqqqqqqq.gz")
    with pytest.raises(UserError, match="no folder"):
        read_examples(tmp_path / "nowhere" / "train.jsonl")


def test_a_directory_and_a_name_too_long_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        read_examples(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path / ("x" * 5000 + ".jsonl"))

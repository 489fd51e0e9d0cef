"""Files are read row by row; a fault of the whole file is one sentence with the file's name and the mend."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from penchant.data.files import read_rows
from penchant.data.formats import ExampleData, read_examples
from penchant.data.streams import EXTENSIONS, ROW_LIMIT, Unreadable
from penchant.errors import UserError

ROWS = [{"prompt": "p", "chosen": f"c{index}", "rejected": "r"} for index in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
TABLE = "prompt,chosen,rejected\n" + "".join(f"{row['prompt']},{row['chosen']},{row['rejected']}\n" for row in ROWS)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def parquet_bytes(rows: list[dict[str, str]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet_bytes(ROWS)
EMPTY_PARQUET = parquet_bytes([])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", LINES),
        ("DATA.JSONL", LINES),
        ("data.jsonl.gz", gzip.compress(LINES)),
        ("data.jsonl.zst", zstd(LINES)),
        ("data.jsonl.zst", zstd(LINES[:40]) + zstd(LINES[40:])),
        ("data.jsonl", b"\xef\xbb\xbf" + LINES),
        ("data.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("data.jsonl", LINES.rstrip(b"\n")),
    ],
    ids=["plain", "upper case", "gz", "zst", "zst of two frames", "BOM", "CRLF", "no last newline"],
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
        ("data.json.zst", zstd(ARRAY)),
        ("data.parquet", PARQUET),
        ("data.json", b"\xef\xbb\xbf" + ARRAY),
        ("data.json", json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode()),
        ("data.json", json.dumps({"version": 2, "data": ROWS}).encode()),
    ],
    ids=["plain", "gz", "zst", "parquet", "BOM", "indented with CRLF", "inside an object"],
)
def test_rows_without_lines_are_named_by_their_number(name: str, content: bytes, tmp_path: Path) -> None:
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

    contents = {"a.jsonl": LINES, "a.json": ARRAY, "a.csv": TABLE.encode(), "a.tsv": TABLE.replace(",", "\t").encode()}
    contents |= {f"{name}.gz": gzip.compress(content) for name, content in contents.items()} | {
        f"{name}.zst": zstd(content) for name, content in contents.items()
    }
    contents["a.parquet"] = PARQUET
    assert sorted(f".{name.partition('.')[2]}" for name in contents) == sorted(EXTENSIONS)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert chosen(read_examples(str(tmp_path / name))) == ["c0", "c1", "c2"]


def test_a_line_of_ten_megabytes_is_one_problem_and_its_neighbours_are_read(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    longest = json.dumps({**ROWS[0], "chosen": "c" * (ROW_LIMIT - 60)}).encode()
    path = tmp_path / "data.jsonl.gz"
    long_lines = [longest + b" " * (ROW_LIMIT - len(longest)), b"x" * (3 * ROW_LIMIT)]
    path.write_bytes(gzip.compress(b"\n".join([good, longest, *long_lines, good]), compresslevel=1))
    data = read_examples(path)
    assert [example.source for example in data.examples] == [f"{path}:1", f"{path}:2", f"{path}:5"]
    assert [(problem.code, problem.source) for problem in data.problems] == [
        ("D28", f"{path}:3"),
        ("D28", f"{path}:4"),
    ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst", "data.csv"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    def peak(num_rows: int) -> int:
        rows = [{"prompt": f"p{index}", "chosen": "c" * 2000, "rejected": "r"} for index in range(num_rows)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packed = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
        table = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows)
        content = table.encode() if name == "data.csv" else packed(lines)
        path = tmp_path / name
        path.write_bytes(content)
        del rows, lines, table, content
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == num_rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # what is imported on the way stays
    assert peak(4000) < peak(1000) + 500_000 < 4000 * 2000


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index}", "chosen": f"{index} " * 400, "rejected": "r"} for index in range(4000)]
    path = tmp_path / "data.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=100, compression="none", use_dictionary=False
    )
    assert path.stat().st_size > 6_000_000
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() - before for _ in read_rows(path))
    assert most < 2_000_000


def test_a_directory_stands_for_the_data_files_in_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    for name in ("README.md", ".hidden.jsonl"):
        (tmp_path / name).write_text("no rows")
    (tmp_path / "inner.jsonl").mkdir()
    sources = [source for source, _ in read_rows(tmp_path)]
    assert sources == [f"{tmp_path / name}:{line}" for name in ("a.jsonl", "b.jsonl") for line in (1, 2, 3)]


def test_a_pattern_stands_for_the_files_that_it_matches(tmp_path: Path) -> None:
    for name in ("train-2.jsonl", "train-1.jsonl", "test.jsonl", "train.md"):
        (tmp_path / name).write_bytes(LINES)
    sources = [source for source, _ in read_rows(f"{tmp_path}/train*")]
    assert sources == [f"{tmp_path / name}:{line}" for name in ("train-1.jsonl", "train-2.jsonl") for line in (1, 2, 3)]
    with pytest.raises(UserError, match=r"valid\*: the pattern matches no data file"):
        list(read_rows(f"{tmp_path}/valid*"))


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data[1].jsonl"
    path.write_bytes(LINES)
    assert len(read_examples(path).examples) == 3


def test_a_path_that_is_there_goes_before_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "data.jsonl").write_bytes(LINES)
    monkeypatch.chdir(tmp_path)
    assert [source for source, _ in read_rows("owner/name")] == [f"owner/name/data.jsonl:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("named", ["inner", "inner/*.jsonl"])
def test_a_link_that_leads_out_of_the_directory_is_refused(named: str, tmp_path: Path) -> None:
    inner, secret = tmp_path / "inner", tmp_path / "secret.jsonl"
    inner.mkdir()
    secret.write_bytes(LINES)
    (inner / "a.jsonl").write_bytes(LINES)
    (inner / "within.jsonl").symlink_to(inner / "a.jsonl")
    assert len(read_examples(str(tmp_path / named)).examples) == 6
    (inner / "b.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: is a link that leads out of .*/inner, to .*/secret\.jsonl"):
        read_examples(str(tmp_path / named))
    assert len(read_examples(inner / "b.jsonl").examples) == 3, "a link that is named itself is meant"


def test_a_link_to_nothing_and_a_pipe_are_explained_and_nothing_waits(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl: is no ordinary file"):
        read_examples(tmp_path)
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: is no ordinary file"):
        read_examples(tmp_path)


WHOLE_FILE_FAULTS = {
    "empty": ("data.jsonl", b"", "is empty"),
    "empty array file": ("data.json", b" \n", "is empty"),
    "blank lines": ("data.jsonl", b"\n\n", "holds no row"),
    "nothing in the gzip": ("data.jsonl.gz", gzip.compress(b""), "holds no row"),
    "empty array": ("data.json", b"[]", "holds no row"),
    "an extension that is not read": ("data.xlsx", b"PK\x03\x04", "convert it to .jsonl, .json, .csv"),
    "no extension": ("data", LINES, "convert it to .jsonl, .json, .csv"),
    "not gzip": ("data.jsonl.gz", LINES, "is not gzip data although its name ends in .gz"),
    "not zstd": ("data.json.zst", ARRAY, "is not zstd data although its name ends in .zst"),
    "not parquet": ("data.parquet", LINES, "is not parquet data although its name ends in .parquet"),
    "gzip called zstd": ("data.jsonl.zst", gzip.compress(LINES), "is gzip data; rename it to data.jsonl.gz"),
    "zstd called gzip": ("data.jsonl.gz", zstd(LINES), "is zstd data; rename it to data.jsonl.zst"),
    "zstd under a plain name": ("data.csv", zstd(TABLE.encode()), "rename it to data.csv.zst"),
    "parquet called lines": ("data.jsonl", PARQUET, "is parquet data; rename it to data.parquet"),
    "zip called lines": ("data.jsonl", b"PK\x03\x04" + bytes(20), "is zip data; unpack it first"),
    "zstd cut off": ("data.jsonl.zst", zstd(LINES)[:-5], "cut off or damaged"),
    "zstd with a changed byte": ("data.jsonl.zst", zstd(LINES)[:-1] + b"x", "cut off or damaged"),
    "gzip with a changed byte": ("data.jsonl.gz", gzip.compress(LINES)[:-5] + b"xxxxx", "cut off or damaged"),
    "parquet cut off": ("data.parquet", PARQUET[:-9], "cut off or damaged"),
    "parquet with a hole": ("data.parquet", PARQUET[:4] + bytes(300) + PARQUET[304:], "cut off or damaged"),
    "parquet without rows": ("data.parquet", EMPTY_PARQUET, "holds no row"),
    "table without rows": ("data.csv", b"prompt,chosen,rejected\n", "holds no row below its header"),
    "table of blank lines": ("data.csv", b"\n\n", "begin with a line of column names"),
    "table with a column twice": ("data.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns are called 'chosen'"),
    "table that is not UTF-8": ("data.csv", b"prompt,chosen,rejected\na,b,c\na,\xff,c\n", "line 3 is not UTF-8"),
    "gzip cut off": ("data.jsonl.gz", gzip.compress(LINES)[:-12], "cut off or damaged"),
    "gzip under a plain name": ("data.jsonl", gzip.compress(LINES), "rename it to data.jsonl.gz"),
    "not UTF-8 in an array": ("data.json", b'[{},\n{"a": "\xff"}]', "line 2 is not UTF-8"),
    "UTF-16": ("data.jsonl", LINES.decode().encode("utf-16"), "is UTF-16 text; save the file as UTF-8"),
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


def test_a_directory_without_data_and_a_name_too_long_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r": the directory holds no data file; name one that ends in \.jsonl"):
        read_examples(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path / ("x" * 5000 + ".jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "package"), [("a.jsonl.zst", zstd(LINES), "zstandard"), ("a.parquet", PARQUET, "pyarrow")]
)
def test_a_package_that_is_not_there_is_named_with_its_extra(
    name: str, content: bytes, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}; install it with: pip install 'penchant\[data\]'"):
        read_examples(tmp_path / name)

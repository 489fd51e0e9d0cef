"""Rows that cannot train, of every kind we know and of kinds that nobody thought of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from penchant.cli import main
from penchant.data.formats import RowProblem, stream_rows

from ..data.test_bad_rows import BAD_LINES, BAD_ROWS
from ..data.test_formats import JSON
from ..training.test_run import rows
from .matrix import Matrix


def test_bad_rows_of_every_kind_in_one_file_are_named_and_the_others_train(
    matrix: Matrix, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [json.dumps(row) for _, row in BAD_ROWS.values()] + list(BAD_LINES.values())
    good = [json.dumps(row) for row in rows(len(bad))]
    data = tmp_path / "pairs.jsonl"
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    data.write_bytes("\n".join(lines).encode("utf-8", errors="surrogateescape"))
    words = ["train", "--model", str(model_folder), "--data", str(data), "--output_dir", str(tmp_path / "run")]
    words += ["--max_steps", "2", "--batch_size", "4", "--num_samples", "0", "--eval_size", "0", "--drop", "inverted"]

    assert main(words) == 2, "more bad rows than max_bad_rows allows"
    assert f"{data}:2: [" in capsys.readouterr().err
    words += ["--drop", "identical,inverted", "--max_bad_rows", "1"]
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert found["used"] == len(good)
    matrix.record(17, "a bad row", len(bad), sum(found["dropped"].values()))


def test_no_json_value_as_a_row_is_an_exception(matrix: Matrix) -> None:
    read = 0

    @settings(max_examples=2000, deadline=None, database=None)
    @given(JSON)
    def look_at(row: Any) -> None:
        nonlocal read
        ((_, found),) = stream_rows([row], "mine")
        assert not isinstance(found, RowProblem) or found.source == "mine[0]"
        read += 1

    with matrix.trial(18, "any JSON value as a row", tried=2000):
        look_at()
        assert read >= 2000

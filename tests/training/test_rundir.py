"""The run directory: chosen without harm, files whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penchant.config import RunConfig
from penchant.errors import UserError
from penchant.training.rundir import check_run_dir, choose_run_dir, open_run_dir, write_json, write_text


def config(model: str, **settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": model, "data": "d", **settings})


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/model-1.5B", "model-1.5B-dpo"), ("a/b/model.gguf", "model-dpo"), ("./sft/", "sft-dpo")],
)
def test_a_run_is_named_after_model_and_method(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_run_dir(config(model)) == Path("runs") / name


def test_a_name_that_is_taken_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("m-ipo", "m-ipo-2", "m-ipo-3"):
        folder = choose_run_dir(config("m", method="ipo"))
        assert folder == Path("runs") / expected
        open_run_dir(folder, overwrite=False)


def test_a_folder_without_right_to_write_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match="no right to write"):
        check_run_dir(tmp_path / "run", overwrite=False)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "lone \ud800 surrogate")
    assert path.read_text() == "lone \\ud800 surrogate"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]

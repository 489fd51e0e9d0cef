"""The run directory: chosen without harm, files whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penchant.config import RunConfig
from penchant.disk import write_json, write_text
from penchant.errors import UserError
from penchant.locking import locked
from penchant.training.rundir import check_run_dir, choose_run_dir, claimed, resolved_run_file


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
        folder.mkdir(parents=True)


def test_a_run_that_stopped_early_is_found_again_by_the_same_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = config("m", seed=1)
    folder = choose_run_dir(begun)
    with claimed(folder):
        pass
    write_text(folder / "run.yaml", resolved_run_file(begun, folder))
    for status in ("running", "interrupted", "failed"):
        write_json(folder / "summary.json", {"status": status})
        assert choose_run_dir(begun) == folder
        assert choose_run_dir(config("m", seed=2)) == Path("runs/m-dpo-2")
        with locked(folder):
            assert choose_run_dir(begun) == Path("runs/m-dpo-2"), "another process works on it"
    write_json(folder / "summary.json", {"status": "finished"})
    assert choose_run_dir(begun) == Path("runs/m-dpo-2")


def test_a_folder_without_right_to_write_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match="no right to write"):
        check_run_dir(tmp_path / "run", overwrite=False)

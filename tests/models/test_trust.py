"""What a model may bring along. Whole runs on harmful files are in tests/faults/test_malicious_files.py."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from penchant.errors import UserError
from penchant.models import trust
from penchant.models.load import load_model_and_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("package", "installed"),
    [("torch", "2.9.1+cpu"), ("torch", "1.13"), ("transformers", "5.2.0"), ("transformers", "4.57.3")],
)
def test_old_versions_are_refused_before_anything_is_read(
    package: str, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "version", {"torch": "2.13.0", "transformers": "5.23.0", package: installed}.get)
    with pytest.raises(UserError, match=f"^{package} {installed.replace('+', '.')} is not safe: before .*pip install"):
        load_model_and_tokenizer("/there/is/no/such/folder")


@pytest.mark.parametrize("installed", ["2.10", "2.10.0a0+git1234", "2.13.0+cu130", "10.0"])
def test_versions_from_the_floor_up_are_accepted(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "version", {"torch": installed, "transformers": "5.3.0"}.get)
    trust.refuse_old_versions()


def test_floors_are_those_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    for package, (floor, _) in trust.FLOORS.items():
        assert required[package] == f">={floor}"


def test_settings_that_are_no_settings_are_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for text in ("[1]", "{", "[" * 100_000, "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^model: '.*config.json' "):
            trust.refuse_harm(tmp_path)


def test_folder_without_harm_is_accepted(model_folder: Path) -> None:
    trust.refuse_harm(model_folder)

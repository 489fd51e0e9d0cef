"""A run on a local model needs no network, and asks for none."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main

from ..training.test_run import rows, write_rows

pytestmark = pytest.mark.fault(24, "no network")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that somebody asked for; there is no way to any of them."""
    addresses: list[Any] = []

    def unreachable(*arguments: Any, **_: Any) -> Any:
        addresses.append(arguments)
        raise OSError("network is unreachable")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, unreachable)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the wish to ask is there
    return addresses


def words_for(model: str, tmp_path: Path) -> list[str]:
    data, heldout = tmp_path / "pairs.jsonl", tmp_path / "heldout.jsonl"
    write_rows(data, rows(8))
    write_rows(heldout, rows(4, seed=1))
    words = ["train", "--model", model, "--data", str(data), "--eval_data", str(heldout), "--max_steps", "2"]
    words += ["--batch_size", "4", "--num_samples", "1", "--sample_max_new_tokens", "2"]
    return [*words, "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("lora", ["0", "4"])
def test_a_whole_run_asks_for_no_address(lora: str, model_folder: Path, tmp_path: Path, asked: list[Any]) -> None:
    assert main([*words_for(str(model_folder), tmp_path), "--lora.rank", lora]) == 0
    assert asked == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert asked == []


def test_a_model_of_the_hub_does_ask_and_is_told_in_one_sentence(
    tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_for("nobody/no-such-model", tmp_path)) == 2
    assert asked
    said = capsys.readouterr().err
    assert "error: model: 'nobody/no-such-model' is no local folder, and the hub cannot be reached" in said
    assert "Traceback" not in said

"""What must not get out: keys of the environment, and markup of the data into the pages."""

from __future__ import annotations

import os
import re
import traceback
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.scoring.policy import Policy

from ..training.test_run import rows, write_rows

pytestmark = pytest.mark.fault(22, "keys in the environment, markup in the data")

KEYS = {
    "HF_TOKEN": "hf_QxVtGkWzPmLrNbYcDsFj",
    "HUGGING_FACE_HUB_TOKEN": "hf_olderNameOfTheSameKey",
    "OPENAI_API_KEY": "sk-proj-mUgV8sK2qXw7",
    "ANTHROPIC_API_KEY": "sk-ant-zT4hR9bL0eJc",
    "WANDB_API_KEY": "5f0c1e77a9d24b6e8c3b",
    "AWS_ACCESS_KEY_ID": "AKIAQZ7XWN3EXAMPLE42",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz",
}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def files_with(folder: Path, text: str) -> list[str]:
    """The files below a folder, hidden ones too, that hold a text."""
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [str(file) for file in files if text.encode() in file.read_bytes()]


def train(model: Path, run_dir: Path, data: str, *more: str) -> int:
    words = ["train", "--model", str(model), "--data", data, "--eval_size", "2", "--max_steps", "3"]
    words += ["--batch_size", "2", "--num_samples", "1", "--sample_max_new_tokens", "2"]
    return main([*words, "--output_dir", str(run_dir), *more])


def test_keys_get_into_no_file_of_a_run_and_are_never_said(
    keys: None, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows(8))
    assert train(model_folder, tmp_path / "run", data, "--save_steps", "1", "--json") == 0
    said = "".join(capfd.readouterr())
    assert files_with(tmp_path / "run", "pairs.jsonl")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    for key in KEYS.values():
        assert files_with(tmp_path / "run", key) == []
        assert key not in said


def test_keys_get_into_no_file_of_a_run_that_crashes_and_are_never_said(
    keys: None, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = 0
    plain = Policy.token_logps

    def failing(self: Policy, *arguments: Any, **more: Any) -> Any:
        nonlocal scored
        scored += 1
        if scored > 12:
            raise RuntimeError(f"out of luck at batch {scored}")
        return plain(self, *arguments, **more)

    monkeypatch.setattr(Policy, "token_logps", failing)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        train(model_folder, tmp_path / "run", write_rows(tmp_path / "pairs.jsonl", rows(8)))
    said = "".join([*capfd.readouterr(), *traceback.format_exception(caught.value)])
    assert files_with(tmp_path / "run", "out of luck")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    for key in KEYS.values():
        assert files_with(tmp_path / "run", key) == []
        assert key not in said


SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"


class Markup(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(page: str) -> None:
    markup = Markup(page)
    assert not markup.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for name in markup.attributes if name.startswith("on")]
    assert not [href for href in markup.attributes.get("href", ()) if not href.startswith("#")]


def test_markup_of_the_data_and_of_names_stays_text_on_every_page(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / f"model {IMAGE}"
    model.symlink_to(model_folder)
    some = rows(8)
    for number, row in enumerate(some):
        for messages in row.values():
            messages[-1]["content"] += f" {number} {SCRIPT} {IMAGE} \"'><!-- --> ![x](javascript:alert(3))"
    run_dir = tmp_path / f"run {IMAGE}"
    data = write_rows(tmp_path / f"pairs {IMAGE}.jsonl", some)
    assert train(model, run_dir, data, "--max_length", "512") == 0
    assert main(["compare", str(run_dir), "--html", str(tmp_path / "compare.html")]) == 0, capsys.readouterr().err
    report = (run_dir / "report.html").read_text()
    assert_harmless(report)
    assert Markup(report).text.count(SCRIPT) > 3
    assert IMAGE in Markup(report).text
    compared = (tmp_path / "compare.html").read_text()
    assert_harmless(compared)
    assert IMAGE in Markup(compared).text
    card = (run_dir / "README.md").read_text()
    assert "onerror" in card
    plain = re.sub(r"`[^`\n]*`|\\<", "", card)  # in code, and behind a backslash, markup is only text
    assert "<" not in plain
    assert SCRIPT not in card

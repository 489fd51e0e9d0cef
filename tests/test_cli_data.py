"""`penchant check` and `penchant preview` as a user meets them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main

from .test_cli import ENVIRONMENT, penchant
from .training.test_checks import many
from .training.test_run import write_rows

BAD = {"prompt": "what", "chosen": "", "rejected": "b"}
INVERTED = {"prompt": "what", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def names_of(split: dict[str, Any]) -> list[str]:
    return [check["name"] for check in split["checks"]]


def test_check_counts_rows_families_problems_and_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [*many(150), many(1)[0], BAD, {"x": 1}])
    code, told = checked(capsys, data, "--max_bad_rows", "0.1")
    train = told["train"]
    assert code == 0
    assert (train["rows"], train["usable"]) == (153, 151)
    assert train["families"] == {"trl": 152, "unknown": 1}
    assert {reason: problem["rows"] for reason, problem in train["problems"].items()} == {"D06": 1, "D03": 1}
    assert train["problems"]["D06"]["first"][0].startswith(f"{data}:152: [D06]")
    assert {"duplicate", "too-few"} <= set(names_of(train))
    (duplicate,) = (check for check in train["checks"] if check["name"] == "duplicate")
    assert duplicate["rows"] == [f"{data}:151 (as {data}:1)"]


def test_check_says_the_same_to_people(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [*many(150), many(1)[0], BAD])
    done = penchant("check", data)
    assert done.returncode == 0, done.stderr
    assert f"{data}: 152 rows, 151 usable" in done.stdout
    assert "1  D06  a completion is empty" in done.stdout
    assert re.search(r"info +S04  duplicate: 1 of 151 rows \(0\.7%\) repeat an earlier row", done.stdout)
    assert "leave the rows out with drop: [duplicate]" in done.stdout


def test_check_ends_with_two_where_a_run_would_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = write_rows(tmp_path / "clean.jsonl", many(150))
    bad = write_rows(tmp_path / "bad.jsonl", [*many(50), BAD])
    inverted = write_rows(tmp_path / "inverted.jsonl", [*many(150), INVERTED])
    assert main(["check", clean]) == 0
    assert main(["check", bad]) == 2
    assert "more than max_bad_rows 0.01 allows" in capsys.readouterr().out
    assert main(["check", bad, "--max-bad-rows", "0.1"]) == 0
    assert main(["check", inverted]) == 2
    assert main(["check", clean, "--eval_data", bad]) == 2


def test_check_looks_for_held_out_prompts_among_the_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = many(150)
    train, heldout = write_rows(tmp_path / "train.jsonl", data), write_rows(tmp_path / "eval.jsonl", data[4:6])
    _, told = checked(capsys, train, "--eval_data", heldout)
    assert names_of(told["eval"]) == ["leak"]
    assert told["eval"]["checks"][0]["rows"] == [f"{heldout}:1", f"{heldout}:2"]


def test_check_with_a_model_sees_what_max_length_cuts_off(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = many(30)
    long[3]["chosen"] = [{"role": "assistant", "content": "the cat " * 200}]
    long[5]["prompt"] = [{"role": "user", "content": "the cat " * 200}]
    data = write_rows(tmp_path / "pairs.jsonl", long)
    code, told = checked(capsys, data, "--model", str(model_folder), "--max_length", "100")
    assert code == 0
    found = {check["name"]: check for check in told["train"]["checks"]}
    assert found["truncated"]["rows"] == [f"{data}:4"]
    assert found["long-prompt"]["rows"] == [f"{data}:6"]


def test_check_says_when_the_model_has_no_chat_template(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    data = write_rows(tmp_path / "pairs.jsonl", many(20))
    _, told = checked(capsys, data, "--model", str(folder))
    assert "no-template" in names_of(told["train"])
    template = model_folder / "chat_template.jinja"
    _, told = checked(capsys, data, "--model", str(folder), "--chat_template", str(template))
    assert "no-template" not in names_of(told["train"])
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    )
    _, told = checked(capsys, plain, "--model", str(folder))
    assert "no-template" not in names_of(told["train"])


def test_check_without_a_model_loads_nothing_heavy(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", many(20))
    code = (
        f"import sys; from penchant.cli import main\nmain(['check', {data!r}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "nowhere.jsonl"], "there is no such file"),
        (["check", "{bad}"], "none of its 1 rows can be used; the first: "),
        (["check", "{good}", "--chat_template", "x"], "--chat_template: has no effect without --model"),
        (["check", "{good}", "--model", "./nowhere"], "there is no folder"),
        (["check", "{good}", "--model", "{model}", "--max_length", "1"], "--max_length: must be at least 2"),
        (["check", "{good}", "--model", "{model}", "--chat_template", "nowhere"], "'nowhere' cannot be read"),
        (["preview", "{good}", "--model", "{model}", "--rows", "0"], "--rows: must be at least 1"),
        (["preview", "nowhere.jsonl", "--model", "{model}"], "there is no such file"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    words: list[str], said: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "good": write_rows(tmp_path / "good.jsonl", many(3)),
        "bad": write_rows(tmp_path / "bad.jsonl", [BAD]),
        "model": str(model_folder),
    }
    assert main([word.format(**files) for word in words]) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "Traceback" not in told


def test_preview_shows_what_is_trained_on_and_where_it_ends(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "what is [x]", "chosen": "the [red] cat", "rejected": "a dog " * 40}
    messages = {**row, "prompt": [{"role": "user", "content": "what is"}]}
    data = write_rows(tmp_path / "pairs.jsonl", [messages, BAD, row])
    assert main(["preview", data, "--model", str(model_folder), "--rows", "2", "--max_length", "60"]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\n" in shown
    assert "[the [red] cat<|im_end|>]" in shown
    assert "ends with '<|im_end|>'" in shown
    assert re.search(r"cut at max_length 60: \d+ more tokens", shown)
    assert f"{data}:2: left out" in shown
    assert f"{data}:3" not in shown


def test_preview_as_json_tells_every_token(
    model_folder: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "what is", "completion": "the red cat", "label": False}])
    assert main(["preview", data, "--model", str(model_folder), "--json", "--max_length", "8"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    whole = tokenizer("the red cat", add_special_tokens=False).input_ids
    prompt = tokenizer("what is").input_ids
    (completion,) = row["completions"]
    assert completion["name"] == "undesirable"
    assert [token["id"] for token in row["prompt"]] == prompt
    assert [token["id"] for token in completion["tokens"]] == [*whole, tokenizer.eos_token_id][: 8 - len(prompt)]
    assert completion["cut"] == max(0, len(prompt) + len(whole) + 1 - 8)
    assert not any(token["trained"] for token in row["prompt"])
    assert all(token["trained"] for token in completion["tokens"])


def test_convert_writes_rows_that_mean_the_same(tmp_path: Path) -> None:
    rows = [*many(3), BAD]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    written = tmp_path / "openai.jsonl"
    done = penchant("convert", data, str(written), "--to", "openai")
    assert done.returncode == 0, done.stderr
    assert "3 rows written, 1 left out" in done.stderr
    assert f"{data}:4: [D06]" in done.stderr
    back = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["preferred_output"] for row in back] == [row["chosen"] for row in rows[:3]]
    assert [row["input"]["messages"] for row in back] == [row["prompt"] for row in rows[:3]]

    again = penchant("convert", data, str(written), "--to", "trl")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert [json.loads(line) for line in written.read_text().splitlines()] == back
    unknown = penchant("convert", data, str(tmp_path / "x.jsonl"), "--to", "opena")
    assert unknown.returncode == 2
    assert "did you mean 'openai'" in unknown.stderr


def test_a_row_family_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "what", "prompt": "what", "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "pairs.jsonl", [row] * 2)
    _, told = checked(capsys, data)
    _, forced = checked(capsys, data, "--data_family", "alpaca")
    assert told["train"]["families"] == {"trl": 2}
    assert forced["train"]["families"] == {"alpaca": 2}

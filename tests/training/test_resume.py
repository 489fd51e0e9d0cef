"""Going on with a run: what counts as a change, who may allow it, where the logs are cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penchant.config import RunConfig, option_names
from penchant.disk import write_json, write_json_lines
from penchant.errors import UserError
from penchant.training import resume
from penchant.training.resume import (
    changes_since,
    check_allowed,
    config_of,
    cut_logs,
    describe_changes,
    refuse_changes,
)

SHA = {name: name[0] * 64 for name in ("a", "b")}
_FILES = ("data", "data (columns)", "tokenizer")
THEN = {"loss.name": "dpo", "loss.beta": 0.1, "lora.rank": None, "seed": 0} | dict.fromkeys(_FILES, SHA["a"])

# What differs.


def test_a_change_is_a_value_that_is_another() -> None:
    now = {**THEN, "seed": 1, "loss.beta": 0.2, "data": SHA["b"]}
    found = changes_since(THEN, now)
    assert found == {"seed": (0, 1), "loss.beta": (0.1, 0.2), "data": (SHA["a"], SHA["b"])}
    assert changes_since(THEN, dict(THEN)) == {}
    assert describe_changes(found) == (
        "data: sha256 aaaaaaaaaaaa then, sha256 bbbbbbbbbbbb now; loss.beta: 0.1 then, 0.2 now; seed: 0 then, 1 now"
    )


def test_a_setting_that_came_with_a_later_version_had_its_default_before() -> None:
    known = RunConfig(model="m", data="d").max_grad_norm
    assert changes_since(THEN, {**THEN, "max_grad_norm": known}) == {}
    assert changes_since(THEN, {**THEN, "max_grad_norm": 5.0}) == {"max_grad_norm": (known, 5.0)}


def test_a_setting_that_only_one_loss_has_is_a_change() -> None:
    now = {key: value for key, value in THEN.items() if key != "loss.beta"} | {"loss.name": "orpo", "loss.weight": 1.0}
    assert changes_since(THEN, now) == {
        "loss.beta": (0.1, None), "loss.name": ("dpo", "orpo"), "loss.weight": (None, 1.0)
    }  # fmt: skip


def test_every_key_of_a_run_file_is_either_free_or_compared() -> None:
    compared = set(resume._settings(RunConfig(model="m", data="d")))
    for name in option_names():
        is_otherwise = name in resume._FREE or name in resume._BY_CONTENT or name.startswith("judge.")
        assert (name in compared) != is_otherwise, name
    assert set(option_names()) >= resume._FREE


# Who may allow it.


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("beta", {"loss.beta"}),
        ("loss.beta", {"loss.beta"}),
        ("loss", {"loss.beta", "loss.name"}),
        ("lora", {"lora.rank"}),
        ("data", {"data", "data (columns)"}),
        ("tokenizer", {"tokenizer"}),
    ],
)
def test_a_word_allows_what_it_names_and_no_more(word: str, allowed: set[str], tmp_path: Path) -> None:
    now = {"loss.name": "ipo", "loss.beta": 0.2, "lora.rank": 4, "seed": 1} | dict.fromkeys(_FILES, SHA["b"])
    changes = changes_since(THEN, now)
    check_allowed([word], now, changes)
    refuse_changes({name: changes[name] for name in allowed}, [word], tmp_path, 3)
    for name in set(changes) - allowed:
        with pytest.raises(UserError, match="differs from it"):
            refuse_changes({name: changes[name]}, [word], tmp_path, 3)


def test_the_refusal_shows_both_values_and_the_way_on(tmp_path: Path) -> None:
    changes = changes_since(THEN, {**THEN, "loss.beta": 0.2, "data (columns)": SHA["b"], "lora.rank": 8})
    with pytest.raises(UserError) as refused:
        refuse_changes(changes, ["lora"], tmp_path / "run", 30)
    assert str(refused.value) == (
        f"output_dir: '{tmp_path / 'run'}' holds a run that stands at step 30, and this one differs from it:\n"
        "  data (columns): sha256 aaaaaaaaaaaa then, sha256 bbbbbbbbbbbb now\n"
        "  loss.beta: 0.1 then, 0.2 now\n"
        "Go on all the same with --allow-change data,loss.beta, begin anew with "
        "`penchant train ... --overwrite`, or choose another output_dir."
    )


@pytest.mark.parametrize(
    ("word", "hint"), [("betta", "'beta'"), ("sed", "'seed'"), ("lorra.rank", "'lora.rank'"), ("zzz", None)]
)
def test_a_word_that_names_nothing_is_refused_with_the_nearest(word: str, hint: str | None) -> None:
    with pytest.raises(UserError, match=f"there is no key '{word}'") as refused:
        check_allowed(["beta", word], THEN, {})
    assert str(refused.value).partition("; ")[2] == (f"did you mean {hint}?" if hint else "")


@pytest.mark.parametrize(
    "word", ["beta", "loss", "data", "model", "chat_template", "logging_steps", "lora", "tokenizer"]
)
def test_what_has_not_changed_may_be_allowed_too(word: str) -> None:
    check_allowed([word], THEN, {})


# The run file of a run directory.


def begun(folder: Path, cwd: Path, **settings: Any) -> Path:
    """A run directory that was begun in `cwd`."""
    folder.mkdir()
    given = {"model": "the/model", "data": "rows.jsonl", "output_dir": "as/it/was", **settings}
    (folder / "run.yaml").write_text(json.dumps(given))
    write_json(folder / "summary.json", {"working_directory": str(cwd)})
    return folder


def test_relative_paths_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    for name in ("rows.jsonl", "held.jsonl", "template.jinja"):
        (tmp_path / "there" / name).touch()
    (tmp_path / "there" / "ref").mkdir()
    settings = {"eval_data": "held.jsonl", "chat_template": "template.jinja", "reference": {"model": "ref"}}
    run_dir = begun(tmp_path / "run", tmp_path / "there", **settings)
    monkeypatch.chdir(tmp_path)
    config = config_of(Path("run"), {"seed": 3})
    assert config.output_dir == "run"
    assert config.model == "the/model", "no folder: it may be one of the hub"
    there = tmp_path / "there"
    assert (config.data, config.eval_data) == (str(there / "rows.jsonl"), str(there / "held.jsonl"))
    assert (config.chat_template, config.reference.model) == (str(there / "template.jinja"), str(there / "ref"))
    assert config.seed == 3
    assert config_of(run_dir, {"data": "other.jsonl"}).data == "other.jsonl"
    monkeypatch.chdir(there)
    assert config_of(run_dir, {}).data == "rows.jsonl"


def test_what_was_in_memory_cannot_be_found_again(tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", tmp_path, data="rows in memory")
    with pytest.raises(UserError, match=r"data: was handed over in memory; call penchant\.train"):
        config_of(run_dir, {})
    assert config_of(run_dir, {"data": "rows.jsonl"}).data == "rows.jsonl"


def test_a_folder_without_a_run_file_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run directory: it holds no run\.yaml"):
        config_of(tmp_path, {})


@pytest.mark.parametrize("summary", ["", "[]", '{"working_directory": null}', '{"working_directory": "/no/such"}'])
def test_a_summary_that_is_of_no_use_does_no_harm(summary: str, tmp_path: Path) -> None:
    run_dir = begun(tmp_path / "run", tmp_path)
    (run_dir / "summary.json").write_text(summary)
    assert config_of(run_dir, {}).data == "rows.jsonl"


# Logs.


def test_logs_are_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    metrics = [
        {"step": 0, "eval_loss": 1.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.9},
        {"step": 2, "eval_loss": 0.9},
        {"step": 3, "loss": 0.8},
    ]
    events = [{"step": step, "message": "a \u2028 line"} for step in (0, 2, 3)]
    for evaluated_at, kept in ((2, metrics[:4]), (0, metrics[:3]), (-1, metrics[1:3])):
        write_json_lines(tmp_path / "metrics.jsonl", metrics)
        write_json_lines(tmp_path / "events.jsonl", events)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "eval_l')
        cut_logs(tmp_path, 2, evaluated_at)
        assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == kept
        assert [json.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()] == events[:2]


@pytest.mark.parametrize("end", [b"\x00" * 40, b"\xff\xfe\x80", b'{"step": 1, "los', b"", b"\n\n"], ids=repr)
def test_whatever_a_loss_of_power_left_at_the_end_is_passed_over(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + end)
    cut_logs(tmp_path, 1, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    assert not (tmp_path / "events.jsonl").exists()

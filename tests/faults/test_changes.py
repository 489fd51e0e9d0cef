"""A run that is gone on with is the run that was begun, or it is told what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from penchant.cli import main
from penchant.disk import sha256_of

from ..conftest import make_tiny_model
from ..training.test_run import lines_of, rows, write_rows
from .matrix import Matrix
from .test_saving import Runs

Words = list[str]


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs to go on with."""
    return Runs(model_folder, tmp_path_factory.mktemp("runs"))


@dataclass
class Changed:
    """A run directory whose run differs from then on, and the words that go on with it."""

    run_dir: Path
    words: Words


def with_options(*options: str) -> Callable[[Runs, Path, Path], Changed]:
    """Other options on the line of `penchant resume`."""

    def change(runs: Runs, model: Path, folder: Path) -> Changed:
        run_dir = runs.stopped()
        return Changed(run_dir, ["resume", str(run_dir), *options])

    return change


def other_rows(runs: Runs, model: Path, folder: Path) -> Changed:
    """Every other row has a word more."""
    changed = rows()
    for row in changed[::2]:
        row["chosen"][0]["content"] += " mat"
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--data", write_rows(folder / "other.jsonl", changed)])


def another_method(runs: Runs, model: Path, folder: Path) -> Changed:
    """The command that began the run, with another word for the method."""
    run_dir = runs.stopped()
    return Changed(run_dir, [*runs.train(run_dir), "--method", "ipo"])


def more_rows(runs: Runs, model: Path, folder: Path) -> Changed:
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--data", write_rows(folder / "more.jsonl", rows(13))])


def rows_in_another_order(runs: Runs, model: Path, folder: Path) -> Changed:
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--data", write_rows(folder / "back.jsonl", rows()[::-1])])


def other_columns(runs: Runs, model: Path, folder: Path) -> Changed:
    """The same texts, one of them of more weight."""
    run_dir, weighted = runs.stopped(), [{**row, "weight": 1.0 + (place == 3)} for place, row in enumerate(rows())]
    return Changed(run_dir, ["resume", str(run_dir), "--data", write_rows(folder / "weighted.jsonl", weighted)])


def other_weights(runs: Runs, model: Path, folder: Path) -> Changed:
    """The folder of the model is where it was, and holds other weights."""
    make_tiny_model(seed=9).save_pretrained(shutil.copytree(model, folder / "other"))
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--model", str(folder / "other")])


def other_template(runs: Runs, model: Path, folder: Path) -> Changed:
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--chat_template", str(folder / "template.jinja")])


def other_tokenizer(runs: Runs, model: Path, folder: Path) -> Changed:
    """The same weights with a tokenizer in which two words have changed places."""
    file = Path(shutil.copytree(model, folder / "renamed")) / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["Ġdog"], vocabulary["Ġcat"] = vocabulary["Ġcat"], vocabulary["Ġdog"]
    file.write_text(json.dumps(settings))
    run_dir = runs.stopped()
    return Changed(run_dir, ["resume", str(run_dir), "--model", str(folder / "renamed")])


CHANGES: dict[str, tuple[Callable[[Runs, Path, Path], Changed], str, str]] = {
    "beta": (with_options("--loss.beta", "0.3"), "loss.beta", "loss.beta: 0.1 then, 0.3 now"),
    "loss": (another_method, "loss.name", 'loss.name: "dpo" then, "ipo" now'),
    "learning rate": (
        with_options("--learning_rate", "1e-4"),
        "learning_rate",
        "learning_rate: 0.003 then, 0.0001 now",
    ),
    "batch size": (with_options("--batch_size", "2"), "batch_size", "batch_size: 4 then, 2 now"),
    "seed": (with_options("--seed", "1"), "seed", "seed: 0 then, 1 now"),
    "max_length": (with_options("--max_length", "28"), "max_length,data", "max_length: 1024 then, 28 now"),
    "optimizer": (with_options("--optimizer", "rmsprop"), "optimizer", 'optimizer: "adamw" then, "rmsprop" now'),
    "number of steps": (with_options("--max_steps", "7"), "max_steps", "max_steps: 6 then, 7 now"),
    "data": (other_rows, "data", "data: sha256 "),
    "more data": (more_rows, "data", "data: sha256 "),
    "order of the data": (rows_in_another_order, "data", "data: sha256 "),
    "columns of the data": (other_columns, "data", "data (columns): sha256 "),
    "weights of the model": (other_weights, "model", "model: sha256 "),
    "chat template": (other_template, "chat_template,data", "chat_template: sha256 "),
    "tokenizer": (other_tokenizer, "tokenizer,data", "tokenizer: sha256 "),
}
"""What is changed, the keys that the refusal must name, and what it must say of them."""

_ACCEPTED = ("beta", "loss", "data", "optimizer")
"""What the short version allows and takes to its end."""


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_rest_of_a_run_is_refused_with_both_values_and_can_be_allowed(
    name: str,
    runs: Runs,
    model_folder: Path,
    tmp_path: Path,
    matrix: Matrix,
    full: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change, keys, words = CHANGES[name]
    changed = change(runs, model_folder, tmp_path)
    before = {path: sha256_of(path) for path in changed.run_dir.rglob("*") if path.is_file()}
    with matrix.trial(13, f"refused: {name}"):
        assert main(changed.words) == 2
        said = capfd.readouterr().err
        assert "holds a run that stands at step 4, and this one differs from it:" in said
        assert f"\n  {words}" in said
        assert {path: sha256_of(path) for path in changed.run_dir.rglob("*") if path.is_file()} == before
        advised = said.partition("Go on all the same with --allow-change ")[2].partition(", begin anew")[0]
        assert set(keys.split(",")) <= set(advised.split(","))
    if not full and name not in _ACCEPTED:
        return
    with matrix.trial(13, f"allowed and recorded: {name}"):
        assert main([*changed.words, "--allow-change", advised]) == 0
        assert "goes on at step 4 of" in capfd.readouterr().err
        (event,) = (e for e in lines_of(changed.run_dir / "events.jsonl") if e["code"] == "changed")
        assert event["step"] == 4
        assert words in event["message"]
        steps = [record["step"] for record in lines_of(changed.run_dir / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        assert not runs.is_whole(changed.run_dir), "it makes a difference, or it need not have been refused"


def test_an_allowed_change_is_the_rule_from_then_on(
    runs: Runs,
    matrix: Matrix,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from penchant.training.resume import config_of

    run_dir = runs.stopped()
    with matrix.trial(13, "an allowed change is kept"):
        with runs.stopping_after(5):
            assert main(["resume", str(run_dir), "--loss.beta", "0.3", "--allow-change", "beta"]) == 143
        assert config_of(run_dir, {}).loss["beta"] == 0.3
        assert main(["resume", str(run_dir), "--loss.beta", "0.1"]) == 2
        assert main(["resume", str(run_dir), "--allow-change", "beta"]) == 0


def test_what_was_allowed_stays_allowed_when_no_checkpoint_came_to_say_so(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = runs.stopped()

    def dies(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("penchant.training.loop.train_step", dies)
        assert main(["resume", str(run_dir), "--loss.beta", "0.3", "--allow-change", "beta"]) == 130
    assert main(["resume", str(run_dir), "--loss.beta", "0.4"]) == 2
    assert main(["resume", str(run_dir)]) == 0
    assert json.loads((run_dir / "summary.json").read_text())["loss"]["beta"] == 0.3


def test_a_change_may_not_bring_another_shape_with_it(
    runs: Runs,
    matrix: Matrix,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = runs.stopped()
    with matrix.trial(13, "another rank does not fit, allowed or not"):
        assert main(["resume", str(run_dir), "--lora.rank", "4"]) == 2
        assert "lora.rank: 0 then, 4 now" in capfd.readouterr().err
        assert main(["resume", str(run_dir), "--lora.rank", "4", "--allow-change", "lora,learning_rate"]) == 2
        said = capfd.readouterr().err
        assert "does not fit this model" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("words", [["resume"], ["train"]])
def test_a_word_that_names_nothing_is_refused_before_any_work(
    words: Words,
    runs: Runs,
    tmp_path: Path,
    matrix: Matrix,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = ["resume", str(runs.stopped())] if words == ["resume"] else runs.train(tmp_path / "new")
    with matrix.trial(13, "an unknown word"):
        assert main([*line, "--allow-change", "learning-rat"]) == 2
        said = capfd.readouterr().err
        assert "there is no key 'learning_rat'; did you mean 'learning_rate'?" in said
        assert not (tmp_path / "new").exists()


# What may change without a word.

FREE = {
    "logging": ["--logging_steps", "2"],
    "saving": ["--save_steps", "1", "--keep_checkpoints", "1"],
    "tokens at once": ["--microbatch_tokens", "900"],
    "samples": ["--num_samples", "0"],
    "bad rows": ["--max_bad_rows", "0.5"],
}


@pytest.mark.parametrize("name", FREE)
def test_what_no_step_depends_on_may_change_without_a_word(
    name: str,
    runs: Runs,
    matrix: Matrix,
) -> None:
    run_dir = runs.stopped()
    with matrix.trial(13, "free to change"):
        assert main(["resume", str(run_dir), *FREE[name]]) == 0
        assert runs.is_whole(run_dir)
        assert "changed" not in [event["code"] for event in lines_of(run_dir / "events.jsonl")]


def test_a_run_may_be_moved_and_gone_on_with_from_anywhere(
    runs: Runs,
    model_folder: Path,
    tmp_path: Path,
    matrix: Matrix,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun with relative paths in one folder; moved; gone on with from another folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_rows(Path("pairs.jsonl"), rows())
    shutil.copytree(model_folder, "model")
    shutil.copytree(model_folder, "reference")
    words = runs.train(Path("run"), model="model", data="pairs.jsonl", **{"reference.model": "reference"})
    with matrix.trial(13, "moved, and from another folder"):
        with runs.stopping_after(4):
            assert main(words) == 143
        (tmp_path / "there").mkdir()
        shutil.move("run", tmp_path / "there" / "moved")
        monkeypatch.chdir(tmp_path / "there")
        assert main(["resume", "moved"]) == 0
        assert runs.is_whole(tmp_path / "there" / "moved")
    assert not (tmp_path / "here" / "run").exists()


def test_a_reference_of_other_weights_is_refused_wherever_it_lies(
    runs: Runs,
    model_folder: Path,
    tmp_path: Path,
    matrix: Matrix,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reference = Path(shutil.copytree(model_folder, tmp_path / "reference"))
    words = runs.train(tmp_path / "run", **{"reference.model": str(reference)})
    with runs.stopping_after(2):
        assert main(words) == 143
    make_tiny_model(seed=9).save_pretrained(reference)
    with matrix.trial(13, "refused: weights of the reference"):
        assert main(words) == 2
        assert "reference.model: sha256 " in capfd.readouterr().err

"""`penchant eval` as a user meets it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.disk import read_json_lines
from penchant.evaluate.pairs import pair_accuracy
from penchant.examples import Pair
from penchant.scoring.policy import Policy

from .conftest import WORDS, make_tiny_model
from .training.test_run import write_rows

RULES = "def brevity(prompt, completions):\n    return [-len(text) for text in completions]\n"
PAIRS = [
    {"prompt": f"what is {word}", "chosen": f" {word} {WORDS[place]}", "rejected": " no" * (place % 3 + 1)}
    for place, word in enumerate(WORDS[:8])
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def rule(tmp_path: Path) -> list[str]:
    (tmp_path / "rules.py").write_text(RULES)
    return ["--judge.name", "rule", "--judge.function", f"{tmp_path / 'rules.py'}:brevity"]


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reference"
    make_tiny_model(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["eval", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_pairs_tell_the_accuracy_of_the_implicit_reward(
    pairs: str, model_folder: Path, reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    told = evaluated(
        capsys, "--model", model_folder, "--data", pairs, "--reference", reference_folder, "--output", output
    )
    policy, reference = (Policy.from_pretrained(str(folder)) for folder in (model_folder, reference_folder))
    expected = pair_accuracy(policy, reference, [Pair(**row) for row in PAIRS])
    assert told["pairs"] == pytest.approx(expected.as_dict(), abs=1e-4)
    assert "answers" not in told
    assert json.loads((output / "summary.json").read_text()) == {k: v for k, v in told.items() if k != "output"}
    task_rows = read_json_lines(output / "lm_eval" / "penchant_pairs.jsonl")
    assert [row["choices"][row["label"]] for row in task_rows] == [row["chosen"] for row in PAIRS]


def test_against_a_baseline_all_is_told_with_intervals(
    pairs: str, rule: list[str], model_folder: Path, reference_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["--model", model_folder, "--data", pairs, "--output", tmp_path / "out", *rule]
    words += ["--baseline", reference_folder, "--reference", reference_folder, "--sampling.max_new_tokens", "6"]
    told = evaluated(capsys, *words, "--best-of", "3", "--temperatures", "0,1")
    assert list(told["answers"]) == ["temperature 0", "temperature 1", "best of 3 at 1"]
    rows = read_json_lines(tmp_path / "out" / "answers.jsonl")
    assert len(rows) == 24
    for setting, measure in told["answers"].items():
        own = [row for row in rows if row["setting"] == setting]
        for row in own:
            lengths = [len(row["answer"]), len(row["baseline"])]
            assert row["scores"] == [-lengths[0], -lengths[1]]
            assert row["outcome"] == 0.5 + 0.5 * ((lengths[0] < lengths[1]) - (lengths[0] > lengths[1]))
        assert measure["win_rate"]["rate"]["value"] == pytest.approx(sum(row["outcome"] for row in own) / 8)
        assert measure["score"]["value"] == pytest.approx(-sum(len(row["answer"]) for row in own) / 8)
        assert measure["score_difference"]["value"] == pytest.approx(
            measure["score"]["value"] - measure["baseline"]["score"]["value"]
        )
    plain, best = told["answers"]["temperature 1"], told["answers"]["best of 3 at 1"]
    assert best["score"]["value"] >= plain["score"]["value"]
    assert best["kl_bound_from_model"] == pytest.approx(math.log(3) - 2 / 3)
    assert plain["kl"]["low"] < plain["kl"]["value"] < plain["kl"]["high"]
    assert told["answers"]["temperature 0"]["kl"] is None, "greedy answers are no samples of the model"
    outputs = json.loads((tmp_path / "out" / "alpaca_eval.json").read_text())
    assert [row["output"] for row in outputs] == [row["answer"] for row in rows[:8]]
    assert (tmp_path / "out" / "alpaca_eval_baseline.json").exists()


def test_against_the_chosen_answers_of_the_data(
    rule: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "mixed.jsonl", [*PAIRS, {"prompt": "without an answer"}])
    words = ["--model", model_folder, "--data", data, "--output", tmp_path / "out", *rule]
    told = evaluated(capsys, *words, "--against", "chosen", "--sampling.temperature", "0.5")
    assert (told["baseline"], told["prompts"]) == ("chosen", 8)
    rows = read_json_lines(tmp_path / "out" / "answers.jsonl")
    assert [row["baseline"] for row in rows] == [row["chosen"] for row in PAIRS]
    assert list(told["answers"]) == ["temperature 0.5"]


def test_prompts_alone_get_scores(rule: list[str], model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": word} for word in WORDS[:6]])
    told = evaluated(capsys, "--model", model_folder, "--data", data, "--output", tmp_path / "out", "--limit", 4, *rule)
    assert (told["pairs"], told["baseline"], told["prompts"]) == (None, None, 4)
    (measure,) = told["answers"].values()
    assert "win_rate" not in measure
    assert measure["answers"] == 4
    assert not (tmp_path / "out" / "lm_eval").exists()


def test_answers_that_are_there_are_not_sampled_anew(
    pairs: str, rule: list[str], model_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", model_folder, "--data", pairs, "--output", tmp_path / "out", *rule]
    words += ["--sampling.max_new_tokens", "4"]
    told = evaluated(capsys, *words)
    path = tmp_path / "out" / "answers" / "model-temperature-1.jsonl"
    kept = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "sample", None)  # calling it would fail
        assert evaluated(capsys, *words) == told
        path.write_bytes(kept)
        assert "was begun with other settings" in refused(capsys, *words, "--seed", "1")
    assert evaluated(capsys, *words, "--seed", "1", "--overwrite") != told
    assert path.read_bytes() != kept


def test_people_see_tables(
    pairs: str,
    rule: list[str],
    model_folder: Path,
    reference_folder: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    words = ["--model", model_folder, "--data", pairs, "--reference", reference_folder, *rule]
    words += ["--sampling.max_new_tokens", "4", "--against", "chosen", "--best-of", "2"]
    assert main(["eval", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    for part in ("accuracy", "win rate against chosen", "at equal lengths", "KL from the reference", "best of 2 at 1"):
        assert part in shown
    assert "what is the" in shown
    assert "written to evals/tiny-llama-pairs" in shown
    assert (tmp_path / "evals" / "tiny-llama-pairs" / "summary.json").exists()


def test_a_run_is_named_by_its_folder(
    pairs: str, model_folder: Path, reference_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "runs" / "one" / "model")
    (tmp_path / "runs" / "one" / "run.yaml").touch()
    told = evaluated(capsys, "--model", "runs/one/model", "--data", pairs, "--reference", reference_folder)
    assert told["output"] == "evals/one-pairs"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is nothing to measure: no reference is given; give --reference R"),
        (["--baseline", "b"], "--baseline: has no effect without a judge; give --judge.name"),
        (["--best-of", "2"], "--best-of: has no effect without a judge"),
        (["--sampling.top_k", "2"], "has no effect without a judge"),
        (["--limit", "0"], "--limit: must be at least 1, got 0"),
        (["--judge.nam", "rule"], "there is no option '--judge.nam'; did you mean 'judge.name'?"),
        (["RULE", "--best-of", "1"], "--best-of: must be at least 2, got 1"),
        (["RULE", "--best-of", "2", "--temperatures", "0"], "at temperature 0 all answers are the same"),
        (["RULE", "--temperatures", "0,warm"], "--temperatures: must be numbers from 0 on, as 0,0.5,1; got '0,warm'"),
        (["RULE", "--temperatures", "-1"], "--temperatures: must be numbers from 0 on"),
        (["RULE", "--temperatures", "1", "--sampling.temperature", "1"], "has no effect with --temperatures"),
        (["RULE", "--baseline", "b", "--against", "chosen"], "are two things to compare with; leave one out"),
        (
            ["--judge.name", "server", "--judge.url", "http://x/v1", "--judge.model", "m"],
            "a server compares two answers",
        ),
        (["RULE", "--sampling.top_p", "2"], "sampling.top_p: input should be less than or equal to 1, got 2"),
        (["RULE", "--reference", "./nowhere"], "there is no folder './nowhere'"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    words: list[str], told: str, pairs: str, rule: list[str], model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [part for word in words for part in (rule if word == "RULE" else [word])]
    output = tmp_path / "out"
    assert told in refused(capsys, "--model", model_folder, "--data", pairs, "--output", output, *words)
    assert not output.exists()


def test_data_without_what_is_asked_for_are_refused(
    rule: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "what"}])
    words = ["--model", model_folder, "--data", prompts]
    assert "prompts.jsonl holds no pairs" in refused(capsys, *words)
    assert "holds no chosen answers; give --baseline B" in refused(capsys, *words, *rule, "--against", "chosen")
    nothing = write_rows(tmp_path / "nothing.jsonl", [{"x": 1}])
    assert "holds no prompt that can be used" in refused(capsys, "--model", model_folder, "--data", nothing, *rule)


def test_a_reference_of_another_tokenizer_is_refused(
    pairs: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(settings))
    told = refused(capsys, "--model", model_folder, "--data", pairs, "--reference", other)
    assert "has another tokenizer than the model; give one that shares it" in told


def test_the_words_of_help_stand_for_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    told = capsys.readouterr().out
    for option in ("--baseline", "--judge.function", "--sampling.top_p", "--temperatures", "--data_family"):
        assert option in told
    assert "--sampling.completions" not in told

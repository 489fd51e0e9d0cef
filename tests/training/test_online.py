"""Runs that sample their own completions: rounds, references, ties, and going on where they stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penchant import UserError, train
from penchant.config import config_from
from penchant.examples import TokenizedExample
from penchant.online.seeds import prompt_seed
from penchant.scoring.policy import Policy
from penchant.training.logger import RunLog
from penchant.training.loop import Training
from penchant.training.online import set_up_online
from penchant.training.rounds import Rounds
from penchant.training.run import execute

PROMPTS = [{"prompt": f"the {a} {b} on"} for a in ("cat", "dog", "red", "blue") for b in ("sat", "ran", "mat", "tree")]
RULE = "def score(prompt, completions):\n    return [float(text.count('a')) for text in completions]\n"
"""Likes the letter a."""


@pytest.fixture
def rule(tmp_path: Path) -> str:
    place = tmp_path / "rule.py"
    place.write_text(RULE)
    return f"{place}:score"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    place = tmp_path / "prompts.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return place


@pytest.fixture
def settings(model_folder: Path, prompts: Path, rule: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_folder),
        "data": str(prompts),
        "eval_size": 4,
        "judge": {"name": "rule", "function": rule},
        "sampling": {"max_new_tokens": 6, "batch_size": 8},
        "batch_size": 4,
        "learning_rate": 1e-3,
        "num_samples": 0,
        "output_dir": str(tmp_path / "run"),
    }


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def quietly(settings: dict[str, Any], **more: Any) -> Path:
    return execute(config_from({**settings, **more}), log=RunLog(quiet=True)).run_dir


@pytest.mark.parametrize(
    ("method", "more", "rounds", "steps"),
    [
        ("online-dpo", {}, 3, 3),  # 12 prompts, 4 a step
        ("online-dpo", {"loss": {"name": "ipo"}}, 3, 3),
        ("online-dpo", {"loss": {"name": "hinge"}, "lora": {"rank": 2}}, 3, 3),
        ("iterative-dpo", {"online": {"rounds": 2}}, 2, 6),
        ("rso", {"sampling": {"completions": 8, "max_new_tokens": 6}, "online": {"accept": 4}}, 1, 6),
        ("sppo", {"online": {"rounds": 2}, "num_train_epochs": 2}, 2, 12),
        ("best-of-n", {"sampling": {"completions": 4, "max_new_tokens": 6}}, 1, 3),
    ],
)
def test_every_method_runs_to_its_end(
    settings: dict[str, Any], method: str, more: dict[str, Any], rounds: int, steps: int
) -> None:
    folder = quietly(settings, method=method, **more)
    assert sorted(path.name for path in (folder / "rounds").glob("*.jsonl")) == [
        f"{number + 1:04d}.jsonl" for number in range(rounds)
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", steps)
    answers = rows_of(folder, "answers.jsonl")
    assert len(answers) == 4
    assert all(row["score"] == row["answer"].count("a") for row in answers)
    assert summary["answers"]["score"]["value"] == pytest.approx(np.mean([row["score"] for row in answers]))
    assert "held-out prompts" in (folder / "report.html").read_text(encoding="utf-8")
    for path in (folder / "rounds").glob("*.jsonl"):
        for row in rows_of(folder / "rounds", path.name):
            assert row["scores"] == [text.count("a") for text in row["completions"]]


def test_every_prompt_is_asked_once_before_any_is_asked_again(settings: dict[str, Any]) -> None:
    folder = quietly(settings, method="online-dpo", online={"rounds": 6})
    asked = [
        row["prompt"] for path in sorted((folder / "rounds").glob("*.jsonl")) for row in rows_of(path.parent, path.name)
    ]
    assert len(asked) == 24
    assert len(set(asked[:12])) == len(set(asked[12:])) == 12
    assert asked[:12] != asked[12:]


def test_the_first_round_is_what_the_starting_policy_draws_with_the_seeds_of_round_and_prompt(
    settings: dict[str, Any], model_folder: Path
) -> None:
    folder = quietly(settings, method="online-dpo", max_steps=1)
    policy = Policy.from_pretrained(str(model_folder))
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    setup = set_up_online(config_from({**settings, "method": "online-dpo"}), RunLog(quiet=True))
    for row in rows_of(folder / "rounds", "0001.jsonl"):
        (own,) = policy.sample([row["prompt"]], setup.sampling, 2, [prompt_seed(seed, row["prompt"])])
        assert [list(answer.token_ids) for answer in own] == row["ids"]


def test_later_rounds_are_sampled_by_the_weights_of_their_beginning(settings: dict[str, Any]) -> None:
    """With another learning rate the first rounds are the same, and the second ones are not."""
    folders = [
        quietly(settings, method="online-dpo", learning_rate=rate, output_dir=f"{settings['output_dir']}-{rate}")
        for rate in (1e-8, 1e-1)
    ]
    first, second = ([(folder / "rounds" / f"{n:04d}.jsonl").read_bytes() for folder in folders] for n in (1, 2))
    assert first[0] == first[1]
    assert second[0] != second[1]


def test_sppos_reference_is_the_first_policy_of_each_round(settings: dict[str, Any]) -> None:
    folder = quietly(settings, method="sppo", online={"rounds": 3}, loss={"eta": 1.0}, learning_rate=1e-2)
    metrics = {row["step"]: row for row in rows_of(folder, "metrics.jsonl") if "loss" in row}
    for step, row in metrics.items():
        is_first_of_round = step % 3 == 1
        assert (abs(row["rewards/chosen"]) < 1e-5) == is_first_of_round, step
        assert (row["kl"] < 1e-10) == is_first_of_round, step


def test_the_reference_of_the_others_is_the_start_of_the_run(settings: dict[str, Any]) -> None:
    folder = quietly(settings, method="iterative-dpo", online={"rounds": 2}, learning_rate=1e-2)
    metrics = {row["step"]: row for row in rows_of(folder, "metrics.jsonl") if "loss" in row}
    assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics[4]["kl"] > 1e-4  # the first step of the second round


def test_online_dpo_learns_what_the_judge_likes(settings: dict[str, Any]) -> None:
    folder = quietly(
        settings,
        method="online-dpo",
        online={"rounds": 30},
        sampling={"completions": 4, "max_new_tokens": 8},
        batch_size=12,
        learning_rate=5e-3,
        lr_scheduler="constant",
        loss={"beta": 0.05},
    )
    rounds = [rows_of(folder / "rounds", f"{number:04d}.jsonl") for number in range(1, 31)]
    means = [np.mean([score for row in rows for score in row["scores"]]) for rows in rounds]
    assert np.mean(means[-5:]) > 2 * np.mean(means[:5]) + 0.2


def test_where_all_tie_nothing_is_learned_and_it_is_said(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text("def score(prompt, completions):\n    return [1.0] * len(completions)\n")
    judge = {"name": "rule", "function": f"{tmp_path / 'flat.py'}:score"}
    folder = quietly(settings, method="online-dpo", judge=judge)
    before = load_file(Path(settings["model"]) / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [event["code"] for event in rows_of(folder, "events.jsonl")].count("undecided") == 1


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("online-dpo", {"online": {"rounds": 6}}),
        ("sppo", {"online": {"rounds": 2}}),
        ("iterative-dpo", {"online": {"rounds": 2}, "lora": {"rank": 2}}),
    ],
)
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_run_that_was_stopped_comes_to_the_same_end_and_samples_nothing_twice(
    settings: dict[str, Any], method: str, more: dict[str, Any], stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "method": method, **more, "save_steps": 1, "num_train_epochs": 1}
    whole = quietly(settings)
    stopped = {**settings, "output_dir": settings["output_dir"] + "-stopped"}
    step = Training._step

    def fails(self: Training, draw: Any) -> str:
        if self.progress.step == stop_at:
            raise RuntimeError("the machine is gone")
        return step(self, draw)

    monkeypatch.setattr(Training, "_step", fails)
    with pytest.raises(RuntimeError, match="gone"):
        quietly(stopped)
    monkeypatch.undo()
    asked: list[TokenizedExample] = []
    sample = Rounds._sample

    def counts(self: Rounds, number: int, prompts: Any) -> Any:
        asked.extend(prompts)
        return sample(self, number, prompts)

    folder = Path(stopped["output_dir"])
    kept = {path.name: path.read_bytes() for path in (folder / "rounds").iterdir()}
    monkeypatch.setattr(Rounds, "_sample", counts)
    assert quietly(stopped) == folder
    for name, content in kept.items():
        assert (folder / "rounds" / name).read_bytes() == content
    for path in (whole / "rounds").iterdir():
        assert (folder / "rounds" / path.name).read_bytes() == path.read_bytes()
    already = sum(content.count(b"\n") for name, content in kept.items() if name.endswith("jsonl"))
    total = sum(path.read_bytes().count(b"\n") for path in (whole / "rounds").glob("*.jsonl"))
    assert len(asked) == total - already
    file = "adapter_model.safetensors" if "lora" in more else "model.safetensors"
    assert (folder / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()


def test_a_round_that_was_broken_off_is_finished_chunk_by_chunk(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_from({**settings, "method": "iterative-dpo", "sampling": {"max_new_tokens": 6, "batch_size": 12}})
    setup = set_up_online(config, RunLog(quiet=True))
    whole = tmp_path / "whole"
    next(Rounds(setup, None, RunLog(quiet=True), whole).draws())
    lines = (whole / "rounds" / "0001.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    for num_lines, half in ((0, b""), (2, b""), (3, b""), (5, lines[5][:20]), (11, b"")):
        broken = tmp_path / f"broken-{num_lines}"
        (broken / "rounds").mkdir(parents=True)
        (broken / "rounds" / "0001.jsonl").write_bytes(b"".join(lines[:num_lines]) + half)
        next(Rounds(setup, None, RunLog(quiet=True), broken).draws())
        assert (broken / "rounds" / "0001.jsonl").read_bytes() == b"".join(lines)


def test_a_changed_rule_is_a_changed_run(settings: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**settings, "method": "online-dpo", "save_steps": 1}
    step = Training._step

    def fails(self: Training, draw: Any) -> str:
        if self.progress.step == 2:
            raise RuntimeError("gone")
        return step(self, draw)

    monkeypatch.setattr(Training, "_step", fails)
    with pytest.raises(RuntimeError, match="gone"):
        quietly(settings)
    monkeypatch.undo()
    Path(rule.rpartition(":")[0]).write_text(RULE.replace("'a'", "'e'"))
    with pytest.raises(UserError, match=r"judge: sha256"):
        quietly(settings)
    before = (Path(settings["output_dir"]) / "rounds" / "0003.jsonl").read_bytes()
    done = execute(config_from(settings), log=RunLog(quiet=True), allow_change=["judge"])
    third = rows_of(done.run_dir / "rounds", "0003.jsonl")
    assert all(row["scores"] == [text.count("e") for text in row["completions"]] for row in third)
    assert (done.run_dir / "rounds" / "0003.jsonl").read_bytes() != before


def test_samples_of_other_settings_are_not_taken_where_no_checkpoint_tells_of_them(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "method": "iterative-dpo", "online": {"rounds": 1}}

    def fails(self: Training, draw: Any) -> str:
        raise RuntimeError("gone")

    monkeypatch.setattr(Training, "_step", fails)
    with pytest.raises(RuntimeError, match="gone"):
        quietly(settings)
    monkeypatch.undo()
    path = Path(settings["output_dir"]) / "rounds" / "0001.jsonl"
    before = path.read_bytes()
    quietly(settings, seed=1)
    assert path.read_bytes() != before
    fresh = quietly(settings, seed=1, output_dir=settings["output_dir"] + "-fresh")
    assert path.read_bytes() == (fresh / "rounds" / "0001.jsonl").read_bytes()


def test_a_function_in_hand_is_a_judge(model_folder: Path, tmp_path: Path) -> None:
    done = train(
        str(model_folder),
        PROMPTS,
        judge=lambda prompt, completions: [float(len(text)) for text in completions],
        method="online-dpo",
        sampling={"max_new_tokens": 4},
        batch_size=8,
        num_samples=0,
        quiet=True,
        output_dir=str(tmp_path / "run"),
    )
    rows = rows_of(done.run_dir / "rounds", "0001.jsonl")
    assert rows[0]["scores"] == [len(text) for text in rows[0]["completions"]]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"method": "online-dpo", "loss": {"name": "kto"}}, "a loss over pairs is needed"),
        ({"method": "best-of-n", "loss": {"name": "dpo"}}, "the best completions alone"),
        ({"method": "sppo", "reference": {"kind": "copy"}}, "with online.renew_reference"),
        ({"method": "online-dpo", "reference": {"kind": "precomputed"}}, "precomputed needs the completions before"),
        ({"method": "online-dpo", "data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"method": "online-dpo", "eval_size": 16}, "would leave none to train on"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        quietly(settings, **more)
    assert not Path(settings["output_dir"]).exists()


def test_overwrite_forgets_the_rounds(settings: dict[str, Any]) -> None:
    folder = quietly(settings, method="online-dpo")
    shutil.copy(folder / "rounds" / "0001.jsonl", folder / "rounds" / "0009.jsonl")
    execute(config_from({**settings, "method": "online-dpo"}), overwrite=True, log=RunLog(quiet=True))
    assert not (folder / "rounds" / "0009.jsonl").exists()

"""The doctor on runs: its own, TRL's, half-written ones, and folders that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.disk import write_json, write_json_lines
from penchant.doctor.diagnosis import diagnose
from penchant.doctor.run_logs import read_log
from penchant.errors import UserError

TRL = Path(__file__).parent / "trl"


def codes(folder: Path) -> set[str]:
    return {trouble.first.code for trouble in diagnose(folder).troubles}


def penchant_run(folder: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> Path:
    """A run directory as a DPO run of 100 steps leaves it."""
    folder.mkdir()
    (folder / "run.yaml").write_text("model: m\ndata: d\nmethod: dpo\nbatch_size: 16\nwarmup_ratio: 0.1\n")
    loss = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    write_json(
        folder / "summary.json",
        {"status": "running", "method": "dpo", "loss": loss, "total_steps": 100, "steps_per_epoch": 100},
    )
    write_json(folder / "data.json", {"train": {"used": 1600}, "eval": {"used": 64}})
    write_json_lines(folder / "metrics.jsonl", lines)
    write_json_lines(folder / "events.jsonl", events or [])
    return folder


def lines(margin: float, number: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / 100,
            "loss": 0.1,
            "rewards/margins": margin,
            "rewards/accuracies": 0.8,
            "kl": 0.1,
        }
        for step in range(1, number + 1)
    ]


# TRL.


def test_the_doctor_names_the_trouble_in_trls_logs() -> None:
    assert codes(TRL / "rate_too_low") == {"rate-too-low"}
    assert codes(TRL / "swapped") == {"reversed"}


def test_the_numbers_are_those_of_the_log() -> None:
    state = json.loads((TRL / "rate_too_low" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    (trouble,) = diagnose(TRL / "rate_too_low").troubles
    assert trouble.worst.values["loss"] == pytest.approx(sum(losses[:20]) / 20)
    assert trouble.first.step == 20


def test_the_newest_checkpoint_is_read(tmp_path: Path) -> None:
    state = json.loads((TRL / "swapped" / "trainer_state.json").read_text())
    for step in (20, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [entry for entry in state["log_history"] if entry["step"] <= step]
        write_json(folder / "trainer_state.json", {**state, "global_step": step, "log_history": history})
    log = read_log(tmp_path)
    assert (log.last_step, log.maker, log.method, log.status) == (40, "trainer", "dpo", "finished")
    assert read_log(tmp_path / "checkpoint-20").last_step == 20


@pytest.mark.parametrize(
    ("entry", "method", "translated"),
    [
        ({"reward": 0.5, "completions/clipped_ratio": 0.25, "completions/mean_length": 9.0, "frac_reward_zero_std": 0.1,
          "rewards/length/mean": 3.0}, "grpo",
         {"samples/score": 0.5, "samples/finished": 0.75, "samples/length": 9.0, "samples/undecided": 0.1}),
        ({"kl": 0.3, "rewards/margins": 0.1}, "kto", {"kl_mismatched": 0.3, "rewards/margins": 0.1}),
        ({"log_odds_ratio": -0.3, "rewards/margins": 0.1, "nll_loss": 2.0}, "orpo",
         {"log_odds_ratio": -0.3, "rewards/margins": 0.1, "nll_loss": 2.0}),
        ({"nll_loss": 2.0, "rewards/margins": 0.1}, "cpo", {"nll_loss": 2.0, "rewards/margins": 0.1}),
        ({"eval_rewards/margins": 0.1, "rewards/margins": 0.1}, "dpo",
         {"eval_rewards/margins": 0.1, "rewards/margins": 0.1}),
        ({"loss": 2.0}, "sft", {"loss": 2.0}),
    ],
)  # fmt: skip
def test_names_of_trl_become_ours(
    entry: dict[str, Any], method: str, translated: dict[str, Any], tmp_path: Path
) -> None:
    write_json(
        tmp_path / "trainer_state.json", {"max_steps": 5, "global_step": 3, "log_history": [{"step": 3, **entry}]}
    )
    log = read_log(tmp_path)
    assert (log.method, log.status) == (method, None)
    assert log.lines == [{"step": 3, **translated}]


def test_method_and_beta_can_be_told(tmp_path: Path) -> None:
    write_json(tmp_path / "trainer_state.json", {"log_history": [{"step": 3, "rewards/margins": 1.0}]})
    log = read_log(tmp_path, "ipo", 0.2)
    assert (log.facts.losses, log.facts.beta) == (("ipo",), 0.2)
    assert "as given" in log.notes[0]


def test_nan_in_a_log_is_no_number_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(
        '{"max_steps": 5, "log_history": [{"step": 1, "loss": NaN, "grad_norm": Infinity, "rewards/margins": 1.0}]}'
    )
    (line,) = read_log(tmp_path).lines
    assert line["loss"] is None


def test_trls_log_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        pytest.skip("trl is not installed: pip install trl==1.16.0")
    if found != "1.16.0":
        pytest.skip(f"trl {found} is installed, and the log is of trl 1.16.0")
    from . import make_trl_log

    make_trl_log.train("rate_too_low", tmp_path)
    assert codes(tmp_path) == {"rate-too-low"}


# Penchant's own.


def test_a_running_run_is_told_of_the_worst_first_with_evidence(tmp_path: Path) -> None:
    run = penchant_run(
        tmp_path / "run",
        [*lines(60.0), {"step": 40, "eval_kl": 0.6, "eval_loss": 0.2}],
        [
            {"step": 3, "severity": "warn", "code": "spike", "message": "step 3: loss 9"},
            {"step": 9, "severity": "warn", "code": "spike", "message": "step 9: loss 8"},
            {"step": 0, "severity": "info", "code": "identity", "message": "fine"},
            {"step": 12, "severity": "warn", "code": "margin-explosion", "message": "told already"},
        ],
    )
    diagnosis = diagnose(run)
    assert [trouble.worst.severity for trouble in diagnosis.troubles] == ["major", "warn"]
    text = str(diagnosis)
    assert text.startswith(f"{run}: dpo, step 40 of 100, running")
    assert "MAJOR  margin-explosion (since step 10)" in text
    assert "the mean margin of the training pairs is 60.0" in text
    assert "warn  spike (2 times, step 3, 9)" in text
    assert "identity" not in text
    assert diagnosis.is_serious


def test_what_passed_is_said_to_have_passed(tmp_path: Path) -> None:
    later = [{**line, "step": line["step"] + 40} for line in lines(2.0)]
    run = penchant_run(tmp_path / "run", [*lines(12.0), *later])
    assert "margin-explosion (at step 10, later no more)" in str(diagnose(run))


def test_half_a_line_and_broken_files_do_no_harm(tmp_path: Path) -> None:
    run = penchant_run(tmp_path / "run", lines(60.0))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss"')
    assert "margin-explosion" in codes(run)
    for name in ("summary.json", "data.json"):
        (run / name).write_text("{")
    (run / "events.jsonl").unlink()
    assert "margin-explosion" in codes(run)
    (run / "metrics.jsonl").unlink()
    assert codes(run) == set()
    assert "the log has 0 lines of training" in str(diagnose(run))


# The command.


def test_exit_codes_tell_whether_it_is_serious(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(penchant_run(tmp_path / "sound", lines(1.0)))]) == 0
    assert "Nothing of what the watch looks for was found." in capsys.readouterr().out
    assert main(["doctor", str(penchant_run(tmp_path / "warned", lines(12.0))), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in told["findings"]] == ["margin-explosion"]
    assert (told["serious"], told["findings"][0]["still_so"], told["findings"][0]["values"]) == (
        False, True, {"margin": 12.0}
    )  # fmt: skip
    assert main(["doctor", str(penchant_run(tmp_path / "serious", lines(60.0)))]) == 2


@pytest.mark.parametrize("what", ["missing", "a file", "empty", "parent", "no history", "no yaml"])
def test_what_is_no_run_is_refused_in_a_sentence(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, expected = tmp_path / "there", "holds no run: neither a run.yaml (Penchant) nor a trainer_state.json"
    if what == "missing":
        expected = "there is no such folder"
    elif what == "a file":
        place.write_text("x")
        expected = "there is no such folder"
    elif what == "parent":
        place.mkdir()
        penchant_run(place / "mine", [])
        expected = "It holds runs of its own: mine; name one of them."
    elif what == "no history":
        place.mkdir()
        (place / "trainer_state.json").write_text('{"max_steps": ')
        expected = "has no log_history, or is no JSON"
    elif what == "no yaml":
        penchant_run(place, [])
        (place / "run.yaml").write_text("- a list")
        expected = "is no run file"
    else:
        place.mkdir()
    assert main(["doctor", str(place)]) == 2
    assert expected in capsys.readouterr().err


def test_method_is_for_other_libraries_logs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run directory tells its own"):
        diagnose(penchant_run(tmp_path / "run", []), "ipo")


def test_the_doctor_loads_nothing_heavy(tmp_path: Path) -> None:
    run = penchant_run(tmp_path / "run", lines(60.0))
    code = (
        f"import sys; from penchant.cli import main; main(['doctor', {str(run)!r}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0

"""What a report says of a run is what its numbers bear, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penchant.report import verdict
from penchant.report.rundir import RunRecord
from penchant.report.series import Series


def run_with(held_out: dict[str, tuple[float | None, ...]], **fields: Any) -> RunRecord:
    """A run with held-out measurements at steps 0, 10, 20, ..."""
    metrics = {f"eval_{n}": Series(tuple((10 * i, v) for i, v in enumerate(vs))) for n, vs in held_out.items()}
    data = {"eval": {"used": 100, "longer_wins": 0.3}}
    return RunRecord(name="run", **{"metrics": metrics, "data": data, **fields})


def text(run: RunRecord) -> str:
    return " ".join([*verdict.headline(run), *verdict.details(run)])


def test_accuracy_stands_with_its_interval_and_both_length_rules() -> None:
    said = text(run_with({"rewards/accuracies": (0.5, 0.9), "rewards/chosen": (0.4, 1.0)}))
    # Wilson for p = 0.9, n = 100, z = 1.959964: (0.9192073 -+ 0.0617...) / 1.0384146 = 0.8256 to 0.9448.
    assert "90.0% of 100 held-out pairs (95% interval 82.6% to 94.5%); before training it was 50.0%" in said
    assert "right in 30.0% of these pairs, always the shorter one in up to 70.0%" in said
    assert "better than length alone" in said


@pytest.mark.parametrize(
    ("longer_wins", "words"),
    [(0.2, "does not rule out"), (0.03, "length alone would do better"), (0.55, "better than length alone")],
)
def test_length_alone_is_judged_by_the_interval(longer_wins: float, words: str) -> None:
    run = run_with({"rewards/accuracies": (0.5, 0.8)}, data={"eval": {"used": 100, "longer_wins": longer_wins}})
    assert words in text(run)


def test_accuracy_of_a_model_that_is_its_own_reference_counts_for_nothing() -> None:
    zeros = {"rewards/chosen": (0.0, 1.0), "rewards/rejected": (1e-7, -1.0)}
    run = run_with({"rewards/accuracies": (0.43, 0.9), **zeros})
    assert "43.0% measured before training says nothing" in text(run)
    assert "before training it was" not in text(run)


def test_a_coin_and_an_unchanged_accuracy_are_called_so() -> None:
    said = text(run_with({"rewards/accuracies": (0.52, 0.55)}))
    assert "no clear difference" in said
    assert "tossing a coin" in said


def test_without_a_count_of_pairs_there_is_no_interval() -> None:
    run = run_with({"rewards/accuracies": (0.5, 0.9)}, data={})
    assert "interval" not in text(run)
    assert verdict.held_out_accuracy(run).interval is None  # type: ignore[union-attr]


def test_loss_that_turned_up_again_is_named() -> None:
    said = text(run_with({"loss": (0.69, 0.4, 0.55)}))
    assert "fell from 0.69 to 0.55, having been as low as 0.4" in said


def test_falling_chosen_logps_are_not_hidden() -> None:
    said = text(run_with({"logps/chosen": (-100.0, -120.0), "logps/rejected": (-100.0, -180.0), "kl": (0.0, 0.045)}))
    assert (
        "became less probable, from −100 to −120 nats; the margin grew because the rejected ones fell further" in said
    )
    assert "0.045 nats per token away from its reference" in said
    assert "became more probable" in text(run_with({"logps/chosen": (-100.0, -90.0)}))


def test_without_held_out_pairs_training_figures_are_no_evidence() -> None:
    metrics = {"rewards/accuracies": Series(tuple((i, 0.5 if i < 90 else 1.0) for i in range(100)))}
    said = text(RunRecord(name="run", metrics=metrics))
    assert "No pairs were held out" in said
    assert "100.0%" in said
    assert "no evidence" in said


@pytest.mark.parametrize(
    ("status", "word"), [("failed", "failed"), ("running", "still going"), ("interrupted", "was interrupted")]
)
def test_an_unfinished_run_says_so_first(status: str, word: str) -> None:
    run = run_with({"rewards/accuracies": (0.5, 0.9)}, summary={"status": status, "steps": 10})
    assert word in verdict.headline(run)[0]


def test_divergence_and_serious_events_are_said() -> None:
    run = run_with({"loss": (0.69, None)}, events=[{"severity": "stop"}, {"severity": "info"}])
    assert "diverged" in text(run)
    assert "is 1 serious event," in text(run)


def test_a_run_before_its_first_line_has_no_verdict(make_run: Callable[..., Path]) -> None:
    assert text(RunRecord(name="run")) == "Nothing has been measured yet."

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
    data = {"eval": {"unit": "pair", "used": 100, "longer_wins": 0.3}}
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
    run = run_with(
        {"rewards/accuracies": (0.5, 0.8)}, data={"eval": {"unit": "pair", "used": 100, "longer_wins": longer_wins}}
    )
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
    said = text(RunRecord(name="run", metrics=metrics, data={"train": {"unit": "pair"}}))
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


COMPLETIONS = {
    "unit": "completion",
    "used": 20,
    "desirable": 8,
    "longer_wins": None,
    "lengths": {"desirable": {}, "undesirable": {}},
}


def test_completions_are_judged_by_the_couples_of_both_classes() -> None:
    data = {"train": COMPLETIONS, "eval": COMPLETIONS}
    logps = {"logps/chosen": (-50.0, -60.0), "logps/rejected": (-50.0, -80.0)}
    said = text(run_with({"rewards/accuracies": (0.5, 0.75), "rewards/chosen": (0.4, 1.0), **logps}, data=data))
    # Hanley and McNeil for A = 0.75 of 8 and 12: SE^2 = (0.1875 + 7 * 0.0375 + 11 * 0.080357) / 96 = 0.0138951.
    assert (
        "the desirable completion has the higher reward in 75.0% of the couples of a desirable and an undesirable one "
        "among 20 held-out completions (95% interval 51.9% to 98.1%); before training it was 50.0%."
    ) in said
    assert "The desirable completions themselves became less probable, from −50 to −60 nats" in said
    assert "the undesirable ones fell further" in said
    assert not [word for word in ("pair", "chosen", "rejected", "longer", "coin") if word in said]


def test_rankings_are_judged_by_the_couples_within_and_have_no_interval() -> None:
    part = {"unit": "ranking", "used": 40, "longer_wins": 0.3}
    said = text(run_with({"rewards/accuracies": (0.5, 0.75), "logps/chosen": (-9.0, -8.0)}, data={"eval": part}))
    assert "the better completion has the higher reward in 75.0% of the couples within 40 held-out rankings;" in said
    assert "right in 30.0% of these rankings, always the shorter one in up to 70.0%, best against worst." in said
    assert "The best completions became more probable" in said
    assert "interval" not in said
    assert "pair" not in said


def test_pairs_held_against_a_method_for_completions_are_pairs() -> None:
    data = {"train": COMPLETIONS, "eval": {"unit": "pair", "used": 100, "longer_wins": 0.3}}
    said = text(run_with({"rewards/accuracies": (0.5, 0.9), "logps/chosen": (-9.0, -8.0)}, data=data))
    assert "90.0% of 100 held-out pairs (95% interval 82.6% to 94.5%)" in said
    assert "The chosen completions became more probable" in said


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (COMPLETIONS, "the desirable completion had the higher reward in 60.0% of the couples"),
        ({"unit": "ranking"}, "the better completion had the higher reward in 60.0% of the couples"),
        ({"unit": "pair"}, "the chosen completion had the higher reward in 60.0% of the pairs"),
    ],
)
def test_training_figures_speak_of_what_was_trained_on(part: dict[str, Any], words: str) -> None:
    run = RunRecord(name="run", metrics={"rewards/accuracies": Series(((1, 0.6),))}, data={"train": part})
    said, plural = text(run), f"{part['unit']}s"
    assert f"No {plural} were held out, so nothing here tells how the model does on {plural} it has not seen." in said
    assert (
        f"On the training {plural} of the last line of the log {words}; that is a figure about {plural} being" in said
    )


def test_without_couples_there_is_no_accuracy_and_the_completions_have_no_side() -> None:
    part = {"unit": "completion", "used": 20, "desirable": 0, "lengths": {"prompt": {}, "completion": {}}}
    data = {"train": part, "eval": part}
    said = text(run_with({"loss": (6.0, 5.5), "logps/chosen": (-50.0, -40.0)}, data=data))
    assert (
        "Among 20 held-out completions there is no couple of a better and a worse one, so there is no accuracy." in said
    )
    assert "The completions became more probable, from −50 to −40 nats." in said
    assert "desirable" not in said


def test_a_loss_that_stays_does_not_rise() -> None:
    assert "The held-out loss stayed at 6.79." in text(run_with({"loss": (6.7901, 6.7915)}))


def with_answers(**answers: Any) -> RunRecord:
    return run_with({"answer_kl": (0.0, 2.5)}, data={}, summary={"answers": {"prompts": 86, **answers}})


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def test_the_score_of_answers_stands_with_its_change_and_the_distance_that_it_took() -> None:
    scores = {"score_before": estimate(1.5, 1.2, 1.8), "score": estimate(2.0, 1.75, 2.25)}
    said = text(with_answers(**scores, difference=estimate(0.5, 0.25, 0.75)))
    assert "On 86 held-out prompts the mean score of the policy's answers went from 1.5 to 2" in said
    assert "a change of 0.5 (95% interval 0.25 to 0.75)." in said
    assert "2.5 nats a completion away from its reference" in said
    assert "no clear difference" in text(with_answers(**scores, difference=estimate(0.1, -0.2, 0.4)))
    assert "accuracy" not in said


def test_wins_against_the_answers_before_are_told_where_the_judge_compares() -> None:
    said = text(with_answers(win_rate=estimate(0.75, 0.6, 0.875)))
    assert "wins 75.0% (95% interval 60.0% to 87.5%), ties counting half" in said
    assert "mean score" not in said

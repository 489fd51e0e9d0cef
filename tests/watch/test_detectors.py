"""Each detector on both sides of its thresholds, on logs made by hand; on real runs `test_planted.py` tries them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from penchant.config import METHODS
from penchant.losses import LOSSES
from penchant.watch import DETECTORS, Facts
from penchant.watch.kinds import LOG_RATIO, LOGISTIC, REFERENCE_FREE

from .logs import DPO, found, history, training

GRPO = Facts(losses=("grpo",), settings={"beta": 0.04}, total_steps=40, rounds=40, advantages=True, max_new_tokens=64)
ONLINE = replace(DPO, rounds=40)


def of(name: str, **settings: Any) -> Facts:
    return replace(DPO, losses=(name,), settings={"beta": 0.1, **settings})


def held_out(*values: float, name: str = "rewards/accuracies", every: int = 10) -> list[dict[str, Any]]:
    return [{"step": every * place, f"eval_{name}": value} for place, value in enumerate(values)]


def rounds(number: int = 20, **ends: tuple[float, float]) -> list[dict[str, Any]]:
    """Rounds of which the named measurements go from one value to another, along a line."""
    lines = []
    for step in range(1, number + 1):
        share = (step - 1) / (number - 1)
        values = {f"samples/{name}": a + share * (b - a) for name, (a, b) in ends.items()}
        lines.append({"step": step, "loss": 0.0, "entropy": 2.0, **values})
    return lines


START = {"step": 0, "eval_length/chosen": 50.0, "eval_logps/accuracies": 0.6}

FIRES: dict[str, list[tuple[Facts, list[dict[str, Any]], str | None]]] = {
    "weak-reference": [
        (DPO, [{**START, "eval_logps/chosen": -160.0}], "warn"),
        (DPO, [{**START, "eval_logps/chosen": -260.0}], "major"),
        (DPO, [{**START, "eval_logps/chosen": -140.0}], None),
        (of("simpo"), [{**START, "eval_logps/chosen": -260.0}], None),
        (DPO, [{**START, "step": 30, "eval_logps/chosen": -260.0}], None),
    ],
    "rate-too-low": [
        (DPO, training(loss=0.6929, kl=1e-6), "major"),
        (DPO, training(loss=0.6929, kl=1e-2), None),
        (DPO, training(loss=0.6, kl=1e-6), None),
        (DPO, training(20, loss=0.6929, kl=1e-6), None),
        (ONLINE, training(loss=0.6929, kl=1e-6), None),
    ],
    "nothing-learned": [
        (DPO, training(60, **{"rewards/accuracies": 0.51}), "major"),
        (DPO, training(60, **{"rewards/accuracies": 0.56}), None),
        (DPO, [*training(60, **{"rewards/accuracies": 0.51}), *held_out(0.5, 0.7)], None),
        (DPO, training(60, kl=1e-6, **{"rewards/accuracies": 0.51}), None),
    ],
    "reversed": [
        (DPO, training(**{"rewards/accuracies": 0.3, "rewards/margins": -0.2}), "major"),
        (DPO, training(**{"rewards/accuracies": 0.3, "rewards/margins": 0.2}), None),
        (replace(DPO, num_heldout=400), [*training(), *held_out(0.5, 0.4)], "major"),
        (replace(DPO, num_heldout=40), [*training(), *held_out(0.5, 0.4)], None),
    ],
    "overfit": [
        (DPO, [*training(**{"rewards/accuracies": 0.99}), *held_out(0.5, 0.7)], "warn"),
        (DPO, [*training(**{"rewards/accuracies": 0.99}), *held_out(0.5, 0.9)], None),
        (DPO, [*training(), *held_out(0.5, 0.7), *held_out(0.69, 0.5, 0.51, 0.52, 0.53, name="loss")], "warn"),
        (DPO, [*training(), *held_out(0.5, 0.7), *held_out(0.69, 0.5, 0.51, 0.512, 0.53, name="loss")], None),
        (DPO, [*training(), *held_out(0.5, 0.7), *held_out(0.5, 0.5, 0.51, 0.52, 0.53, name="loss")], "major"),
    ],
    "saturated": [
        (DPO, training(**{"rewards/saturated": 0.6}), "warn"),
        (DPO, training(**{"rewards/saturated": 0.4}), None),
        (of("ipo"), training(**{"rewards/saturated": 0.6}), None),
        (replace(DPO, steps_per_epoch=20.0), training(**{"rewards/saturated": 0.6}), None),
    ],
    "length-exploitation": [
        (DPO, training(**{"length/correlation": 0.6}), "warn"),
        (DPO, training(**{"length/correlation": 0.9}), "major"),
        (DPO, training(**{"length/correlation": 0.4}), None),
        (DPO, training(**{"length/correlation": 0.6, "rewards/accuracies": 0.5}), None),
        (DPO, [*training(**{"length/correlation": 0.6}), *held_out(0.0, 0.1, name="length/correlation")], None),
    ],
    "displaced": [
        (DPO, training(start={"logps/chosen": 0.0}, **{"logps/chosen": -100.0}), None),  # one line of the first ten
        (DPO, [*training(10), *({**line, "step": 10 + line["step"], "logps/chosen": -180.0} for line in training(30))],
         "warn"),
        (DPO, [*training(10), *({**line, "step": 10 + line["step"], "logps/chosen": -280.0} for line in training(30))],
         "major"),
        (DPO, [*training(10), *({**line, "step": 10 + line["step"], "logps/chosen": -120.0} for line in training(30))],
         None),
        (DPO, [*training(), *held_out(-100.0, -160.0, name="logps/chosen"),
               *held_out(99.0, 100.0, name="length/chosen")], "warn"),
        (DPO, [*training(), *held_out(-100.0, -145.0, name="logps/chosen")], "warn"),  # TRL's logs tell no lengths
        (DPO, [*training(), *held_out(-100.0, -130.0, name="logps/chosen")], None),
    ],
    "far-from-reference": [
        (DPO, training(kl=0.6), "warn"),
        (DPO, training(kl=2.5), "major"),
        (DPO, training(kl=0.4), None),
        (GRPO, [{"step": 10, "eval_answer_kl": 60.0, "eval_answer_length": 100.0}], "warn"),
        (GRPO, [{"step": 10, "eval_answer_kl": 40.0, "eval_answer_length": 100.0}], None),
    ],
    "over-optimised": [
        (GRPO, [{"step": 10 * n, "eval_score": score, "eval_score_error": 0.1, "eval_answer_kl": 1.0 + n}
                for n, score in enumerate([0.0, 1.0, 0.4, 0.3])], "major"),
        (GRPO, [{"step": 10 * n, "eval_score": score, "eval_score_error": 0.1, "eval_answer_kl": 1.0 + n}
                for n, score in enumerate([0.0, 1.0, 0.8, 0.7])], None),
        (GRPO, [{"step": 10 * n, "eval_score": score, "eval_score_error": 0.1, "eval_answer_kl": 1.0}
                for n, score in enumerate([0.0, 1.0, 0.4, 0.3])], None),
    ],
    "margin-explosion": [
        (DPO, training(**{"rewards/margins": 12.0}), "warn"),
        (DPO, training(**{"rewards/margins": 60.0}), "major"),
        (DPO, training(**{"rewards/margins": 8.0}), None),
        (of("simpo"), training(**{"rewards/margins": 60.0}), None),
    ],
    "beta-too-high": [
        (of("dpo", beta=10.0), training(60, **{"rewards/margins": 1.0}), "warn"),
        (DPO, training(60, **{"rewards/margins": 1.0}), None),
        (of("dpo", beta=10.0), training(40, **{"rewards/margins": 1.0}), None),
    ],
    "beta-too-low": [
        (of("dpo", beta=0.001), training(60, kl=0.8), "warn"),
        (of("dpo", beta=0.001), training(60, kl=0.3), None),
        (of("dpo", beta=0.001), training(60, kl=0.8, **{"rewards/margins": 2.0}), None),
    ],
    "no-gradient": [
        (DPO, training(5, grad_norm=0.0), "stop"),
        (DPO, training(4, grad_norm=0.0), None),
        (DPO, training(5, grad_norm=1e-6), None),
        (DPO, training(5, grad_norm=0.0, loss=1e-5, start={"loss": 1e-5}), None),
        (GRPO, [{**line, "samples/undecided": 1.0} for line in training(5, grad_norm=0.0)], None),
    ],
    "rate-too-high": [
        (DPO, training(loss=0.8), "major"),
        (DPO, training(loss=0.72), None),
        (DPO, training(update_ratio=0.05), "warn"),
        (ONLINE, training(loss=0.8), None),
    ],
    "kto-anchor": [
        (of("kto"), training(60, kl_mismatched=0.0, **{"rewards/chosen": -2.0}), "warn"),
        (of("kto"), training(60, kl_mismatched=0.1, **{"rewards/chosen": -2.0}), None),
        (of("kto"), training(60, kl_mismatched=0.0, **{"rewards/chosen": -0.8}), None),
        (DPO, training(60, kl_mismatched=0.0, **{"rewards/chosen": -2.0}), None),
    ],
    "ipo-target": [
        (of("ipo"), training(95, **{"rewards/margins": 0.05}), "warn"),
        (of("ipo"), training(95, **{"rewards/margins": 0.9}), "warn"),
        (of("ipo"), training(95, **{"rewards/margins": 0.4}), None),
        (of("ipo"), training(80, **{"rewards/margins": 0.05}), None),
    ],
    "orpo-balance": [
        (of("orpo"), [*training(60), *held_out(-100.0, -120.0, name="logps/chosen"),
                      *held_out(100.0, 100.0, name="length/chosen"), *held_out(0.1, 0.4, name="rewards/margins")],
         "major"),
        (of("orpo"), [*training(60), *held_out(-100.0, -80.0, name="logps/chosen"),
                      *held_out(100.0, 100.0, name="length/chosen"), *held_out(0.1, 0.1, name="rewards/margins")],
         "warn"),
        (of("orpo"), [*training(60), *held_out(-100.0, -80.0, name="logps/chosen"),
                      *held_out(100.0, 100.0, name="length/chosen"), *held_out(0.1, 0.4, name="rewards/margins")],
         None),
    ],
    "simpo-margin": [
        (of("simpo", beta=2.0, gamma_beta_ratio=8.0), training(80, **{"rewards/margins": 2.0, "rewards/chosen": -2.0}),
         "warn"),
        (of("simpo", beta=2.0, gamma_beta_ratio=0.5), training(80, **{"rewards/margins": 2.0, "rewards/chosen": -2.0}),
         None),
        (of("simpo", beta=2.0, gamma_beta_ratio=0.5),
         [*training(5, **{"rewards/chosen": -2.0}),
          *({**line, "step": 5 + line["step"], "rewards/chosen": -5.0} for line in training(40))], "major"),
    ],
    "answers-grow": [
        (GRPO, rounds(length=(50.0, 90.0)), "warn"),
        (GRPO, rounds(length=(50.0, 190.0)), "major"),
        (GRPO, rounds(length=(50.0, 70.0)), None),
        (DPO, rounds(length=(50.0, 160.0)), None),
    ],
    "unfinished": [
        (GRPO, rounds(finished=(0.9, 0.6)), "warn"),
        (GRPO, rounds(finished=(0.9, 0.2)), "major"),
        (GRPO, rounds(finished=(0.9, 0.8)), None),
    ],
    "repetition": [
        (GRPO, rounds(repeated_4=(0.02, 0.4), score=(1.0, 0.9)), "warn"),
        (GRPO, rounds(repeated_4=(0.02, 0.4), score=(1.0, 2.0)), "major"),
        (GRPO, rounds(repeated_4=(0.02, 0.1), distinct_2=(0.8, 0.2), score=(1.0, 2.0)), "major"),
        (GRPO, rounds(repeated_4=(0.02, 0.1), distinct_2=(0.8, 0.6), score=(1.0, 2.0)), None),
    ],
    "mode-collapse": [
        (GRPO, [{**line, "entropy": 2.0 - 0.08 * line["step"]} for line in rounds()], "warn"),
        (GRPO, [{**line, "entropy": 2.0 - 0.03 * line["step"]} for line in rounds()], None),
        (GRPO, rounds(same_opening=(0.1, 0.9)), "warn"),
        (GRPO, rounds(same_opening=(0.6, 0.8)), None),
    ],
    "undecided": [
        (GRPO, rounds(3, undecided=(0.7, 0.7)), "warn"),
        (GRPO, rounds(2, undecided=(0.7, 0.7)), None),
        (replace(GRPO, rounds=2), rounds(2, undecided=(0.7, 0.7)), "warn"),
        (GRPO, rounds(3, undecided=(0.4, 0.4)), None),
    ],
    "low-acceptance": [
        (ONLINE, [{"step": 1, "samples/acceptance": 0.03}], "warn"),
        (ONLINE, [{"step": 1, "samples/acceptance": 0.1}], None),
    ],
    "clipped-tokens": [
        (GRPO, training(10, clipped=0.3), "warn"),
        (GRPO, training(10, clipped=0.6), "major"),
        (GRPO, training(10, clipped=0.1), None),
        (DPO, training(10, clipped=0.6), None),
    ],
    "blind-values": [
        (replace(GRPO, losses=("ppo",)), rounds(24, explained=(0.0, 0.0)), "warn"),
        (replace(GRPO, losses=("ppo",)), rounds(24, explained=(0.0, 0.3)), None),
        (replace(GRPO, losses=("ppo",)), rounds(12, explained=(0.0, 0.0)), None),
        (GRPO, rounds(24, explained=(0.0, 0.0)), None),
    ],
}  # fmt: skip
CASES = [(code, place, *case) for code, cases in FIRES.items() for place, case in enumerate(cases)]


@pytest.mark.parametrize(("code", "place", "facts", "lines", "severity"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_detector_fires_beyond_its_threshold_and_not_before(
    code: str, place: int, facts: Facts, lines: list[dict[str, Any]], severity: str | None
) -> None:
    finding = found(code, lines, facts)
    assert (finding and finding.severity) == severity, finding
    if finding is not None:
        assert finding.step == max(line["step"] for line in lines)
        assert finding.message == f"{finding.seen}. {finding.meaning} {finding.remedy}"
        assert finding.seen[0].isupper()


def test_every_detector_is_tried_both_ways() -> None:
    assert FIRES.keys() == DETECTORS.keys()
    for code, cases in FIRES.items():
        assert {severity is None for *_, severity in cases} == {True, False}, code


@pytest.mark.parametrize("code", DETECTORS)
def test_an_empty_log_and_a_sound_one_say_nothing(code: str) -> None:
    for facts in (DPO, GRPO, ONLINE, Facts()):
        assert DETECTORS[code].find(history([]), facts) is None
        assert DETECTORS[code].find(history([{"step": 0, "eval_loss": 0.69}]), facts) is None
    assert found(code, [*training(60), *held_out(0.5, 0.7), *held_out(0.69, 0.6, name="loss")]) is None


@pytest.mark.parametrize("code", DETECTORS)
def test_a_detector_says_what_it_is_in_sentences(code: str) -> None:
    detector = DETECTORS[code]
    for text in (detector.meaning, detector.remedy):
        assert text[0].isupper()
        assert text.endswith(".")
    assert detector.source
    assert detector.runs


def test_a_threshold_can_be_replaced() -> None:
    lines = history(training(**{"rewards/margins": 8.0}))
    assert DETECTORS["margin-explosion"].find(lines, DPO) is None
    assert DETECTORS["margin-explosion"].find(lines, DPO, {"warn": 5.0}) is not None


def test_the_losses_that_detectors_name_are_there() -> None:
    assert {*LOG_RATIO, *LOGISTIC, *REFERENCE_FREE} <= {*LOSSES, *METHODS}
    for name in REFERENCE_FREE:
        assert "reference" not in LOSSES[name]().needs
    for name in (*LOG_RATIO, *LOGISTIC):
        assert "reference" in LOSSES[name]().needs, name


_RUNS = {
    "dpo": DPO,
    "kto": replace(DPO, losses=("kto",)),
    "ipo": replace(DPO, losses=("ipo",)),
    "orpo": replace(DPO, losses=("orpo",), settings={}),
    "simpo": replace(DPO, losses=("simpo",), settings={"beta": 2.0, "gamma_beta_ratio": 0.5}),
    "online": replace(DPO, rounds=20),
    "grpo": replace(DPO, losses=("grpo",), settings={"beta": 0.04}, rounds=20, advantages=True),
    "ppo": replace(DPO, losses=("ppo",), settings={}, rounds=20, advantages=True),
}
_NAMES = (
    *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/saturated"),
    *("logps/chosen", "logps/rejected", "logps/accuracies", "length/chosen", "length/correlation", "entropy", "kl"),
    *("kl_mismatched", "old_kl", "clipped", "value_error", "grad_norm", "grad_clipped", "update_ratio"),
    *("samples/score", "samples/length", "samples/finished", "samples/undecided", "samples/acceptance"),
    *("samples/repeated_4", "samples/distinct_2", "samples/same_opening", "samples/explained"),
    *("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "eval_length/chosen"),
    *("eval_length/correlation", "eval_kl", "eval_score", "eval_score_error", "eval_win_rate", "eval_answer_kl"),
    *("eval_answer_length", "eval_finished", "eval_distinct_2", "eval_repeated_4", "eval_same_opening"),
)


@pytest.mark.parametrize("run", _RUNS)
def test_a_log_that_lacks_a_measurement_is_no_trouble(run: str) -> None:
    rng = random.Random(0)
    logs = [{name for name in _NAMES if name != missing} for missing in (*_NAMES, None)] + [{name} for name in _NAMES]
    for names in logs:
        for scale in (1e-9, 0.5, 20.0):
            lines = [{"step": step, **{name: scale * rng.gauss(0.5, 1) for name in names}} for step in range(30)]
            made = history(lines)
            for detector in DETECTORS.values():
                told = detector.find(made, replace(_RUNS[run], total_steps=30))
                assert told is None or all(math.isfinite(value) for value in told.values.values() if value is not None)
    nothing = history([{"step": step} for step in range(30)])
    assert [code for code, detector in DETECTORS.items() if detector.find(nothing, _RUNS[run])] == []


def test_a_fallen_score_is_seen_without_its_error_too() -> None:
    lines = [
        {"step": 10 * n, "eval_score": score, "eval_answer_kl": 0.5 * n} for n, score in enumerate((1, 3, 1.2, 1.2))
    ]
    told = found("over-optimised", lines, ONLINE)
    assert told is not None
    assert (told.severity, told.values["best"], told.values["best_step"]) == ("major", 3, 10)

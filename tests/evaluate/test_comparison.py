"""Answers beside those of a baseline: what the verdicts come to, and the best of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from penchant.evaluate.comparison import best_of, compare
from penchant.evaluate.wins import mean_with_interval
from penchant.examples import Answer, Prompt
from penchant.online.judges import Judge, Question, RuleJudge, Verdict

PROMPTS = [Prompt("one", "d:1"), Prompt([{"role": "user", "content": "two"}], "d:2"), Prompt("three", "d:3")]
ANSWERS = [Answer("aaaa", (1, 2)), Answer("aa", (1,), False), Answer("a")]
OTHERS = [Answer("bb"), Answer("bb"), Answer("bb")]
LENGTH = RuleJudge(lambda prompt, completions: [len(text) for text in completions])


class Comparer(Judge):
    """Compares: the first wins, or there is no verdict on prompts that are messages."""

    description = identity = "comparer"

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        verdicts = []
        for question in questions:
            chance = 1.0 if isinstance(question.prompt, str) else None
            other = None if chance is None else 0.0
            scores = (None, None) if chance is None else (0.75, 0.25)
            verdicts.append(Verdict(scores, ((0.5, chance), (other, 0.5)), () if chance else ("invalid",)))
            advance(1)
        return verdicts


def test_scores_and_wins_against_a_baseline() -> None:
    done: list[int] = []
    found = compare(LENGTH, PROMPTS, ANSWERS, OTHERS, [0.5, 1.0, 1.5], done.append)
    assert found.outcomes == [1.0, 0.5, 0.0]
    told = found.summary(seed=0)
    assert (told["win_rate"]["wins"], told["win_rate"]["ties"], told["win_rate"]["losses"]) == (1, 1, 1)
    assert told["win_rate"]["rate"]["value"] == 0.5
    assert told["win_rate"]["mean_length"] == pytest.approx(7 / 3)
    assert told["score"]["value"] == pytest.approx(7 / 3)
    assert told["baseline"]["score"]["value"] == 2
    assert told["score_difference"]["value"] == pytest.approx(1 / 3)
    difference = mean_with_interval([2.0, 0.0, -1.0], seed=0)
    assert (told["score_difference"]["low"], told["score_difference"]["high"]) == (difference.low, difference.high)
    assert told["kl"]["value"] == 1.0
    assert told["invalid"] == 0
    assert sum(done) == 3


def test_a_judge_that_compares_gives_wins_and_no_scores() -> None:
    found = compare(Comparer(), PROMPTS, ANSWERS, OTHERS)
    told = found.summary(seed=0)
    assert found.outcomes == [1.0, None, 1.0]
    assert told["win_rate"]["wins"] == 2
    assert told["win_rate"]["mean_length"] == 2.5, "lengths are those of the prompts with a verdict"
    assert (told["score"], told["score_difference"], told["baseline"]["score"]) == (None, None, None)
    assert told["invalid"] == 1


def test_alone_answers_have_scores_only() -> None:
    found = compare(LENGTH, PROMPTS, ANSWERS, None)
    told = found.summary(seed=0)
    assert told["score"]["value"] == pytest.approx(7 / 3)
    assert "win_rate" not in told
    assert found.outcomes == [None] * 3
    assert "baseline" not in found.records("t")[0]


def test_lines_and_summary_are_json() -> None:
    found = compare(LENGTH, PROMPTS, ANSWERS, OTHERS)
    (_, second, _) = json.loads(json.dumps(found.records("temperature 1")))
    assert second == {
        "setting": "temperature 1",
        "prompt": "two",
        "answer": "aa",
        "finished": False,
        "scores": [2.0, 2.0],
        "baseline": "bb",
        "outcome": 0.5,
        "notes": [],
        "source": "d:2",
    }
    assert json.loads(json.dumps(found.summary(0)))["baseline"]["finished"] == 1.0


def test_the_best_of_several_is_the_first_of_the_highest() -> None:
    samples = [[Answer(text) for text in texts] for texts in (("a", "abc", "xyz"), ("aa", "b", ""), ("a", "b", "c"))]
    assert [one.text for one in best_of(LENGTH, PROMPTS, samples)] == ["abc", "aa", "a"]


def test_where_nothing_has_a_verdict_the_first_sample_stands() -> None:
    class Silent(Judge):
        description = identity = "silent"

        def judge(self, questions: Sequence[Question], advance: Any = None) -> list[Verdict]:
            return [Verdict((None,) * len(question.completions)) for question in questions]

    assert best_of(Silent(), PROMPTS[:1], [[Answer("x"), Answer("y")]]) == [Answer("x")]
    told = compare(Silent(), PROMPTS, ANSWERS, OTHERS).summary(0)
    assert (told["win_rate"], told["invalid"]) == (None, 3)

"""Judges: what they say, what they refuse, and that a verdict depends on the question alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.config import JudgeConfig
from penchant.errors import UserError
from penchant.online.judges import ImplicitJudge, Question, RewardJudge, RuleJudge, make_judge
from penchant.scoring.policy import Policy

from ..conftest import make_tiny_model
from ..scoring.test_reward import reward_model

MESSAGES = [{"role": "user", "content": "the capital of France"}]
QUESTIONS = [
    Question("what is one", ("the cat", "two three two three", "no")),
    Question(MESSAGES, ("Paris", "the red mat")),
]


def length(prompt: Any, completions: list[str]) -> list[int]:
    return [len(completion) for completion in completions]


def test_a_rule_scores_every_completion_and_gets_the_prompt_as_it_stands() -> None:
    seen = []

    def rule(prompt: Any, completions: list[str]) -> list[int]:
        seen.append(prompt)
        return length(prompt, completions)

    done: list[int] = []
    verdicts = RuleJudge(rule).judge(QUESTIONS, done.append)
    assert [verdict.scores for verdict in verdicts] == [(7.0, 19.0, 2.0), (5.0, 11.0)]
    assert all(verdict.wins is None and verdict.notes == () for verdict in verdicts)
    assert seen == ["what is one", MESSAGES]
    assert sum(done) == 2


def test_an_implicit_reward_is_the_difference_of_log_probabilities(tokenizer: Any) -> None:
    policy, reference = (Policy(make_tiny_model(seed=seed), tokenizer) for seed in (1, 2))
    verdicts = ImplicitJudge(policy, reference).judge(QUESTIONS)
    for question, verdict in zip(QUESTIONS, verdicts, strict=True):
        for completion, score in zip(question.completions, verdict.scores, strict=True):
            with torch.no_grad():
                ratio = policy.log_prob([question.prompt], [completion]) - reference.log_prob(
                    [question.prompt], [completion]
                )
            assert score == pytest.approx(ratio.item(), abs=1e-4)
    (alone,) = ImplicitJudge(policy, reference).judge(QUESTIONS[:1])
    assert alone.scores == pytest.approx(verdicts[0].scores, abs=1e-5)


def test_a_model_against_itself_prefers_nothing(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model(), tokenizer)
    (verdict, _) = ImplicitJudge(policy, policy).judge(QUESTIONS)
    assert verdict.scores == (0.0, 0.0, 0.0)


def test_verdicts_of_a_reward_model_come_in_the_order_of_the_questions(tokenizer: Any) -> None:
    model = reward_model(tokenizer)
    done: list[int] = []
    verdicts = RewardJudge(model).judge(QUESTIONS * 50, done.append)
    for question, verdict in zip(QUESTIONS, verdicts[-2:], strict=True):
        for completion, score in zip(question.completions, verdict.scores, strict=True):
            (alone,) = model.scores([model.encode(question.prompt, completion).ids])
            assert score == pytest.approx(alone, abs=1e-5)
    assert sum(done) == 100


def test_identities_tell_judges_apart_and_the_same_ones_together(tokenizer: Any, tmp_path: Path) -> None:
    policies = [Policy(make_tiny_model(seed=seed), tokenizer) for seed in (1, 2)]
    twin = Policy(make_tiny_model(seed=1), tokenizer)
    one = ImplicitJudge(*policies).identity
    assert one == ImplicitJudge(twin, policies[1]).identity
    others = [
        ImplicitJudge(*reversed(policies)),
        RewardJudge(reward_model(tokenizer)),
        RewardJudge(reward_model(tokenizer, seed=1)),
        RewardJudge(reward_model(tokenizer, num_labels=2)),
        RuleJudge(length),
    ]
    assert len({one, *(judge.identity for judge in others)}) == 6


def test_a_score_that_is_no_number_stops_with_the_prompt(tokenizer: Any) -> None:
    model = reward_model(tokenizer)
    with torch.no_grad():
        model.model.score.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="'what is one'"):
        RewardJudge(model).judge(QUESTIONS)


def test_the_section_of_a_run_file_makes_each_judge(tmp_path: Path, model_folder: Path, tokenizer: Any) -> None:
    rules = tmp_path / "rules.py"
    rules.write_text("def score(prompt, completions):\n    return [len(text) for text in completions]\n")
    judge = make_judge(JudgeConfig(name="rule", function=f"{rules}:score"))
    assert judge.judge(QUESTIONS)[1].scores == (5.0, 11.0)
    reward_folder = tmp_path / "reward"
    saved = reward_model(tokenizer)
    saved.model.save_pretrained(reward_folder)
    tokenizer.save_pretrained(reward_folder)
    found = make_judge(JudgeConfig(name="reward", model=str(reward_folder)))
    assert found.judge(QUESTIONS)[0].scores == pytest.approx(RewardJudge(saved).judge(QUESTIONS)[0].scores, abs=1e-5)
    same = make_judge(JudgeConfig(name="implicit", model=str(model_folder), reference=str(model_folder)))
    assert same.judge(QUESTIONS)[0].scores == (0.0, 0.0, 0.0)


def test_a_section_without_a_judge_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match=r"judge\.name: is missing; give rule, reward, implicit or server"):
        make_judge(JudgeConfig())


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"name": "rule", "function": "nowhere.py:score"}, "judge.function: there is no file 'nowhere.py'"),
        ({"name": "reward", "model": "./nowhere"}, "judge.model: there is no folder './nowhere'"),
        ({"name": "implicit", "model": "./nowhere", "reference": "m"}, "judge.model: there is no folder './nowhere'"),
    ],
)
def test_what_cannot_be_loaded_is_named_by_its_key(section: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_judge(JudgeConfig(**section))


def test_the_reference_of_an_implicit_judge_is_named_by_its_own_key(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.reference: there is no folder"):
        make_judge(JudgeConfig(name="implicit", model=str(model_folder), reference="./nowhere"))

"""Sampled and judged completions in files: gone on with to the bit, read back as they were, fit for training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.data.formats import RowProblem, read_examples, stream_rows
from penchant.errors import UserError
from penchant.examples import Answer, Pair, Prompt, Ranking, Text, Unpaired
from penchant.models.generation import Sampling
from penchant.online.growing import growing_file, settings_path
from penchant.online.judges import Judge, Question, Verdict
from penchant.online.pairs import Preference, choose
from penchant.online.samples import (
    PolicySampler,
    Sampled,
    judge_settings,
    judge_to,
    preference_rows,
    read_samples,
    sample_settings,
    sample_to,
    stream_samples,
)
from penchant.scoring.policy import Policy

PROMPTS = [Prompt(f"question {number}", f"prompts.jsonl:{number + 1}") for number in range(9)] + [
    Prompt([{"role": "user", "content": "why?"}], "prompts.jsonl:10")
]


class Dice:
    """Answers with numbers that depend on the seed alone, and keeps what it was asked."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.asked: list[Text] = []
        self._stops_at = stops_at

    def sample(
        self,
        prompts: Sequence[Text],
        sampling: Sampling,
        num_samples: int,
        seeds: Sequence[int],
        *,
        advance: Callable[[int], None],
    ) -> list[list[Answer]]:
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            if len(self.asked) == self._stops_at:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            drawn = np.random.default_rng(seed).integers(0, 100, num_samples).tolist()
            answers.append([Answer(f"number {one}", (one, 2)[: 1 + one % 2], one % 2 == 1) for one in drawn])
            advance(num_samples)
        return answers


class Highest(Judge):
    """Likes high numbers, has no verdict on those below ten, and compares."""

    description = "likes high numbers"
    identity = "highest"

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        self.asked += questions
        advance(len(questions))
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        numbers = [int(text.split()[-1]) for text in question.completions]
        scores = tuple(None if number < 10 else float(number) for number in numbers)
        wins = tuple(tuple(0.5 * (1 + (a > b) - (a < b)) for b in numbers) for a in numbers)
        return Verdict(scores, wins, ("invalid",) if None in scores else ())


def sample(path: Path, sampler: Any, prompts: Sequence[Prompt] = PROMPTS, seed: int = 0) -> None:
    settings = sample_settings(prompts, Sampling(), 3, seed)
    with growing_file(path, settings, len(prompts), 4) as file:
        sample_to(file, prompts, sampler, Sampling(), 3, seed)


def judge(samples: Path, path: Path, judge: Judge) -> None:
    asked = read_samples(samples)
    with growing_file(path, judge_settings(asked, judge), len(asked), 4) as file:
        judge_to(file, asked, judge)


def judged_file(folder: Path) -> Path:
    sample(folder / "samples.jsonl", Dice())
    judge(folder / "samples.jsonl", folder / "judged.jsonl", Highest())
    return folder / "judged.jsonl"


def test_samples_stand_in_the_order_of_the_prompts_with_all_that_is_known(tmp_path: Path) -> None:
    sample(tmp_path / "samples.jsonl", Dice())
    samples = read_samples(tmp_path / "samples.jsonl")
    assert [(one.prompt, one.source) for one in samples] == [(prompt.text, prompt.source) for prompt in PROMPTS]
    for one in samples:
        numbers = [int(answer.text.split()[-1]) for answer in one.answers]
        assert [answer.is_finished for answer in one.answers] == [number % 2 == 1 for number in numbers]
        assert one.num_tokens == tuple(1 + number % 2 for number in numbers)
        assert one.verdict is None


def test_the_samples_of_a_prompt_depend_on_seed_and_prompt_alone(tmp_path: Path) -> None:
    sample(tmp_path / "one.jsonl", Dice())
    sample(tmp_path / "other.jsonl", Dice(), PROMPTS[::-2])
    sample(tmp_path / "reseeded.jsonl", Dice(), seed=1)
    one, other, reseeded = (
        {str(sampled.prompt): sampled.answers for sampled in read_samples(tmp_path / f"{name}.jsonl")}
        for name in ("one", "other", "reseeded")
    )
    assert other == {prompt: one[prompt] for prompt in other}
    assert all(reseeded[prompt] != one[prompt] for prompt in one)


@pytest.mark.parametrize("stops_at", range(10))
def test_sampling_that_was_stopped_goes_on_to_the_same_bits_and_asks_nothing_twice(
    stops_at: int, tmp_path: Path
) -> None:
    sample(tmp_path / "whole.jsonl", Dice())
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "stopped.jsonl", Dice(stops_at))
    assert len((tmp_path / "stopped.jsonl").read_text().splitlines()) == stops_at // 4 * 4
    again = Dice()
    sample(tmp_path / "stopped.jsonl", again)
    assert again.asked == [prompt.text for prompt in PROMPTS[stops_at // 4 * 4 :]]
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_verdicts_come_back_as_they_were_given(tmp_path: Path) -> None:
    judged = read_samples(judged_file(tmp_path))
    for one, before in zip(judged, read_samples(tmp_path / "samples.jsonl"), strict=True):
        assert one.verdict == Highest().judge([before.question])[0]
        assert replace(one, verdict=None) == before
    assert any(None in one.verdict.scores for one in judged if one.verdict)


def test_judging_that_was_stopped_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    path = judged_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = Highest()
    judge(tmp_path / "samples.jsonl", path, again)
    assert [question.prompt for question in again.asked] == [prompt.text for prompt in PROMPTS[4:]]
    assert path.read_bytes() == whole


def test_judged_samples_train_as_rankings(tmp_path: Path) -> None:
    rows = [
        {**json.loads(line), "completions": [f"number {place}{n}" for n in range(3)], "scores": [10.0 + place, 30, 20]}
        for place, line in enumerate(judged_file(tmp_path).read_text().splitlines())
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_examples(tmp_path / "rows.jsonl")
    assert data.families == {"ranked": len(PROMPTS)}
    for place, ranking in enumerate(data.examples):
        assert isinstance(ranking, Ranking)
        assert ranking.scores == (30, 20, 10 + place)


def test_settings_tell_prompts_seed_and_sampling_apart_and_not_where_a_prompt_stood() -> None:
    base = sample_settings(PROMPTS, Sampling(), 3, 0)
    assert base == sample_settings([replace(prompt, source="elsewhere") for prompt in PROMPTS], Sampling(), 3, 0)
    others = {
        "prompts": sample_settings(PROMPTS[1:], Sampling(), 3, 0),
        "seed": sample_settings(PROMPTS, Sampling(), 3, 1),
        "sampling.completions": sample_settings(PROMPTS, Sampling(), 2, 0),
        "sampling.temperature": sample_settings(PROMPTS, Sampling(temperature=0.5), 3, 0),
        "sampling.top_p": sample_settings(PROMPTS, Sampling(top_p=0.5), 3, 0),
        "sampling.top_k": sample_settings(PROMPTS, Sampling(top_k=5), 3, 0),
        "sampling.max_new_tokens": sample_settings(PROMPTS, Sampling(max_new_tokens=5), 3, 0),
    }
    assert base.keys() == others.keys()
    for name, other in others.items():
        assert [key for key in base if base[key] != other[key]] == [name]


def test_verdicts_of_another_judge_or_on_other_completions_have_other_settings() -> None:
    one, other = (Sampled("why?", (Answer("a"), Answer(text)), "here") for text in "bc")
    another = Highest()
    another.identity = "another"
    base = judge_settings([one], Highest())
    assert base == judge_settings([replace(one, source="there")], Highest())
    assert base != judge_settings([other], Highest())
    assert base != judge_settings([one], another)


PAIR = {"prompt": "why?", "chosen": "so", "rejected": "no"}
TURNS = {
    "prompt": [{"role": "user", "content": "why?"}],
    "chosen": [{"role": "assistant", "content": "so"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def streamed(folder: Path, *rows: Any) -> list[Sampled | RowProblem]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(stream_samples(path))


@pytest.mark.parametrize("row", [PAIR, TURNS])
def test_a_labelled_pair_can_be_judged_and_its_label_is_kept(row: dict[str, Any], tmp_path: Path) -> None:
    (one,) = streamed(tmp_path, row)
    assert isinstance(one, Sampled)
    assert one.question == Question(row["prompt"], ("so", "no"))
    assert one.preferred == 0
    (again,) = streamed(tmp_path, one.as_record())
    assert isinstance(again, Sampled)
    assert (again.question, again.preferred) == (one.question, one.preferred)


def test_rankings_and_completions_without_scores_can_be_judged(tmp_path: Path) -> None:
    ranked = {"instruction": "why?", "responses": ["a", "b"], "scores": [1, 2]}
    found = streamed(tmp_path, ranked, {"prompt": "why?", "completions": ["same", "same"]}, {**PAIR, "chosen": ""})
    first, second, third = found
    assert isinstance(first, Sampled)
    assert isinstance(second, Sampled)
    assert isinstance(third, RowProblem)
    assert first.question.completions == ("b", "a")
    assert second.question.completions == ("same", "same")
    assert (third.code, third.source) == ("D06", f"{tmp_path}/rows.jsonl:3")


def test_a_completion_of_several_messages_is_refused(tmp_path: Path) -> None:
    answer = [*TURNS["chosen"], {"role": "user", "content": "and?"}, *TURNS["chosen"]]
    (problem,) = streamed(tmp_path, {**TURNS, "chosen": answer})
    assert isinstance(problem, RowProblem)
    assert "several messages" in problem.message


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"scores": [1]}, "scores has 1 entries for 2 completions"),
        ({"scores": 3}, "scores is a number; write a list"),
        ({"scores": [1, "high"]}, "entry 2 of scores is text; write a number"),
        ({"scores": [1, float("inf")]}, "entry 2 of scores is not a finite number"),
        ({"scores": [1, 2], "wins": [[0.5, 1], [0]]}, "entry 2 of wins has 1 entries for 2 completions"),
        ({"finished": [True, "no"]}, "entry 2 of finished is text"),
        ({"finished": [True]}, "finished and completions differ in length"),
        ({"num_tokens": [True, 1]}, "entry 1 of num_tokens is true or false"),
        ({"preferred": 2}, "preferred is not the place"),
        ({"preferred": True}, "preferred is not the place"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"completions": []}, "completions is empty"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name_and_line(
    columns: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"prompt": "why?", "completions": ["a", "b"], **columns}) + "\n")
    with pytest.raises(UserError) as refused:
        read_samples(path)
    assert str(refused.value).startswith(f"{path}:1: [D")
    assert told in str(refused.value)


def test_a_file_whose_making_was_stopped_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "samples.jsonl", Dice(stops_at=5))
    with pytest.raises(UserError, match="holds 4 of 10 records"):
        read_samples(tmp_path / "samples.jsonl")
    settings_path(tmp_path / "samples.jsonl").unlink()
    assert len(read_samples(tmp_path / "samples.jsonl")) == 4


def test_preferences_become_rows_that_train(tmp_path: Path) -> None:
    answers = (Answer("a"), Answer("b", is_finished=False), Answer("c"))
    one = Sampled("why?", answers, verdict=Verdict((1.0, 3.0, 2.0)))
    assert one.verdict is not None
    dice = np.random.default_rng(0)
    rows = preference_rows(one, choose(one.verdict, "all", dice))
    pairs = [found for _, found in stream_rows(rows)]
    assert all(isinstance(pair, Pair) for pair in pairs)
    assert [(p.chosen, p.rejected, p.margin) for p in pairs if isinstance(p, Pair)] == [
        ("b", "c", 1.0),
        ("b", "a", 2.0),
        ("c", "a", 1.0),
    ]
    assert [row["chosen_finished"] for row in rows] == [False, False, True]
    assert [row["rejected_finished"] for row in rows] == [True, True, True]
    chances = [pair.win_probabilities for pair in pairs if isinstance(pair, Pair)]
    sigmoid = [1 / (1 + np.exp(-gap)) for gap in (1.0, 2.0)]
    assert chances[0] == pytest.approx(((0.5 + sum(sigmoid)) / 3, 0.5))
    assert chances[0][1] == chances[2][0] if chances[0] and chances[2] else False


def test_the_best_alone_becomes_a_labelled_completion() -> None:
    one = Sampled([{"role": "user", "content": "why?"}], (Answer("a"), Answer("b", is_finished=False)))
    (row,) = preference_rows(one, [Preference(1, None, 0.0, (0.7, 0.3))])
    assert row["finished"] is False
    ((_, found),) = stream_rows([row])
    assert isinstance(found, Unpaired)
    assert (found.completion, found.is_desirable) == ([{"role": "assistant", "content": "b"}], True)


def test_a_policy_samples_into_a_file_and_its_settings_know_the_weights(model_folder: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(str(model_folder))
    sampler, sampling = PolicySampler(policy, max_rows=4), Sampling(max_new_tokens=4)
    settings = sampler.settings()
    done = []
    with growing_file(tmp_path / "samples.jsonl", settings, 3, 2) as file:
        sample_to(file, PROMPTS[-3:], sampler, sampling, 2, 0, done.append)
    assert sum(done) == 6
    for one in read_samples(tmp_path / "samples.jsonl"):
        assert one.num_tokens is not None
        assert len(one.answers) == 2
        assert all(
            length == 4 or answer.is_finished for length, answer in zip(one.num_tokens, one.answers, strict=True)
        )
    next(iter(policy.parameters())).data.add_(1e-3)
    changed = sampler.settings()
    assert [name for name in settings if settings[name] != changed[name]] == ["model"]

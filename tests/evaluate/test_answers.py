"""Answers to held-out prompts: the same whoever else is asked, kept on the disk, and described by numbers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penchant.evaluate.answers import answer, answer_to, describe, distance, read_answers, same_opening
from penchant.examples import Answer
from penchant.models.generation import Sampling
from penchant.online.growing import growing_file
from penchant.scoring.policy import Policy

from ..conftest import make_tiny_model

PROMPTS: list[Any] = ["what is", [{"role": "user", "content": "the capital"}], "the cat sat on", "one two"]


@pytest.fixture
def policy(tokenizer: Any) -> Policy:
    return Policy(make_tiny_model(), tokenizer)


def test_an_answer_depends_on_the_prompt_and_the_seed_alone(policy: Policy) -> None:
    sampling = Sampling(max_new_tokens=6)
    done: list[int] = []
    several = answer(policy, PROMPTS, sampling, seed=3, advance=done.append, num_samples=3)
    backwards = answer(policy, PROMPTS[::-1], sampling, seed=3, max_rows=2)
    assert [own[:1] for own in several] == backwards[::-1]
    assert sum(done) == 12
    assert answer(policy, PROMPTS, sampling, seed=4, num_samples=3) != several


def test_answers_are_gone_on_with_and_come_back_as_they_were(policy: Policy, tmp_path: Path) -> None:
    sampling, path = Sampling(max_new_tokens=6), tmp_path / "answers.jsonl"

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with growing_file(path, {}, 4, chunk=1) as file:
        answer_to(file, policy, PROMPTS[:2], sampling, num_samples=2)
    kept = path.read_bytes()
    with growing_file(path, {}, 4, chunk=1) as file, pytest.raises(KeyboardInterrupt):
        answer_to(file, policy, PROMPTS, sampling, advance=stop, num_samples=2)
    assert path.read_bytes() == kept
    asked: list[int] = []
    with growing_file(path, {}, 4, chunk=1) as file:
        answer_to(file, policy, PROMPTS, sampling, advance=asked.append, num_samples=2)
    assert sum(asked) == 4, "two prompts with two samples each were still missing"
    assert path.read_bytes().startswith(kept)
    assert read_answers(path) == answer(policy, PROMPTS, sampling, num_samples=2)


def test_distances_are_differences_of_log_probabilities_of_the_sampled_tokens(policy: Policy, tokenizer: Any) -> None:
    reference = Policy(make_tiny_model(seed=1), tokenizer)
    answers = [own[0] for own in answer(policy, PROMPTS, Sampling(max_new_tokens=5))]

    def logp(model: Any, prompt_ids: list[int], ids: tuple[int, ...]) -> float:
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt_ids, *ids]])).logits.log_softmax(-1)[0]
        return sum(log_probs[len(prompt_ids) - 1 + place, token].item() for place, token in enumerate(ids))

    found = distance(policy, reference, PROMPTS, answers)
    for place in (0, 2, 3):  # plain prompts, whose ids are their own
        ids = tokenizer(PROMPTS[place]).input_ids
        tokens = answers[place].token_ids
        expected = logp(policy.model, ids, tokens) - logp(reference.model, ids, tokens)
        assert found[place] == pytest.approx(expected, abs=1e-4)
    assert distance(policy, policy, PROMPTS, answers) == [0.0] * 4


def test_distances_of_own_samples_estimate_the_divergence(tokenizer: Any) -> None:
    """Against the sum over all completions of at most two tokens."""
    policy, reference = (Policy(make_tiny_model(seed=seed), tokenizer) for seed in (0, 1))
    prompt_ids = tokenizer("what is").input_ids

    def log_law(model: Any, *prefixes: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([[*prompt_ids, *ids] for ids in prefixes])).logits[:, -1].double().log_softmax(-1)

    end = tokenizer.eos_token_id
    everything = [[token] for token in range(320)]
    first, ref_first = (log_law(one.model, [])[0] for one in (policy, reference))
    then, ref_then = (log_law(one.model, *everything) for one in (policy, reference))
    after = (then.exp() * (then - ref_then)).sum(-1)
    after[end] = 0.0
    divergence = (first.exp() * (first - ref_first + after)).sum().item()

    (answers,) = answer(policy, ["what is"], Sampling(max_new_tokens=2), num_samples=1500, max_rows=500)
    found = np.array(distance(policy, reference, ["what is"] * 1500, answers))
    error = found.std() / np.sqrt(1500)
    assert abs(found.mean() - divergence) < 4 * error
    assert divergence > 10 * error, "or the test could not tell it from 0"


def test_numbers_of_repetition_by_hand() -> None:
    answers = [
        Answer("a b a b a b", (5, 6, 7), True),  # bigrams ab ba ab ba ab; 4-grams abab baba abab
        Answer("c d", (5,), False),  # one bigram, no 4-gram
        Answer("", (2,), True),
        Answer("x y z u v", (1, 2, 3, 4, 5), True),  # 4 bigrams, 2 4-grams
    ]
    told = describe(answers)
    assert told["distinct_2"] == pytest.approx((2 + 1 + 4) / (5 + 1 + 4))
    assert told["repeated_4"] == pytest.approx((1 / 3 + 0) / 2)
    assert told["finished"] == 0.75
    assert told["num_tokens"] == 10 / 4
    assert (told["answers"], told["score"], told["kl"]) == (4, None, None)


def test_what_is_not_known_is_none() -> None:
    told = describe([Answer("word")], scores=[None])
    assert [told[name] for name in ("score", "num_tokens", "distinct_2", "repeated_4", "kl")] == [None] * 5


def test_scores_without_a_verdict_are_left_out_and_intervals_hold_the_mean() -> None:
    answers = [Answer("a")] * 40
    scores = [None if place % 4 == 0 else float(place) for place in range(40)]
    known = [score for score in scores if score is not None]
    told = describe(answers, scores, distances=[0.5, 1.5] * 20)
    assert told["score"]["value"] == pytest.approx(sum(known) / 30)
    assert told["score"]["low"] < told["score"]["value"] < told["score"]["high"]
    assert told["kl"]["value"] == 1.0
    halves = list(itertools.islice(itertools.cycle((-0.5, 0.5)), 40))
    assert told["kl"]["high"] - told["kl"]["low"] == pytest.approx(2 * 1.96 * np.std(halves) / np.sqrt(40), rel=0.1)


def test_the_share_of_answers_with_the_same_opening() -> None:
    texts = ["a b c d e f", "a b c d e g", "a b c d x", "a b", "a  b"]
    assert same_opening([Answer(text) for text in texts]) == 2 / 5
    assert same_opening([Answer("a b c d e f")]) == 1.0

"""Log-probabilities in batches: the same as one by one, and answers taken as they were sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penchant.errors import UserError
from penchant.examples import Answer
from penchant.online import logps
from penchant.scoring.policy import Policy

from ..conftest import make_tiny_model

MESSAGES = [{"role": "user", "content": "the capital of France"}]
PROMPTS = ["what is", MESSAGES, "the cat sat on the red mat under the blue tree", "one"]
COMPLETIONS = ["one two three", "Paris", "no", "the dog ran " * 8]


def test_batches_change_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(make_tiny_model().double(), tokenizer)
    done: list[int] = []
    together = logps.sequence_logps(policy, PROMPTS, COMPLETIONS, done.append)
    with torch.no_grad():
        singly = [policy.log_prob([p], [c]).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert together == pytest.approx(singly, abs=1e-9)
    monkeypatch.setattr(logps, "MAX_TOKENS", 40)
    assert logps.sequence_logps(policy, PROMPTS, COMPLETIONS) == pytest.approx(singly, abs=1e-9)
    assert sum(done) == 4


def test_an_answer_is_scored_token_by_token_as_it_was_sampled(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model().double(), tokenizer)
    ids = (7, 9, 11)  # no tokenizer would cut a text so
    (scored,) = logps.sequence_logps(policy, ["what is"], [Answer("any", ids, is_finished=False)])
    prompt_ids = tokenizer("what is").input_ids
    with torch.no_grad():
        log_probs = policy.model(torch.tensor([[*prompt_ids, *ids]])).logits.log_softmax(-1)[0]
    start = len(prompt_ids) - 1
    assert scored == pytest.approx(sum(log_probs[start + t, token].item() for t, token in enumerate(ids)), abs=1e-9)


def test_an_unfinished_text_has_no_end(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model().double(), tokenizer)
    ids = tuple(tokenizer("one two").input_ids)
    answers = [Answer("one two", is_finished=False), Answer("one two", ids), Answer("one two", (*ids, 2))]
    unfinished, without, with_end = logps.sequence_logps(policy, ["what"] * 3, answers)
    assert unfinished == pytest.approx(without)
    (finished,) = logps.sequence_logps(policy, ["what"], [Answer("one two")])
    assert finished == pytest.approx(with_end)
    assert with_end < without


def test_no_gradient_is_kept_and_the_model_stays_in_its_mode(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model(attention_dropout=0.5).train(), tokenizer)
    assert logps.sequence_logps(policy, PROMPTS, COMPLETIONS) == logps.sequence_logps(policy, PROMPTS, COMPLETIONS)
    assert policy.model.training


def test_messages_that_the_template_refuses_are_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="a prompt cannot be scored: the chat template refuses the messages"):
        logps.sequence_logps(Policy(make_tiny_model(), tokenizer), [MESSAGES], ["Paris"])

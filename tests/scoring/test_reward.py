"""Reward models: scores that depend on the text alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.errors import UserError
from penchant.scoring.reward import RewardModel

MESSAGES = [{"role": "user", "content": "the capital of France"}]
TEXTS = [
    ("what is one", "the cat"),
    (MESSAGES, "Paris"),
    ("the cat sat on the red mat under the blue tree", "no " * 20),
    ("one", ""),
]


def reward_model(tokenizer: Any, seed: int = 0, **settings: Any) -> RewardModel:
    """A tiny Llama that scores."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, **{"pad_token_id": 0, "num_labels": 1, **settings},
    )  # fmt: skip
    return RewardModel(LlamaForSequenceClassification(config), copy.copy(tokenizer), "tiny")


def bert(tokenizer: Any, **settings: Any) -> RewardModel:
    """A tiny BERT that scores: it sees both ways, so that filling must be masked."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, num_labels=1, max_position_embeddings=64, **settings,
    )  # fmt: skip
    return RewardModel(BertForSequenceClassification(config), copy.copy(tokenizer), "bert")


def scores_of(model: RewardModel, texts: list[Any]) -> list[float]:
    return model.scores([model.encode(*text).ids for text in texts])


@pytest.mark.parametrize("make", [reward_model, bert])
def test_a_score_does_not_depend_on_the_others(tokenizer: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tokenizer)
    model.model.double()
    singly = [scores_of(model, [text])[0] for text in TEXTS]
    assert len(set(singly)) == len(TEXTS)
    assert scores_of(model, TEXTS) == pytest.approx(singly, abs=1e-9)
    assert scores_of(model, TEXTS[::-1]) == pytest.approx(singly[::-1], abs=1e-9)
    monkeypatch.setattr("penchant.scoring.reward._MAX_TOKENS", 40)
    assert scores_of(model, TEXTS) == pytest.approx(singly, abs=1e-9)


def test_a_model_without_a_token_to_fill_up_with_takes_one_text_at_a_time(tokenizer: Any) -> None:
    model, filled = reward_model(tokenizer, pad_token_id=None), reward_model(tokenizer)
    assert scores_of(model, TEXTS) == pytest.approx(scores_of(filled, TEXTS), abs=1e-5)


def test_the_score_is_the_logit_at_the_last_token_of_the_rendered_conversation(tokenizer: Any) -> None:
    model = reward_model(tokenizer)
    text = "<|im_start|>user\nthe capital of France<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = model.model.model(torch.tensor([ids])).last_hidden_state
        logit = model.model.score(hidden)[0, -1, 0].item()
    assert scores_of(model, [(MESSAGES, "Paris")]) == pytest.approx([logit], abs=1e-5)
    assert scores_of(model, [("the capital of France", "Paris")]) == pytest.approx([logit], abs=1e-5)


def test_with_two_labels_the_score_is_their_difference(tokenizer: Any) -> None:
    model = reward_model(tokenizer, num_labels=2)
    encoded = model.encode("what", "no").ids
    with torch.no_grad():
        bad, good = model.model(torch.tensor([encoded])).logits[0].tolist()
    assert model.scores([encoded]) == pytest.approx([good - bad], abs=1e-5)
    with pytest.raises(UserError, match="has 3 labels"):
        reward_model(tokenizer, num_labels=3)


def test_without_a_template_plain_text_stays_plain_and_messages_become_turns(tokenizer: Any) -> None:
    model = reward_model(tokenizer)
    model.tokenizer.chat_template = None
    assert model.tokenizer.decode(model.encode("one two", " three").ids) == "one two three"
    turns = model.tokenizer.decode(model.encode(MESSAGES, "Paris").ids)
    assert turns == "\n\nHuman: the capital of France\n\nAssistant: Paris<|im_end|>"
    assert model.tokenizer.chat_template is None


def test_a_long_text_loses_the_beginning_of_its_prompt_only(tokenizer: Any) -> None:
    model = bert(tokenizer)
    assert model.max_length == 64
    whole = reward_model(tokenizer).encode("the cat sat " * 30, "one two three")
    cut = model.encode("the cat sat " * 30, "one two three")
    assert not whole.is_truncated
    assert cut.is_truncated
    assert cut.ids == [whole.ids[0], *whole.ids[-63:]]
    exactly = model.encode("a" * 10, "no")
    assert not exactly.is_truncated
    model.tokenizer.model_max_length = len(exactly.ids)
    assert model.encode("a" * 10, "no") == exactly
    model.tokenizer.model_max_length -= 1
    assert model.encode("a" * 10, "no").is_truncated


def test_a_folder_comes_back_as_it_was_saved(tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model(tokenizer, attention_dropout=0.3)
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(str(tmp_path))
    assert scores_of(loaded, TEXTS) == pytest.approx(scores_of(model, TEXTS), abs=1e-6)
    assert loaded.sha256 == model.sha256 != reward_model(tokenizer, seed=1).sha256

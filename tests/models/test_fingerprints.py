"""Fingerprints: the same for the same thing saved and loaded, another for the smallest change that counts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers
from torch import nn

from penchant.models.fingerprints import template_sha256, tokenizer_sha256, weights_sha256


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A tokenizer that the test may change."""
    return copy.deepcopy(tokenizer)


def rewritten(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """The tokenizer with the rules that `change` leaves of its JSON."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    change(rules)
    backend = Tokenizer.from_str(json.dumps(rules))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token
    )


def test_hash_of_the_weights_tells_one_bit_apart(tiny_model: nn.Module) -> None:
    before = weights_sha256(tiny_model)
    assert weights_sha256(tiny_model) == before
    with torch.no_grad():
        weight = tiny_model.lm_head.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1e9))
    assert weights_sha256(tiny_model) != before


def test_tokenizer_that_was_saved_and_loaded_is_the_same(own: Any, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    assert tokenizer_sha256(transformers.AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_sha256(own)


def test_tokenizer_stays_the_same_when_it_pads_and_truncates(own: Any) -> None:
    before = tokenizer_sha256(own)
    own(["one", "one two three"], padding=True, truncation=True, max_length=2)
    own.pad_token = own.eos_token
    assert tokenizer_sha256(own) == before


def drop_a_merge(rules: dict[str, Any]) -> None:
    rules["model"]["merges"].pop()


def swap_two_ids(rules: dict[str, Any]) -> None:
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def write_small(rules: dict[str, Any]) -> None:
    rules["normalizer"] = json.loads(normalizers.Lowercase().__getstate__())


@pytest.mark.parametrize("change", [drop_a_merge, swap_two_ids, write_small])
def test_tokenizer_with_another_rule_is_another(change: Callable[[dict[str, Any]], None], tokenizer: Any) -> None:
    assert tokenizer_sha256(rewritten(tokenizer, lambda rules: None)) == tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(rewritten(tokenizer, change)) != tokenizer_sha256(tokenizer)


def test_tokenizer_with_an_added_token_or_another_end_is_another(own: Any) -> None:
    before = tokenizer_sha256(own)
    own.eos_token = "<|endoftext|>"
    other_end = tokenizer_sha256(own)
    own.add_tokens(["<|new|>"])
    assert len({before, other_end, tokenizer_sha256(own)}) == 3


def test_tokenizer_in_python_is_known_by_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"e</w>": 0, "n": 1, "o": 2, "<unk>": 3, "ne</w>": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nn e</w>\n")

    def made() -> Any:
        return transformers.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))

    assert not hasattr(made(), "backend_tokenizer")
    assert tokenizer_sha256(made()) == tokenizer_sha256(made())
    larger = made()
    larger.add_tokens(["two"])
    assert tokenizer_sha256(larger) != tokenizer_sha256(made())


def test_template_is_known_by_its_text(own: Any) -> None:
    assert template_sha256(own) == hashlib.sha256(own.chat_template.encode()).hexdigest()
    own.chat_template = None
    assert template_sha256(own) is None


def test_several_templates_are_known_by_all_their_texts(own: Any) -> None:
    own.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    before = template_sha256(own)
    own.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    assert template_sha256(own) == before
    own.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}"}
    assert template_sha256(own) != before

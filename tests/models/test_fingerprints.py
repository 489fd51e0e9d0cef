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

from penchant.models.adapters import add_lora
from penchant.models.fingerprints import architecture_sha256, template_sha256, tokenizer_sha256, weights_sha256

from ..conftest import make_tiny_model


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


def test_architecture_is_the_same_wherever_it_was_saved_and_whatever_it_was_asked(
    tiny_model: nn.Module, tmp_path: Path
) -> None:
    found = set()
    for name in ("one", "other"):
        tiny_model.save_pretrained(tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found.add(architecture_sha256(model))
        model(input_ids=torch.arange(9)[None])
        model.train()
        found.add(architecture_sha256(model))
    assert len(found) == 1
    assert found != {None}


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 2e-6},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"attn_implementation": "eager"},
        {"num_key_value_heads": 4},
    ],
    ids=str,
)
def test_architecture_with_another_setting_is_another(settings: dict[str, Any]) -> None:
    assert architecture_sha256(make_tiny_model(**settings)) != architecture_sha256(make_tiny_model())


def test_windows_caps_and_kinds_of_layers_are_of_the_architecture() -> None:
    found = set()
    plain = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "head_dim": 8}
    for other in (
        {},
        {"final_logit_softcapping": 20.0},
        {"attn_logit_softcapping": 20.0},
        {"query_pre_attn_scalar": 64},
        {"sliding_window": 8},
        {"layer_types": ["full_attention", "full_attention"]},
    ):
        found.add(architecture_sha256(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**plain, **other))))
    assert len(found) == 6
    assert None not in found


def change_a_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def change_a_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq[0] *= 2


def round_a_weight_differently(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


def exchange_a_layer(model: Any) -> None:
    model.model.norm = nn.LayerNorm(32)


@pytest.mark.parametrize("change", [change_a_scale, change_a_buffer, round_a_weight_differently, exchange_a_layer])
def test_model_that_was_changed_in_hand_is_another(change: Callable[[Any], None], tiny_model: nn.Module) -> None:
    before = architecture_sha256(tiny_model)
    change(tiny_model)
    assert architecture_sha256(tiny_model) not in (before, None)


class OwnLayer(nn.Linear):
    """A layer with code of the user's."""


def add_own_layer(model: Any) -> None:
    model.lm_head = OwnLayer(32, 320)


def add_adapter(model: Any) -> None:
    add_lora(model, 2, 4)


def add_hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda _, __, output: 2 * output)


def exchange_forward(model: Any) -> None:
    model.model.norm.forward = lambda hidden: 2 * hidden


@pytest.mark.parametrize("change", [add_own_layer, add_adapter, add_hook, exchange_forward, nn.Module.double])
def test_model_of_which_not_all_can_be_seen_has_no_architecture(
    change: Callable[[Any], object], tiny_model: nn.Module
) -> None:
    assert architecture_sha256(tiny_model) is not None
    change(tiny_model)
    assert architecture_sha256(tiny_model) is None
    assert architecture_sha256(nn.Linear(2, 2)) is None


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

"""Every layout gives the same log-probabilities and gradients, on every family of architectures that it is used for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from penchant.layouts import padded
from penchant.models.adapters import add_lora
from penchant.models.logps import token_logps
from penchant.scoring.layout import PADDED, PREFIX_SHARED, choose_layout, trouble_with_sharing
from penchant.scoring.policy import Policy
from penchant.scoring.reference import pair_logps
from penchant.types import TokenizedPair

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARING = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma": {},
    "gemma3_text": {"sliding_window": 5},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5},
    "smollm3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
NOT_SHARING = {
    "gemma2": {"sliding_window": 5},  # soft-capped attention scores
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # convolutions carry tokens across segments
    "bloom": {"n_layer": 2, "n_head": 4},  # attention code of its own
}


def make_model(family: str, settings: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    return model if "num_local_experts" in settings else model.double()  # grouped products know no float64


def make_pairs(seed: int = 0) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [(7, 4, 9), (3, 6, 1), (11, 2, 5)]
    rows = [[torch.randint(3, 96, (n,), generator=generator).tolist() for n in row] for row in lengths]
    return [TokenizedPair(*row, index) for index, row in enumerate(rows)]  # type: ignore[arg-type]


def gradients(model: nn.Module, total: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of their norm: norms and rotary angles are computed in float32 even in a float64 model."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def weighted_sum(logps: torch.Tensor) -> torch.Tensor:
    return (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum()


def by_sequence(model: nn.Module, pairs: list[TokenizedPair], layout: Any) -> torch.Tensor:
    batch = layout.collate(pairs)
    return batch.sum_by_sequence(token_logps(model, batch).logps)


@pytest.mark.parametrize("family", SHARING)
def test_prefix_shared_equals_padded_in_values_and_gradients(family: str) -> None:
    model, pairs = make_model(family, SHARING[family]), make_pairs()
    expected = by_sequence(model, pairs, PADDED)
    expected_gradients = gradients(model, weighted_sum(expected))
    layout = choose_layout(Policy(model, None), "auto", pairs)
    assert layout.name == "prefix_shared", layout.reason
    found = by_sequence(model, pairs, PREFIX_SHARED)
    tolerance = 1e-9 if found.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found_gradients = gradients(model, weighted_sum(found))
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("family", NOT_SHARING)
def test_a_model_that_cannot_share_prefixes_is_refused_and_left_as_it_was(family: str) -> None:
    model, pairs = make_model(family, NOT_SHARING[family]), make_pairs()
    expected = by_sequence(model, pairs, PADDED)
    implementation = model.config._attn_implementation
    layout = choose_layout(Policy(model, None), "auto", pairs)
    assert layout.name == "padded"
    assert "not shared" in layout.reason
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(by_sequence(model, pairs, PADDED), expected)


def test_with_lora_values_and_gradients_are_the_same() -> None:
    model, pairs = make_model("llama", {}), make_pairs()
    adapted = add_lora(model, rank=2, alpha=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    adapted.double()
    expected = by_sequence(adapted, pairs, PADDED)
    expected_gradients = gradients(adapted, weighted_sum(expected))
    assert trouble_with_sharing(Policy(adapted, None), pairs) is None
    found = by_sequence(adapted, pairs, PREFIX_SHARED)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_same_gradients(gradients(adapted, weighted_sum(found)), expected_gradients)


def test_no_token_of_one_completion_sees_the_other_nor_another_pair() -> None:
    model, pairs = make_model("llama", {}), make_pairs()
    assert trouble_with_sharing(Policy(model, None), pairs) is None
    before = by_sequence(model, pairs, PREFIX_SHARED)
    changed = [*pairs]
    changed[1] = TokenizedPair(pairs[1].prompt_ids, [5, 6, 7, 8, 9, 10], pairs[1].rejected_ids, 1)
    after = by_sequence(model, changed, PREFIX_SHARED)
    moved = (after - before).abs() > 1e-12
    assert moved.tolist() == [False, True, False, False, False, False]  # only the chosen sequence of pair 1


def test_a_longer_prompt_is_seen_by_both_completions() -> None:
    model, pairs = make_model("llama", {}), make_pairs()
    assert trouble_with_sharing(Policy(model, None), pairs) is None
    before = by_sequence(model, pairs, PREFIX_SHARED)
    changed = [*pairs]
    changed[2] = TokenizedPair([9, *pairs[2].prompt_ids[1:]], pairs[2].chosen_ids, pairs[2].rejected_ids, 2)
    moved = (by_sequence(model, changed, PREFIX_SHARED) - before).abs() > 1e-12
    assert moved.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("layout", [PADDED, PREFIX_SHARED], ids=lambda layout: layout.name)
def test_a_batch_leads_back_to_the_tokens_of_every_completion(layout: Any) -> None:
    pairs = make_pairs()
    batch = layout.collate(pairs)
    targets = [part.tolist() for part in batch.target_ids.split(batch.lengths.tolist())]
    assert targets == [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    inputs = batch.model_inputs["input_ids"].flatten()
    for sequence, pair in enumerate([*pairs, *pairs]):
        completion = pair.chosen_ids if sequence < len(pairs) else pair.rejected_ids
        rows = batch.hidden_rows[batch.sequence_ids == sequence]
        assert inputs[rows].tolist() == [pair.prompt_ids[-1], *completion[:-1]]
    assert layout.cost(pairs) == inputs.numel()


@pytest.mark.parametrize("layout", [PADDED, PREFIX_SHARED], ids=lambda layout: layout.name)
def test_an_empty_prompt_is_refused(layout: Any) -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        layout.collate([TokenizedPair([], [3], [4], 0)])


def test_pair_logps_do_not_depend_on_company() -> None:
    model, pairs = make_model("llama", {}), make_pairs()
    together = padded.collate(pairs)
    logps = pair_logps(together, token_logps(model, together).logps, None)
    for place, pair in enumerate(pairs):
        alone = padded.collate([pair])
        single = pair_logps(alone, token_logps(model, alone).logps, None)
        torch.testing.assert_close(single.policy_chosen_logps[0], logps.policy_chosen_logps[place])
        torch.testing.assert_close(single.policy_rejected_logps[0], logps.policy_rejected_logps[place])

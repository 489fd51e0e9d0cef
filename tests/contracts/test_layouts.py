"""Every layout gives the same log-probabilities and gradients, on every family of architectures that it is used for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from penchant.models.adapters import add_lora
from penchant.models.logps import token_logps
from penchant.scoring.layout import PACKED, PADDED, PREFIX_SHARED, choose_layout, trouble_with
from penchant.scoring.policy import Policy
from penchant.types import TokenizedExample

from ..scoring.alone import scores_alone, sequences_of

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
    "ministral": {"sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "gemma3_text": {"sliding_window": 5},
    "gemma4_text": {"sliding_window": 5},
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "granite": {"logits_scaling": 4.0},
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5},
    "smollm3": {},
    "starcoder2": {"sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "glm4": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
NOT_SHARING = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # convolutions carry tokens across segments
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},  # and states
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},  # and linear attention
    "bloom": {"n_layer": 2, "n_head": 4},  # attention code of its own
    "falcon": {"alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
}


def make_model(family: str, settings: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {name: size for name, size in SIZES.items() if (family, name) != ("falcon", "head_dim")}  # it derives it
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    return model if "num_experts_per_tok" in settings else model.double()  # grouped products know no float64


IN_ONE_ROW = [PACKED, PREFIX_SHARED]
EVERY = pytest.mark.parametrize("layout", [PADDED, *IN_ONE_ROW], ids=lambda layout: layout.name)
WITH_PROMPTS = pytest.mark.parametrize("with_prompts", [False, True], ids=["completions", "with prompts"])

LENGTHS = {
    "pairs": [(7, [4, 9]), (3, [6, 1]), (11, [2, 5])],
    "singles": [(7, [4]), (1, [6]), (11, [1]), (2, [9])],
    "triples": [(5, [4, 9, 2]), (2, [6, 1, 6]), (9, [3, 3, 8])],
    "ragged": [(7, [4, 9]), (1, [6]), (11, [2, 5, 3, 7]), (3, [1, 8, 2])],
}
"""Tokens of each example's prompt and of its completions."""


def make_examples(kind: str = "pairs", seed: int = 0) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(seed)

    def some(number: int) -> list[int]:
        return torch.randint(3, 96, (number,), generator=generator).tolist()

    return [
        TokenizedExample(some(prompt), tuple(map(some, completions)), index)
        for index, (prompt, completions) in enumerate(LENGTHS[kind])
    ]


def gradients(model: nn.Module, total: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of their norm: norms and rotary angles are computed in float32 even in a float64 model."""
    assert found.shape == expected.shape
    assert expected.norm() > 0.1
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def tolerance(family: str, dtype: torch.dtype) -> dict[str, float]:
    """What the model's own attention leaves room for: Gemma 2's takes its softmax in float32."""
    error = 2e-5 if dtype == torch.float32 else 1e-6 if family == "gemma2" else 1e-9
    return {"rtol": error, "atol": error}


def weighted_sum(logps: torch.Tensor) -> torch.Tensor:
    return (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum()


def by_sequence(
    model: nn.Module, examples: Sequence[TokenizedExample], layout: Any, with_prompts: bool = False
) -> torch.Tensor:
    batch = layout.collate(examples, with_prompts)
    return batch.sum_by_sequence(token_logps(model, batch).logps)


@pytest.mark.parametrize("family", SHARING)
def test_rows_of_segments_equal_padded_ones_in_values_and_gradients(family: str) -> None:
    model, examples = make_model(family, SHARING[family]), make_examples()
    expected = by_sequence(model, examples, PADDED)
    expected_gradients = gradients(model, weighted_sum(expected))
    layout = choose_layout(Policy(model, None), "auto", examples)
    assert layout.name == "prefix_shared", layout.reason
    for layout in IN_ONE_ROW:
        found = by_sequence(model, examples, layout)
        torch.testing.assert_close(found, expected, **tolerance(family, found.dtype))
        assert_same_gradients(gradients(model, weighted_sum(found)), expected_gradients)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("kind", ["singles", "triples", "ragged"])
@WITH_PROMPTS
def test_every_layout_gives_the_token_logps_and_gradients_of_sequences_one_by_one(
    family: str, kind: str, with_prompts: bool
) -> None:
    model, examples = make_model(family, SHARING[family]), make_examples(kind)
    scores = scores_alone(model, examples, with_prompts)
    expected = torch.cat(scores)
    expected_gradients = gradients(model, weighted_sum(expected))
    assert trouble_with(PREFIX_SHARED, Policy(model, None), examples) is None
    for layout in (PADDED, *IN_ONE_ROW):
        batch = layout.collate(examples, with_prompts)
        found = token_logps(model, batch).logps
        assert batch.lengths.tolist() == [len(each) for each in scores]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert_same_gradients(gradients(model, weighted_sum(found)), expected_gradients)


@pytest.mark.parametrize("family", NOT_SHARING)
def test_a_model_that_cannot_share_prefixes_is_refused_and_left_as_it_was(family: str) -> None:
    model, examples = make_model(family, NOT_SHARING[family]), make_examples()
    expected = by_sequence(model, examples, PADDED)
    implementation = model.config._attn_implementation
    layout = choose_layout(Policy(model, None), "auto", examples)
    assert layout.name == "padded"
    assert "not shared" in layout.reason
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(by_sequence(model, examples, PADDED), expected)


@pytest.mark.parametrize("kind", ["singles", "ragged"])
def test_a_state_carried_from_token_to_token_is_found_out_in_every_unit(kind: str) -> None:
    model = make_model("lfm2", NOT_SHARING["lfm2"])
    assert "differ" in (trouble_with(PREFIX_SHARED, Policy(model, None), make_examples(kind)) or "")


@pytest.mark.parametrize("family", SHARING)
def test_with_lora_values_and_gradients_are_the_same(family: str) -> None:
    model, examples = make_model(family, SHARING[family]), make_examples("ragged")
    dtype = next(model.parameters()).dtype
    adapted = add_lora(model, rank=2, alpha=4).to(dtype)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = by_sequence(adapted, examples, PADDED)
    expected_gradients = gradients(adapted, weighted_sum(expected))
    assert trouble_with(PREFIX_SHARED, Policy(adapted, None), examples) is None
    for layout in IN_ONE_ROW:
        found = by_sequence(adapted, examples, layout)
        torch.testing.assert_close(found, expected, **tolerance(family, dtype))
        assert_same_gradients(gradients(adapted, weighted_sum(found)), expected_gradients)


@EVERY
@pytest.mark.parametrize("kind", ["pairs", "triples", "ragged"])
def test_no_token_of_one_completion_sees_another_one_nor_another_example(kind: str, layout: Any) -> None:
    model, examples = make_model("llama", {}), make_examples(kind)
    if layout is not PADDED:
        assert trouble_with(layout, Policy(model, None), examples) is None
    batch = layout.collate(examples)
    before = token_logps(model, batch).logps
    sequence = 0
    for place, example in enumerate(examples):
        for number, completion in enumerate(example.completion_ids):
            # Every token becomes another one; the lengths stay.
            others = [3 + (token + 1) % 90 for token in completion]
            completions = (*example.completion_ids[:number], others, *example.completion_ids[number + 1 :])
            changed = [*examples]
            changed[place] = replace(example, completion_ids=completions)
            moved = (token_logps(model, layout.collate(changed)).logps - before).abs() > 1e-12
            assert moved.tolist() == (batch.sequence_ids == sequence).tolist()
            sequence += 1


@EVERY
def test_a_prompt_is_seen_by_all_its_completions_and_by_no_other(layout: Any) -> None:
    model, examples = make_model("llama", {}), make_examples("triples")
    if layout is not PADDED:
        assert trouble_with(layout, Policy(model, None), examples) is None
    before = by_sequence(model, examples, layout)
    changed = [*examples]
    changed[2] = replace(examples[2], prompt_ids=[9, *examples[2].prompt_ids[1:]])
    moved = (by_sequence(model, changed, layout) - before).abs() > 1e-12
    assert moved.tolist() == [False] * 6 + [True] * 3


@EVERY
def test_the_scores_of_a_prompt_do_not_see_its_completions(layout: Any) -> None:
    model, examples = make_model("llama", {}), make_examples("ragged")
    if layout is not PADDED:
        assert trouble_with(layout, Policy(model, None), examples) is None
    before = by_sequence(model, examples, layout, with_prompts=True)
    changed = [
        replace(example, completion_ids=tuple([3 + (t + 1) % 90 for t in ids] for ids in example.completion_ids))
        for example in examples
    ]
    moved = (by_sequence(model, changed, layout, with_prompts=True) - before).abs() > 1e-12
    assert moved.tolist() == layout.collate(examples, True).is_completion.tolist()


@EVERY
@pytest.mark.parametrize("kind", LENGTHS)
@WITH_PROMPTS
def test_a_batch_leads_back_to_the_tokens_of_every_sequence(layout: Any, kind: str, with_prompts: bool) -> None:
    examples = make_examples(kind)
    batch = layout.collate(examples, with_prompts)
    sequences = sequences_of(examples, with_prompts)
    targets = [part.tolist() for part in batch.target_ids.split(batch.lengths.tolist())]
    assert targets == [tokens for _, tokens in sequences]
    inputs = batch.model_inputs["input_ids"].flatten()
    for number, (context, tokens) in enumerate(sequences):
        rows = batch.hidden_rows[batch.sequence_ids == number]
        assert inputs[rows].tolist() == [context[-1], *tokens][: len(tokens)]
    assert layout.cost(examples) == inputs.numel()


@EVERY
def test_an_empty_prompt_is_refused(layout: Any) -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        layout.collate([TokenizedExample([], ([3], [4]), 0)])

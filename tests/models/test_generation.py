"""Sampled tokens against transformers' own `generate`, its warpers, and the model called afresh for every token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from penchant import stopping
from penchant.errors import UserError
from penchant.models import generation, prompt_cache
from penchant.models.adapters import adapter_off, add_lora
from penchant.models.attention import IMPLEMENTATION, attending, use_attend
from penchant.models.generation import Generated, Sampling, choose, generate

from ..conftest import make_tiny_model

VOCAB = 61
END = 2
LENGTHS = (12, 1, 7, 12, 3, 20)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
OLD_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether it can share prompts, settings
    "llama": (True, SIZES),
    "mistral": (True, {**SIZES, "sliding_window": 5}),  # shorter than the prompts, and than some completions
    "qwen2": (True, SIZES),
    "qwen3": (True, SIZES),
    "phi3": (True, SIZES),
    "olmo2": (True, SIZES),
    "gemma2": (True, {**SIZES, **HYBRID, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": (True, {**SIZES, **HYBRID, "query_pre_attn_scalar": 8}),
    "gpt_oss": (True, {**SIZES, **HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": (True, {**SIZES, "num_local_experts": 4}),
    "qwen2_moe": (True, {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 8}),
    "gpt2": (True, OLD_SIZES),
    "gpt_neox": (True, SIZES),
    "bloom": (False, OLD_SIZES),  # attention code of its own, which adds a slope over positions
    "stablelm": (False, SIZES),  # hands nothing down to attention
    "lfm2": (False, {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "mamba": (False, {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}


def make(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family][1], **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the fast ones know no float64
    return model


@pytest.fixture
def llama() -> Any:
    return make("llama")


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(3, VOCAB, length).tolist() for length in LENGTHS]


def sampled(model: Any, prompts: Sequence[Sequence[int]], num_samples: int = 3, **settings: Any) -> Any:
    """Tokens of samples with the seeds 10, 11, ... unless others are given."""
    seeds = settings.pop("seeds", range(10, 10 + len(prompts)))
    rest = {name: settings.pop(name) for name in ("max_rows", "advance") if name in settings}
    ends = settings.pop("end_ids", [END])
    return generate(model, prompts, Sampling(**{"max_new_tokens": 8, **settings}), num_samples, seeds, ends, **rest)


class Bare(nn.Module):
    """Any other model: token ids in, logits out, nothing remembered."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, prompts: list[list[int]]) -> None:
    model = make(family).eval()
    before = model.config._attn_implementation
    found = sampled(model, prompts, 1, temperature=0.0, max_new_tokens=24, max_rows=4)  # 24: the buffers grow
    for ids, (sample,) in zip(prompts, found, strict=True):
        inputs = torch.tensor([ids])
        answer = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=24, eos_token_id=END,
            pad_token_id=0,
        )  # fmt: skip
        assert list(sample.ids) == answer[0, len(ids) :].tolist()
        assert sample.is_finished == (sample.ids[-1] == END)
    assert len({sample.ids for (sample,) in found}) > 2
    assert generation._CHECKED[model] == FAMILIES[family][0]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_draws_the_same_tokens(family: str, prompts: list[list[int]]) -> None:
    model = make(family)
    found = sampled(model, prompts, top_p=0.95, top_k=40)
    assert len({sample.ids for group in found for sample in group}) > 2 * len(prompts)
    assert sampled(Bare(model), prompts, top_p=0.95, top_k=40) == found
    generation._CHECKED[model] = False  # by transformers' own generate
    assert sampled(model, prompts, top_p=0.95, top_k=40) == found


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("family", ["mistral", "gpt2", "lfm2"])
def test_a_sample_depends_on_nothing_but_prompt_seed_and_number(
    family: str, max_rows: int, prompts: list[list[int]]
) -> None:
    model = make(family)
    found = sampled(model, prompts)
    assert sampled(model, prompts, max_rows=max_rows) == found
    order = [3, 0, 5, 1, 4, 2]
    shuffled = sampled(model, [prompts[i] for i in order], seeds=[10 + i for i in order], max_rows=max_rows)
    assert shuffled == [found[i] for i in order]
    more = sampled(model, prompts[2:3], 5, seeds=[12], max_rows=max_rows)
    assert more[0][:3] == found[2]
    assert len({sample.ids for sample in more[0]}) == 5


def test_in_float32_batching_does_not_change_the_tokens_either(prompts: list[list[int]]) -> None:
    model = make("llama").float()
    found = sampled(model, prompts)
    assert sampled(model, prompts, max_rows=3) == found
    assert sampled(Bare(model), prompts) == found
    assert generation._CHECKED[model]


def test_prompts_computed_in_parts_make_the_same_tokens(
    llama: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sampled(llama, prompts)
    monkeypatch.setattr(prompt_cache, "PREFILL_TOKENS", 16)
    seen: list[tuple[int, ...]] = []
    llama.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    assert sampled(llama, prompts) == found
    assert [shape for shape in seen if shape[1] > 1] == [(2, 2), (1, 6), (1, 11), (1, 11), (1, 19)]


LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0, 1.2, -0.3, 1.9], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 4.0]])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_each_token_takes_its_share_of_the_numbers(temperature: float, top_k: int, top_p: float) -> None:
    """Of evenly spread numbers a token takes as many as its probability says, give or take the two at its edges."""
    scores = TemperatureLogitsWarper(temperature)(None, LOGITS)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected = (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)
    number = 4000
    uniforms = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    for row, probabilities in zip(LOGITS, expected, strict=True):
        tokens = choose(row.expand(number, -1), Sampling(temperature, top_p, top_k), uniforms)
        shares = torch.bincount(tokens, minlength=len(row)) / number
        torch.testing.assert_close(shares, probabilities, rtol=0, atol=1.1 / number)
        assert torch.equal(shares > 0, probabilities > 0)


def test_top_p_holds_in_a_vocabulary_too_flat_for_its_shortcut() -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) / 10
    expected = TopPLogitsWarper(0.9)(None, logits) > -math.inf
    kept = logits >= generation._least_kept(logits, 0.9)
    assert (kept != expected).sum() <= 3  # one token a row stands on the edge, where rounding decides
    assert 4000 < kept[0].sum() < 5000


def test_the_extreme_numbers_take_tokens_that_can_be_taken() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 3.0, -torch.inf]])
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(2, -1), Sampling(), numbers).tolist() == [1, 3]


class Constant(nn.Module):
    """The same logits wherever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def test_many_seeds_draw_by_the_softmax_and_tokens_do_not_depend_on_each_other() -> None:
    number = 1500
    found = sampled(Constant(LOGITS[0]), [[1]] * number, 2, seeds=range(number), max_new_tokens=2, end_ids=[])
    first, second = ([group[k].ids for group in found] for k in (0, 1))
    p = LOGITS[0].softmax(-1).double()
    joint = (p[:, None] * p[None, :]).flatten()  # 48 degrees of freedom: beyond 93 once in ten thousand
    for pairs in (first, second, [(a[0], b[0]) for a, b in zip(first, second, strict=True)]):
        counts = Counter(pairs)
        observed = torch.tensor([counts[a, b] for a in range(7) for b in range(7)])
        assert ((observed - number * joint) ** 2 / (number * joint)).sum() < 93


def test_the_largest_seed_is_a_seed() -> None:
    found = sampled(Constant(LOGITS[0]), [[1], [1]], 1, seeds=[2**63 - 1, 0], max_new_tokens=20, end_ids=[])
    assert found[0] != found[1]


def test_a_sample_ends_with_its_end_token_or_at_the_limit(llama: Any, prompts: list[list[int]]) -> None:
    ends = list(range(0, VOCAB, 7))
    free = sampled(llama, prompts, end_ids=[], max_new_tokens=12)
    assert all(len(sample.ids) == 12 and not sample.is_finished for group in free for sample in group)
    found = sampled(llama, prompts, end_ids=ends, max_new_tokens=12)
    for before, after in zip(chain(*free), chain(*found), strict=True):
        until = next((i + 1 for i, token in enumerate(before.ids) if token in ends), None)
        assert after == Generated(before.ids[:until], until is not None)
    assert {sample.is_finished for group in found for sample in group} == {True, False}


def test_finished_rows_leave(llama: Any, prompts: list[list[int]]) -> None:
    sampled(llama, prompts, 1)  # the model was held against itself before
    rows: list[int] = []
    llama.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[0]) if inputs[0].shape[1] == 1 else None
    )
    found = sampled(llama, prompts, 8, end_ids=range(0, VOCAB, 5), max_new_tokens=20)
    lengths = [len(sample.ids) for group in found for sample in group]
    live = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert rows[0] == len(prompts)  # a row for each prompt, whose last token all its samples share
    assert len(rows) == len(live)
    assert live[-1] < len(lengths) / 4
    for computed, needed in zip(rows[1:], live[1:], strict=True):
        assert needed <= computed < 8 / 7 * needed


def test_a_prompt_is_computed_once_for_its_samples(llama: Any) -> None:
    prompts = [list(range(3, 23)), list(range(20, 40))]
    sampled(llama, prompts, 1)
    counts: list[int] = []
    llama.model.embed_tokens.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    sampled(llama, prompts, 5, max_new_tokens=6, end_ids=[])
    assert sum(counts) == 2 * 20 + 2 * 5 * (6 - 1)  # the last token is drawn and never fed
    counts.clear()
    answers = sampled(llama, prompts, 5, temperature=0.0, max_new_tokens=6, end_ids=[])
    assert sum(counts) == 2 * 20 + 2 * (6 - 1)
    assert all(len(group) == 5 and len(set(group)) == 1 for group in answers)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_progress_counts_every_sample_once(family: str, prompts: list[list[int]]) -> None:
    for temperature in (0.0, 1.0):
        counts: list[int] = []
        sampled(make(family), prompts, temperature=temperature, max_rows=5, advance=counts.append)
        assert sum(counts) == 3 * len(prompts)
        assert len(counts) > 1


def state_of(model: Any) -> list[Any]:
    parts = [(part.training, getattr(getattr(part, "config", None), "_attn_implementation", None))
             for part in model.modules()]  # fmt: skip
    weights = [(weight.requires_grad, weight.grad is None, weight.sum().item()) for weight in model.parameters()]
    return [parts, weights, torch.get_rng_state().tolist(), model.generation_config.to_dict()]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", IMPLEMENTATION])
@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_the_model_is_left_as_it_was(family: str, implementation: str, prompts: list[list[int]]) -> None:
    model = make(family)
    use_attend(model)
    model.set_attn_implementation(implementation)
    model.generation_config.update(do_sample=True, repetition_penalty=5.0, eos_token_id=7, min_new_tokens=3)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state_of(model)
    assert sampled(model, prompts) == sampled(make(family), prompts)  # and none of its settings counts
    assert state_of(model) == before

    def fail(*_: Any) -> None:
        raise FloatingPointError("no")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(FloatingPointError):
        sampled(model, prompts)
    handle.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_stop_is_heard_between_tokens(family: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family).train()
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise stopping.StopRequested(2)

    monkeypatch.setattr(stopping, "check", check)
    with pytest.raises(stopping.StopRequested):
        sampled(model, prompts, end_ids=[])
    assert len(calls) == 3
    assert model.training


def test_an_adapter_counts_and_can_be_turned_off(llama: Any, prompts: list[list[int]]) -> None:
    base = sampled(make("llama"), prompts)
    adapted: Any = add_lora(llama, rank=4, alpha=8).double()
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.5)
    found = sampled(adapted, prompts)
    assert generation._CHECKED[adapted]
    assert found != base
    assert sampled(Bare(adapted), prompts) == found
    generation._CHECKED[adapted] = False
    assert sampled(adapted, prompts) == found
    generation._CHECKED[adapted] = True
    with adapter_off(adapted):
        assert sampled(adapted, prompts) == base


def test_what_remembers_more_than_keys_is_found_out_by_its_numbers(llama: Any, prompts: list[list[int]]) -> None:
    llama.model.layers[1].mlp.register_forward_hook(lambda _, __, output: output.cumsum(1))
    found = sampled(llama, prompts, 1, temperature=0.0)
    assert not generation._CHECKED[llama]
    generation._CHECKED[llama] = True
    assert sampled(llama, prompts, 1, temperature=0.0) != found


def test_a_layer_that_does_not_tell_its_window_is_not_served(prompts: list[list[int]]) -> None:
    model = make("qwen2_moe", use_sliding_window=True, sliding_window=30, layer_types=["sliding_attention"] * 2)
    sampled(model, prompts, 1, max_new_tokens=1)
    assert not generation._CHECKED[model]  # though on so few tokens the window changes nothing


def test_a_long_prompt_does_not_change_the_positions_of_the_others(prompts: list[list[int]]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make("llama", rope_parameters=rope, max_position_embeddings=16)
    with_long = sampled(model, [*prompts[:3], prompts[5]], seeds=[1, 2, 3, 4])
    assert with_long[:3] == sampled(model, prompts[:3], seeds=[1, 2, 3])
    assert not generation._CHECKED[model]


def test_autocast_rounds_the_logits_and_keeps_the_law(prompts: list[list[int]]) -> None:
    model = make_tiny_model(vocab_size=VOCAB).eval()
    ids = sorted(prompts, key=len)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stepper = generation._Stepper(model, ids)
        with attending(model):
            found = stepper.step([each[-1] for each in ids])
        expected = torch.cat([model(input_ids=torch.tensor([each])).logits[:, -1] for each in ids])
        assert {states.dtype for states in stepper.cache.prompt_states(0)} == {torch.bfloat16}
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
        assert sampled(model, prompts) == sampled(model, prompts)
    assert generation._CHECKED[model]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(temperature: float, value: float, llama: Any) -> None:
    llama.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([5]), value))
    with pytest.raises(UserError, match="not finite"):
        sampled(llama, [[3, 4, 5]], temperature=temperature)


def test_no_prompts_have_no_samples(llama: Any, prompts: list[list[int]]) -> None:
    assert sampled(llama, []) == []
    with pytest.raises(ValueError, match="zip"):
        sampled(llama, prompts, seeds=[1])

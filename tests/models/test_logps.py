"""Log-probabilities of completion tokens against each model's own full logits, one sequence at a time, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from penchant.layouts.padded import collate
from penchant.models import head
from penchant.models.adapters import add_lora
from penchant.models.logps import builds_full_logits, token_logps
from penchant.types import Batch, TokenizedExample

from ..scoring.alone import log_probs_alone, logps_alone

VOCAB = 61
SEQUENCES = [  # ragged on both sides; one completion of a single token, one empty
    ([5, 9, 2, 31], [7, 60, 8]),
    ([11], [4, 4, 12, 30, 2, 1, 59]),
    ([3, 44, 5, 6, 7, 8, 21], [9]),
    ([17, 18], []),
    ([50, 6], [13, 1]),
]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 4}),
    "gemma3_text": ("Gemma3", {"final_logit_softcapping": 2.0, "sliding_window": 4}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2", {"logit_scale": 0.3, "sliding_window": 4}),
    "granite": ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neox": ("GPTNeoX", {"hidden_dropout": 0.0}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0}),
    "falcon": ("Falcon", {"alibi": True}),
    "bloom": ("Bloom", {}),
}


def make_model(family: str) -> nn.Module:
    name, settings = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **settings})
    config._experts_implementation = "eager"  # the grouped kernels know no float64
    return getattr(transformers, f"{name}{suffix}")(config).double().eval()


@pytest.fixture
def _float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotations and routers of these models compute in float32 whatever the weights are; here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def collate_sequences(sequences: list[tuple[list[int], list[int]]]) -> Batch:
    return collate([TokenizedExample(prompt, (completion,), i) for i, (prompt, completion) in enumerate(sequences)])


def expected_logps(model: nn.Module, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(y_t | x, y_<t) of every completion token, from the full logits of each sequence by itself."""
    return torch.cat([logps_alone(model, prompt, completion) for prompt, completion in sequences])


def expected_rows(model: nn.Module, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """The distributions that the completion tokens were drawn from, (M, V), from each sequence by itself."""
    whole = [(len(prompt), log_probs_alone(model, [*prompt, *completion])) for prompt, completion in sequences]
    return torch.cat([log_probs[start - 1 : -1] for start, log_probs in whole]).detach().exp()


def expected_entropies(model: nn.Module, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    return torch.stack([-(p * p.log()).sum() for p in expected_rows(model, sequences)])


def expected_log_collisions(model: nn.Module, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    return torch.stack([(p * p).sum().log() for p in expected_rows(model, sequences)])


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token has a weight of its own."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same_values_and_gradients(model: nn.Module, batch: Batch) -> None:
    found, expected = token_logps(model, batch).logps, expected_logps(model, SEQUENCES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    found_gradients, expected_gradients = gradients(model, found), gradients(model, expected)
    assert set(found_gradients) == set(expected_gradients)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def batch() -> Batch:
    return collate_sequences(SEQUENCES)


@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_token_logps_and_gradients_are_those_of_the_models_own_logits(family: str, batch: Batch) -> None:
    model = make_model(family)
    assert_same_values_and_gradients(model, batch)
    assert not builds_full_logits(model)


@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "lm_head"]], ids=["linear", "head"])
def test_token_logps_and_gradients_of_an_adapted_model_are_those_of_its_own_logits(
    target_modules: str | list[str], batch: Batch
) -> None:
    model = add_lora(make_model("llama"), rank=2, alpha=4, target_modules=target_modules).double()
    token_logps(model, batch)  # checked against the model while the adapter still is the identity
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert_same_values_and_gradients(model, batch)
    assert not builds_full_logits(model)
    with model.disable_adapter():
        base = expected_logps(model, SEQUENCES)
        torch.testing.assert_close(token_logps(model, batch).logps, base, rtol=0, atol=1e-9)
    assert not torch.allclose(token_logps(model, batch).logps, base, atol=1e-3)


@pytest.mark.usefixtures("_float64_throughout")
def test_chunks_change_neither_values_nor_gradients(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma2")
    whole = token_logps(model, batch, with_entropies=True, with_collisions=True)
    whole_gradients = gradients(model, whole.logps)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 3 * 4 * VOCAB)  # three rows at a time; 13 rows in all
    in_chunks = token_logps(model, batch, with_entropies=True, with_collisions=True)
    torch.testing.assert_close(in_chunks.logps, whole.logps, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_chunks.entropies, whole.entropies, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_chunks.log_collisions, whole.log_collisions, rtol=0, atol=1e-12)
    for name, gradient in gradients(model, in_chunks.logps).items():
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=0, atol=1e-12)
    assert_same_values_and_gradients(model, batch)


@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_entropies_are_the_sums_of_minus_p_log_p(family: str, batch: Batch) -> None:
    model = make_model(family)
    scored = token_logps(model, batch, with_entropies=True)
    torch.testing.assert_close(scored.entropies, expected_entropies(model, SEQUENCES), rtol=0, atol=1e-9)
    assert not scored.entropies.requires_grad
    assert token_logps(model, batch).entropies is None


@pytest.mark.usefixtures("_float64_throughout")
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("rows_per_chunk", [2, 100])
def test_log_collisions_are_the_logs_of_the_sums_of_p_squared(
    family: str, rows_per_chunk: int, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", rows_per_chunk * 4 * VOCAB)
    scored = token_logps(model, batch, with_collisions=True)
    expected = expected_log_collisions(model, SEQUENCES)
    torch.testing.assert_close(scored.log_collisions, expected, rtol=0, atol=1e-9)
    assert expected.max() - expected.min() > 0.05  # rows differ, so they cannot have been mixed up
    assert not scored.log_collisions.requires_grad
    assert scored.entropies is None
    assert token_logps(model, batch).log_collisions is None


def test_log_collision_of_a_uniform_and_of_a_sure_distribution() -> None:
    sure = torch.full((VOCAB,), -torch.inf).index_fill(0, torch.tensor([7]), 3.0)
    logits = torch.stack([torch.zeros(VOCAB), sure, sure])

    class Fixed(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return logits[None, : tokens.shape[1]]

    scored = token_logps(Fixed(), collate_sequences([([4], [9, 7])]), with_entropies=True, with_collisions=True)
    assert scored.logps.tolist() == pytest.approx([-math.log(VOCAB), 0.0])
    assert scored.log_collisions.tolist() == pytest.approx([-math.log(VOCAB), 0.0])
    assert scored.entropies.tolist() == pytest.approx([math.log(VOCAB), 0.0])


class AddsToItsLogits(transformers.LlamaForCausalLM):
    """A head that is more than a projection, by a rule that nothing outside could know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 3, VOCAB, dtype=output.logits.dtype)
        return output


@pytest.mark.usefixtures("_float64_throughout")
def test_head_that_is_not_understood_is_asked_for_its_own_logits(batch: Batch) -> None:
    torch.manual_seed(0)
    model = AddsToItsLogits(transformers.LlamaConfig(**SIZES)).double()
    assert_same_values_and_gradients(model, batch)
    assert builds_full_logits(model)
    entropies = token_logps(model, batch, with_entropies=True).entropies
    torch.testing.assert_close(entropies, expected_entropies(model, SEQUENCES), rtol=0, atol=1e-9)


class Recurrent(nn.Module):
    """A plain torch module, with the argument named in its own way; its logits bare or in an object."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wrapped = wrapped
        self.embedding = nn.Embedding(VOCAB, 8)
        self.recurrence = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Any:
        logits = self.head(self.recurrence(self.embedding(tokens))[0])
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_module_serves_as_a_model(wrapped: bool, batch: Batch) -> None:
    model = Recurrent(wrapped).double()
    assert_same_values_and_gradients(model, batch)
    assert builds_full_logits(model)


def test_module_that_puts_time_first_is_refused(batch: Batch) -> None:
    model = Recurrent(wrapped=False)
    model.recurrence.register_forward_hook(lambda _, __, output: (output[0].transpose(0, 1), output[1]))
    with pytest.raises(ValueError, match="rows, T, V"):
        token_logps(model, batch)


def rows_made(model: nn.Module, batch: Batch) -> tuple[list[int], int]:
    """Rows of each product with the head, there and back, and the size of the largest tensor over the vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows: list[int] = []
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and output.shape[-1:] == (VOCAB,) and output.data_ptr() != weight.data_ptr():
                sizes.append(output.numel())
                if func is torch.ops.aten.mm.default:
                    rows.append(output.shape[0])
            return output

    weight = model.lm_head.weight
    with Watch():
        token_logps(model, batch).logps.sum().backward()
    return rows, max(sizes)


def test_only_rows_that_predict_a_completion_token_reach_the_head(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").float()
    token_logps(model, batch)  # the first call looks at the model's own logits once
    num_tokens = sum(len(completion) for _, completion in SEQUENCES)
    assert num_tokens < batch.model_inputs["input_ids"].numel()
    assert rows_made(model, batch) == ([num_tokens], num_tokens * VOCAB)

    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 4 * VOCAB)
    assert rows_made(model, batch) == ([4, 4, 4, 1], 4 * VOCAB)
    monkeypatch.setitem(head.KEPT_BYTES, "cpu", 4 * num_tokens * VOCAB - 1)
    assert rows_made(model, batch) == ([4, 4, 4, 1] * 2, 4 * VOCAB)  # no room to keep them: once more on the way back
    model.lm_head.weight.requires_grad_(False)
    assert rows_made(model, batch) == ([4, 4, 4, 1], 4 * VOCAB)  # what goes back is made on the way there

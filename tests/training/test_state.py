"""What a checkpoint holds of a run's state comes back to the bit, whatever the model and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penchant
from penchant.config import RunConfig, config_from
from penchant.models.adapters import add_lora
from penchant.scoring.policy import Policy
from penchant.training.checkpoint import Checkpoint, DamagedError, read_checkpoint, write_checkpoint
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.state import expected_checkpoint_bytes, load_state, read_facts, take_snapshot

from ..conftest import make_tiny_model

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
SIZES_OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": SIZES_OF_GPT2,  # tied, its matrices stand on their sides
    "gemma2": {},
    "gemma3_text": {"sliding_window": 16},
    "qwen2": {},
    "qwen3_moe": EXPERTS,  # experts are written one by one and computed together
    "mixtral": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "gpt_neox": {},
}


def build(name: str, seed: int) -> nn.Module:
    """A tiny model of that architecture with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    kind = name.partition(",")[0]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | ARCHITECTURES[name]))


def config(**settings: Any) -> RunConfig:
    return config_from({"model": "m", "data": "d", **settings})


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Steps on random tokens, drawn from the random numbers of the process."""
    model.train()
    for _ in range(number):
        ids = torch.randint(3, 320, (2, 9))
        model(input_ids=ids, labels=ids).loss.backward()
        set_rate(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All numbers of model and optimizer by name."""
    state = optimizer.state_dict()["state"]
    moments = {f"{place}:{key}": value for place, kept in state.items() for key, value in kept.items()}
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in {**weights, **moments}.items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two sets of numbers differ in a bit, in type, or in being there."""
    assert one
    return [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    ]  # fmt: skip


def save(policy: Policy, optimizer: torch.optim.Optimizer, folder: Path, step: int = 3, **facts: Any) -> Checkpoint:
    snapshot = take_snapshot(policy, optimizer, facts, copy=False)
    return read_checkpoint(write_checkpoint(folder, step, {}, snapshot.write))


def check_round_trip(
    make: Callable[[int], nn.Module], tokenizer: Any, folder: Path, settings: RunConfig | None = None
) -> None:
    """Trains, saves, trains on; and from the checkpoint, into a model of other weights, the same once more."""
    settings = settings or config()
    model = make(0)
    optimizer = make_optimizer(model, settings)
    take_steps(model, optimizer, 3)
    checkpoint = save(Policy(model, tokenizer), optimizer, folder, words=["a", 1])
    saved = bits(model, optimizer)
    take_steps(model, optimizer, 2)
    after = bits(model, optimizer)
    assert len(differing(saved, after)) > 3

    other = make(1)
    frozen = {name for name, parameter in other.named_parameters() if not parameter.requires_grad}
    other_optimizer = make_optimizer(other, settings)
    assert differing(saved, bits(other, other_optimizer))
    facts = load_state(checkpoint, Policy(other, tokenizer), other_optimizer)
    assert facts["words"] == ["a", 1]
    assert differing(saved, bits(other, other_optimizer)) == []
    take_steps(other, other_optimizer, 2)
    assert differing(after, bits(other, other_optimizer)) == []
    assert {name for name, parameter in other.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_to_the_bit_and_goes_on_to_the_bit(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    check_round_trip(lambda seed: build(name, seed), tokenizer, tmp_path)


def test_the_one_moment_of_rmsprop_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    check_round_trip(lambda seed: build("llama", seed), tokenizer, tmp_path, config(optimizer="rmsprop"))


def test_frozen_weights_stay_frozen_and_have_no_moments(tokenizer: Any, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        model = build("gpt2", seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("h.1" in name)
        return model

    check_round_trip(make, tokenizer, tmp_path)
    names = (tmp_path / "step-3" / "training.safetensors").read_bytes()
    assert b"h.1.mlp" in names
    assert b"h.0.mlp" not in names


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_comes_back_without_its_base(name: str, tokenizer: Any, tmp_path: Path) -> None:
    check_round_trip(lambda seed: adapted(name, seed), tokenizer, tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "step-3").glob("*.safetensors"))
    assert size < sum(parameter.nbytes for parameter in build(name, 0).parameters())


def adapted(name: str, seed: int) -> nn.Module:
    """An adapter of its own on the same base."""
    base = build(name, 0)
    torch.manual_seed(seed)
    return add_lora(base, 2, 4)


def test_bfloat16_weights_come_back_in_their_type(tokenizer: Any, tmp_path: Path) -> None:
    check_round_trip(lambda seed: build("llama", seed).bfloat16(), tokenizer, tmp_path)


def test_tied_weights_are_written_once(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    for name, expected in (("llama", 2), ("llama, tied", 1)):
        model = build(name, 0)
        save(Policy(model, tokenizer), make_optimizer(model, config()), tmp_path / name)
        with safe_open(tmp_path / name / "step-3" / "model.safetensors", "pt") as file:
            assert sum(file.get_tensor(key).shape == (320, 32) for key in file.keys()) == expected  # noqa: SIM118


def test_a_copy_does_not_see_what_comes_later_and_a_view_does(tokenizer: Any, tmp_path: Path) -> None:
    for copy in (True, False):
        model = build("llama, tied", 0)
        optimizer = make_optimizer(model, config())
        take_steps(model, optimizer, 2)
        snapshot = take_snapshot(Policy(model, tokenizer), optimizer, {}, copy=copy)
        then = bits(model, optimizer)
        take_steps(model, optimizer, 1)
        write_checkpoint(tmp_path / str(copy), 2, {}, snapshot.write)
        found = build("llama, tied", 1)
        found_optimizer = make_optimizer(found, config())
        load_state(read_checkpoint(tmp_path / str(copy) / "step-2"), Policy(found, tokenizer), found_optimizer)
        assert (differing(then, bits(found, found_optimizer)) == []) == copy


def test_the_random_numbers_go_on_where_they_were(tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", 0)
    optimizer = make_optimizer(model, config())
    torch.manual_seed(5)
    torch.randn(7)
    checkpoint = save(Policy(model, tokenizer), optimizer, tmp_path)
    expected = torch.randn(5)
    torch.manual_seed(1)
    load_state(checkpoint, Policy(model, tokenizer), optimizer)
    assert torch.equal(torch.randn(5), expected)


def test_what_plain_transformers_loads_from_a_checkpoint_is_the_model(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("llama", "qwen3_moe"):
        model = build(name, 0)
        folder = save(Policy(model, tokenizer), make_optimizer(model, config()), tmp_path / name).folder
        ids = torch.tensor([[3, 50, 60, 70]])
        expected = model.eval()(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, expected)
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_another_model_is_refused_in_a_sentence(tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", 0)
    checkpoint = save(Policy(model, tokenizer), make_optimizer(model, config()), tmp_path)
    for other in (build("gpt2", 0), make_tiny_model(hidden_size=16), adapted("llama", 0)):
        with pytest.raises(penchant.UserError, match="does not fit this model"):
            load_state(checkpoint, Policy(other, tokenizer), make_optimizer(other, config()))


@pytest.mark.parametrize("lost", ["training.safetensors", "training.json"])
def test_a_missing_piece_is_an_error_and_no_fresh_start(lost: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", 0)
    policy, optimizer = Policy(model, tokenizer), make_optimizer(model, config())
    snapshot = take_snapshot(policy, optimizer, {}, copy=False)

    def fill(folder: Path) -> None:
        snapshot.write(folder)
        (folder / lost).unlink()

    checkpoint = read_checkpoint(write_checkpoint(tmp_path, 1, {}, fill))
    with pytest.raises(DamagedError, match=lost):
        load_state(checkpoint, policy, optimizer)


def test_moments_of_another_optimizer_are_left_and_the_new_ones_begin_at_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = build("llama", 0)
    optimizer = make_optimizer(model, config())
    take_steps(model, optimizer, 2)
    checkpoint = save(Policy(model, tokenizer), optimizer, tmp_path)
    weights = dict(model.named_parameters())
    other = build("llama", 1)
    rmsprop = make_optimizer(other, config(optimizer="rmsprop"))
    load_state(checkpoint, Policy(other, tokenizer), rmsprop)
    assert differing(weights, dict(other.named_parameters())) == []
    assert not rmsprop.state
    take_steps(other, rmsprop, 1)
    assert differing(weights, dict(other.named_parameters()))


@pytest.mark.parametrize("optimizer_name", ["adamw", "rmsprop"])
def test_the_size_that_is_announced_is_that_on_disk(optimizer_name: str, tokenizer: Any, tmp_path: Path) -> None:
    settings = config(optimizer=optimizer_name)
    model = make_tiny_model(hidden_size=128, intermediate_size=256)
    optimizer = make_optimizer(model, settings)
    take_steps(model, optimizer, 1)
    checkpoint = save(Policy(model, tokenizer), optimizer, tmp_path)
    size = sum(path.stat().st_size for path in checkpoint.folder.iterdir())
    assert size == pytest.approx(expected_checkpoint_bytes(Policy(model, tokenizer), settings), rel=0.05)


def test_facts_come_back_as_they_were(tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", 0)
    said = {"answers_before": ["ünïcode \ud800 and half a pair", ""], "loss": (0.1 + 0.2).hex()}
    checkpoint = save(Policy(model, tokenizer), make_optimizer(model, config()), tmp_path, **said)
    found = read_facts(checkpoint)
    assert {name: found[name] for name in said} == said


def test_a_snapshot_can_be_written_twice(tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", 0)
    snapshot = take_snapshot(Policy(model, tokenizer), make_optimizer(model, config()), {}, copy=True)
    folders = [write_checkpoint(tmp_path, step, {}, snapshot.write) for step in (1, 2)]
    one, other = (sorted(read_checkpoint(folder).facts["files"].items()) for folder in folders)
    assert one == other

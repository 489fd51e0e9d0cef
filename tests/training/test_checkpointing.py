"""Gradient checkpointing: the same gradients, of every model and layout, from less memory; and what is told of it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penchant.errors import UserError
from penchant.losses import build_loss
from penchant.models.adapters import add_lora
from penchant.models.generation import Sampling
from penchant.models.gradient_checkpointing import num_checkpointed_layers, set_gradient_checkpointing
from penchant.models.load import disable_dropout
from penchant.scoring.layout import Layout, choose_layout
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.training import loop
from penchant.training.estimate import Speed, estimate_run, measure
from penchant.training.step import accumulate_gradient, train_step
from penchant.types import TokenizedExample

from ..conftest import make_tiny_model
from ..contracts.test_layouts import SHARING, make_examples, make_model
from ..scoring.samples import gradient_of
from .test_run import losses_of, train

LAYOUTS = pytest.mark.parametrize("wanted", ["padded", "packed", "prefix_shared"])
WEIGHTS = pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "LoRA"])


UNSAMPLED: dict[str, Any] = {"num_samples": 0, "sample_max_new_tokens": 128}


class Layer(nn.Module):
    """A module that knows nothing of transformers."""


def tokens(number: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 320, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def long_examples() -> list[TokenizedExample]:
    """Long enough for activations to outweigh the weights."""
    return [TokenizedExample(tokens(300, i), (tokens(100, 10 + i), tokens(80, 20 + i)), i) for i in range(2)]


def deep_policy(rank: int, precision: Any = "float32") -> Policy:
    model = make_tiny_model(num_hidden_layers=8, hidden_size=64, intermediate_size=128, max_position_embeddings=1024)
    return Policy(model if not rank else add_lora(model, rank, 8), None, precision)


def gradient_with(model: nn.Module, layout: Layout, wanted: bool) -> Tensor:
    set_gradient_checkpointing(model, wanted)
    model.train().zero_grad()
    loss = build_loss({"name": "simpo"})
    accumulate_gradient(Policy(model, None), None, loss, [layout.collate(make_examples("pairs"))], Means())
    return gradient_of(model)


@pytest.mark.parametrize("family", SHARING)
@LAYOUTS
def test_no_gradient_changes_in_any_family(family: str, wanted: str) -> None:
    model = make_model(family, SHARING[family])
    disable_dropout(model)
    layout = choose_layout(Policy(model, None), wanted, make_examples())
    expected = gradient_with(model, layout, False)
    found = gradient_with(model, layout, True)
    assert num_checkpointed_layers(model) == 2
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@LAYOUTS
def test_no_gradient_of_an_adapter_changes_and_frozen_embeddings_need_none(wanted: str) -> None:
    model = add_lora(make_model("llama", {}), 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    layout = choose_layout(Policy(model, None), wanted, make_examples())
    expected, found = (gradient_with(model, layout, wanted) for wanted in (False, True))
    assert num_checkpointed_layers(model) == 2
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert not model.get_input_embeddings()(torch.tensor([3])).requires_grad


@WEIGHTS
@LAYOUTS
def test_a_run_has_the_losses_that_it_has_without(rank: int, wanted: str, model_folder: Path) -> None:
    settings: dict[str, Any] = {"layout": wanted, "lora": {"rank": rank}, "max_steps": 4, **UNSAMPLED}
    parent = model_folder.parent / f"{wanted}-{rank}"
    expected = losses_of(train(model_folder, parent / "kept", **settings))
    found = losses_of(train(model_folder, parent / "again", gradient_checkpointing=True, **settings))
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected[-1] < expected[0] - 0.01


def test_a_run_that_stopped_may_go_on_with_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, **UNSAMPLED}
    whole = losses_of(train(model_folder, tmp_path / "whole", **settings))
    steps = iter([train_step, train_step])

    def stops_in_its_third(*args: Any, **kwargs: Any) -> Any:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", stops_in_its_third)
    with pytest.raises(KeyboardInterrupt):
        train(model_folder, tmp_path / "cut", **settings)
    monkeypatch.setattr(loop, "train_step", train_step)
    gone_on = train(model_folder, tmp_path / "cut", gradient_checkpointing=True, **settings)
    assert losses_of(gone_on) == pytest.approx(whole, abs=1e-6)


def test_scoring_and_sampling_compute_nothing_twice(tiny_model: nn.Module, tokenizer: Any) -> None:
    policy = Policy(tiny_model, tokenizer)
    tiny_model.eval()
    expected = policy.sample(["the cat"], Sampling(max_new_tokens=5), 2)
    set_gradient_checkpointing(tiny_model, True)

    def never(*_: Any) -> None:
        raise AssertionError("a layer was checkpointed")

    for part in tiny_model.modules():
        if hasattr(part, "_gradient_checkpointing_func"):
            part._gradient_checkpointing_func = never  # type: ignore[assignment]
    tiny_model.train()
    assert policy.sample(["the cat"], Sampling(max_new_tokens=5), 2) == expected
    with pytest.raises(AssertionError, match="checkpointed"):
        policy.log_prob(["the cat"], [" sat"])
    tiny_model.eval()
    assert policy.log_prob(["the cat"], [" sat"]).isfinite().all()


def test_a_model_in_hand_is_turned_back(tiny_model: nn.Module) -> None:
    set_gradient_checkpointing(tiny_model, True)
    set_gradient_checkpointing(tiny_model, True)
    assert num_checkpointed_layers(tiny_model) == 2
    set_gradient_checkpointing(tiny_model, False)
    assert num_checkpointed_layers(tiny_model) == 0


def test_a_model_that_cannot_is_refused_by_the_name_of_the_key(tiny_model: nn.Module) -> None:
    tiny_model.supports_gradient_checkpointing = False  # type: ignore[assignment]
    for model in (tiny_model, Layer()):
        set_gradient_checkpointing(model, False)
        with pytest.raises(UserError, match=f"^gradient_checkpointing: {type(model).__name__} cannot"):
            set_gradient_checkpointing(model, True)


# Memory.


class Peak(TorchDispatchMode):
    """The most bytes that live at once of all tensors made within it."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage._cdata, None)
        self.bytes = max(self.bytes, sum(self._live.values()))
        return found


def peak_of_a_gradient(policy: Policy, layout: Layout, examples: list[TokenizedExample]) -> int:
    """Without the gradients themselves."""
    policy.model.train()
    batch = layout.collate(examples)
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    with Peak() as peak:
        torch.autograd.grad(policy.token_logps(batch).logps.sum(), parameters)
    return peak.bytes - sum(parameter.nbytes for parameter in parameters)


@WEIGHTS
@LAYOUTS
def test_what_is_held_at_the_peak_is_foretold(rank: int, wanted: str) -> None:
    policy, examples = deep_policy(rank), long_examples()
    layout = choose_layout(policy, wanted, examples)
    foretold, seen = [], []
    for wanted_now in (False, True):
        set_gradient_checkpointing(policy.model, wanted_now)
        speed = measure(policy, layout, examples)
        foretold.append(speed.fixed_bytes + speed.activation_bytes * layout.cost(examples))
        seen.append(peak_of_a_gradient(policy, layout, examples))
    assert seen[1] < 0.5 * seen[0]
    assert foretold == pytest.approx(seen, rel=0.3)


def test_copies_of_the_weights_in_bf16_do_not_grow_with_the_tokens() -> None:
    policy, examples = deep_policy(0, "bf16"), long_examples()
    layout = choose_layout(policy, "padded", examples)
    matrices = sum(p.numel() for name, p in policy.model.named_parameters() if "proj" in name or "lm_head" in name)
    speed = measure(policy, layout, examples)
    assert speed.fixed_bytes == pytest.approx(2 * matrices, rel=0.1)
    in_float32 = measure(deep_policy(0), layout, examples)
    assert 0.5 < speed.activation_bytes / in_float32.activation_bytes < 1


def test_the_second_forward_pass_counts_as_time(tiny_model: nn.Module) -> None:
    policy, speed = Policy(tiny_model, None), Speed(1.0, 0.0)
    before = estimate_run(policy, speed, 100.0, 10.0, 1, False).seconds
    set_gradient_checkpointing(tiny_model, True)
    assert before == 3 * 100 + 10
    assert estimate_run(policy, speed, 100.0, 10.0, 1, False).seconds == 4 * 100 + 10

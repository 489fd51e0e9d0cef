"""Train steps on token tensors against an independent computation in float64, written out from the formulas here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from penchant.algorithms import DPO, IPO, PairAlgorithm
from penchant.losses import DPOLoss, base
from penchant.types import PairLogps

VOCAB, PAD = 61, 0
PROMPTS = [[5, 9, 2, 31], [11], [17, 18]]
CHOSEN = [[7, 60, 8], [4, 4, 12, 30, 2, 1, 59], [6, 2]]
REJECTED = [[7, 12], [3], [13, 1, 8, 9, 2]]


class Recurrent(nn.Module):
    """A plain torch module; logits bare or in an object."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.embedding = nn.Embedding(VOCAB, 8)
        self.recurrence = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Any:
        logits = 3 * self.head(self.recurrence(self.embedding(tokens))[0])
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": make_gpt2,
    "plain": Recurrent,
    "plain with .logits": lambda: Recurrent(wrapped=True),
}


def make_models(kind: str) -> tuple[nn.Module, nn.Module]:
    """Policy and reference with weights of their own, in float64."""
    torch.manual_seed(0)
    return MODELS[kind]().double(), MODELS[kind]().double()


# Five ways to hand over the same ragged pairs.


def filled(rows: list[list[int]], left: bool, filling: int = PAD) -> Tensor:
    width = max(map(len, rows))
    gaps = [[filling] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])


def by_pad_id(left: bool) -> dict[str, Tensor]:
    return {
        "prompt": filled(PROMPTS, left),
        "chosen": filled(CHOSEN, left),
        "rejected": filled(REJECTED, left),
    }


def by_masks(left: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, rows in {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}.items():
        tensors[name] = filled(rows, left, filling=2)  # 2 is a real token, too
        tensors[f"{name}_mask"] = filled([[1] * len(row) for row in rows], left).bool()
    return tensors


INPUTS: dict[str, tuple[int | None, dict[str, Tensor]]] = {
    "right padded": (PAD, by_pad_id(left=False)),
    "left padded": (PAD, by_pad_id(left=True)),
    "prompts left, completions right": (PAD, {**by_pad_id(left=False), "prompt": filled(PROMPTS, left=True)}),
    "masks, right": (None, by_masks(left=False)),
    "masks, left": (None, by_masks(left=True)),
    "masks over a pad id": (2, by_masks(left=False)),
}


# The independent computation.


@dataclass
class Method:
    make: type[PairAlgorithm]
    settings: dict[str, Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of the log-ratios of chosen and rejected, for one pair."""
    is_per_token: bool = False

    @property
    def beta(self) -> float:
        return self.settings["beta"]


METHODS = {
    "dpo": Method(DPO, {"beta": 0.3}, lambda c, r: torch.log(1 + torch.exp(-0.3 * (c - r)))),
    "cdpo": Method(
        DPO,
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda c, r: 0.8 * torch.log(1 + torch.exp(-0.3 * (c - r))) + 0.2 * torch.log(1 + torch.exp(0.3 * (c - r))),
    ),
    "ipo per token": Method(IPO, {"beta": 0.5}, lambda c, r: (c - r - 1) ** 2, is_per_token=True),
    "ipo": Method(IPO, {"beta": 0.5, "length_normalize": False}, lambda c, r: (c - r - 1) ** 2),
}


def log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    output = model(torch.tensor([prompt + completion]))
    log_probs = torch.log_softmax((output if isinstance(output, Tensor) else output.logits)[0], -1)
    return sum(log_probs[len(prompt) + t - 1, token] for t, token in enumerate(completion))


@dataclass
class Expected:
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def expected_step(method: Method, policy: nn.Module, ref: nn.Module, num_pairs: int = 3) -> Expected:
    policy, ref = copy.deepcopy(policy), copy.deepcopy(ref)
    losses, chosen_rewards, rejected_rewards = [], [], []
    for prompt, *completions in zip(PROMPTS[:num_pairs], CHOSEN, REJECTED, strict=False):
        ratios = [log_prob(policy, prompt, each) - log_prob(ref, prompt, each).detach() for each in completions]
        if method.is_per_token:
            ratios = [ratio / len(each) for ratio, each in zip(ratios, completions, strict=True)]
        losses.append(method.loss(*ratios))
        chosen_rewards.append(method.beta * ratios[0].item())
        rejected_rewards.append(method.beta * ratios[1].item())
    loss = sum(losses) / num_pairs
    loss.backward()
    gradients = {name: each.grad for name, each in policy.named_parameters()}
    wins = sum(chosen > rejected for chosen, rejected in zip(chosen_rewards, rejected_rewards, strict=True))
    metrics = {
        "loss": loss.item(),
        "chosen_reward": sum(chosen_rewards) / num_pairs,
        "rejected_reward": sum(rejected_rewards) / num_pairs,
        "accuracy": wins / num_pairs,
        "margin": (sum(chosen_rewards) - sum(rejected_rewards)) / num_pairs,
        "grad_norm": math.sqrt(sum(each.pow(2).sum().item() for each in gradients.values())),
    }
    return Expected(metrics, gradients)


def assert_step_is_as_expected(
    method: Method, kind: str, pad_token_id: int | None, inputs: dict[str, Tensor], num_pairs: int = 3
) -> None:
    policy, ref = make_models(kind)
    expected = expected_step(method, policy, ref, num_pairs)
    expected_policy = copy.deepcopy(policy)
    found_ref = copy.deepcopy(ref)
    algorithm = method.make(
        policy, found_ref, **method.settings, learning_rate=1e-3, max_grad_norm=1e9, pad_token_id=pad_token_id
    )
    metrics = algorithm.train_step(**inputs)
    assert metrics == pytest.approx(expected.metrics, rel=1e-6, abs=1e-9)
    for name, each in policy.named_parameters():
        torch.testing.assert_close(each.grad, expected.gradients[name], rtol=1e-6, atol=1e-9)

    optimizer = torch.optim.AdamW(expected_policy.parameters(), lr=1e-3, weight_decay=0.0)
    for name, each in expected_policy.named_parameters():
        each.grad = policy.get_parameter(name).grad.clone()
    optimizer.step()
    for name, each in expected_policy.named_parameters():
        assert torch.equal(each, policy.get_parameter(name))
    for each, before in zip(found_ref.parameters(), ref.parameters(), strict=True):
        assert torch.equal(each, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_train_step_is_the_formula(method: str, kind: str) -> None:
    assert_step_is_as_expected(METHODS[method], kind, *INPUTS["right padded"])


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("method", ["dpo", "ipo per token"])
def test_ragged_pairs_give_the_same_step_however_they_are_filled_up(method: str, given: str) -> None:
    assert_step_is_as_expected(METHODS[method], "plain", *INPUTS[given])


@pytest.mark.parametrize("method", METHODS)
def test_batch_of_one_needs_no_padding(method: str) -> None:
    inputs = {
        "prompt": torch.tensor(PROMPTS[:1]),
        "chosen": torch.tensor(CHOSEN[:1]),
        "rejected": torch.tensor(REJECTED[:1]),
    }
    assert_step_is_as_expected(METHODS[method], "gpt2", None, inputs, num_pairs=1)


@pytest.mark.parametrize("max_grad_norm", [0.01, 1e9])
def test_weights_after_clipped_steps_are_those_of_adamw(max_grad_norm: float) -> None:
    method, (policy, ref) = METHODS["dpo"], make_models("plain")
    expected_policy = copy.deepcopy(policy)
    algorithm = DPO(policy, ref, **method.settings, learning_rate=1e-2, max_grad_norm=max_grad_norm, pad_token_id=PAD)
    optimizer = torch.optim.AdamW(expected_policy.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        expected = expected_step(method, expected_policy, ref)
        scale = min(1.0, max_grad_norm / expected.metrics["grad_norm"])
        for name, each in expected_policy.named_parameters():
            each.grad = expected.gradients[name] * scale
        optimizer.step()
        assert algorithm.train_step(**by_pad_id(left=False)) == pytest.approx(expected.metrics, rel=1e-5)
    for name, each in expected_policy.named_parameters():
        torch.testing.assert_close(policy.get_parameter(name), each, rtol=0, atol=1e-6)


def test_given_optimizer_takes_the_steps() -> None:
    method, (policy, ref) = METHODS["dpo"], make_models("plain")
    before, expected = copy.deepcopy(policy), expected_step(method, policy, ref)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    DPO(policy, ref, beta=0.3, max_grad_norm=1e9, pad_token_id=PAD, optimizer=optimizer).train_step(**by_pad_id(False))
    for name, each in before.named_parameters():
        moved = each.detach() - 0.1 * expected.gradients[name]
        torch.testing.assert_close(policy.get_parameter(name).detach(), moved, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_dpo_starts_at_log_two_and_at_chance(kind: str) -> None:
    policy, _ = make_models(kind)
    metrics = DPO(policy, copy.deepcopy(policy), beta=0.7, pad_token_id=PAD).train_step(**by_pad_id(left=False))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == metrics["chosen_reward"] == metrics["rejected_reward"] == 0


@pytest.mark.parametrize("make", [DPO, IPO])
def test_repeated_steps_learn_the_preference(make: Callable[..., PairAlgorithm]) -> None:
    policy, _ = make_models("plain")
    algorithm = make(policy, copy.deepcopy(policy), beta=0.1, learning_rate=1e-2, pad_token_id=PAD)
    history = [algorithm.train_step(**by_pad_id(left=False)) for _ in range(20)]
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["margin"] > 0


def test_scores_are_sums_over_the_completions() -> None:
    policy, ref = make_models("gpt2")
    logps = DPO(policy, ref, pad_token_id=PAD).score(**by_pad_id(left=True))
    for place in range(3):
        for model, chosen, rejected in (
            (policy, logps.policy_chosen_logps, logps.policy_rejected_logps),
            (ref, logps.ref_chosen_logps, logps.ref_rejected_logps),
        ):
            expected = log_prob(model, PROMPTS[place], CHOSEN[place]).item()
            assert chosen[place].item() == pytest.approx(expected, rel=1e-9)
            expected = log_prob(model, PROMPTS[place], REJECTED[place]).item()
            assert rejected[place].item() == pytest.approx(expected, rel=1e-9)
    assert logps.chosen_lengths.tolist() == [len(each) for each in CHOSEN]
    assert logps.rejected_lengths.tolist() == [len(each) for each in REJECTED]


def test_pad_id_between_two_tokens_is_a_token() -> None:
    policy, ref = make_models("plain")
    ids = {"prompt": torch.tensor([[PAD, 5, PAD, 9]]), "rejected": torch.tensor([[8, PAD]])}
    logps = DPO(policy, ref, pad_token_id=PAD).score(**ids, chosen=torch.tensor([[7, PAD, 8, PAD]]))
    assert logps.chosen_lengths.tolist() == [3]
    expected = log_prob(policy, [5, PAD, 9], [7, PAD, 8]).item()
    assert logps.policy_chosen_logps.item() == pytest.approx(expected, rel=1e-9)


def test_prompt_of_padding_alone_is_refused() -> None:
    policy, ref = make_models("plain")
    one = torch.tensor([[7]])
    with pytest.raises(ValueError, match="empty prompt"):
        DPO(policy, ref, pad_token_id=PAD).train_step(torch.tensor([[PAD, PAD]]), one, one)


def test_reference_that_is_the_policy_is_refused() -> None:
    policy, _ = make_models("plain")
    for make in (DPO, IPO):
        with pytest.raises(ValueError, match="deepcopy"):
            make(policy, policy)


def test_loss_that_needs_a_reference_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="'dpo' compares with a reference: give ref_model"):
        PairAlgorithm(make_models("plain")[0], None, DPOLoss())


def test_loss_without_a_reference_trains_the_policy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LOSSES", {})  # the loss that is made here registers itself

    class WithoutReference(base.PairLoss, name="without_reference"):
        """-log sigmoid of the difference of the two log-probabilities."""

        needs_reference = False

        def __call__(self, logps: PairLogps) -> Tensor:
            return -nn.functional.logsigmoid(logps.policy_chosen_logps - logps.policy_rejected_logps)

        def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
            return logps.policy_chosen_logps, logps.policy_rejected_logps

    policy, _ = make_models("plain")
    before = copy.deepcopy(policy)
    metrics = PairAlgorithm(policy, None, WithoutReference(), pad_token_id=PAD).train_step(**by_pad_id(left=False))
    chosen, rejected = (
        [log_prob(before, prompt, each).item() for prompt, each in zip(PROMPTS, completions, strict=True)]
        for completions in (CHOSEN, REJECTED)
    )
    losses = [math.log(1 + math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    assert metrics["chosen_reward"] == pytest.approx(sum(chosen) / 3, rel=1e-9)
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(bad: float) -> None:
    policy, ref = make_models("plain")
    algorithm = DPO(policy, ref, learning_rate=1e-2, pad_token_id=PAD)
    algorithm.train_step(**by_pad_id(left=False))
    before = {name: each.clone() for name, each in policy.state_dict().items()}
    state = copy.deepcopy(algorithm.optimizer.state_dict()["state"])
    hook = policy.head.register_forward_hook(lambda _, __, output: output * bad)
    with pytest.raises(FloatingPointError, match="not finite"):
        algorithm.train_step(**by_pad_id(left=False))
    hook.remove()
    assert all(torch.equal(each, before[name]) for name, each in policy.state_dict().items())
    for number, kept in algorithm.optimizer.state_dict()["state"].items():
        assert all(torch.equal(kept[name], state[number][name]) for name in kept)
    assert all(each.grad is None for each in policy.parameters())
    assert math.isfinite(algorithm.train_step(**by_pad_id(left=False))["loss"])


def test_frozen_parameters_stay() -> None:
    policy, ref = make_models("plain")
    policy.embedding.requires_grad_(False)
    before = copy.deepcopy(policy)
    DPO(policy, ref, learning_rate=1e-2, pad_token_id=PAD).train_step(**by_pad_id(left=False))
    assert torch.equal(policy.embedding.weight, before.embedding.weight)
    assert not torch.equal(policy.head.weight, before.head.weight)


def test_reference_is_set_to_evaluation_and_the_policy_keeps_its_mode() -> None:
    policy, ref = make_models("gpt2")
    policy.train()
    ref.train()
    algorithm = DPO(policy, ref, pad_token_id=PAD)
    algorithm.train_step(**by_pad_id(left=False))
    assert not any(part.training for part in ref.modules())
    assert all(part.training for part in policy.modules())

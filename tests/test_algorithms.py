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

from penchant.algorithms import DPO, IPO, KTO, ORPO, PairAlgorithm, SimPO, UnpairedAlgorithm
from penchant.losses import DPOLoss, KTOLoss, OffsetDPOLoss, SPPOLoss, base, build_loss
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

        reads = frozenset()

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


# Without a reference.


def per_token(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    return log_prob(model, prompt, completion) / len(completion)


def simpo(model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[Tensor, ...]:
    """Loss and both rewards of one pair, beta 2.5 and gamma 0.75."""
    rewards = [2.5 * per_token(model, prompt, each) for each in (chosen, rejected)]
    return torch.log(1 + torch.exp(-(rewards[0] - rewards[1] - 0.75))), *rewards


def orpo(
    model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int], on_prompt: bool = False
) -> tuple[Tensor, ...]:
    """Loss and both log-odds of one pair, lambda 0.5."""
    shares = [per_token(model, prompt, each).exp() for each in (chosen, rejected)]
    odds = [torch.log(p / (1 - p)) for p in shares]
    nll = -per_token(model, prompt, chosen)
    if on_prompt:  # of all tokens but the first, which nothing predicts
        nll = -per_token(model, prompt[:1], prompt[1:] + chosen)
    return nll + 0.5 * torch.log(1 + torch.exp(-(odds[0] - odds[1]))), *odds


def orpo_on_prompt(model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[Tensor, ...]:
    return orpo(model, prompt, chosen, rejected, on_prompt=True)


WITHOUT_REFERENCE = {
    "simpo": (SimPO, {"beta": 2.5, "gamma_beta_ratio": 0.3}, simpo),
    "orpo": (ORPO, {"odds_ratio_weight": 0.5}, orpo),
    "orpo on prompts": (ORPO, {"odds_ratio_weight": 0.5, "nll_on_prompt": True}, orpo_on_prompt),
}


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("given", ["right padded", "masks, left"])
def test_train_step_without_a_reference_is_the_formula(name: str, kind: str, given: str) -> None:
    make, settings, formula = WITHOUT_REFERENCE[name]
    policy, _ = make_models(kind)
    expected_policy = copy.deepcopy(policy)
    found = [formula(expected_policy, *rows) for rows in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    losses, chosen, rejected = (torch.stack(column) for column in zip(*found, strict=True))
    losses.mean().backward()
    gradients = {name: each.grad for name, each in expected_policy.named_parameters()}

    pad_token_id, inputs = INPUTS[given]
    algorithm = make(policy, **settings, max_grad_norm=1e9, pad_token_id=pad_token_id)
    metrics = algorithm.train_step(**inputs)
    assert metrics == pytest.approx(
        {
            "loss": losses.mean().item(),
            "chosen_reward": chosen.mean().item(),
            "rejected_reward": rejected.mean().item(),
            "accuracy": (chosen > rejected).double().mean().item(),
            "margin": (chosen - rejected).mean().item(),
            "grad_norm": math.sqrt(sum(each.pow(2).sum().item() for each in gradients.values())),
        },
        rel=1e-6,
    )
    for parameter_name, each in policy.named_parameters():
        torch.testing.assert_close(each.grad, gradients[parameter_name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [SimPO, ORPO])
def test_repeated_steps_without_a_reference_learn_the_preference(make: Callable[..., PairAlgorithm]) -> None:
    algorithm = make(make_models("plain")[0], learning_rate=1e-2, pad_token_id=PAD)
    history = [algorithm.train_step(**by_pad_id(left=False)) for _ in range(20)]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["accuracy"] == 1.0


# Losses that need more than sums.


@pytest.mark.parametrize("name", ["wpo", "ld-dpo", "aot", "bco-pair"])
def test_losses_over_tokens_or_over_the_whole_batch_see_what_they_need(name: str) -> None:
    """The weight of WPO, the cut of LD-DPO, the ranks of AOT and the shift of BCO, each from its definition."""
    policy, ref = make_models("plain")
    rows = list(zip(PROMPTS, CHOSEN, REJECTED, strict=True))

    def ratio(prompt: list[int], completion: list[int]) -> float:
        return (log_prob(policy, prompt, completion) - log_prob(ref, prompt, completion)).item()

    def log_weight(prompt: list[int], completion: list[int]) -> float:
        log_probs = torch.log_softmax(policy(torch.tensor([prompt + completion]))[0], -1)[len(prompt) - 1 : -1]
        chosen = log_probs[torch.arange(len(completion)), torch.tensor(completion)]
        return (chosen - log_probs.exp().square().sum(-1).log()).mean().item()

    ratios = [(ratio(prompt, chosen), ratio(prompt, rejected)) for prompt, chosen, rejected in rows]
    if name == "wpo":
        weights = [min(1.0, math.exp(log_weight(x, y) + log_weight(x, z))) for x, y, z in rows]
        assert min(weights) < 1
        losses = [w * math.log1p(math.exp(-0.01 * (c - r))) for w, (c, r) in zip(weights, ratios, strict=True)]
    elif name == "ld-dpo":
        halves = []
        for prompt, *sides in rows:
            shorter = min(map(len, sides))
            halves.append([(ratio(prompt, side) + ratio(prompt, side[:shorter])) / 2 for side in sides])
        losses = [math.log1p(math.exp(-0.1 * (c - r))) for c, r in halves]
    elif name == "aot":
        ours = sorted((log_prob(policy, x, y) - log_prob(policy, x, z)).item() for x, y, z in rows)
        theirs = sorted((log_prob(ref, x, y) - log_prob(ref, x, z)).item() for x, y, z in rows)
        losses = [math.log1p(math.exp(-0.1 * (one - other))) for one, other in zip(ours, theirs, strict=True)]
    else:
        shift = 0.1 * sum(map(sum, ratios)) / 6
        losses = [math.log1p(math.exp(shift - 0.1 * c)) + math.log1p(math.exp(0.1 * r - shift)) for c, r in ratios]
    metrics = PairAlgorithm(policy, ref, build_loss({"name": name}), pad_token_id=PAD).train_step(**by_pad_id(False))
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_loss_that_needs_a_column_of_the_data_is_refused() -> None:
    for loss, column in ((OffsetDPOLoss(), "margins"), (SPPOLoss(soft=True), "win_probabilities")):
        with pytest.raises(ValueError, match=f"needs {column}, which token tensors do not carry"):
            PairAlgorithm(*make_models("plain"), loss)


# Single completions.

LABELS = [True, False, True]


def singles(left: bool, labels: list[bool] = LABELS, masks: bool = False) -> dict[str, Tensor]:
    """The chosen completions of the pairs, each judged by itself."""
    given = by_masks(left) if masks else by_pad_id(left)
    renamed = {name.replace("chosen", "completion"): each for name, each in given.items() if "rejected" not in name}
    return {**renamed, "is_desirable": torch.tensor(labels)}


def kto(
    policy: nn.Module, ref: nn.Module, labels: list[bool], partners: tuple[int, ...] = (1, 2, 0)
) -> tuple[Tensor, list[Tensor], float]:
    """Losses and rewards by the formula, beta 0.3 and weights 1 and 1.5, with the estimate in them."""

    def ratio(prompt: list[int], completion: list[int]) -> Tensor:
        return log_prob(policy, prompt, completion) - log_prob(ref, prompt, completion).detach()

    mismatched = [ratio(prompt, CHOSEN[partner]).item() for prompt, partner in zip(PROMPTS, partners, strict=True)]
    estimate = max(0.0, sum(mismatched) / 3)
    ratios = [ratio(prompt, completion) for prompt, completion in zip(PROMPTS, CHOSEN, strict=True)]
    losses = [
        1 * (1 - torch.sigmoid(0.3 * (r - estimate))) if good else 1.5 * (1 - torch.sigmoid(0.3 * (estimate - r)))
        for r, good in zip(ratios, labels, strict=True)
    ]
    return torch.stack(losses), [0.3 * r.detach() for r in ratios], estimate


def mean_where(values: list[Tensor], labels: list[bool], wanted: bool) -> float:
    kept = [value.item() for value, label in zip(values, labels, strict=True) if label is wanted]
    return sum(kept) / len(kept) if kept else math.nan


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("labels", [LABELS, [False, False, True], [True] * 3, [False] * 3], ids=str)
@pytest.mark.parametrize(("left", "masks"), [(False, False), (True, False), (True, True)])
def test_kto_step_is_the_formula_with_the_next_prompts_completions(
    kind: str, labels: list[bool], left: bool, masks: bool
) -> None:
    policy, ref = make_models(kind)
    expected_policy = copy.deepcopy(policy)
    losses, rewards, _ = kto(expected_policy, ref, labels)
    losses.mean().backward()
    gradients = {name: each.grad for name, each in expected_policy.named_parameters()}
    algorithm = KTO(
        policy, ref, beta=0.3, undesirable_weight=1.5, max_grad_norm=1e9, pad_token_id=None if masks else PAD
    )
    metrics = algorithm.train_step(**singles(left, labels, masks))
    expected = {
        "loss": losses.mean().item(),
        "desirable_reward": mean_where(rewards, labels, True),
        "undesirable_reward": mean_where(rewards, labels, False),
        "grad_norm": math.sqrt(sum(each.pow(2).sum().item() for each in gradients.values())),
    }
    assert metrics == pytest.approx(expected, rel=1e-6, nan_ok=True)
    for name, each in policy.named_parameters():
        torch.testing.assert_close(each.grad, gradients[name], rtol=1e-6, atol=1e-9)


def test_the_estimate_of_kto_is_the_mean_where_it_is_above_zero_and_zero_below() -> None:
    policy, ref = make_models("plain")
    estimates = []
    for one, other in ((policy, ref), (ref, policy)):
        _, _, estimate = kto(one, other, LABELS)
        found = KTO(one, other, pad_token_id=PAD).score(**singles(left=False)).kl
        assert found.item() == pytest.approx(estimate, rel=1e-9)
        assert not found.requires_grad
        estimates.append(estimate)
    assert min(estimates) == 0 < max(estimates)


def test_kto_starts_at_one_half_and_learns() -> None:
    policy, _ = make_models("plain")
    algorithm = KTO(policy, copy.deepcopy(policy), learning_rate=1e-2, pad_token_id=PAD)
    history = [algorithm.train_step(**singles(left=False)) for _ in range(20)]
    assert history[0]["loss"] == pytest.approx(0.5, abs=1e-12)
    assert history[-1]["loss"] < 0.45
    assert history[-1]["desirable_reward"] > 0 > history[-1]["undesirable_reward"]


def test_kto_finds_the_next_prompt_that_is_another_one() -> None:
    policy, ref = make_models("plain")
    prompts, completions = [[5, 9], [5, 9], [11, 3]], [[7, 60], [4, 4], [6, 2]]
    ratios = [
        (log_prob(policy, prompt, completions[k]) - log_prob(ref, prompt, completions[k])).item()
        for prompt, k in zip(prompts, (2, 2, 0), strict=True)
    ]
    ids = {"prompt": torch.tensor(prompts), "completion": torch.tensor(completions)}
    found = KTO(policy, ref).score(**ids, is_desirable=torch.tensor(LABELS)).kl
    assert found.item() == pytest.approx(max(0.0, sum(ratios) / 3), rel=1e-9)


@pytest.mark.parametrize("prompts", [[[5, 9]], [[5, 9], [5, 9]]])
def test_kto_with_one_prompt_is_refused(prompts: list[list[int]]) -> None:
    completions = [[7, 60], [4, 4]][: len(prompts)]
    labels = torch.tensor([True, False][: len(prompts)])
    with pytest.raises(ValueError, match="one prompt only"):
        KTO(*make_models("plain")).train_step(torch.tensor(prompts), torch.tensor(completions), labels)


@pytest.mark.parametrize("name", ["bco", "apo-zero-unpaired", "aot-unpaired"])
def test_any_loss_over_single_completions_trains(name: str) -> None:
    policy, ref = make_models("plain")
    rows = zip(PROMPTS, CHOSEN, strict=True)
    rewards = [0.1 * (log_prob(policy, *row) - log_prob(ref, *row)).item() for row in rows]
    first, bad, last = rewards
    if name == "bco":
        shift = ((first + last) / 2 + bad) / 2
        losses = [math.log1p(math.exp(s)) for s in (shift - first, bad - shift, shift - last)]
    elif name == "apo-zero-unpaired":
        losses = [1 / (1 + math.exp(s)) for s in (first, -bad, last)]
    else:  # half the mass of the undesirable one is held against each of the two others
        losses = [1.5 * math.log1p(math.exp(bad - reward)) for reward in (first, last)]
    metrics = UnpairedAlgorithm(policy, ref, build_loss({"name": name}), pad_token_id=PAD).train_step(**singles(False))
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert metrics["desirable_reward"] == pytest.approx((first + last) / 2, rel=1e-6)
    assert metrics["undesirable_reward"] == pytest.approx(bad, rel=1e-6)


def test_scores_of_single_completions_are_their_sums() -> None:
    policy, ref = make_models("gpt2")
    logps = KTO(policy, ref, pad_token_id=PAD).score(**singles(left=True))
    for place, (prompt, completion) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        assert logps.policy_logps[place].item() == pytest.approx(log_prob(policy, prompt, completion).item(), rel=1e-9)
        assert logps.ref_logps[place].item() == pytest.approx(log_prob(ref, prompt, completion).item(), rel=1e-9)
    assert logps.lengths.tolist() == [len(each) for each in CHOSEN]
    assert logps.is_desirable.tolist() == LABELS


def test_a_loss_that_judges_something_else_is_refused(tiny_model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'kto' takes unpaired, not pair"):
        PairAlgorithm(tiny_model, copy.deepcopy(tiny_model), KTOLoss())
    with pytest.raises(ValueError, match="'dpo' takes pair, not unpaired"):
        UnpairedAlgorithm(tiny_model, copy.deepcopy(tiny_model), DPOLoss())

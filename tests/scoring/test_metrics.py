"""What is reported of a batch: against counts by brute force, and the same however the batch was cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from penchant.layouts import padded
from penchant.losses import Loss, build_loss
from penchant.scoring.metrics import Means, observe
from penchant.scoring.records import logps_for
from penchant.types import Batch, TokenizedExample, TokenLogps

from .samples import ragged


def seen(
    loss: Loss,
    examples: Sequence[TokenizedExample],
    policy: TokenLogps,
    ref: torch.Tensor | None,
    means: Means | None = None,
    with_prompts: bool = False,
) -> tuple[dict[str, float | None], list[float]]:
    """The means after observing these examples, and what `observe` gives back."""
    means = means or Means()
    batch = padded.collate(examples, with_prompts)
    logps = logps_for(loss, batch, policy, ref, torch.zeros(()).double())
    rewards = observe(means, loss, batch, logps, loss(logps), policy, ref)
    return means.means(), rewards.tolist()


def with_rewards(rewards: Sequence[Sequence[float]], labels: Sequence[bool | None] = ()) -> tuple[Any, ...]:
    """Examples of one-token completions, and values that make their log-ratios the given numbers."""
    examples = [
        TokenizedExample([5, 6], tuple([7 + k] for k in range(len(own))), place, is_desirable=label)
        for place, (own, label) in enumerate(zip(rewards, labels or [None] * len(rewards), strict=True))
    ]
    flat = torch.tensor([reward for own in rewards for reward in own], dtype=torch.float64)
    return examples, TokenLogps(flat - 20), torch.full_like(flat, -20)


def wins(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


UNPAIRED = build_loss({"name": "apo-zero-unpaired", "beta": 1.0})
RANKED = build_loss({"name": "pl-dpo", "beta": 1.0})
PAIRED = build_loss({"name": "dpo", "beta": 1.0})


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 5])
def test_accuracy_of_single_completions_is_the_share_of_couples_in_the_right_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (9,), generator=generator).tolist()  # few values, so that many are equal
    labels = (torch.rand(9, generator=generator) < 0.4).tolist()
    good = [reward for reward, label in zip(rewards, labels, strict=True) if label]
    bad = [reward for reward, label in zip(rewards, labels, strict=True) if not label]
    assert set(good) & set(bad), "no ties"
    metrics, found = seen(UNPAIRED, *with_rewards([[reward] for reward in rewards], labels))
    assert found == rewards
    couples = [wins(one, other) for one in good for other in bad]
    assert metrics["rewards/accuracies"] == pytest.approx(sum(couples) / len(couples))
    assert metrics["rewards/chosen"] == pytest.approx(sum(good) / len(good))
    assert metrics["rewards/rejected"] == pytest.approx(sum(bad) / len(bad))
    assert metrics["rewards/margins"] == pytest.approx(sum(good) / len(good) - sum(bad) / len(bad))


@pytest.mark.parametrize("label", [True, False, None])
def test_completions_of_one_class_have_no_accuracy_and_no_margin(label: bool | None) -> None:
    metrics, _ = seen(UNPAIRED, *with_rewards([[1.0], [2.0]], [label, label]))
    side, other = ("rejected", "chosen") if label is False else ("chosen", "rejected")
    assert metrics[f"rewards/{side}"] == 1.5
    assert metrics[f"logps/{side}"] == -18.5
    assert metrics[f"length/{side}"] == 1.0
    assert not {f"rewards/{other}", f"logps/{other}", "rewards/accuracies", "rewards/margins"} & set(metrics)


def test_accuracy_of_rankings_is_the_mean_share_of_couples_in_the_right_order() -> None:
    rewards = [[3.0, 1.0, 2.0, 2.0], [0.0, 1.0], [5.0, 4.0, 3.0], [1.0, 1.0, 1.0]]
    metrics, found = seen(RANKED, *with_rewards(rewards))
    assert found == [reward for own in rewards for reward in own]
    shares = [[wins(own[i], own[j]) for i, j in combinations(range(len(own)), 2)] for own in rewards]
    assert shares[0] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    assert metrics["rewards/accuracies"] == pytest.approx(sum(sum(each) / len(each) for each in shares) / 4)
    assert metrics["rewards/chosen"] == pytest.approx((3 + 0 + 5 + 1) / 4)
    assert metrics["rewards/rejected"] == pytest.approx((2 + 1 + 3 + 1) / 4)
    assert metrics["rewards/margins"] == pytest.approx((1 - 1 + 2 + 0) / 4)


@pytest.mark.parametrize("loss", [PAIRED, RANKED], ids=lambda loss: loss.name)
def test_accuracy_of_pairs_counts_ties_half(loss: Loss) -> None:
    metrics, _ = seen(loss, *with_rewards([[2.0, 1.0], [1.0, 1.0], [0.0, 3.0], [1.0, 0.0]]))
    assert metrics["rewards/accuracies"] == (1 + 0.5 + 0 + 1) / 4
    assert metrics["rewards/margins"] == (1 + 0 - 3 + 1) / 4


def test_pairs_under_a_loss_over_single_completions_are_compared_as_pairs() -> None:
    # Only within a pair: the rejected completion of the second one beats the chosen ones of the others.
    metrics, found = seen(UNPAIRED, *with_rewards([[1.0, 0.0], [9.0, 8.0], [5.0, 6.0]]))
    assert found == [1.0, 0.0, 9.0, 8.0, 5.0, 6.0]
    assert metrics["rewards/accuracies"] == pytest.approx(2 / 3)
    losses = [1 / (1 + math.exp(-reward if place % 2 else reward)) for place, reward in enumerate(found)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 6)


def random_scores(batch: Batch, seed: int = 0) -> tuple[TokenLogps, torch.Tensor]:
    """Values for every token that depend on its id alone, so that they follow it into other batches."""
    generator = torch.Generator().manual_seed(seed)
    table = -1 - torch.rand(4, 96, generator=generator, dtype=torch.float64)
    policy, entropies, collisions, ref = table[:, batch.target_ids]
    return TokenLogps(policy, entropies, collisions), ref


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"name": "dpo"}, "pair"),
        ({"name": "orpo", "nll_on_prompt": True}, "pair"),
        ({"name": "aot"}, "pair"),
        ({"name": "kto"}, "pair"),
        ({"name": "kto"}, "unpaired"),
        ({"name": "bco"}, "unpaired"),
        ({"name": "sft"}, "unlabelled"),
        ({"name": "pl-dpo"}, "ranking"),
    ],
    ids=str,
)
def test_what_is_seen_depends_neither_on_the_cut_nor_on_the_order(settings: dict[str, Any], kind: str) -> None:
    loss, examples = build_loss(settings), ragged(kind)
    with_prompts = "prompts" in loss.needs
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        for sizes in ([6], [1, 3, 2]):
            some, parts = [examples[place] for place in order], []
            for size in sizes:
                parts.append(padded.collate([some.pop(0) for _ in range(size)], with_prompts))
            whole = Batch.join(parts)
            policy, ref = random_scores(whole)
            logps = logps_for(loss, whole, policy, ref, torch.tensor(0.1).double())
            means = Means()
            rewards = iter(observe(means, loss, whole, logps, loss(logps), policy, ref).tolist())
            by_index = {e.index: [next(rewards) for _ in e.completion_ids] for e in whole.examples}
            found.append((means.means(), by_index))
    for metrics, by_index in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-9)
        for index, rewards_of_example in found[0][1].items():
            assert by_index[index] == pytest.approx(rewards_of_example, rel=1e-9)


@pytest.mark.parametrize("kind", ["pair", "ranking"])
def test_means_over_batches_are_those_over_all_their_examples(kind: str) -> None:
    loss, examples = (PAIRED if kind == "pair" else RANKED), ragged(kind)
    means = Means()
    for part in (examples[:1], examples[1:4], examples[4:]):
        policy, ref = random_scores(padded.collate(part))
        in_parts, _ = seen(loss, part, policy, ref, means)
    policy, ref = random_scores(padded.collate(examples))
    assert in_parts == pytest.approx(seen(loss, examples, policy, ref)[0], rel=1e-9)


def test_loss_is_the_mean_by_weight_and_the_rest_is_not() -> None:
    examples = ragged("pair")
    policy, ref = random_scores(padded.collate(examples))
    metrics, rewards = seen(PAIRED, examples, policy, ref)
    margins = [one - other for one, other in zip(rewards[::2], rewards[1::2], strict=True)]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    weights = [example.weight for example in examples]
    assert metrics["loss"] == pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
    assert metrics["loss"] != pytest.approx(sum(losses) / 6, rel=1e-3)
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 6)


@pytest.mark.parametrize(
    ("kind", "with_prompts"), [("pair", False), ("pair", True), ("unpaired", False), ("ranking", False)]
)
def test_entropy_and_kl_are_means_over_the_tokens_of_completions_alone(kind: str, with_prompts: bool) -> None:
    loss = {"pair": PAIRED, "unpaired": UNPAIRED, "ranking": RANKED}[kind]
    examples = ragged(kind)
    batch = padded.collate(examples, with_prompts)
    policy, ref = random_scores(batch)
    of_completions = batch.is_completion[batch.sequence_ids]
    ref = ref.masked_fill(~of_completions, torch.nan)
    metrics, _ = seen(loss, examples, policy, ref, with_prompts=with_prompts)
    tokens = [token for example in examples for ids in example.completion_ids for token in ids]
    plain = padded.collate(examples)
    assert plain.target_ids.tolist() == tokens
    plain_policy, plain_ref = random_scores(plain)
    ratios = (plain_policy.logps - plain_ref).tolist()
    assert metrics["kl"] == pytest.approx(sum(ratio**2 / 2 for ratio in ratios) / len(tokens))
    assert metrics["entropy"] == pytest.approx(sum(plain_policy.entropies.tolist()) / len(tokens))


def test_saturated_pairs_are_those_with_a_weight_below_a_hundredth() -> None:
    edge = math.log(99)  # sigmoid(-log 99) = 1/100
    metrics, _ = seen(PAIRED, *with_rewards([[edge + 0.01, 0.0], [edge - 0.01, 0.0], [-9.0, 0.0], [9.0, 0.0]]))
    assert metrics["rewards/saturated"] == 2 / 4
    assert 1 / (1 + math.exp(edge)) == pytest.approx(0.01)


def test_the_ranking_accuracy_of_the_policy_counts_ties_half() -> None:
    examples, _, _ = with_rewards([[0.0, 0.0]] * 4)
    policy = TokenLogps(torch.tensor([-1.0, -2.0, -2.0, -1.0, -3.0, -3.0, -5.0, -6.0]).double())
    metrics, _ = seen(PAIRED, examples, policy, policy.logps)
    assert metrics["logps/accuracies"] == (1 + 0 + 0.5 + 1) / 4
    assert metrics["rewards/accuracies"] == 0.5


def test_the_correlation_with_length_is_pearsons_over_all_pairs_of_all_batches() -> None:
    examples = ragged("pair")
    means, margins, differences = Means(), [], []
    for part in (examples[:2], examples[2:]):
        policy, ref = random_scores(padded.collate(part))
        _, rewards = seen(PAIRED, part, policy, ref, means)
        margins += [one - other for one, other in zip(rewards[::2], rewards[1::2], strict=True)]
        differences += [len(example.completion_ids[0]) - len(example.completion_ids[1]) for example in part]
    expected = float(np.corrcoef(margins, differences)[0, 1])
    assert means.means()["length/correlation"] == pytest.approx(expected, rel=1e-9)
    again = Means.from_json(means.to_json())
    assert again.means() == means.means()
    again.include(Means())
    assert again.to_json() == means.to_json()


def test_where_lengths_or_margins_do_not_differ_there_is_no_correlation() -> None:
    assert "length/correlation" not in seen(PAIRED, *with_rewards([[2.0, 1.0], [3.0, 1.0]]))[0]


def test_ktos_estimate_is_told() -> None:
    examples = ragged("unpaired")
    batch = padded.collate(examples)
    policy, ref = random_scores(batch)
    loss, means = build_loss({"name": "kto"}), Means()
    logps = logps_for(loss, batch, policy, ref, torch.tensor(0.25).double())
    observe(means, loss, batch, logps, loss(logps), policy, ref)
    assert means.means()["kl_mismatched"] == 0.25


def test_lengths_and_logps_speak_of_first_and_last() -> None:
    examples = [
        TokenizedExample([5], ([1, 2], [3], [4, 5, 6]), 0),
        TokenizedExample([6, 7], ([8], [9, 10]), 1),
    ]
    policy = TokenLogps(torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, -8, -9]).double())
    metrics, _ = seen(RANKED, examples, policy, torch.zeros(9).double())
    assert metrics["length/chosen"] == (2 + 1) / 2
    assert metrics["length/rejected"] == (3 + 2) / 2
    assert metrics["logps/chosen"] == (-3 - 7) / 2
    assert metrics["logps/rejected"] == (-15 - 17) / 2
    assert "entropy" not in metrics


def test_without_a_reference_there_is_no_kl() -> None:
    examples = ragged("pair")
    policy, _ = random_scores(padded.collate(examples))
    assert "kl" not in seen(build_loss({"name": "simpo"}), examples, policy, None)[0]


def test_means_weigh_by_count_or_weight_and_know_no_nan() -> None:
    means = Means()
    means.add("plain", torch.tensor([1.0, 2.0]))
    means.add("plain", torch.tensor([6.0]))
    means.add("weighted", torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    means.add("weighted", torch.tensor([10.0]), torch.tensor([4.0]))
    means.add("empty", torch.tensor([]))
    means.add("broken", torch.tensor([1.0, math.nan]))
    means.add("endless", torch.tensor([1.0, math.inf]))
    assert means.means() == {"plain": 3.0, "weighted": (3 + 2 + 40) / 8, "broken": None, "endless": None}

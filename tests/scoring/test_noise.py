"""The noise of margins: what it is made of, that it is what bf16 does, and when it is not measured."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penchant.scoring import noise
from penchant.scoring.layout import PADDED, choose_layout
from penchant.scoring.noise import margin_noise
from penchant.scoring.policy import Policy
from penchant.types import Batch, TokenizedExample, TokenLogps

from ..training.test_run import single_rows, train
from .samples import ragged


def tokens(number: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs(number: int) -> list[TokenizedExample]:
    return [TokenizedExample(tokens(20, i), (tokens(30, 50 + i), tokens(40, 100 + i)), i) for i in range(number)]


def off_by_a_quarter(policy: Policy, batch: Batch) -> TokenLogps:
    """Stands in for a model: under bf16 every token's log-probability is 1/4 too high."""
    return TokenLogps(torch.full((len(batch.target_ids),), -1.0 if policy.precision == "float32" else -0.75))


@pytest.mark.parametrize(
    ("kind", "tokens_more"),
    [("pair", [-2, 7, -5, 0, 6, -6]), ("unpaired", [3, 9, 1, 4, 7, 2]), ("ranking", [2, 7, -1, 0, 4, -3])],
)
def test_it_is_the_root_mean_square_of_first_less_last_completion(
    kind: str, tokens_more: list[int], tiny_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "token_logps", off_by_a_quarter)
    expected = math.sqrt(sum((0.25 * number) ** 2 for number in tokens_more) / 6)
    assert margin_noise(Policy(tiny_model, None, "bf16"), PADDED, ragged(kind)) == pytest.approx(expected, rel=1e-12)


def test_long_examples_are_cut_and_many_are_not_all_tried(
    tiny_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TokenizedExample] = []

    def looked_at(policy: Policy, batch: Batch) -> TokenLogps:
        seen.extend(batch.examples)
        return off_by_a_quarter(policy, batch)

    monkeypatch.setattr(Policy, "token_logps", looked_at)
    long = [TokenizedExample(tokens(200, i), (tokens(100, i), tokens(10, i)), i) for i in range(50)]
    assert margin_noise(Policy(tiny_model, None, "bf16"), PADDED, long) == pytest.approx(0.25 * (64 - 10))
    assert {example.index for example in seen} == set(range(0, 48, 6))
    assert seen[1].prompt_ids == long[6].prompt_ids[-64:]
    assert [*map(list, seen[1].completion_ids)] == [long[6].completion_ids[0][:64], long[6].completion_ids[1]]


@pytest.mark.parametrize("wanted", ["padded", "prefix_shared"])
def test_it_is_what_bf16_does_to_margins(wanted: str, tiny_model: nn.Module) -> None:
    """Held against pairs scored one by one; the rounding itself differs from batch to batch."""
    policy, examples = Policy(tiny_model, None, "bf16"), pairs(8)
    found = margin_noise(policy, choose_layout(policy, wanted, examples), examples)
    differences = []
    with torch.no_grad():
        for example in examples:
            sums = []
            for precision in ("bf16", "float32"):
                batch = PADDED.collate([example])
                scored = Policy(tiny_model, None, precision).token_logps(batch)  # type: ignore[arg-type]
                sums.append(batch.sum_by_sequence(scored.logps.double()))
            differences.append((sums[0] - sums[1]) @ torch.tensor([1.0, -1.0], dtype=torch.float64))
    expected = torch.stack(differences).square().mean().sqrt().item()
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=0.6)


def test_there_is_none_in_float32(tiny_model: nn.Module) -> None:
    assert margin_noise(Policy(tiny_model, None), PADDED, pairs(4)) == 0.0


def test_a_large_model_is_tried_on_fewer_examples_and_a_very_large_one_on_none(
    tiny_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, examples = Policy(tiny_model, None, "bf16"), pairs(8)
    flops_of_one = 2 * sum(parameter.numel() for parameter in tiny_model.parameters()) * PADDED.cost(examples[:1])
    seen: list[int] = []

    def counted(policy: Policy, batch: Batch) -> TokenLogps:
        seen.append(len(batch.examples))
        return off_by_a_quarter(policy, batch)

    monkeypatch.setattr(Policy, "token_logps", counted)
    monkeypatch.setattr(noise, "_MOST_FLOPS", {"cpu": 3.5 * flops_of_one})
    assert margin_noise(policy, PADDED, examples) == pytest.approx(0.25 * 10)
    assert seen == [3, 3]
    monkeypatch.setattr(noise, "_MOST_FLOPS", {"cpu": 1.5 * flops_of_one})
    assert margin_noise(policy, PADDED, examples) is None
    assert margin_noise(policy, PADDED, examples[:1]) == pytest.approx(0.25 * 10)


def test_bare_prompts_have_no_margins(tiny_model: nn.Module) -> None:
    bare = [TokenizedExample(tokens(5, i), (), i) for i in range(4)]
    assert margin_noise(Policy(tiny_model, None, "bf16"), PADDED, bare) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bf16"}, r"arithmetic bf16 products over float32 weights: margins are good to about 0\.\d+ nats"),
        ({"dtype": "bf16", "method": "kto", "data": single_rows()}, "log-probabilities are good to about"),
        ({"dtype": "float32"}, None),
    ],
)
def test_a_run_says_so_in_its_first_lines(
    settings: dict[str, Any],
    said: str | None,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(model_folder, tmp_path, quiet=False, max_steps=1, **settings)
    shown = " ".join("".join(capsys.readouterr()).split())
    assert (re.search(said, shown) is not None) if said else "good to about" not in shown

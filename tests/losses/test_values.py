"""Every loss against values.json, which make_values.py makes from the papers' equations without this package."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from penchant.losses import LOSSES, Loss, build_loss
from penchant.types import Logps, PairLogps, PairTokens, RankedLogps, RolloutLogps, SequenceLogps

FOLDER = Path(__file__).parent
VALUES = json.loads((FOLDER / "values.json").read_text())
ROWS = [pytest.param(*row, id=f"{row[0]} {row[1]} {row[2]}") for row in VALUES["rows"]]


def padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
    """Ragged rows as one tensor, 0 behind the end of each."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def as_logps(batch: dict[str, Any], dtype: torch.dtype) -> Logps:
    """One of the inputs of values.json as what a loss consumes."""

    def column(name: str) -> Tensor | None:
        return torch.tensor(batch[name], dtype=dtype) if name in batch else None

    if "advantages" in batch:
        lengths = torch.tensor(batch["lengths"])
        return RolloutLogps(
            column("policy_now"),
            column("old"),
            column("ref_now"),
            column("advantages"),
            torch.arange(len(lengths)).repeat_interleave(lengths),
            lengths,
            column("values"),
            column("old_values"),
            column("returns"),
        )
    if "is_desirable" in batch:
        return SequenceLogps(
            column("policy"),
            column("ref"),
            torch.tensor(batch["lengths"]),
            torch.tensor(batch["is_desirable"]),
            kl=column("kl"),
            tokens_per_example=batch.get("tokens_per_example"),
        )
    if "policy" in batch:
        lengths = padded(batch["lengths"], torch.long)
        return RankedLogps(padded(batch["policy"], dtype), padded(batch["ref"], dtype), lengths, lengths > 0)
    tokens = None
    if "policy_chosen_tokens" in batch:
        names = [f"{model}_{side}_tokens" for model in ("policy", "ref") for side in ("chosen", "rejected")]
        names += ["chosen_log_collisions", "rejected_log_collisions"]
        tokens = PairTokens(*(padded(batch[name], dtype) for name in names))
    return PairLogps(
        *(column(f"{model}_{side}") for model in ("policy", "ref") for side in ("chosen", "rejected")),
        torch.tensor(batch["chosen_lengths"]),
        torch.tensor(batch["rejected_lengths"]),
        margins=column("margins"),
        win_probabilities=column("win_probabilities"),
        policy_prompt_logps=column("policy_prompt"),
        prompt_lengths=torch.tensor(batch["prompt_lengths"]) if "prompt_lengths" in batch else None,
        tokens_per_example=batch.get("tokens_per_example"),
        tokens=tokens,
    )


def as_tensor(values: list[Any]) -> Tensor:
    """Values as the rewards of a loss have them, ragged ones padded."""
    if values and isinstance(values[0], list) and len({len(row) for row in values}) > 1:
        return padded(values, torch.float64)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("name", "settings", "inputs", "losses", "rewards"), ROWS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_loss_and_rewards_are_those_of_the_papers_equation(
    name: str, settings: dict, inputs: str, losses: list, rewards: list, dtype: torch.dtype, rtol: float
) -> None:
    loss = build_loss({"name": name, **settings})
    logps = as_logps(VALUES["inputs"][inputs], dtype)
    close = {"rtol": rtol, "atol": 1e-30}
    torch.testing.assert_close(loss(logps).double(), as_tensor(losses), **close)
    given = loss.rewards(logps)
    given = torch.stack(given) if isinstance(given, tuple) else given
    torch.testing.assert_close(given.double(), as_tensor(rewards), **close)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_has_values_for_several_settings_of_every_field(loss: type[Loss]) -> None:
    settings = [row[1] for row in VALUES["rows"] if row[0] == loss.name]
    assert settings, f"{loss.name} has no row in values.json: give make_values.py its equation"
    for field in dataclasses.fields(loss):
        assert len({str(each[field.name]) for each in settings}) > 1, field.name


def test_the_generator_still_makes_this_file() -> None:
    spec = importlib.util.spec_from_file_location("make_values", FOLDER / "make_values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.as_json(module.make_values()) == (FOLDER / "values.json").read_text()

"""The padded layout: every completion can be read back, and what fills rows up is never seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from penchant.layouts.padded import collate, cost
from penchant.models.logps import token_logps
from penchant.types import TokenizedExample

PAIRS = [
    TokenizedExample([5, 9, 2, 31], ([7, 60, 8], [7, 12]), index=40),
    TokenizedExample([11], ([4, 4, 12, 30, 2, 1, 59], [3]), index=7),
    TokenizedExample((17, 18, 50), ((6,), (13, 1, 8, 9, 2)), index=8),
]
SINGLES = [
    TokenizedExample([5, 9, 2, 31], ([7, 60, 8],), index=0),
    TokenizedExample([11], ([],), index=1),
    TokenizedExample([17, 18], ([6, 13, 1, 8, 9],), index=2),
]
RAGGED = [PAIRS[1], SINGLES[0], TokenizedExample([3, 4], ([5], [6, 7, 8, 9, 10], [11, 12]), index=3)]


def test_completions_of_an_example_stand_together_in_the_order_of_the_examples() -> None:
    batch = collate(PAIRS)
    assert batch.examples == tuple(PAIRS)
    assert batch.lengths.tolist() == [3, 2, 7, 1, 1, 5]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 5]
    assert batch.target_ids.tolist() == [7, 60, 8, 7, 12, 4, 4, 12, 30, 2, 1, 59, 3, 6, 13, 1, 8, 9, 2]


def test_prompts_stand_behind_their_completions_without_their_first_token() -> None:
    batch = collate(PAIRS, with_prompts=True)
    assert batch.lengths.tolist() == [3, 2, 3, 7, 1, 0, 1, 5, 2]
    targets = [7, 60, 8, 7, 12, 9, 2, 31, 4, 4, 12, 30, 2, 1, 59, 3, 6, 13, 1, 8, 9, 2, 18, 50]
    assert batch.target_ids.tolist() == targets
    assert batch.is_completion.tolist() == [True, True, False] * 3
    assert batch.model_inputs["input_ids"].tolist() == collate(PAIRS).model_inputs["input_ids"].tolist()


def test_each_row_is_a_prompt_with_its_completion_behind() -> None:
    batch = collate(PAIRS)
    rows = batch.model_inputs["input_ids"]
    sequences = [[*pair.prompt_ids, *completion] for pair in PAIRS for completion in pair.completion_ids]
    assert rows.shape == (6, 8)
    for row, sequence in zip(rows.tolist(), sequences, strict=True):
        assert row[: len(sequence)] == sequence


@pytest.mark.parametrize("examples", [PAIRS, SINGLES, RAGGED], ids=["pairs", "singles", "ragged"])
def test_each_completion_token_stands_right_behind_the_row_that_predicts_it(examples: list[TokenizedExample]) -> None:
    batch = collate(examples)
    input_ids = batch.model_inputs["input_ids"]
    flat, width = input_ids.flatten(), input_ids.shape[1]
    assert torch.equal(flat[batch.hidden_rows + 1], batch.target_ids)
    assert torch.equal(batch.hidden_rows // width, batch.sequence_ids)
    assert torch.equal((batch.hidden_rows + 1) // width, batch.sequence_ids)


def test_prompt_tokens_are_no_targets() -> None:
    batch = collate(SINGLES)
    assert batch.hidden_rows.tolist() == [3, 4, 5, 2 * 7 + 1, 2 * 7 + 2, 2 * 7 + 3, 2 * 7 + 4, 2 * 7 + 5]
    assert batch.lengths.tolist() == [3, 0, 5]


def test_sums_by_sequence_add_up_each_completion_and_leave_an_empty_one_at_zero() -> None:
    batch = collate(SINGLES)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], requires_grad=True)
    sums = batch.sum_by_sequence(values)
    assert sums.tolist() == [7.0, 0.0, 248.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1.0] * 3 + [100.0] * 5


@pytest.mark.parametrize("with_prompts", [False, True])
def test_what_fills_rows_up_changes_nothing(with_prompts: bool, tiny_model: nn.Module) -> None:
    batch = collate(RAGGED, with_prompts)
    input_ids = batch.model_inputs["input_ids"]
    lengths = [len(example.prompt_ids) + len(ids) for example in RAGGED for ids in example.completion_ids]
    is_filling = torch.arange(input_ids.shape[1]) >= torch.tensor(lengths)[:, None]
    assert is_filling.any()
    refilled = replace(batch, model_inputs={"input_ids": input_ids.masked_fill(is_filling, 299)})
    assert torch.equal(token_logps(tiny_model, refilled).logps, token_logps(tiny_model, batch).logps)


def test_company_changes_nothing(tiny_model: nn.Module) -> None:
    model = tiny_model.double()
    together = collate(PAIRS)
    sums = together.sum_by_sequence(token_logps(model, together).logps).view(-1, 2)
    for place, pair in enumerate(PAIRS):
        alone = collate([pair])
        # Norms compute in float32 whatever the weights are, so the last bits depend on the company.
        found = alone.sum_by_sequence(token_logps(model, alone).logps)
        torch.testing.assert_close(found, sums[place], rtol=0, atol=1e-4)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        collate([*PAIRS, TokenizedExample([], ([3], [4]), index=9)])


@pytest.mark.parametrize("examples", [PAIRS, PAIRS[:1], PAIRS[1:], PAIRS[2:], SINGLES, RAGGED], ids=len)
def test_cost_is_the_number_of_input_ids(examples: list[TokenizedExample]) -> None:
    assert cost(examples) == collate(examples).model_inputs["input_ids"].numel()

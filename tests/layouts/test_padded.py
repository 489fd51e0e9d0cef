"""The padded layout: every completion can be read back, and what fills rows up is never seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from penchant.layouts.padded import collate, collate_sequences, cost
from penchant.models.logps import token_logps
from penchant.types import TokenizedPair

PAIRS = [
    TokenizedPair([5, 9, 2, 31], [7, 60, 8], [7, 12], index=40),
    TokenizedPair([11], [4, 4, 12, 30, 2, 1, 59], [3], index=7),
    TokenizedPair((17, 18, 50), (6,), (13, 1, 8, 9, 2), index=8),
]
SEQUENCES = [([5, 9, 2, 31], [7, 60, 8]), ([11], []), ([17, 18], [6, 13, 1, 8, 9])]


def test_chosen_come_first_then_rejected_each_in_the_order_of_the_pairs() -> None:
    batch = collate(PAIRS)
    completions = [pair.chosen_ids for pair in PAIRS] + [pair.rejected_ids for pair in PAIRS]
    assert batch.indices == (40, 7, 8)
    assert batch.lengths.tolist() == [3, 7, 1, 2, 1, 5]
    assert batch.sequence_ids.tolist() == [number for number, ids in enumerate(completions) for _ in ids]
    assert batch.target_ids.tolist() == [token for ids in completions for token in ids]


def test_each_row_is_a_prompt_with_its_completion_behind() -> None:
    batch = collate(PAIRS)
    rows = batch.model_inputs["input_ids"]
    sequences = [[*pair.prompt_ids, *pair.chosen_ids] for pair in PAIRS]
    sequences += [[*pair.prompt_ids, *pair.rejected_ids] for pair in PAIRS]
    assert rows.shape == (6, 8)
    for row, sequence in zip(rows.tolist(), sequences, strict=True):
        assert row[: len(sequence)] == sequence


def test_each_completion_token_stands_right_behind_the_row_that_predicts_it() -> None:
    for batch in (collate(PAIRS), collate_sequences(SEQUENCES)):
        input_ids = batch.model_inputs["input_ids"]
        flat, width = input_ids.flatten(), input_ids.shape[1]
        assert torch.equal(flat[batch.hidden_rows + 1], batch.target_ids)
        assert torch.equal(batch.hidden_rows // width, batch.sequence_ids)
        assert torch.equal((batch.hidden_rows + 1) // width, batch.sequence_ids)


def test_prompt_tokens_are_no_targets() -> None:
    batch = collate_sequences(SEQUENCES)
    assert batch.hidden_rows.tolist() == [3, 4, 5, 2 * 7 + 1, 2 * 7 + 2, 2 * 7 + 3, 2 * 7 + 4, 2 * 7 + 5]
    assert batch.lengths.tolist() == [3, 0, 5]


def test_sums_by_sequence_add_up_each_completion_and_leave_an_empty_one_at_zero() -> None:
    batch = collate_sequences(SEQUENCES)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], requires_grad=True)
    sums = batch.sum_by_sequence(values)
    assert sums.tolist() == [7.0, 0.0, 248.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1.0] * 3 + [100.0] * 5


def test_what_fills_rows_up_changes_nothing(tiny_model: nn.Module) -> None:
    batch = collate(PAIRS)
    input_ids = batch.model_inputs["input_ids"]
    is_filling = torch.ones_like(input_ids, dtype=torch.bool)
    for row, pair in enumerate(PAIRS):
        is_filling[row, : len(pair.prompt_ids) + len(pair.chosen_ids)] = False
        is_filling[row + len(PAIRS), : len(pair.prompt_ids) + len(pair.rejected_ids)] = False
    assert is_filling.any()
    refilled = replace(batch, model_inputs={"input_ids": input_ids.masked_fill(is_filling, 299)})
    assert torch.equal(token_logps(tiny_model, refilled).logps, token_logps(tiny_model, batch).logps)


def test_company_changes_nothing(tiny_model: nn.Module) -> None:
    model = tiny_model.double()
    together = collate(PAIRS)
    sums = together.sum_by_sequence(token_logps(model, together).logps)
    for place, pair in enumerate(PAIRS):
        alone = collate([pair])
        chosen, rejected = alone.sum_by_sequence(token_logps(model, alone).logps)
        # Norms compute in float32 whatever the weights are, so the last bits depend on the company.
        torch.testing.assert_close(chosen, sums[place], rtol=0, atol=1e-4)
        torch.testing.assert_close(rejected, sums[len(PAIRS) + place], rtol=0, atol=1e-4)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        collate([*PAIRS, TokenizedPair([], [3], [4], index=9)])


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], PAIRS[1:], PAIRS[2:]])
def test_cost_is_the_number_of_input_ids(pairs: list[TokenizedPair]) -> None:
    assert cost(pairs) == collate(pairs).model_inputs["input_ids"].numel()


def test_moved_batch_is_the_same_batch() -> None:
    batch = collate(PAIRS)
    moved = batch.to("meta")
    assert moved.indices == batch.indices
    tensors = [moved.model_inputs["input_ids"], moved.hidden_rows, moved.target_ids, moved.sequence_ids, moved.lengths]
    assert all(tensor.is_meta for tensor in tensors)

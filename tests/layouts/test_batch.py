"""Batches whatever their layout: moved and joined they lead from the same tokens to the same sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penchant.layouts import packed, padded, prefix_shared
from penchant.types import Batch, Segments, TokenizedExample, TokenLogps

LAYOUTS = pytest.mark.parametrize("layout", [padded, packed, prefix_shared], ids=["padded", "packed", "prefix_shared"])
EXAMPLES = [
    TokenizedExample([5, 9, 2, 31], ([7, 60, 8], [7, 12]), index=40),
    TokenizedExample([11], ([4, 4, 12, 30],), index=7),
    TokenizedExample([17, 18, 50], ([6], [13, 1, 8, 9, 2], [3, 3]), index=8),
]


@LAYOUTS
@pytest.mark.parametrize("with_prompts", [False, True])
def test_moved_batch_is_the_same_batch(layout: Any, with_prompts: bool) -> None:
    batch = layout.collate(EXAMPLES, with_prompts)
    moved = batch.to("meta")
    assert moved.examples == batch.examples
    assert moved.with_prompts is with_prompts
    assert set(moved.model_inputs) == set(batch.model_inputs)
    tensors = [moved.hidden_rows, moved.target_ids, moved.sequence_ids, moved.lengths]
    for each in moved.model_inputs.values():
        if isinstance(each, Segments):
            tensors += [*each.rows, *each.members, each.own_spans.bounds]
            if each.shared_spans is not None:
                tensors += [each.shared_spans.asking, each.shared_spans.asked, each.shared_spans.of_asked.bounds]
        else:
            tensors.append(each)
    assert all(tensor.is_meta for tensor in tensors)


@LAYOUTS
@pytest.mark.parametrize("with_prompts", [False, True])
def test_joined_batches_are_the_sequences_of_one_batch(layout: Any, with_prompts: bool) -> None:
    whole = layout.collate(EXAMPLES, with_prompts)
    joined = Batch.join([layout.collate(EXAMPLES[:1], with_prompts), layout.collate(EXAMPLES[1:], with_prompts)])
    assert joined.examples == whole.examples
    for name in ("target_ids", "sequence_ids", "lengths", "is_completion"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist(), name
    values = torch.arange(len(whole.target_ids), dtype=torch.float64)
    assert joined.sum_by_sequence(values).tolist() == whole.sum_by_sequence(values).tolist()
    assert joined.model_inputs == {}


def test_layouts_agree_on_everything_but_what_the_model_sees() -> None:
    for with_prompts in (False, True):
        rows, *others = (layout.collate(EXAMPLES, with_prompts) for layout in (padded, packed, prefix_shared))
        for name in ("target_ids", "sequence_ids", "lengths", "is_completion"):
            for other in others:
                assert getattr(rows, name).tolist() == getattr(other, name).tolist(), name


def test_what_was_said_about_several_batches_is_joined_where_all_said_it() -> None:
    one = TokenLogps(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), torch.tensor([-1.0, -2.0]))
    other = TokenLogps(torch.tensor([3.0]), torch.tensor([0.125]))
    joined = TokenLogps.join([one, other])
    assert joined.logps.tolist() == [1.0, 2.0, 3.0]
    assert joined.entropies.tolist() == [0.5, 0.25, 0.125]
    assert joined.log_collisions is None
    assert TokenLogps.join([one, one]).log_collisions.tolist() == [-1.0, -2.0, -1.0, -2.0]

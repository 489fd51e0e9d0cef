"""The prefix-shared layout: one packed row, each prompt computed once for all its completions, nothing filled up.

Everything but attention works token by token, so a prompt's hidden states are the same for all its completions and need
to be computed once. Attention is the exception: there each completion must see its prompt and itself only, which the
attention function (`models.attention`) sees to. The idea is that of prefix sharing (Wang & Hegde 2024,
arXiv:2410.20305).
"""

from __future__ import annotations

from collections.abc import Sequence

from penchant.layouts.packed import PackedRow
from penchant.types import Batch, TokenizedExample


def collate(examples: Sequence[TokenizedExample], with_prompts: bool = False) -> Batch:
    """Lays out B examples as one row: prompt, completion, completion, ..., prompt, completion, ...

    `with_prompts` scores the prompts too.

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    row = PackedRow()
    for example in examples:
        prompt = len(example.prompt_ids)
        sequences = row.add_group([example.prompt_ids, *example.completion_ids])
        for places in sequences:
            row.score(places, prompt)
        if with_prompts:
            row.score(sequences[0][:prompt], 1)
    return row.as_batch(examples, with_prompts)


def cost(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that the model computes for these examples laid out together."""
    return sum(len(example.prompt_ids) + sum(map(len, example.completion_ids)) for example in examples)

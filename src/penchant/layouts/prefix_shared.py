"""The prefix-shared layout: one packed row, each prompt computed once for all its completions, nothing filled up.

Everything but attention works token by token, so a prompt's hidden states are the same for all its completions and need
to be computed once. Attention is the exception: there each completion must see its prompt and itself only. The
attention function (`models.attention`) spreads queries, keys and values into one row a sequence, attends there, and
takes the results back. The idea is that of prefix sharing (Wang & Hegde 2024, arXiv:2410.20305).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.types import Batch, SharedRows, TokenizedExample


def collate(examples: Sequence[TokenizedExample], with_prompts: bool = False) -> Batch:
    """Lays out B examples as one row: prompt, completion, completion, ..., prompt, completion, ...

    `with_prompts` scores the prompts too.

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    if any(len(example.prompt_ids) == 0 for example in examples):
        raise ValueError("a sequence with an empty prompt cannot be scored: its first token has no context")
    input_ids: list[int] = []
    position_ids: list[int] = []
    rows: list[torch.Tensor] = []  # packed places of each row of attention: a prompt and one completion
    scored: list[tuple[torch.Tensor, int]] = []  # of each sequence its packed places, and from which on it is scored
    for example in examples:
        start, prompt = len(input_ids), len(example.prompt_ids)
        prompt_places = torch.arange(start, start + prompt)
        input_ids += example.prompt_ids
        position_ids += range(prompt)
        for completion in example.completion_ids:
            behind = len(input_ids)
            rows.append(torch.cat([prompt_places, torch.arange(behind, behind + len(completion))]))
            scored.append((rows[-1], prompt))
            input_ids += completion
            position_ids += range(prompt, prompt + len(completion))
        if with_prompts:
            scored.append((prompt_places, 1))

    width = max(len(row) for row in rows)
    gather = torch.zeros(len(rows), width, dtype=torch.long)  # (N, L)
    scatter = torch.zeros(len(input_ids), dtype=torch.long)  # (T,)
    for number, row in enumerate(rows):
        gather[number, : len(row)] = row
        scatter[row] = torch.arange(len(row)) + number * width  # the rows of an example agree on the prompt's results
    ids = torch.tensor(input_ids)
    lengths = torch.tensor([len(places) - first for places, first in scored])
    return Batch(
        model_inputs={
            "input_ids": ids[None],
            "position_ids": torch.tensor(position_ids)[None],
            # A mask of four dimensions is passed on as it is, so no mask of T x T is built; attention ignores it.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            "shared_rows": SharedRows(gather, scatter),
        },
        hidden_rows=torch.cat([places[first - 1 : -1] for places, first in scored]),
        target_ids=torch.cat([ids[places[first:]] for places, first in scored]),
        sequence_ids=torch.arange(len(scored)).repeat_interleave(lengths),
        lengths=lengths,
        examples=tuple(examples),
        with_prompts=with_prompts,
    )


def cost(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that the model computes for these examples laid out together."""
    return sum(len(example.prompt_ids) + sum(map(len, example.completion_ids)) for example in examples)

"""The prefix-shared layout: one packed row, each prompt computed once for both of its completions, nothing filled up.

Everything but attention works token by token, so a prompt's hidden states are the same for both completions and need
to be computed once. Attention is the exception: there each completion must see its prompt and itself only. The
attention function (`models.attention`) spreads queries, keys and values into one row a sequence, attends there, and
takes the results back. The idea is that of prefix sharing (Wang & Hegde 2024, arXiv:2410.20305).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.types import Batch, SharedRows, TokenizedPair


def collate(pairs: Sequence[TokenizedPair]) -> Batch:
    """Lays out B pairs as one row of prompt, chosen, rejected after prompt, chosen, rejected, ...

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    if any(len(pair.prompt_ids) == 0 for pair in pairs):
        raise ValueError("a sequence with an empty prompt cannot be scored: its first token has no context")
    input_ids: list[int] = []
    position_ids: list[int] = []
    chosen_rows: list[torch.Tensor] = []  # packed places of each sequence, prompt included
    rejected_rows: list[torch.Tensor] = []
    for pair in pairs:
        start = len(input_ids)
        prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
        input_ids += [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
        position_ids += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
        chosen_rows.append(torch.arange(start, start + prompt + chosen))
        behind = start + prompt + chosen
        rejected_rows.append(torch.cat([torch.arange(start, start + prompt), torch.arange(behind, behind + rejected)]))

    rows = chosen_rows + rejected_rows
    width = max(len(row) for row in rows)
    gather = torch.zeros(len(rows), width, dtype=torch.long)  # (N, L)
    scatter = torch.zeros(len(input_ids), dtype=torch.long)  # (T,)
    hidden_rows, target_ids, sequence_ids, lengths = [], [], [], []
    ids = torch.tensor(input_ids)
    for number, (row, pair) in enumerate(zip(rows, [*pairs, *pairs], strict=True)):
        gather[number, : len(row)] = row
        scatter[row] = torch.arange(len(row)) + number * width  # both rows of a pair agree on the prompt's results
        prompt = len(pair.prompt_ids)
        hidden_rows.append(row[prompt - 1 : -1])
        target_ids.append(ids[row[prompt:]])
        sequence_ids.append(torch.full((len(row) - prompt,), number))
        lengths.append(len(row) - prompt)
    return Batch(
        model_inputs={
            "input_ids": ids[None],
            "position_ids": torch.tensor(position_ids)[None],
            # A mask of four dimensions is passed on as it is, so no mask of T x T is built; attention ignores it.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
            "shared_rows": SharedRows(gather, scatter),
        },
        hidden_rows=torch.cat(hidden_rows),
        target_ids=torch.cat(target_ids),
        sequence_ids=torch.cat(sequence_ids),
        lengths=torch.tensor(lengths),
        indices=tuple(pair.index for pair in pairs),
    )


def cost(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens that the model computes for these pairs laid out together."""
    return sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)

"""The padded layout: every completion in a row of its own behind its prompt, rows filled up on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.types import Batch, TokenizedPair


def collate(pairs: Sequence[TokenizedPair]) -> Batch:
    """Lays out B pairs as 2B rows: the chosen sequences, then the rejected ones."""
    sequences = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    sequences += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    return collate_sequences(sequences, indices=tuple(pair.index for pair in pairs))


def collate_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], indices: tuple[int, ...] = ()) -> Batch:
    """Lays out N (prompt ids, completion ids) as N rows.

    No attention mask is needed, in any causal model: what fills a row up stands behind its last real token, where no
    real token can see it, and its own outputs are never read. (Without a mask the attention kernels take their fast
    causal path.)

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    if any(len(prompt) == 0 for prompt, _ in sequences):
        raise ValueError("a sequence with an empty prompt cannot be scored: its first token has no context")
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)  # (N, T)
    hidden_rows, target_ids, sequence_ids = [], [], []
    for number, (prompt, completion) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(completion)
        ids = torch.tensor([*prompt, *completion], dtype=torch.long)
        input_ids[number, :end] = ids
        hidden_rows.append(torch.arange(start - 1, end - 1) + number * width)
        target_ids.append(ids[start:])
        sequence_ids.append(torch.full((len(completion),), number))
    return Batch(
        model_inputs={"input_ids": input_ids},
        hidden_rows=torch.cat(hidden_rows),
        target_ids=torch.cat(target_ids),
        sequence_ids=torch.cat(sequence_ids),
        lengths=torch.tensor([len(completion) for _, completion in sequences]),
        indices=indices,
    )


def cost(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens that the model computes for these pairs laid out together, filling included."""
    return 2 * len(pairs) * max(pair.num_tokens for pair in pairs)

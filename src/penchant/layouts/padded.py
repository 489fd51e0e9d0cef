"""The padded layout: every completion in a row of its own behind its prompt, rows filled up on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.types import Batch, TokenizedExample


def collate(examples: Sequence[TokenizedExample], with_prompts: bool = False) -> Batch:
    """Lays out B examples as N rows, one for each completion; `with_prompts` scores the prompts too.

    No attention mask is needed, in any causal model: what fills a row up stands behind its last real token, where no
    real token can see it, and its own outputs are never read. (Without a mask the attention kernels take their fast
    causal path.)

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    if any(len(example.prompt_ids) == 0 for example in examples):
        raise ValueError("a sequence with an empty prompt cannot be scored: its first token has no context")
    num_rows = sum(len(example.completion_ids) for example in examples)
    width = max(example.num_tokens for example in examples)
    input_ids = torch.zeros(num_rows, width, dtype=torch.long)  # (N, T)
    spans: list[tuple[int, int]] = []  # the scored tokens of each sequence, by their places in the flattened rows
    row = 0
    for example in examples:
        prompt = len(example.prompt_ids)
        for number, completion in enumerate(example.completion_ids, start=row):
            end = prompt + len(completion)
            input_ids[number, :end] = torch.tensor([*example.prompt_ids, *completion], dtype=torch.long)
            spans.append((number * width + prompt, number * width + end))
        if with_prompts:
            spans.append((row * width + 1, row * width + prompt))
        row += len(example.completion_ids)
    places = torch.cat([torch.arange(start, end) for start, end in spans])
    lengths = torch.tensor([end - start for start, end in spans])
    return Batch(
        model_inputs={"input_ids": input_ids},
        hidden_rows=places - 1,
        last_rows=torch.tensor([end - 1 for _, end in spans]),
        target_ids=input_ids.flatten()[places],
        sequence_ids=torch.arange(len(spans)).repeat_interleave(lengths),
        lengths=lengths,
        examples=tuple(examples),
        with_prompts=with_prompts,
    )


def cost(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that the model computes for these examples laid out together, filling included."""
    num_rows = sum(len(example.completion_ids) for example in examples)
    return num_rows * max(example.num_tokens for example in examples)

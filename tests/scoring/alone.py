"""Scores worked out apart from the package: one sequence at a time, unpadded, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penchant.types import TokenizedExample


def log_probs_alone(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """log pi(. | ids up to t) for every place t of one sequence, (T, V)."""
    output = model(torch.tensor([list(ids)]))
    return (output if isinstance(output, Tensor) else output.logits)[0].log_softmax(-1)


def logps_alone(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """log pi(y_t | x, y_<t) of every token of one completion."""
    log_probs = log_probs_alone(model, [*prompt, *completion])
    found = [log_probs[len(prompt) - 1 + place, token] for place, token in enumerate(completion)]
    return torch.stack(found) if found else log_probs.new_zeros(0)


def sequences_of(examples: Sequence[TokenizedExample], with_prompts: bool = False) -> list[tuple[list[int], list[int]]]:
    """Of each sequence what stands before its scored tokens, and those: completions, then (if wanted) the prompt."""
    sequences = []
    for example in examples:
        sequences += [(list(example.prompt_ids), list(completion)) for completion in example.completion_ids]
        if with_prompts:
            sequences.append((list(example.prompt_ids[:1]), list(example.prompt_ids[1:])))
    return sequences


def scores_alone(model: nn.Module, examples: Sequence[TokenizedExample], with_prompts: bool = False) -> list[Tensor]:
    """Token log-probabilities of every sequence of the examples, in the order of a batch of them."""
    return [logps_alone(model, context, tokens) for context, tokens in sequences_of(examples, with_prompts)]


def collisions_alone(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """log of the sum over the vocabulary of p^2, for the distribution of every token of one completion."""
    probs = log_probs_alone(model, [*prompt, *completion]).detach().exp()
    return probs.square().sum(-1).log()[len(prompt) - 1 : -1]

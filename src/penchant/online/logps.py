"""Log-probabilities of completions under a policy, without gradient, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from penchant.data.chat import RenderError, encode
from penchant.data.loader import microbatches
from penchant.errors import UserError
from penchant.examples import Answer
from penchant.layouts import padded
from penchant.models.logps import evaluation_mode
from penchant.scoring.policy import Policy
from penchant.types import Text, TokenizedExample

MAX_TOKENS = 4096
"""Tokens computed at once, filling included."""


@torch.no_grad()
def sequence_logps(
    policy: Policy,
    prompts: Sequence[Text],
    completions: Sequence[Text | Answer],
    advance: Callable[[int], None] = lambda n: None,
) -> list[float]:
    """log pi(completion | prompt) of each: the sum over the completion's tokens, in nats.

    A text ends with its end token; an answer is taken as it was sampled. Calls `advance(completions)` after each batch.

    Raises:
        UserError: the chat template refuses a prompt.
    """
    examples = [
        _encoded(policy, prompt, completion, number)
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    sums = [0.0] * len(examples)
    with evaluation_mode(policy.model):
        for part in microbatches(examples, MAX_TOKENS, _cost):
            batch = padded.collate(part).to(policy.device)
            logps = batch.sum_by_sequence(policy.token_logps(batch).logps)
            for example, logp in zip(batch.examples, logps.tolist(), strict=True):
                sums[example.index] = logp
            advance(len(batch.examples))
    return sums


def _cost(examples: Sequence[TokenizedExample]) -> int:
    """What `padded.cost` says of single completions that come longest first, without looking at all of them."""
    return len(examples) * examples[0].num_tokens


def _encoded(policy: Policy, prompt: Text, completion: Text | Answer, number: int) -> TokenizedExample:
    text = completion.text if isinstance(completion, Answer) else completion
    try:
        prompt_ids, (ids,) = encode(policy.tokenizer, prompt, [text])
    except RenderError as error:
        raise UserError(f"a prompt cannot be scored: {error}; leave the row out.") from None
    if isinstance(completion, Answer):
        ids = list(completion.token_ids) or (ids if completion.is_finished else ids[:-1])
    return TokenizedExample(prompt_ids, (ids,), number)

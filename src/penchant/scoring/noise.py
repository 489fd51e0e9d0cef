"""How far a margin can be trusted: what bf16 does to it, measured on some examples of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from penchant.scoring.layout import Layout
from penchant.scoring.policy import Policy
from penchant.types import Batch, TokenizedExample

_MOST_EXAMPLES, _MOST_TOKENS = 8, 64
"""How many examples are tried, and tokens of each of their parts."""

_MOST_FLOPS = {"cpu": 2e11, "cuda": 5e13}
"""Of one pass over them: seconds, in float32 too."""


@torch.no_grad()
def margin_noise(policy: Policy, layout: Layout, examples: Sequence[TokenizedExample]) -> float | None:
    """The difference, root mean square in nats, between margins in the policy's arithmetic and in float32.

    A margin is log pi(first completion) - log pi(last completion): chosen less rejected, best less worst; of a single
    completion it is log pi. Prompts are cut to their ends and completions to their beginnings, and fewer examples are
    taken of a large model. None where not even two can be scored within seconds, and for bare prompts.
    """
    every = max(1, len(examples) // _MOST_EXAMPLES)
    tried = [_cut(examples[place]) for place in range(0, len(examples), every)][:_MOST_EXAMPLES]
    flops_per_token = 2 * sum(parameter.numel() for parameter in policy.model.parameters())
    while tried and flops_per_token * layout.cost(tried) > _MOST_FLOPS.get(policy.device.type, 2e11):
        tried.pop()
    if len(tried) < min(2, len(examples)) or not all(example.completion_ids for example in tried):
        return None
    batch = layout.collate(tried)
    exact = _margins(type(policy)(policy.model, policy.tokenizer, "float32"), batch)
    return (_margins(policy, batch) - exact).square().mean().sqrt().item()


def _cut(example: TokenizedExample) -> TokenizedExample:
    completions = tuple(ids[:_MOST_TOKENS] for ids in example.completion_ids)
    return replace(example, prompt_ids=example.prompt_ids[-_MOST_TOKENS:], completion_ids=completions)


def _margins(policy: Policy, batch: Batch) -> Float[Tensor, " B"]:
    logps = policy.token_logps(batch).logps.double()
    sums = batch.to(policy.device).sum_by_sequence(logps).split([len(one.completion_ids) for one in batch.examples])
    return torch.stack([own[0] - own[-1] if len(own) > 1 else own[0] for own in sums])

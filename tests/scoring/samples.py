"""Ragged examples of every kind, and a policy that has left its reference; all in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penchant.scoring.layout import PACKED, PADDED, PREFIX_SHARED, Layout, trouble_with
from penchant.scoring.policy import Policy
from penchant.scoring.reference import FrozenModel
from penchant.types import Batch, Rollout, TokenizedExample

VOCAB = 96
LAYOUTS = [PADDED, PACKED, PREFIX_SHARED]

LENGTHS: dict[str, list[list[int]]] = {
    "pair": [[3, 5], [9, 2], [1, 6], [4, 4], [7, 1], [2, 8]],
    "unpaired": [[3], [9], [1], [4], [7], [2]],
    "unlabelled": [[3], [9], [1], [4], [7], [2]],
    "ranking": [[3, 5, 1], [9, 2], [1, 6, 4, 2], [4, 4], [7, 1, 3], [2, 8, 5]],
    "rollout": [[3, 5, 1], [9, 2], [1, 6, 4, 2], [4, 4], [7, 1, 3], [2, 8, 5]],
}
"""Tokens of each example's completions."""

PROMPT_LENGTHS = [4, 1, 7, 2, 11, 5]
WEIGHTS = [1.0, 2.0, 0.5, 1.0, 4.0, 0.25]  # exact in float32
LABELS = [True, False, False, True, True, False]


def ragged(kind: str) -> list[TokenizedExample]:
    """Six examples: "pair" (with margins and win probabilities), "unpaired", "unlabelled", "ranking", "rollout"."""
    generator = torch.Generator().manual_seed(3)

    def some(number: int) -> list[int]:
        return torch.randint(3, VOCAB, (number,), generator=generator).tolist()

    examples = []
    for place, lengths in enumerate(LENGTHS[kind]):
        said: dict[str, Any] = {}
        if kind == "pair":
            said = {"margin": 0.25 * place, "win_probabilities": (0.5 + place / 16, 0.5 - place / 32)}
        elif kind == "unpaired":
            said = {"is_desirable": LABELS[place]}
        elif kind == "rollout":
            said = {"rollouts": tuple(_rollout(length, generator) for length in lengths)}
        completions = tuple(map(some, lengths))
        examples.append(
            TokenizedExample(some(PROMPT_LENGTHS[place]), completions, 10 + place, weight=WEIGHTS[place], **said)
        )
    return examples


def _rollout(length: int, generator: torch.Generator) -> Rollout:
    """Log-probabilities about those of the policy, so that some tokens are clipped and some are not."""
    advantages, near, returns, values = torch.randn(4, length, generator=generator, dtype=torch.float64).tolist()
    return Rollout(advantages, [-4.5 + 0.5 * value for value in near], returns, values)


def make_model(seed: int = 0) -> nn.Module:
    """A tiny GPT-2, which computes all it computes in the weights' own arithmetic, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=48,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).double()


def move(model: nn.Module, seed: int = 8, by: float = 0.05) -> None:
    """Adds noise to all weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def moved_policy() -> tuple[Policy, FrozenModel]:
    """A policy that has left its reference; both attend in segments where a batch asks for it."""
    policy = Policy(make_model(), None, value_head=make_head())
    assert trouble_with(PREFIX_SHARED, policy, ragged("pair")) is None
    reference = FrozenModel.copy_of(policy)
    move(policy.model)
    return policy, reference


def make_head() -> nn.Module:
    """What a method with a value head reads off the hidden states."""
    torch.manual_seed(9)
    return nn.Linear(16, 1).double()


def plain_models() -> tuple[nn.Module, nn.Module]:
    """The two models of `moved_policy`, attending as transformers makes them."""
    ref = make_model()
    policy = copy.deepcopy(ref)
    move(policy)
    return policy, ref.requires_grad_(False)


def cut(
    examples: Sequence[TokenizedExample], sizes: Sequence[int], layout: Layout, with_prompts: bool = False
) -> list[Batch]:
    """The examples in batches of these sizes, the last example first."""
    remaining, batches = list(examples), []
    for size in sizes:
        batches.append(layout.collate([remaining.pop() for _ in range(size)], with_prompts))
    assert not remaining
    return batches


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients as one vector; parameters without one count as zeros."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([each.flatten() for each in found])

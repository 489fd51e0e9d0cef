"""Which layout a run uses, and why: the fastest that is exact for the model in hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from penchant import distributed
from penchant.data.loader import microbatches
from penchant.errors import UserError
from penchant.layouts import packed, padded, prefix_shared
from penchant.models.attention import use_attend
from penchant.scoring.policy import Policy
from penchant.types import Batch, TokenizedExample


@dataclass(frozen=True)
class Layout:
    """How examples become a batch, what that costs in tokens, and the sentence that says why it was chosen."""

    name: str
    collate: Callable[..., Batch]
    """`collate(examples, with_prompts=False)`."""
    cost: Callable[[Sequence[TokenizedExample]], int]
    reason: str

    def batches(
        self, examples: Sequence[TokenizedExample], max_tokens: int, with_prompts: bool = False
    ) -> Iterator[Batch]:
        """The examples in batches of at most `max_tokens`, longest first."""
        return (self.collate(part, with_prompts) for part in self.parts(examples, max_tokens))

    def parts(self, examples: Sequence[TokenizedExample], max_tokens: int) -> list[list[TokenizedExample]]:
        """The examples of each of those batches."""
        return microbatches(examples, max_tokens, self.cost)


PADDED = Layout("padded", padded.collate, padded.cost, "padded: a row a sequence, filled up")
PACKED = Layout("packed", packed.collate, packed.cost, "packed: sequences one behind the other, nothing filled up")
PREFIX_SHARED = Layout(
    "prefix_shared",
    prefix_shared.collate,
    prefix_shared.cost,
    "prefix_shared: each prompt computed once for all its completions, nothing filled up",
)


def choose_layout(policy: Policy, wanted: str, examples: Sequence[TokenizedExample]) -> Layout:
    """`wanted` is a layout's name or auto: prefix_shared where it is exact, else padded; some real examples are tried.

    What keeps prompts from being shared (a state that is carried from token to token, attention code of a model's own)
    keeps sequences from being packed, too.

    Raises:
        UserError: what was asked for is not exact for this model.
    """
    if wanted == "padded":
        return PADDED
    layout = PACKED if wanted == "packed" else PREFIX_SHARED
    trouble = trouble_with(layout, policy, examples)
    if trouble is None:
        return layout
    if wanted != "auto":
        raise UserError(f"layout: {layout.name} cannot be used with this model: {trouble}; set layout: padded.")
    return replace(PADDED, reason=f"{PADDED.reason} (prefixes not shared: {trouble})")


def trouble_with(layout: Layout, policy: Policy, examples: Sequence[TokenizedExample]) -> str | None:
    """Makes the model attend in segments and holds the layout against padded rows; None where both agree.

    Layers that carry a state from token to token (convolutions, linear attention, state spaces) let one completion see
    the other, and nothing but numbers shows it. Where they disagree the model is left attending as before.
    """
    model = policy.model
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None:
        return "it is not a transformers model"
    # The ends of a few real rows: several in one batch, since leaks show between neighbours; short, to be quick.
    tried = [
        TokenizedExample(
            example.prompt_ids[-16:],
            tuple(ids[: 8 - 2 * (place % 2)] for place, ids in enumerate(example.completion_ids[:4])),
            example.index,
        )
        for example in examples[:3]
    ]
    expected, expected_gradient = _scores(policy, padded.collate(tried))
    if not use_attend(model):
        model.set_attn_implementation(before)  # type: ignore[operator]
        return "its attention cannot be exchanged"
    try:
        found, gradient = _scores(policy, layout.collate(tried))
    except (RuntimeError, TypeError, ValueError) as error:
        model.set_attn_implementation(before)  # type: ignore[operator]
        return f"its attention does not fit ({str(error).splitlines()[0]})"
    difference = (found - expected).abs().max().item()
    off = (gradient - expected_gradient).norm().item() / max(expected_gradient.norm().item(), 1e-30)
    tolerance = 2e-3 if policy.precision == "float32" else 0.5
    if not (difference <= tolerance and off <= (1e-2 if policy.precision == "float32" else 0.2)):
        model.set_attn_implementation(before)  # type: ignore[operator]
        return f"log-probabilities of the same tokens differ by {difference:.2g} nats, gradients by {off:.0%}"
    return None


def _scores(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log-probabilities, and the gradient of their sum in the embedding of each token that occurs."""
    embedded: list[torch.Tensor] = []

    def begin_here(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = policy.model.get_input_embeddings().register_forward_hook(begin_here)  # type: ignore[operator]
    try:
        logps = policy.token_logps(batch).logps
        (slopes,) = torch.autograd.grad(logps.sum(), embedded[-1:])
    finally:
        hook.remove()
        distributed.let_go(policy.model)
    occurring = sorted(
        {token for one in batch.examples for ids in (one.prompt_ids, *one.completion_ids) for token in ids}
    )
    known = torch.tensor(occurring, device=slopes.device)
    ids = batch.model_inputs["input_ids"].to(slopes.device).flatten()  # also what fills rows up, which has no gradient
    places = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    shares = slopes.flatten(0, -2) * (known[places] == ids)[:, None]
    return logps.detach(), slopes.new_zeros(len(known), slopes.shape[-1]).index_add(0, places, shares)

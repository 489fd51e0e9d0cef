"""From token log-probabilities of a batch to the record that a loss consumes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from penchant.losses import Loss
from penchant.types import (
    Batch,
    Logps,
    PairLogps,
    PairTokens,
    RankedLogps,
    RolloutLogps,
    SequenceLogps,
    TokenizedExample,
    TokenLogps,
)


def unit_of(loss: Loss, examples: Sequence[TokenizedExample]) -> str:
    """What a loss takes these examples as: "pair", "unpaired", "ranking" or "rollout".

    A loss over single completions takes pairs as two of them, so that it can be held against held-out pairs.
    """
    are_pairs = all(len(example.completion_ids) == 2 for example in examples)
    return "pair" if "pair" in loss.units and are_pairs else next(unit for unit in loss.units if unit != "pair")


def tokens_per_example(examples: Sequence[TokenizedExample]) -> float:
    """Tokens whose likelihood shall rise, per example: what a mean over the tokens of a whole batch is made with.

    Each example's tokens count by its weight, so that weight 2 is the same as the example given twice.
    """
    tokens = sum(example.weight * example.num_trained_tokens for example in examples)
    return tokens / sum(example.weight for example in examples)


def tokens_per_completion(examples: Sequence[TokenizedExample]) -> float:
    """Tokens of all completions, per completion; each example's count by its weight."""
    tokens = sum(example.weight * len(ids) for example in examples for ids in example.completion_ids)
    return tokens / sum(example.weight * len(example.completion_ids) for example in examples)


def logps_for(
    loss: Loss,
    batch: Batch,
    policy: TokenLogps,
    ref: Float[Tensor, " M"] | None,
    kl: Float[Tensor, ""] | None = None,
    whole_batch: Sequence[TokenizedExample] | None = None,
) -> Logps:
    """The record that `loss` consumes, with what it needs in it.

    Args:
        kl: the estimate for `SequenceLogps.kl`.
        whole_batch: the examples of the optimizer batch of which `batch` is a part.
    """
    unit = unit_of(loss, batch.examples)
    if unit == "rollout":
        return rollout_logps(batch, policy, ref, tokens_per_completion(whole_batch or batch.examples))
    share = tokens_per_example(whole_batch or batch.examples)
    if unit == "pair":
        return pair_logps(batch, policy, ref, "tokens" in loss.needs, share)
    if unit == "unpaired":
        return sequence_logps(batch, policy.logps, ref, kl, share)
    return ranked_logps(batch, policy.logps, ref)


def pair_logps(
    batch: Batch,
    policy: TokenLogps,
    ref: Float[Tensor, " M"] | None,
    with_tokens: bool = False,
    tokens_per_example: float | None = None,
) -> PairLogps:
    """The record of a batch of pairs."""
    per_pair = 3 if batch.with_prompts else 2
    sums = batch.sum_by_sequence(policy.logps).view(-1, per_pair)  # (B, 2 or 3)
    ref_sums = None if ref is None else batch.sum_by_sequence(ref).view(-1, per_pair)
    lengths = batch.lengths.view(-1, per_pair)
    return PairLogps(
        policy_chosen_logps=sums[:, 0],
        policy_rejected_logps=sums[:, 1],
        ref_chosen_logps=None if ref_sums is None else ref_sums[:, 0],
        ref_rejected_logps=None if ref_sums is None else ref_sums[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        margins=_column([example.margin for example in batch.examples], sums),
        win_probabilities=_column([example.win_probabilities for example in batch.examples], sums),
        policy_prompt_logps=sums[:, 2] if batch.with_prompts else None,
        prompt_lengths=lengths[:, 2] if batch.with_prompts else None,
        tokens_per_example=tokens_per_example,
        tokens=_pair_tokens(batch, policy, ref, per_pair) if with_tokens else None,
    )


def sequence_logps(
    batch: Batch,
    policy: Float[Tensor, " M"],
    ref: Float[Tensor, " M"] | None,
    kl: Float[Tensor, ""] | None = None,
    tokens_per_example: float | None = None,
) -> SequenceLogps:
    """The record of single completions; of a pair, chosen is desirable and rejected is not.

    A completion that nobody judged counts as desirable: losses that need labels are never given one.
    """
    labels = [
        place == 0 and example.is_desirable is not False
        for example in batch.examples
        for place in range(len(example.completion_ids))
    ]
    is_desirable = torch.tensor(labels, device=batch.lengths.device)
    is_completion = batch.is_completion  # prompts may be scored beside them
    sums = batch.sum_by_sequence(policy)[is_completion]
    ref_sums = None if ref is None else batch.sum_by_sequence(ref)[is_completion]
    return SequenceLogps(sums, ref_sums, batch.lengths[is_completion], is_desirable, kl, tokens_per_example)


def ranked_logps(batch: Batch, policy: Float[Tensor, " M"], ref: Float[Tensor, " M"] | None) -> RankedLogps:
    """The record of rankings, filled up to the longest."""
    counts = [len(example.completion_ids) for example in batch.examples]

    def rows(values: Tensor) -> Tensor:  # (N,) -> (B, K)
        return pad_sequence(list(values.split(counts)), batch_first=True)

    return RankedLogps(
        policy_logps=rows(batch.sum_by_sequence(policy)),
        ref_logps=None if ref is None else rows(batch.sum_by_sequence(ref)),
        lengths=rows(batch.lengths),
        is_present=rows(torch.ones_like(batch.lengths, dtype=torch.bool)),
    )


def rollout_logps(
    batch: Batch, policy: TokenLogps, ref: Float[Tensor, " M"] | None, tokens_per_example: float | None = None
) -> RolloutLogps:
    """The record of sampled completions, with what was found out about them when they were sampled.

    Raises:
        ValueError: nothing was.
    """
    rollouts = [rollout for example in batch.examples for rollout in example.rollouts]
    if len(rollouts) != len(batch.lengths):
        raise ValueError("a policy gradient needs what was found out about each completion when it was sampled")

    def column(values: Sequence[Sequence[float] | None]) -> Tensor | None:  # a number for each token, if all have it
        if any(own is None for own in values):
            return None
        flat = np.concatenate([np.asarray(own, dtype=np.float64) for own in values])
        return torch.from_numpy(flat).to(policy.logps)

    advantages, old_logps = (
        column([rollout.advantages for rollout in rollouts]),
        column([rollout.old_logps for rollout in rollouts]),
    )
    assert advantages is not None
    return RolloutLogps(
        policy_logps=policy.logps,
        old_logps=policy.logps.detach() if old_logps is None else old_logps,
        ref_logps=ref,
        advantages=advantages,
        sequence_ids=batch.sequence_ids,
        lengths=batch.lengths,
        values=policy.values,
        old_values=column([rollout.old_values for rollout in rollouts]),
        returns=column([rollout.returns for rollout in rollouts]),
        tokens_per_example=tokens_per_example,
    )


def weights_of(loss: Loss, batch: Batch) -> Float[Tensor, " B"]:
    """The weight of each value that the loss gives on this batch."""
    is_by_completion = unit_of(loss, batch.examples) in ("unpaired", "rollout")
    weights = [
        example.weight
        for example in batch.examples
        for _ in range(len(example.completion_ids) if is_by_completion else 1)
    ]
    return torch.tensor(weights, device=batch.lengths.device)


def rewards_of(loss: Loss, logps: Logps) -> Float[Tensor, " N"]:
    """The implicit rewards of all completions, in their order in the batch."""
    rewards = loss.rewards(logps)
    if isinstance(logps, PairLogps):
        return torch.stack(rewards, dim=1).flatten()
    return rewards[logps.is_present] if isinstance(logps, RankedLogps) else rewards


def _column(values: list[float | tuple[float, float] | None], like: Tensor) -> Tensor | None:
    """A column of the data, if every row has it."""
    if any(value is None for value in values):
        return None
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _pair_tokens(batch: Batch, policy: TokenLogps, ref: Float[Tensor, " M"] | None, per_pair: int) -> PairTokens:
    lengths = batch.lengths.tolist()

    def sides(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # (M,) -> (B, C), (B, R)
        if values is None:
            return None, None
        rows = values.split(lengths)
        return pad_sequence(rows[0::per_pair], batch_first=True), pad_sequence(rows[1::per_pair], batch_first=True)

    chosen, rejected = sides(policy.logps)
    assert chosen is not None
    assert rejected is not None
    return PairTokens(chosen, rejected, *sides(ref), *sides(policy.log_collisions))

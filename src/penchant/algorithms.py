"""Preference optimization as an object: token tensors in, metrics out, for any torch module.

Nothing here knows texts, files or run directories. See `penchant.train` for whole runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from penchant.data.loader import mismatched
from penchant.layouts import padded
from penchant.losses import (
    DPOLoss,
    IPOLoss,
    KTOLoss,
    Loss,
    ORPOLoss,
    SimPOLoss,
    preference_accuracy,
)
from penchant.models.logps import token_logps
from penchant.scoring.records import logps_for, rewards_of
from penchant.types import Batch, Logps, PairLogps, SequenceLogps, TokenizedExample


class Options(TypedDict, total=False):
    """What every algorithm takes besides models and loss; see `PairAlgorithm`."""

    learning_rate: float
    max_grad_norm: float
    pad_token_id: int | None
    optimizer: torch.optim.Optimizer | None


class _Algorithm:
    """What training on token tensors has in common, whatever the loss judges; arguments as `PairAlgorithm` says."""

    _unit: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        loss: Loss,
        learning_rate: float = 5e-7,
        max_grad_norm: float = 1.0,
        pad_token_id: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if "reference" in loss.needs and ref_model is None:
            raise ValueError(f"the loss '{loss.name}' compares with a reference: give ref_model")
        if self._unit not in loss.units:
            raise ValueError(f"the loss '{loss.name}' takes {' or '.join(loss.units)}, not {self._unit}")
        if "scores" in loss.needs:
            raise ValueError(f"the loss '{loss.name}' is that of a reward model, and this trains a policy")
        for column in loss.needs & {"margins", "win_probabilities"}:
            raise ValueError(f"the loss '{loss.name}' needs {column}, which token tensors do not carry")
        if ref_model is model:
            raise ValueError("ref_model is the policy itself and would move with it: give copy.deepcopy(model)")
        self.model = model
        self.ref_model = ref_model
        self.loss = loss
        self.max_grad_norm = max_grad_norm
        self.pad_token_id = pad_token_id
        self.optimizer = optimizer or torch.optim.AdamW(
            _trainable(model.parameters()), lr=learning_rate, weight_decay=0.0
        )
        if ref_model is not None:
            ref_model.eval()

    def _learn(self, logps: Logps) -> tuple[dict[str, float], Float[Tensor, " N"]]:
        """One optimizer step; what is common to all metrics, and the rewards before the step."""
        losses = self.loss(logps)
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        grad_norm = nn.utils.clip_grad_norm_(_trainable(self.model.parameters()), self.max_grad_norm)
        if not (torch.isfinite(losses).all() and torch.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError("the loss or its gradient is not finite; the step was not taken")
        self.optimizer.step()
        with torch.no_grad():
            rewards = rewards_of(self.loss, logps)
        return {"loss": losses.mean().item(), "grad_norm": grad_norm.item()}, rewards

    def _score(self, examples: Sequence[TokenizedExample]) -> Logps:
        batch = padded.collate(examples, "prompts" in self.loss.needs).to(next(self.model.parameters()).device)
        scored = token_logps(self.model, batch, with_collisions="collisions" in self.loss.needs)
        kl = self._kl(examples) if "kl" in self.loss.needs else None
        return logps_for(self.loss, batch, scored, self._ref_logps(batch), kl)

    @torch.no_grad()
    def _kl(self, examples: Sequence[TokenizedExample]) -> Float[Tensor, ""]:
        longest = max(len(e.prompt_ids) for e in examples) + max(e.num_tokens for e in examples)
        others = padded.collate(mismatched(examples, longest)).to(next(self.model.parameters()).device)
        ref = self._ref_logps(others)
        assert ref is not None
        return others.sum_by_sequence(token_logps(self.model, others).logps - ref).mean().clamp(min=0)

    @torch.no_grad()
    def _ref_logps(self, batch: Batch) -> Float[Tensor, " M"] | None:
        if self.ref_model is None:
            return None
        ref_device = next(self.ref_model.parameters()).device
        return token_logps(self.ref_model, batch.to(ref_device)).logps.to(batch.target_ids.device)

    def _rows(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None) -> list[list[int]]:
        """The real tokens of each row."""
        if mask is None and self.pad_token_id is not None:
            is_real = ids != self.pad_token_id
            # Real from the first real token to the last one: a pad id between two tokens is a token.
            mask = (is_real.cumsum(-1) > 0) & (is_real.flip(-1).cumsum(-1).flip(-1) > 0)
        if mask is None:
            return ids.tolist()
        return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


class PairAlgorithm(_Algorithm):
    """Trains a policy on pairs of token tensors with any loss over pairs.

    Args:
        model: the policy: any module that maps token ids (rows, T) to logits (rows, T, V), or to an object with
            `.logits`, causally (a position sees itself and what stands before it).
        ref_model: the reference, same token ids; it is put into evaluation mode and never changed. None for losses
            without a reference.
        loss: the loss; `self.loss` afterwards.
        learning_rate: of the AdamW optimizer (no weight decay) that is made here; ignored when `optimizer` is given.
        max_grad_norm: gradients are scaled down to this norm.
        pad_token_id: id that fills ragged rows up, on the left or on the right. None: rows are full, or masks are
            given to `train_step`.
        optimizer: an optimizer over the policy's parameters, instead of AdamW.
    """

    _unit = "pair"

    def train_step(
        self,
        prompt: Int[Tensor, "B P"],
        chosen: Int[Tensor, "B C"],
        rejected: Int[Tensor, "B R"],
        prompt_mask: Bool[Tensor, "B P"] | None = None,
        chosen_mask: Bool[Tensor, "B C"] | None = None,
        rejected_mask: Bool[Tensor, "B R"] | None = None,
    ) -> dict[str, float]:
        """One optimizer step on B pairs.

        Masks are true where a token is real; without them the runs of `pad_token_id` at either end of a row are
        padding. Where the pad id is also a real token (an end token, say), give masks.

        Returns:
            `loss`, `chosen_reward`, `rejected_reward`, `accuracy` (share of pairs whose chosen reward is the higher,
            ties counting half), `margin` (chosen less rejected reward): means over the pairs before the step; and
            `grad_norm` before clipping.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; the weights are left as they were.
        """
        logps = self.score(prompt, chosen, rejected, prompt_mask, chosen_mask, rejected_mask)
        metrics, rewards = self._learn(logps)
        chosen_rewards, rejected_rewards = rewards.view(-1, 2).unbind(-1)
        return {
            "loss": metrics["loss"],
            "chosen_reward": chosen_rewards.mean().item(),
            "rejected_reward": rejected_rewards.mean().item(),
            "accuracy": preference_accuracy(chosen_rewards, rejected_rewards).mean().item(),
            "margin": (chosen_rewards - rejected_rewards).mean().item(),
            "grad_norm": metrics["grad_norm"],
        }

    def score(
        self,
        prompt: Int[Tensor, "B P"],
        chosen: Int[Tensor, "B C"],
        rejected: Int[Tensor, "B R"],
        prompt_mask: Bool[Tensor, "B P"] | None = None,
        chosen_mask: Bool[Tensor, "B C"] | None = None,
        rejected_mask: Bool[Tensor, "B R"] | None = None,
    ) -> PairLogps:
        """Log-probabilities of B pairs under policy (with gradient) and reference (without)."""
        rows = zip(
            self._rows(prompt, prompt_mask),
            self._rows(chosen, chosen_mask),
            self._rows(rejected, rejected_mask),
            strict=True,
        )
        pairs = [TokenizedExample(x, (y_w, y_l), index) for index, (x, y_w, y_l) in enumerate(rows)]
        logps = self._score(pairs)
        assert isinstance(logps, PairLogps)
        return logps


class UnpairedAlgorithm(_Algorithm):
    """Trains a policy on single completions, each desirable or not, with any loss over them.

    Arguments as those of `PairAlgorithm`.
    """

    _unit = "unpaired"

    def train_step(
        self,
        prompt: Int[Tensor, "N P"],
        completion: Int[Tensor, "N C"],
        is_desirable: Bool[Tensor, " N"],
        prompt_mask: Bool[Tensor, "N P"] | None = None,
        completion_mask: Bool[Tensor, "N C"] | None = None,
    ) -> dict[str, float]:
        """One optimizer step on N completions; masks as in `PairAlgorithm.train_step`.

        Returns:
            `loss`; `desirable_reward` and `undesirable_reward`, means before the step (nan where there is none); and
            `grad_norm` before clipping.

        Raises:
            ValueError: the loss estimates a KL divergence, and all prompts are the same.
            FloatingPointError: the loss or the gradient is not finite; the weights are left as they were.
        """
        metrics, rewards = self._learn(self.score(prompt, completion, is_desirable, prompt_mask, completion_mask))
        is_desirable = is_desirable.to(rewards.device)
        return {
            "loss": metrics["loss"],
            "desirable_reward": rewards[is_desirable].mean().item(),
            "undesirable_reward": rewards[~is_desirable].mean().item(),
            "grad_norm": metrics["grad_norm"],
        }

    def score(
        self,
        prompt: Int[Tensor, "N P"],
        completion: Int[Tensor, "N C"],
        is_desirable: Bool[Tensor, " N"],
        prompt_mask: Bool[Tensor, "N P"] | None = None,
        completion_mask: Bool[Tensor, "N C"] | None = None,
    ) -> SequenceLogps:
        """Log-probabilities of N completions under policy (with gradient) and reference (without)."""
        rows = zip(
            self._rows(prompt, prompt_mask),
            self._rows(completion, completion_mask),
            is_desirable.tolist(),
            strict=True,
        )
        examples = [TokenizedExample(x, (y,), index, is_desirable=good) for index, (x, y, good) in enumerate(rows)]
        logps = self._score(examples)
        assert isinstance(logps, SequenceLogps)
        return logps


class DPO(PairAlgorithm):
    """Direct Preference Optimization on token tensors; see `DPOLoss` for the equation."""

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, ref_model, DPOLoss(beta, label_smoothing), **options)


class IPO(PairAlgorithm):
    """Identity Preference Optimization on token tensors; see `IPOLoss` for the equation."""

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module,
        beta: float = 0.1,
        length_normalize: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, ref_model, IPOLoss(beta, length_normalize), **options)


class SimPO(PairAlgorithm):
    """Simple Preference Optimization on token tensors; see `SimPOLoss` for the equation."""

    def __init__(
        self, model: nn.Module, beta: float = 2.0, gamma_beta_ratio: float = 0.5, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, None, SimPOLoss(beta, gamma_beta_ratio), **options)


class ORPO(PairAlgorithm):
    """Odds Ratio Preference Optimization on token tensors; see `ORPOLoss` for the equation."""

    def __init__(
        self,
        model: nn.Module,
        odds_ratio_weight: float = 0.1,
        nll_on_prompt: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, None, ORPOLoss(odds_ratio_weight, nll_on_prompt), **options)


class KTO(UnpairedAlgorithm):
    """Kahneman-Tversky Optimization on token tensors; see `KTOLoss` for the equation.

    The KL divergence is estimated from the batch's own prompts, each with the completion of the next other one.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, ref_model, KTOLoss(beta, desirable_weight, undesirable_weight), **options)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]

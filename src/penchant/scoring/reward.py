"""Reward models with their tokenizers: one that judges, texts in and scores out; and one that learns to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penchant.data.chat import PLAIN_CHAT_TEMPLATE, RenderError, encode, render
from penchant.errors import UserError
from penchant.models.fingerprints import template_sha256, tokenizer_sha256, weights_sha256
from penchant.models.reward import ENCODING, last_scores, load_reward_model, load_to_train_reward
from penchant.scoring.policy import Policy, Precision
from penchant.types import Batch, Text, TokenLogps

_MAX_TOKENS = 8192
"""Tokens computed at once, filling included."""


@dataclass(frozen=True)
class EncodedText:
    """A conversation as a reward model reads it."""

    ids: list[int]
    is_truncated: bool


class RewardModel:
    """A transformers model for sequence classification, and what it says of completions."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str = "", precision: Precision = "float32") -> None:
        """Takes a classifier with one label, whose logit is the score, or two: logit 1 less logit 0.

        Raises:
            UserError: it has more labels.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self._precision = precision
        config: Any = model.config
        self._config, num_labels = config, config.num_labels
        if num_labels > 2:
            raise UserError(
                f"judge.model: '{name}' has {num_labels} labels; a reward model has one, or two (bad, good)."
            )

    @classmethod
    def from_pretrained(
        cls, name: str, device: torch.device | str = "cpu", precision: Precision = "float32"
    ) -> RewardModel:
        """The reward model in a folder or at a hub id, with float32 weights and dropout off.

        Raises:
            UserError: there is none, it is no reward model, or it would need code from strangers.
        """
        model, tokenizer = load_reward_model(name, device)
        return cls(model, tokenizer, name, precision)

    @property
    def sha256(self) -> str:
        """Hash of all that its scores depend on."""
        tokenizer, template = tokenizer_sha256(self.tokenizer), template_sha256(self.tokenizer)
        parts = [weights_sha256(self.model), tokenizer, template, self._precision]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    @property
    def max_length(self) -> int:
        """Most tokens that it can read: what its positions and its tokenizer allow."""
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def encode(self, prompt: Text, completion: str) -> EncodedText:
        """Prompt and completion rendered by the chat template, a plain prompt as the user's turn.

        A model that was trained here reads them as it did then: as a policy does, a plain prompt as it is.
        Without a template plain text is prompt and completion one behind the other, as two texts in one, and messages
        are written out as turns of Human and Assistant. What is too long loses the beginning of the prompt, but not
        the special tokens in front.

        Raises:
            UserError: the template refuses the messages.
        """
        is_plain = isinstance(prompt, str) and self.tokenizer.chat_template is None
        if hasattr(self._config, ENCODING):
            ids = self._as_trained(prompt, completion)
        else:
            ids = self.tokenizer(
                prompt + completion if is_plain else self._rendered(prompt, completion),  # type: ignore[operator]
                add_special_tokens=is_plain,
                verbose=False,
            ).input_ids
        excess = len(ids) - self.max_length
        if excess <= 0:
            return EncodedText(ids, False)
        special = set(self.tokenizer.all_special_ids)
        front = next(place for place, token in enumerate([*ids, -1]) if token not in special)
        front = min(front, self.max_length - 1)
        return EncodedText(ids[:front] + ids[front + excess :], True)

    @torch.inference_mode()
    def scores(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        """The score of each text, whatever the others are."""
        scores = [0.0] * len(encoded)
        for part in self._batches(encoded):
            for place, score in zip(part, self._scores([encoded[place] for place in part]).tolist(), strict=True):
                scores[place] = score
        return scores

    def _as_trained(self, prompt: Text, completion: str) -> list[int]:
        try:
            prompt_ids, (completion_ids,) = encode(self.tokenizer, prompt, [completion])
        except RenderError as error:
            raise UserError(f"judge.model: with '{self.name}' {error}.") from None
        return [*prompt_ids, *completion_ids]

    def _rendered(self, prompt: Text, completion: str) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        tokenizer = self.tokenizer
        own_template = tokenizer.chat_template
        tokenizer.chat_template = own_template or PLAIN_CHAT_TEMPLATE
        try:
            prompt_text, (completion_text,) = render(tokenizer, messages, [completion])
        except RenderError as error:
            raise UserError(f"judge.model: with '{self.name}' {error}.") from None
        finally:
            tokenizer.chat_template = own_template
        return prompt_text + completion_text

    def _batches(self, encoded: Sequence[Sequence[int]]) -> list[list[int]]:
        """The places of the texts that are scored together: of like length, the longest first."""
        batches: list[list[int]] = []
        can_pad = self._pad_id is not None
        for place in sorted(range(len(encoded)), key=lambda place: (-len(encoded[place]), place)):
            fits = batches and can_pad and len(encoded[batches[-1][0]]) * (len(batches[-1]) + 1) <= _MAX_TOKENS
            if fits:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches

    @property
    def _pad_id(self) -> int | None:
        """What the model itself takes for filling. Classifiers over decoders look for the last token that is none, so
        another one would be read as the text's end; where the model knows none it takes one text at a time."""
        return self._config.get_text_config().pad_token_id

    def _scores(self, texts: Sequence[Sequence[int]]) -> Tensor:
        width, device = max(map(len, texts)), next(self.model.parameters()).device
        filling = self._pad_id or 0
        ids = torch.tensor([[*text, *[filling] * (width - len(text))] for text in texts], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
        with self._arithmetic(device):
            logits = self.model(input_ids=ids, attention_mask=mask).logits.double()  # (rows, labels)
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        if self._precision == "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


class RewardLearner(Policy):
    """A reward model in the place of a policy: what trains policies trains it.

    It says of a batch what a policy says, with scores for log-probabilities: a completion's whole score stands at its
    last token and 0 at the others, so the sum over its tokens is its score.
    """

    @classmethod
    def from_pretrained(
        cls, model: str, device: torch.device | str = "cpu", precision: Precision = "float32"
    ) -> RewardLearner:
        """A language model with a fresh scoring head in the place of its own, or a reward model to go on with.

        Raises:
            UserError: it cannot be loaded, or none of its family scores sequences.
        """
        loaded, tokenizer = load_to_train_reward(model, device)
        _choose_filling(loaded, tokenizer)
        return cls(loaded, tokenizer, precision)

    def _score(self, batch: Batch, with_entropies: bool, with_collisions: bool) -> TokenLogps:
        """Scores, each at the last token of its sequence; of entropies and log-collisions there are none."""
        scores = last_scores(self.model, batch)
        is_there = batch.lengths > 0
        lasts = (batch.lengths.cumsum(0) - 1)[is_there]
        zeros = torch.zeros(len(batch.target_ids), dtype=scores.dtype, device=scores.device)
        return TokenLogps(zeros.index_put((lasts,), scores[is_there]))

    def merged(self) -> nn.Module:
        """The model with its adapter, if it has one, folded into its weights: what judges and servers load."""
        return self.model.merge_and_unload() if hasattr(self.model, "peft_config") else self.model  # type: ignore[operator]


def _choose_filling(model: Any, tokenizer: Any) -> None:
    """Makes a token the filling that ends no text: classifiers read their score at the last token that is none."""
    _, (plain,) = encode(tokenizer, ".", ["."])
    ends = {plain[-1]}
    if tokenizer.chat_template:
        _, (answer,) = encode(tokenizer, [{"role": "user", "content": "."}], ["."])
        ends.add(answer[-1])
    candidates = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens]
    fit = [token for token in candidates if token and tokenizer.convert_tokens_to_ids(token) not in ends]
    if fit:
        tokenizer.pad_token = fit[0]
    model.config.pad_token_id = tokenizer.pad_token_id if fit else None  # without, it takes one text at a time

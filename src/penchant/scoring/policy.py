"""A language model with its tokenizer: texts or batches in, log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant import stopping
from penchant.data.chat import encode
from penchant.layouts import padded
from penchant.models.load import load_model_and_tokenizer
from penchant.models.logps import evaluation_mode, token_logps
from penchant.types import Batch, Text, TokenizedExample, TokenLogps

Precision = Literal["float32", "bf16"]
"""`float32`, or `bf16`: matrix products in bfloat16 over float32 weights (autocast)."""


class Policy:
    """A causal language model that scores and answers.

    >>> policy = Policy.from_pretrained("path/to/model")                  # doctest: +SKIP
    >>> policy.log_prob(["What is 2 + 2?"], ["4"])                        # doctest: +SKIP
    tensor([-1.84], grad_fn=...)
    """

    def __init__(self, model: nn.Module, tokenizer: Any, precision: Precision = "float32") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision

    @classmethod
    def from_pretrained(
        cls, model: str, device: torch.device | str = "cpu", precision: Precision = "float32"
    ) -> Policy:
        """A policy from a local folder, a hub id or a `.gguf` file, with float32 weights and dropout off.

        Raises:
            UserError: the model cannot be loaded.
        """
        return cls(*load_model_and_tokenizer(model, device), precision)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, for an optimizer."""
        return self.model.parameters()

    def token_logps(self, batch: Batch, with_entropies: bool = False, with_collisions: bool = False) -> TokenLogps:
        """Log-probabilities of the scored tokens of a batch, in nats."""
        with self._arithmetic():
            return token_logps(self.model, batch.to(self.device), with_entropies, with_collisions)

    def log_prob(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Float[Tensor, " N"]:
        """log pi(completion | prompt) of N texts: the sum over the completion's tokens and its end token, in nats.

        Differentiable with respect to the model's parameters. Prompts may be messages: they are rendered by the chat
        template, and a plain completion is then the assistant's answer. Plain prompts are taken as they are.

        Raises:
            ValueError: the numbers of prompts and completions differ.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: give one for each")
        sequences = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            prompt_ids, completion_ids = encode(self.tokenizer, prompt, [completion])
            sequences.append(TokenizedExample(prompt_ids, tuple(completion_ids), number))
        batch = padded.collate(sequences).to(self.device)
        return batch.sum_by_sequence(self.token_logps(batch).logps)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Text], max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One answer to each prompt, greedy at temperature 0; text only, end token removed.

        What the model's own generation settings say about sampling and repetition is left aside.
        """
        padding_side = self.tokenizer.padding_side
        self.tokenizer.padding_side = "left"  # so that every prompt ends where its answer begins
        try:
            # The end of an answer to each prompt comes along: a template may end turns with another token than eos.
            encoded = [encode(self.tokenizer, prompt, ["."]) for prompt in prompts]
            inputs = self.tokenizer.pad({"input_ids": [ids for ids, _ in encoded]}, return_tensors="pt")
        finally:
            self.tokenizer.padding_side = padding_side
        inputs = inputs.to(self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with evaluation_mode(self.model), self._arithmetic(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = self.model.generate(  # type: ignore[operator]
                **inputs,
                **sampling,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                stopping_criteria=[_can_be_stopped],
                eos_token_id=sorted({self.tokenizer.eos_token_id, *(answer[-1] for _, (answer,) in encoded)}),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        answers = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _can_be_stopped(ids: Tensor, scores: Any, **more: Any) -> Tensor:
    """Asked by transformers after every token: nothing ends here, but whoever asked for a stop need not wait."""
    stopping.check()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

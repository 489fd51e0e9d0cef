"""A language model with its tokenizer: texts or batches in, log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant import distributed
from penchant.data.chat import encode
from penchant.examples import Answer
from penchant.layouts import padded
from penchant.models.generation import Sampling, generate
from penchant.models.gradient_checkpointing import layers_of
from penchant.models.load import load_model_and_tokenizer
from penchant.models.logps import token_logps
from penchant.types import Batch, Text, TokenizedExample, TokenLogps

Precision = Literal["float32", "bf16"]
"""`float32`, or `bf16`: matrix products in bfloat16 over float32 weights (autocast)."""


def gathered_logps(
    turns: Sequence[distributed.Turn], scored: Sequence[TokenLogps], batches: Sequence[Batch]
) -> list[TokenLogps]:
    """What was said of all batches, where each process has scored those of its turns."""
    if not batches:
        return []
    columns = [one.as_tuple() for one in scored]
    values = [[column for column in own if column is not None] for own in columns]
    pieces = [iter(p) for p in distributed.gathered(turns, values, [len(batch.target_ids) for batch in batches])]
    return [TokenLogps(*[None if column is None else next(piece) for column in columns[0]]) for piece in pieces]  # type: ignore[arg-type]


class Policy:
    """A causal language model that scores and answers.

    >>> policy = Policy.from_pretrained("path/to/model")                  # doctest: +SKIP
    >>> policy.log_prob(["What is 2 + 2?"], ["4"])                        # doctest: +SKIP
    tensor([-1.84], grad_fn=...)
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, precision: Precision = "float32", value_head: nn.Module | None = None
    ) -> None:
        """`value_head` maps hidden states (M, D) to what is expected to come (M, 1), for methods that need it."""
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.value_head = value_head
        """Maps hidden states (M, D) to what is expected to come (M, 1)."""

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
        """The parameters of model and value head, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names."""
        yield from self.model.named_parameters()
        if self.value_head is not None:
            yield from self.value_head.named_parameters("value_head")

    def token_logps(self, batch: Batch, with_entropies: bool = False, with_collisions: bool = False) -> TokenLogps:
        """Log-probabilities of the scored tokens of a batch, in nats, and what the value head says of them."""
        with self._arithmetic():
            here = batch.to(self.device)
            scored: tuple[Any, ...] = distributed.within(
                self.model, lambda: self._score(here, with_entropies, with_collisions).as_tuple()
            )
        return TokenLogps(*scored)

    def _score(self, batch: Batch, with_entropies: bool, with_collisions: bool) -> TokenLogps:
        return token_logps(self.model, batch, with_entropies, with_collisions, self.value_head)

    @torch.no_grad()
    def score_all(
        self,
        batches: Sequence[Batch],
        with_entropies: bool = False,
        with_collisions: bool = False,
        advance: Callable[[int], None] = lambda examples: None,
    ) -> list[TokenLogps]:
        """`token_logps` of each batch, without gradient; several processes share the work, all with the same batches.

        Calls `advance(examples)` after each batch of this process, with those that all have done meanwhile.
        """
        turns, scored, step = distributed.turns(len(batches)), [], distributed.world().size
        for number, turn in enumerate(turns):
            scored.append(self.token_logps(batches[turn.place], with_entropies, with_collisions))
            advance(sum(len(batch.examples) for batch in batches[number * step : (number + 1) * step]))
        return gathered_logps(turns, scored, batches)

    def shard(self) -> None:
        """Splits the weights over all processes that work together; does nothing where this is the only one."""
        distributed.shard(self.model, layers_of(self.model), self.device)

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

    def sample(
        self,
        prompts: Sequence[Text],
        sampling: Sampling,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        max_rows: int = 64,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[list[Answer]]:
        """`num_samples` answers to each prompt, at most `max_rows` in the making at a time.

        Several processes, all with the same prompts, answer some of them each, with all weights gathered.
        An answer depends on its prompt, the prompt's seed (0, 1, 2, ... where none are given) and its own number, not
        on the other prompts. What the model's own generation settings say about sampling, repetition and ends is left
        aside. `advance(n)` is called whenever n answers are done.

        Raises:
            ValueError: the numbers of prompts and seeds differ.
        """
        # The end of an answer to each prompt comes along: a template may end turns with another token than eos.
        encoded = [encode(self.tokenizer, prompt, ["."]) for prompt in prompts]
        prompt_ids = [ids for ids, _ in encoded]
        every_seed = range(len(prompts)) if seeds is None else seeds
        if len(every_seed) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(every_seed)} seeds: give one for each")
        me = distributed.world()
        own, total, num_told = slice(me.rank, None, me.size), len(prompts) * num_samples, 0

        def told(number: int) -> None:
            nonlocal num_told
            news = min(number * me.size, total - num_told)  # what the others have done meanwhile
            num_told += news
            advance(news)

        end_ids = {self.tokenizer.eos_token_id, *(answer[-1] for _, (answer,) in encoded)}
        with self._arithmetic(), distributed.all_weights(self.model):
            samples = generate(
                self.model,
                prompt_ids[own],
                sampling,
                num_samples,
                every_seed[own],
                end_ids,
                max_rows,
                told,
            )
        answers = [
            [Answer(self._text_behind(ids, sample.ids), sample.ids, sample.is_finished) for sample in group]
            for ids, group in zip(prompt_ids[own], samples, strict=True)
        ]
        shares = distributed.told_by_all(answers)
        return [shares[place % me.size][place // me.size] for place in range(len(prompts))]

    def generate(
        self, prompts: Sequence[Text], max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """One answer to each prompt, greedy at temperature 0; text only, without the spaces around it.

        What the model's own generation settings say about sampling and repetition is left aside.
        """
        sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
        words = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)
        answers = self.sample(prompts, sampling, seeds=[int(word) >> 1 for word in words])
        return [answer.text.strip() for (answer,) in answers]

    def _text_behind(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that tokens stand for behind a prompt: at the start of a text, some would lose their space."""
        before, whole = (
            self.tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for each in (list(prompt_ids), [*prompt_ids, *ids])
        )
        return whole[len(before) :]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

"""Completions sampled from a model behind a server, instead of one that is loaded here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from penchant.errors import UserError
from penchant.examples import Answer, Text
from penchant.models.generation import Sampling
from penchant.online.client import ChatClient, Failure
from penchant.online.protocol import ChatRequest


class ServerSampler:
    """Samples as `Policy.sample` does; the server's model draws the tokens, so other numbers come of the same seed."""

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    def sample(
        self,
        prompts: Sequence[Text],
        sampling: Sampling,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[list[Answer]]:
        """`num_samples` answers to each prompt; calls `advance(answers)` as they come. Without seeds each is 0.

        Messages are answered as a chat, plain text is gone on with.

        Raises:
            UserError: the server refuses, or a sample cannot be had of it.
        """
        requests = [
            ChatRequest(
                prompt,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                sampling.max_new_tokens,
                _seed_of_sample(seed, number),
            )
            for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True)
            for number in range(num_samples)
        ]
        answers = []
        for reply in self._client.ask(requests, advance):
            if isinstance(reply, Failure):
                raise UserError(
                    f"The server at {self._client.url} failed on a sample: {reply.reason}. The others are kept; the"
                    " same command goes on."
                )
            answers.append(Answer(reply.text, is_finished=reply.finish != "length"))
        return [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]


def _seed_of_sample(seed: int, number: int) -> int:
    """A seed for one sample, below 2^31 since some servers take no larger ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big") >> 1

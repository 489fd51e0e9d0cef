"""The records of preference data, as rows and as token ids. They hold no tensors, so reading data loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""

Text = str | Sequence[Message]
"""What stands in a prompt or a completion: plain text, or whole messages (rendered by the chat template)."""


def plain_text(text: Text) -> str:
    """A prompt or completion as one text: a single message is its content, several stand behind their roles."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def has_answers(prompt: Text) -> bool:
    """Whether a prompt holds turns of the assistant."""
    return not isinstance(prompt, str) and any(message["role"] == "assistant" for message in prompt)


Finished = tuple[bool, ...] | None
"""Which of an example's completions ended by themselves (None: all); the others were cut off, and teach no end."""


@dataclass(frozen=True)
class Pair:
    """One human judgement: for `prompt`, `chosen` was preferred to `rejected`.

    Prompt and completions are all plain text or all messages. `source` names the row (`file:line`) in messages.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    source: str = ""
    weight: float = 1.0
    """How much the pair counts, relative to the others."""
    margin: float | None = None
    """By how much chosen is better (a difference of scores, say), where the data know."""
    win_probabilities: tuple[float, float] | None = None
    """Chances of chosen and of rejected to beat the policy that made them, where the data know (SPPO)."""
    finished: Finished = None

    @property
    def completions(self) -> tuple[Text, ...]:
        """Chosen, rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Unpaired:
    """One completion, judged on its own; `is_desirable` is None where nobody judged it."""

    prompt: Text
    completion: Text
    is_desirable: bool | None
    source: str = ""
    weight: float = 1.0
    finished: Finished = None
    is_conversation: bool = False
    """Whether nobody judged it and the prompt holds earlier answers, which are worth as much as the completion."""

    @property
    def completions(self) -> tuple[Text, ...]:
        """The completion."""
        return (self.completion,)


@dataclass(frozen=True)
class Ranking:
    """Several completions of one prompt, the best first; `scores` are theirs, where the data know."""

    prompt: Text
    completions: tuple[Text, ...]
    source: str = ""
    weight: float = 1.0
    scores: tuple[float, ...] | None = None
    finished: Finished = None


Example = Pair | Unpaired | Ranking
"""What a row of preference data holds."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that completions are to be sampled for."""

    text: Text
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The whole row of the data, for rules that look into it: the right answer, say."""


@dataclass(frozen=True)
class Answer:
    """A completion as a model gave it. `text` is exactly what follows the prompt, without the end token."""

    text: str
    token_ids: tuple[int, ...] = ()
    """With the end token, if it is there; empty where only the text is known."""
    is_finished: bool = True
    """Whether it ended by itself, and not at the limit of tokens."""


@dataclass(frozen=True)
class Rollout:
    """What was found out about a sampled completion before training on it, a number for each of its tokens."""

    advantages: Sequence[float]
    """How much better the token did than was expected."""
    old_logps: Sequence[float] | None = None
    """Its log-probability, in nats, under the policy that sampled it; None where that is the policy as it stands."""
    returns: Sequence[float] | None = None
    """What the value function is to say before the token."""
    old_values: Sequence[float] | None = None
    """What it said when the completion was sampled."""


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and its completions as token ids; each finished completion ends with its end-of-turn token.

    Pairs hold (chosen, rejected), unpaired examples one completion, rankings K, the best first, bare prompts none.
    `prompt_ids` and one completion make one sequence. `index` names the example within a run.
    """

    prompt_ids: Sequence[int]
    completion_ids: tuple[Sequence[int], ...]
    index: int
    weight: float = 1.0
    margin: float | None = None
    win_probabilities: tuple[float, float] | None = None
    is_desirable: bool | None = None
    rollouts: tuple[Rollout, ...] = ()
    """One for each completion, where the policy sampled them itself and learns from scores."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest of the sequences."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids), default=0)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens of the completion whose likelihood shall rise: chosen, the best, the desirable one."""
        return len(self.completion_ids[0]) if self.is_desirable is not False else 0

    @property
    def num_scored_tokens(self) -> int:
        """Tokens of all sequences, the prompt counted in each: what any layout has to account for."""
        return len(self.prompt_ids) * len(self.completion_ids) + sum(map(len, self.completion_ids))

"""The OpenAI protocol, as far as it is spoken here: what is asked, and what comes back."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, Field, model_validator

from penchant.examples import Text


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked: to answer messages, or to go on after plain text."""

    prompt: Text
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    """Another seed makes it another request, answered anew."""

    def key(self, model: str) -> str:
        """sha256 of all that the answer depends on; the same model may move to another URL."""
        return hashlib.sha256(json.dumps([model, self.settings()], sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """The request in the words of the protocol, without those that ask for nothing."""
        settings: dict[str, Any] = {"temperature": self.temperature}
        if isinstance(self.prompt, str):
            settings["prompt"] = _encodable(self.prompt)
        else:
            settings["messages"] = [{key: _encodable(text) for key, text in turn.items()} for turn in self.prompt]
        if self.top_p < 1:
            settings["top_p"] = self.top_p
        if self.top_k > 0:
            settings["extra_body"] = {"top_k": self.top_k}  # many servers know it, the protocol does not
        if self.max_tokens is not None:
            settings["max_tokens"] = self.max_tokens
        if self.seed is not None:
            settings["seed"] = self.seed
        return settings


@dataclass(frozen=True)
class Reply:
    """What a server has answered."""

    text: str
    finish: str
    """Why it ended there: `stop`, or `length` at the limit of tokens."""
    from_cache: bool = False


class Message(BaseModel):
    """A turn of a chat; a server that declines to speak sends no content, and that is no answer."""

    content: str


class Choice(BaseModel):
    """One of the answers: a message to messages, a text to plain text."""

    message: Message | None = None
    text: str | None = None
    finish_reason: str | None = None

    @model_validator(mode="after")
    def _is_there(self) -> Choice:
        if self.message is None and self.text is None:
            raise ValueError("neither message nor text")
        return self


class Response(BaseModel):
    """Of what a server sends, what is read here."""

    choices: list[Choice] = Field(min_length=1)
    usage: Any = None

    @property
    def reply(self) -> Reply:
        """The first answer; one is all that is asked for."""
        choice = self.choices[0]
        text = choice.message.content if choice.message else choice.text
        return Reply(text or "", choice.finish_reason or "stop")

    @property
    def num_tokens(self) -> int:
        """Tokens of question and answer; 0 where the server does not say."""
        total = self.usage.get("total_tokens") if isinstance(self.usage, dict) else None
        return total if isinstance(total, int) else 0


def pause_asked_for(retry_after: str) -> float | None:
    """The pause that a server asks for, given in seconds or as a date; None where it asks for none."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if seconds > 0 else None


def _encodable(text: str) -> str:
    """The text with a mark where half a surrogate pair stands, which nobody can send."""
    return text.encode(errors="replace").decode()

"""A language model behind an OpenAI-compatible URL: many requests at once, each retried when it fails, none twice."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from penchant import stopping
from penchant.errors import UserError
from penchant.online.answer_cache import AnswerCache
from penchant.online.protocol import ChatRequest, Reply, Response, pause_asked_for

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_RETRIED = {408, 409, 429}
"""Statuses that may pass, beside those of 500 and above."""

_LONGEST_PAUSE_S = 60.0
"""Also where the server asks for a longer one."""

_HEARING_S = 0.2
"""A wish to stop is heard this soon."""

_POLL_S = 0.05
_FAILURES_IN_A_ROW = 20
_QUOTED = 300
"""Characters of what a server says that an error quotes."""


@dataclass(frozen=True)
class Failure:
    """There is no reply: every try has failed, the last for this reason."""

    reason: str


Ask = Callable[[ChatRequest], Awaitable[Reply | Failure]]
"""What a job asks with."""

Result = TypeVar("Result")


@dataclass
class Tally:
    """What a client has seen so far."""

    asked: int = 0
    """Requests that the server has answered."""
    from_cache: int = 0
    retries: int = 0
    failed: int = 0
    """Requests of which every try failed."""
    tokens: int = 0
    """As the server counts them, those of the questions included."""


class ChatClient:
    """Asks a server; what it has answered is kept and not asked again, nor by other processes with the same cache."""

    def __init__(
        self,
        url: str,
        model: str,
        key_from: str = "OPENAI_API_KEY",
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 5,
        cache: Path | None = None,
        backoff_s: float = 0.5,
    ) -> None:
        """`key_from` names the environment variable with the key; `cache` is a file of JSON lines, made when missing.

        Raises:
            UserError: the URL cannot be asked, or the package openai is missing.
        """
        try:
            import openai  # noqa: F401  (an extra, and slow to load)
        except ImportError:
            raise UserError("Asking a server needs the package openai: pip install 'penchant[server]'.") from None
        self.url, self.model, self.tally = _checked(url), model, Tally()
        self._key_from, self._key = key_from, _key_in(key_from)
        self._parallel, self._timeout_s, self._retries, self._backoff_s = parallel, timeout_s, retries, backoff_s
        self._cache = AnswerCache(cache or _default_cache())
        self._failures_in_a_row, self._last_failure = 0, ""
        self._dice = random.Random()  # of its own: pauses of random length must not touch a run's random numbers

    def ask(
        self, requests: Sequence[ChatRequest], advance: Callable[[int], None] = lambda n: None
    ) -> list[Reply | Failure]:
        """The replies to many requests, in their order; calls `advance(requests)` as they come.

        Raises:
            UserError: the server refuses the key or a request, or gives no usable answer at all.
            StopRequested: somebody asked to stop; what had come is kept.
        """
        return self.run([_asking(request) for request in requests], advance)

    def run(
        self, jobs: Sequence[Callable[[Ask], Awaitable[Result]]], advance: Callable[[int], None] = lambda n: None
    ) -> list[Result]:
        """The results of jobs that ask one thing after another; as many are under way at once as `parallel` says.

        Raises as `ask` does.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            results = asyncio.run(self._run(jobs, advance))
        else:  # a notebook has its own loop in this thread
            with ThreadPoolExecutor(1) as thread:
                results = thread.submit(asyncio.run, self._run(jobs, advance)).result()
        if self.tally.failed and not self.tally.asked and not self.tally.from_cache:
            self._give_up()
        return results

    async def _run(
        self, jobs: Sequence[Callable[[Ask], Awaitable[Result]]], advance: Callable[[int], None]
    ) -> list[Result]:
        from openai import AsyncOpenAI

        results: dict[int, Result] = {}
        waiting = iter(enumerate(jobs))

        async def work(ask: Ask) -> None:
            for number, job in waiting:
                results[number] = await job(ask)
                advance(1)
                await asyncio.sleep(0)  # where all comes from the cache nothing else lets the others, or a stop, in

        async with AsyncOpenAI(base_url=self.url, api_key=self._key, max_retries=0, timeout=self._timeout_s) as server:
            ask = functools.partial(self._answer, server)
            workers = [asyncio.create_task(work(ask)) for _ in range(min(self._parallel, len(jobs)))]
            try:
                working = set(workers)
                while working:
                    ended, working = await asyncio.wait(
                        working, timeout=_HEARING_S, return_when=asyncio.FIRST_EXCEPTION
                    )
                    for worker in ended:
                        worker.result()
                    stopping.check()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [results[number] for number in range(len(jobs))]

    async def _answer(self, server: AsyncOpenAI, request: ChatRequest) -> Reply | Failure:
        """The kept reply, or a new one."""
        key = request.key(self.model)
        while not self._cache.claim(key):  # the same is being asked just now
            await asyncio.sleep(_POLL_S)
        try:
            kept = self._cache.get(key)
            if kept is None:
                return await self._ask(server, request, key)
            self.tally.from_cache += 1
            return kept
        finally:
            self._cache.release(key)

    async def _ask(self, server: AsyncOpenAI, request: ChatRequest, key: str) -> Reply | Failure:
        from openai import APIError

        endpoint = server.completions if isinstance(request.prompt, str) else server.chat.completions
        for number in itertools.count():
            try:
                async with asyncio.timeout(self._timeout_s):  # those of http begin anew with every byte
                    raw = await endpoint.with_raw_response.create(model=self.model, **request.settings())
                response = Response.model_validate_json(raw.http_response.content)
            except (APIError, TimeoutError, ValidationError) as error:
                reason, pause_s = self._trouble(error, number)
            else:
                # No `await` stands between the server's last byte and the disk: nothing that has come can be lost.
                self._cache.keep(key, response.reply)
                self._failures_in_a_row = 0
                self.tally.asked += 1
                self.tally.tokens += response.num_tokens
                return response.reply
            if number == self._retries:
                break
            self.tally.retries += 1
            await asyncio.sleep(pause_s)
        self.tally.failed += 1
        self._failures_in_a_row, self._last_failure = self._failures_in_a_row + 1, reason
        if self._failures_in_a_row >= _FAILURES_IN_A_ROW:
            self._give_up()
        return Failure(reason)

    def _give_up(self) -> NoReturn:
        raise UserError(
            f"The server at {self.url} gives no usable answer: {self._last_failure}. What it has answered is kept; when"
            " it is well again, the same command goes on."
        )

    def _trouble(self, error: Exception, number: int) -> tuple[str, float]:
        """What went wrong in the try with this number (from 0), and the pause before the next.

        Raises:
            UserError: another try would end in the same way.
        """
        from openai import APIStatusError, APITimeoutError

        pause_s = min(self._backoff_s * 2 ** min(number, 10), _LONGEST_PAUSE_S) * self._dice.uniform(0.5, 1.0)
        if isinstance(error, APIStatusError):
            self._refuse_refusal(error)
            asked_s = pause_asked_for(error.response.headers.get("retry-after", ""))
            return self._quoted(error.message), min(asked_s or pause_s, _LONGEST_PAUSE_S)
        if isinstance(error, TimeoutError | APITimeoutError):
            return f"no whole answer came within {self._timeout_s:g} s", pause_s
        if isinstance(error, ValidationError):
            came = error.errors()[0]["input"]
            text = came.decode(errors="replace") if isinstance(came, bytes) else str(came)
            return f"what came is no answer of a language model: '{self._quoted(text)}'", pause_s
        return self._quoted(str(error.__cause__ or error)), pause_s

    def _refuse_refusal(self, error: APIStatusError) -> None:
        status = error.status_code
        if status in _RETRIED or status >= 500:
            return
        # Raised from None: what the server said may repeat the key.
        if status in (401, 403):
            has = "refuses the key that stands" if os.environ.get(self._key_from) else "wants a key, and none stands"
            raise UserError(
                f"The server at {self.url} {has} in the environment variable {self._key_from} (status {status});"
                " put one there that it accepts, or name another variable in judge.key_from."
            ) from None
        raise UserError(
            f"The server at {self.url} refuses what its model '{self.model}' is asked: {self._quoted(error.message)}."
            " Check judge.url, which mostly ends in /v1, and judge.model."
        ) from None

    def _quoted(self, text: str) -> str:
        """What a server says, on one line, cut short, and without the key that it may repeat."""
        if self._key != _NO_KEY:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:_QUOTED].rstrip(".")


def _asking(request: ChatRequest) -> Callable[[Ask], Awaitable[Reply | Failure]]:
    return lambda ask: ask(request)


_NO_KEY = "none"
"""What is sent to servers that want no key, because the protocol wants one."""


def _key_in(variable: str) -> str:
    key = os.environ.get(variable, "").strip() or _NO_KEY
    if not (key.isascii() and key.isprintable()):  # http would refuse it, and quote it
        raise UserError(f"The environment variable {variable} holds characters that no key has; set it again.")
    return key


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise UserError(f"judge.url: '{url}' is no address of a server; write it as http://host:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "judge.url: holds more than scheme, host, port and path; leave out user, password and everything behind the"
            " path, and name the environment variable with the key in judge.key_from."
        )
    return url


def _default_cache() -> Path:
    from penchant.models.load import cache_folder

    return cache_folder() / "answers" / "answers.jsonl"

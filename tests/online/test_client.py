"""Asking a server: everything once, in order, bounded in time and number, and never a word about the key."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from penchant import stopping
from penchant.errors import UserError
from penchant.online.client import ChatClient, Failure
from penchant.online.protocol import ChatRequest, Reply, pause_asked_for
from penchant.stopping import StopRequested

from .fake_server import FakeServer, body, reply_to, reset, silence, status


def echo(request: dict[str, Any]) -> str:
    return "echo " + (request["prompt"] if "prompt" in request else request["messages"][-1]["content"])


def chat(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], **settings)


def client(server: FakeServer, cache: Path, **settings: Any) -> ChatClient:
    return ChatClient(
        server.url, "fake", **{"cache": cache, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, **settings}
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "answers" / "answers.jsonl"


def test_replies_stand_in_the_order_of_the_requests_and_no_more_are_under_way_than_allowed(cache: Path) -> None:
    def slow_first(request: dict[str, Any]) -> str:
        time.sleep(0.1 if echo(request) == "echo 0" else 0.005)
        return echo(request)

    advanced: list[int] = []
    with FakeServer(slow_first) as server:
        replies = client(server, cache, parallel=3).ask([chat(str(number)) for number in range(20)], advanced.append)
    assert replies == [Reply(f"echo {number}", "stop") for number in range(20)]
    assert 2 <= server.most_at_once <= 3
    assert sum(advanced) == 20


def test_what_was_answered_is_never_asked_again_even_of_another_url(cache: Path) -> None:
    with FakeServer(echo) as first, FakeServer(echo) as second:
        client(first, cache).ask([chat("a"), chat("b")])
        asker = client(second, cache)
        replies = asker.ask([chat("b"), chat("c"), chat("a")])
    assert [(reply.text, reply.from_cache) for reply in replies if isinstance(reply, Reply)] == [
        ("echo b", True),
        ("echo c", False),
        ("echo a", True),
    ]
    assert (len(first.requests), len(second.requests)) == (2, 1)
    assert (asker.tally.asked, asker.tally.from_cache, asker.tally.tokens) == (1, 2, 7)


def test_the_same_request_twice_at_once_is_asked_once(cache: Path) -> None:
    with FakeServer(echo, delay_s=0.1) as server:
        replies = client(server, cache).ask([chat("a")] * 5)
    assert len(server.requests) == 1
    assert {reply.text for reply in replies if isinstance(reply, Reply)} == {"echo a"}


def test_whatever_changes_the_answer_makes_another_request(cache: Path) -> None:
    plain = chat("a")
    others = [
        chat("b"),
        chat("a", temperature=0.5),
        chat("a", top_p=0.9),
        chat("a", top_k=4),
        chat("a", max_tokens=9),
        chat("a", seed=0),
        chat("a", seed=1),
        ChatRequest("a"),
        ChatRequest([{"role": "system", "content": "a"}]),
    ]
    keys = [request.key("fake") for request in [plain, *others]] + [plain.key("other")]
    assert len(set(keys)) == len(others) + 2
    assert chat("a").key("fake") == plain.key("fake")


def test_messages_are_answered_as_a_chat_and_plain_text_is_gone_on_with(cache: Path) -> None:
    requests = [chat("a", temperature=0.7, top_p=0.9, top_k=40, max_tokens=5, seed=3), ChatRequest("b")]
    with FakeServer(echo) as server:
        replies = client(server, cache, parallel=1).ask(requests)
    assert replies == [Reply("echo a", "stop"), Reply("echo b", "stop")]
    assert server.paths == ["/v1/chat/completions", "/v1/completions"]
    assert server.requests == [
        {
            "model": "fake",
            "messages": [{"role": "user", "content": "a"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "max_tokens": 5,
            "seed": 3,
        },
        {"model": "fake", "prompt": "b", "temperature": 0.0},
    ]


def test_half_a_surrogate_pair_is_sent_as_a_mark(cache: Path) -> None:
    with FakeServer(echo) as server:
        assert client(server, cache).ask([chat("a \udc00 b")]) == [Reply("echo a ? b", "stop")]


def test_a_reply_is_on_the_disk_before_it_is_used(cache: Path) -> None:
    sizes: list[int] = []
    with FakeServer(echo) as server:
        client(server, cache, parallel=1).ask(
            [chat("a"), chat("b")], lambda n: sizes.append(cache.read_text().count('"echo '))
        )
    assert sizes == [1, 2]


def test_half_a_line_in_the_cache_swallows_nothing(cache: Path) -> None:
    with FakeServer(echo) as server:
        client(server, cache).ask([chat("a"), chat("b")])
        whole = cache.read_bytes()
        cache.write_bytes(whole[: whole.rindex(b"echo")])
        client(server, cache).ask([chat("a"), chat("b")])
        assert len(server.requests) == 3
        replies = client(server, cache).ask([chat("a"), chat("b")])
    assert len(server.requests) == 3
    assert [reply.text for reply in replies if isinstance(reply, Reply)] == ["echo a", "echo b"]


@pytest.mark.parametrize(
    "junk", [b"\x00\xff\n", b"null\n", b'{"key": 1}\n', b"[1, 2]\n", b'{"key": "a", "text": "b"}\n']
)
def test_what_is_no_reply_in_the_cache_is_passed_over(junk: bytes, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(junk)
    with FakeServer(echo) as server:
        assert client(server, cache).ask([chat("a")]) == [Reply("echo a", "stop")]
        client(server, cache).ask([chat("a")])
    assert len(server.requests) == 1


def test_retry_after_is_honoured(cache: Path) -> None:
    began = time.monotonic()
    with FakeServer(echo, [status(429, Retry_After="0.4")]) as server:
        assert client(server, cache).ask([chat("a")]) == [Reply("echo a", "stop")]
    assert time.monotonic() - began >= 0.4


def test_retry_after_is_given_in_seconds_or_as_a_date_and_nonsense_asks_for_nothing() -> None:
    assert pause_asked_for("7") == 7
    assert pause_asked_for("inf") == float("inf")
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < (pause_asked_for(soon) or 0) <= 30
    for nonsense in ("", "-3", "0", "nan", "-inf", "soon", "Fri, 99 Foo 2020", format_datetime(datetime(2001, 1, 1))):
        assert pause_asked_for(nonsense) is None


def test_a_pause_of_a_day_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.online.client._LONGEST_PAUSE_S", 0.1)
    began = time.monotonic()
    with FakeServer(echo, [status(429, Retry_After="86400"), status(503, Retry_After="inf")]) as server:
        assert client(server, cache).ask([chat("a")]) == [Reply("echo a", "stop")]
    assert time.monotonic() - began < 5


def test_pauses_grow(cache: Path) -> None:
    with FakeServer(echo, [status(500)] * 4) as server:
        client(server, cache, retries=4, backoff_s=0.04).ask([chat("a")])
    pauses = [later - earlier for earlier, later in itertools.pairwise(server.times)]
    for number, pause in enumerate(pauses):
        assert pause >= 0.02 * 2**number


@pytest.mark.parametrize("number", [400, 404, 413, 422])
def test_a_refused_request_is_an_error_that_names_the_server_and_is_not_repeated(number: int, cache: Path) -> None:
    with FakeServer(echo, itertools.repeat(status(number, "there is no such thing, " * 100))) as server:
        with pytest.raises(UserError, match="there is no such thing") as refused:
            client(server, cache, parallel=1).ask([chat("a"), chat("b")])
        assert server.url in str(refused.value)
    assert "'fake'" in str(refused.value)
    assert len(str(refused.value)) < 600
    assert len(server.requests) == 1


KEY = "sk-proj-mUgV8sK2qXw7"


@pytest.mark.parametrize(
    "fault",
    [
        status(401, f"Incorrect API key provided: {KEY}"),
        status(403, f"{KEY} may not"),
        status(400, f"your key {KEY} is fine, the rest is not"),
        status(500, f"crashed on {KEY}"),
        body(f"<html>{KEY}</html>".encode()),
        body(json.dumps({"choices": KEY}).encode()),
    ],
    ids=["401", "403", "400", "500", "page", "schema"],
)
def test_the_key_is_sent_and_never_said(
    fault: Any,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # as it comes out of a file
    caplog.set_level(logging.DEBUG)
    with FakeServer(echo, itertools.repeat(fault)) as server, pytest.raises(UserError) as refused:
        client(server, cache).ask([chat("a")])
    assert set(server.keys) == {f"Bearer {KEY}"}
    said = ["".join(traceback.format_exception(refused.value)), *capfd.readouterr(), caplog.text, cache.read_text()]
    assert KEY not in "".join(said)


def test_a_refused_key_stops_at_once_and_the_variable_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", KEY)
    for name, words in (("OUR_KEY", "refuses the key"), ("NO_SUCH_KEY", "wants a key")):
        with (
            FakeServer(echo, itertools.repeat(status(401))) as server,
            pytest.raises(UserError, match=words) as refused,
        ):
            client(server, cache, key_from=name, parallel=1).ask([chat("a"), chat("b")])
        assert name in str(refused.value)
        assert len(server.requests) == 1


def test_a_key_that_http_cannot_carry_is_refused_without_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as refused:
        ChatClient("http://127.0.0.1:1/v1", "fake")
    assert KEY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:99999/v1", "http://[::1/v1"])
def test_only_http_is_asked(url: str) -> None:
    with pytest.raises(UserError, match=r"judge\.url"):
        ChatClient(url, "fake")


@pytest.mark.parametrize("url", ["https://me:secret@a/v1", "https://a/v1?key=secret", "https://a/v1#secret"])
def test_a_url_with_a_secret_in_it_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(UserError, match=r"judge\.key_from") as refused:
        ChatClient(url, "fake")
    assert "secret" not in str(refused.value)


def test_a_server_that_is_not_there_is_an_error_after_the_last_try(cache: Path) -> None:
    with FakeServer(echo) as server:
        asker = client(server, cache)
    with pytest.raises(UserError, match=r"no usable answer: .*(refused|failed)"):
        asker.ask([chat("a"), chat("b")])
    assert asker.tally.failed == 2
    assert asker.tally.retries == 4


def test_one_failure_among_answers_is_a_failure_of_that_request_alone(cache: Path) -> None:
    with FakeServer(echo, itertools.repeat(status(503), 3)) as server:
        replies = client(server, cache, parallel=1).ask([chat("a"), chat("b")])
        assert replies == [Failure("Error code: 503 - no luck today"), Reply("echo b", "stop")]
        assert len(server.requests) == 4
        assert client(server, cache).ask([chat("a")]) == [Reply("echo a", "stop")]  # a failure is not kept


def test_a_server_that_dies_on_the_way_is_not_asked_a_thousand_times(cache: Path) -> None:
    def fault(number: int) -> Any:
        return status(500) if number else lambda handler: handler.send(200, json.dumps(reply_to({}, "x")).encode())

    with FakeServer(echo, map(fault, itertools.count())) as server:
        asker = client(server, cache, parallel=4, retries=0)
        with pytest.raises(UserError, match="no usable answer"):
            asker.ask([chat(str(number)) for number in range(1000)])
        assert 21 <= len(server.requests) <= 28  # each of the four may be on its way, and have begun one more


def test_a_stop_is_heard_within_a_second_and_what_had_come_is_kept(cache: Path) -> None:
    with FakeServer(echo) as server, stopping.listening():
        asker = client(server, cache, timeout_s=60.0)
        asker.ask([chat("a")])
        server.faults = itertools.repeat(silence)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(StopRequested):
            asker.ask([chat("a"), chat("b"), chat("c")])
        assert time.monotonic() - began < 1.3
        assert asker.tally.from_cache == 1


def test_a_stop_is_heard_while_everything_comes_from_the_cache(cache: Path) -> None:
    with FakeServer(echo) as server, stopping.listening():
        asker = client(server, cache)
        asker.ask([chat("a")])

        def advance(n: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM) if asker.tally.from_cache == 10 else None
            time.sleep(0.002)

        with pytest.raises(StopRequested):
            asker.ask([chat("a")] * 1000, advance)
        assert asker.tally.from_cache < 500


def test_a_notebook_with_a_loop_of_its_own_can_ask(cache: Path) -> None:
    async def cell() -> Any:
        return client(server, cache).ask([chat("a")])

    with FakeServer(echo) as server:
        assert asyncio.run(cell()) == [Reply("echo a", "stop")]


def test_an_error_in_one_job_ends_the_others_and_comes_out_as_it_is(cache: Path) -> None:
    async def failing(ask: Any) -> None:
        raise ZeroDivisionError

    async def waiting(ask: Any) -> None:
        await ask(chat("a"))

    with FakeServer(echo, [silence]) as server:
        began = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            client(server, cache).run([waiting, failing, failing])
        assert time.monotonic() - began < 1


def test_a_connection_that_breaks_is_tried_again(cache: Path) -> None:
    with FakeServer(echo, [reset, reset]) as server:
        asker = client(server, cache)
        assert asker.ask([chat("a")]) == [Reply("echo a", "stop")]
    assert asker.tally.retries == 2

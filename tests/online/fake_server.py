"""A language model behind a real port that answers as it is told, and fails as it is told."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Fault = Callable[["Handler"], None]
"""What becomes of a request instead of an answer."""

Answerer = Callable[[dict[str, Any]], str]
"""The text that answers a request, which is the JSON that came."""


class FakeServer(ThreadingHTTPServer):
    """Answers chats, and goes on with plain texts, on a port of its own; notes all that it is asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answerer, faults: Iterable[Fault | None] = (), delay_s: float = 0.0) -> None:
        """Each of the first requests meets one of `faults`, if not None; all others get `answer`, after a delay."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.delay_s = answer, delay_s
        self.faults: Iterator[Fault | None] = iter(faults)
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def times_asked(self) -> Counter[str]:
        """How often each request came."""
        with self.lock:
            return Counter(json.dumps(request, sort_keys=True) for request in self.requests)

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave connections behind; that is no news."""

    def enter(self, handler: Handler, request: dict[str, Any]) -> Fault | None:
        """Notes a request; the fault that it meets."""
        with self.lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.paths.append(handler.path)
            self.keys.append(handler.headers["Authorization"])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return next(self.faults, None)

    def leave(self) -> None:
        """A request is over."""
        with self.lock:
            self._now -= 1


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """A request for an answer."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.enter(self, request)
        try:
            if fault is not None:
                fault(self)
                return
            time.sleep(self.server.delay_s)
            self.send(200, json.dumps(reply_to(request, self.server.answer(request))).encode())
        finally:
            self.server.leave()

    def send(self, status: int, body: bytes, **headers: str) -> None:
        """A whole response."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""


def reply_to(request: dict[str, Any], text: str, finish: str = "stop") -> dict[str, Any]:
    """The JSON of an answer."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if "messages" in request:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return {"id": "1", "choices": [choice], "usage": {"total_tokens": 7}}


def status(number: int, message: str = "no luck today", **headers: str) -> Fault:
    """A status, with a message as servers send them."""
    body = json.dumps({"error": {"message": message, "type": "error"}}).encode()
    return lambda handler: handler.send(number, body, **headers)


def body(content: bytes) -> Fault:
    """Success, but for the content."""
    return lambda handler: handler.send(200, content)


def reset(handler: Handler) -> None:
    """The connection is gone without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def silence(handler: Handler) -> None:
    """Nothing, for as long as the server stands."""
    handler.close_connection = True
    handler.server.closing.wait()


def drip(handler: Handler) -> None:
    """A byte every 50 ms, without an end."""
    handler.close_connection = True
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"1\r\n \r\n")


def shown(request: dict[str, Any]) -> tuple[str, ...]:
    """The completions that a judge is shown as A and as B."""
    text = request["messages"][-1]["content"]
    found = [
        re.search(rf"^-+ answer {letter} (\w+) -+\n(.*)\n-+ end of answer {letter} \1 -+$", text, re.M | re.S)
        for letter in "AB"
    ]
    assert all(found), text
    return tuple(block[2] for block in found if block)


def longer_is_better(request: dict[str, Any]) -> str:
    """A judge with a taste of its own, whatever the order."""
    first, second = shown(request)
    return f"They differ in length.\n{'A' if len(first) > len(second) else 'B'}"

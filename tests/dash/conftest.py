"""Folders of runs, and the page over them, served for real."""

from __future__ import annotations

import http.client
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from penchant.dash.runs import Runs
from penchant.dash.server import ADDRESS, make_app

from ..report.conftest import parts_of_a_run, write_json, write_jsonl

TOKEN = "a-token-that-nobody-guesses"
MakeRun = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for runs."""
    made = tmp_path / "runs"
    made.mkdir()
    return made


@pytest.fixture
def make_run(folder: Path) -> MakeRun:
    """Makes a complete run directory in the folder; a part given by its file name replaces that part."""

    def make(name: str = "concise", parts: Mapping[str, Any] | None = None, **size: int) -> Path:
        run_dir = folder / name
        run_dir.mkdir(parents=True)
        for file, content in {**parts_of_a_run(**size), **(parts or {})}.items():
            if isinstance(content, str):
                (run_dir / file).write_text(content, encoding="utf-8")
            elif file.endswith(".jsonl") and content is not None:
                write_jsonl(run_dir / file, content)
            elif content is not None:
                write_json(run_dir / file, content)
        return run_dir

    return make


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    text: str


@dataclass(frozen=True)
class Site:
    """The page, served on a port of its own."""

    port: int

    @property
    def origin(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    @property
    def entrance(self) -> str:
        return f"{self.origin}/?token={TOKEN}"

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: str | None = None,
        signed_in: bool = True,
        **headers: str | None,
    ) -> Answer:
        """Sends the request as it stands: no path is put in order, no header is made but these; None leaves one out."""
        cookie = f"penchant-{self.port}={TOKEN}" if signed_in else None
        sent = {"host": f"{ADDRESS}:{self.port}", "cookie": cookie}
        if body is not None:
            sent |= {"content-type": "application/x-www-form-urlencoded", "content-length": str(len(body.encode()))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(None if body is None else body.encode())
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, told, response.read().decode())
        finally:
            connection.close()


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    """The page over the folder."""
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = uvicorn.Config(make_app(Runs([folder]), TOKEN, port), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield Site(port)
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's browser."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    return found

"""The server of the live page."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from penchant.errors import UserError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"the live page needs the extra ui ({error}): pip install 'penchant[ui]'") from None

from penchant.dash.pages import Pages
from penchant.dash.runs import Runs
from penchant.dash.wall import Wall

ADDRESS = "127.0.0.1"
"""This machine only; from elsewhere the page is reached through ssh -L."""

_SECONDS_TO_END = 2


def make_app(runs: Runs, token: str, port: int) -> Wall:
    """The page over some runs, for whoever has the token."""
    pages = Pages(runs, token)
    routes = [
        Route("/", pages.index),
        Route("/compare", pages.compare),
        Route("/run/{name:path}", pages.run),
        Route("/pairs/{name:path}", pages.pairs),
        Route("/report/{name:path}", pages.report),
        Route("/stop/{name:path}", pages.stop, methods=["POST"]),
        Route("/note/{name:path}", pages.note, methods=["POST"]),
        Route("/static/{file}", pages.static),
    ]
    return Wall(Starlette(routes=routes, exception_handlers=pages.failures), token, port)


def serve(folders: Sequence[Path], port: int, announce: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C; `announce` is told its address, token and all, when it can be opened.

    Raises:
        UserError: a folder is not there, or the port is taken.
    """
    runs, token = Runs(folders), secrets.token_urlsafe(24)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port: {port} cannot be had ({reason}); give another, or 0 for any free one.") from None
        listener.listen()
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            make_app(runs, token, port),
            log_level="warning",
            access_log=False,  # it would write the token
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
        announce(f"http://{ADDRESS}:{port}/?token={token}")
        uvicorn.Server(config).run(sockets=[listener])

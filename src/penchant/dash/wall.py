"""Who may see the page and what may be sent to it: every request passes here first.

The page listens on this machine only, but other pages in the same browser can send requests to it too. So a request
must name this machine as its host (a foreign name that was made to point here is DNS rebinding), must bring the token,
and what changes anything must come from the page itself.
"""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""What pages may load and run: this server's own files; nothing that stands in a page itself."""

_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

_NAMES_OF_THIS_MACHINE = {"127.0.0.1", "localhost", "[::1]"}
_WITHOUT_TOKEN = PlainTextResponse(
    "This page needs the token of its address. Open the whole address that `penchant dash` has printed.\n", 403
)


class Wall:
    """The ASGI app behind it sees only requests that may be answered."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"penchant-{port}"  # cookies know no ports: two pages would sign each other out

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope) if scope["type"] == "http" else PlainTextResponse("no\n", 404)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        else:
            await refusal(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """What a request gets instead of an answer; None where it is to be answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _hostname(host) not in _NAMES_OF_THIS_MACHINE:
            return PlainTextResponse("This page answers to the names of this machine only.\n", 421)
        path = scope["path"]
        if any(part in (".", "..") for part in path.replace("\\", "/").split("/")) or "\0" in path:
            return PlainTextResponse("There is no such page.\n", 400)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("This cannot be done.\n", 405)
        if not self._has_cookie(headers) or b"token=" in scope["query_string"]:
            return self._let_in(scope)
        if scope["method"] == "POST" and not _comes_from(host, headers):
            return PlainTextResponse("This was not sent by the page itself.\n", 403)
        return None

    def _let_in(self, scope: Scope) -> Response:
        """Exchanges the token of the address for a cookie, so that it stands in no address any more."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if scope["method"] != "GET" or len(given) != 1 or not _equal(given[0], self._token):
            return _WITHOUT_TOKEN
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        path = "/" + scope["path"].lstrip("/")  # `//elsewhere` would lead to another server
        response = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
        response.set_cookie(self._cookie, self._token, path="/", httponly=True, samesite="strict")
        return response

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._token)


def form_key(token: str) -> str:
    """What a form of the page carries, so that no other page can fill it in."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def is_form_key(given: str, token: str) -> bool:
    """Whether a form was made by this server."""
    return _equal(given, form_key(token))


def _equal(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())


def _hostname(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _comes_from(host: str, headers: Headers) -> bool:
    """Whether the browser says that a page of this very server sent the request."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site not in (None, "same-origin"):
        return False
    # A form on a page with the policy `no-referrer` has the origin "null"; then the browser must vouch for it.
    return origin == f"http://{host}" or (origin == "null" and site == "same-origin")


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending

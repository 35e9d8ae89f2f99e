"""Who may ask, and how much: what every request passes before a route sees it, and how a route reads its body.

Against pages of other sites that a person's browser shows: Host must be a name of this server (a name that was made
to point here, DNS rebinding, is none), and Origin one whose pages may ask. Against other people: a key. Against
clients that mean ill or are broken: bounds on sizes and numbers; those on time are `connection.py`'s.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.server.errors import ApiError, as_api_error
from griffin_gguf.runtime.server.settings import Settings, is_loopback

T = TypeVar("T")

log = logging.getLogger("griffin.server")

#: The status of a request whose client went away, as nginx has it; nobody receives it.
GONE = 499

#: Reached without a key: they hold no more than that a server is here. A browser cannot send a key for a page.
_OPEN = {"/", "/health", "/chat"}

#: Schemes of programs that show pages of their own (Electron, Tauri, VS Code); no web site can claim one.
_DESKTOP = {"app", "file", "tauri", "vscode-file", "vscode-webview"}

#: Status -> OpenAI's type of error, where the kind of status does not say it.
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

#: On every answer, unless a route says otherwise: nothing here is to be framed, guessed at, kept or embedded elsewhere.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(:\d{1,5})?", re.IGNORECASE | re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#\s]*)", re.ASCII)

_LONGEST_PATH = 100  # characters of it in the log

#: What is read of a body that nobody wants, so that its client gets to read the answer: a share of `max_body`, seconds.
_DRAIN_SHARE, _DRAIN_TIME = 8, 2.0

#: Objects, arrays and strings that a body may hold: a million of them stop everything for a second.
_VALUES = 150_000


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `ApiError`: 413 for one too long, 415 for a packed one, 408 for one too slow."""
    settings: Settings = request.app.state.settings
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding: expected none; a body is plain JSON")
    too_long = ApiError(413, f"body: expected at most {settings.max_body} bytes")
    if int(request.headers.get("content-length", 0)) > settings.max_body:
        raise too_long
    parts, count = list[bytes](), 0
    try:
        async with asyncio.timeout(settings.body_time):
            async for part in request.stream():
                count += len(part)
                if count > settings.max_body:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"body: expected within {settings.body_time:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client went away") from None
    body = b"".join(parts)
    if settings.log_prompts:
        log.info("body of %s: %r", request.url.path, body)
    return body


def parse(body: bytes, kind: type[T]) -> T:
    """The JSON of a body as a `kind`. Raises `ApiError` 400, which names the field; unknown fields are passed over."""
    if not body.strip():
        raise ApiError(400, "body: expected JSON, found nothing")
    if _values(body) > _VALUES:
        raise ApiError(400, f"body: expected at most {_VALUES} objects, arrays and strings")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        field = place.removesuffix("`") or None
        raise ApiError(400, f"{field or 'body'}: {problem[:1].lower()}{problem[1:]}", param=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = "text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ApiError(400, f"body: expected JSON: {problem}") from None
    except RecursionError:
        raise ApiError(400, "body: expected JSON nested less deeply") from None


def _values(body: bytes) -> int:
    """How many objects, arrays and strings some JSON holds, or more where even that is at most `_VALUES`."""
    most = _count(body)
    if most <= _VALUES:
        return most
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # now every quote begins or ends a string
    strings = plain.count(b'"') // 2
    if strings > _VALUES:
        return strings
    return strings + _count(b"".join(plain.split(b'"')[::2]))


def _count(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[") + text.count(b'"') // 2


async def while_connected(request: Request, awaitable: Awaitable[T]) -> T:
    """What `awaitable` comes to; it is cancelled where the client goes away first. The body must be read before.

    Raises `ApiError` 499 then, and else what `awaitable` raises.
    """
    work = asyncio.ensure_future(awaitable)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(GONE, "the client went away")
        return work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A streamed answer: at its end, whatever that was, its generator is closed and what it rests on given back.

    That is `held`, also where the client is gone before the generator has begun.
    """

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, held: AsyncExitStack | None = None) -> None:
        super().__init__(pieces, media_type=media_type)
        self._held = held or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._held:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send all pieces."""
        try:
            await super().stream_response(send)
        finally:
            if close := getattr(self.body_iterator, "aclose", None):
                await close()


def error_response(path: str, error: ApiError) -> Response:
    """`error` in the shape of the interface that `path` belongs to: OpenAI's under /v1, else Ollama's."""
    shape = openai_error(error) if path.startswith("/v1/") else {"error": error.message}
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(shape), error.status, headers, "application/json")


def openai_error(error: ApiError) -> dict[str, dict[str, str | None]]:
    """`error` as OpenAI's clients read it."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


@dataclass
class Gate:
    """What all requests share. With `closing` no more are let in."""

    running: int = 0  # requests in work; not those that only wait for the rest of a body that nobody wants
    closing: bool = False


class Guard:
    """The middleware: lets a request through to `app`, or answers it."""

    def __init__(self, app: ASGIApp, settings: Settings, gate: Gate) -> None:
        self._app, self._settings, self._gate = app, settings, gate
        self._key = settings.api_key.encode() if settings.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(headers, receive, send, self._settings, self._gate)
        self._gate.running += 1
        try:
            self._check_sender(headers)
            exchange.origin = headers.get("origin")
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, exchange.receive, exchange.send)
                return
            self._check_room(scope, headers)
            self._check_key(scope, headers)
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            failure = as_api_error(error)
            if failure.status == 500:
                log.error(
                    "%s %s: %s", scope["method"], shown_path(scope), _told(error, texts=self._settings.log_prompts)
                )
            if not exchange.begun:  # else the client sees its connection closed in the middle
                await error_response(scope["path"], failure)(scope, exchange.receive, exchange.send)
        finally:
            self._gate.running -= 1

    def _check_sender(self, headers: Headers) -> None:
        """Host and Origin; `ApiError` 403 for any that is not ours."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not allowed_host(hosts[0], self._settings):
            raise ApiError(403, "Host: is no name of this server (griffin serve --allow-host adds one)")
        if len(origins) > 1 or not all(allowed_origin(o, hosts[0], self._settings) for o in origins):
            raise ApiError(403, "Origin: pages from there may not ask (griffin serve --allow-origin adds one)")

    def _check_room(self, scope: Scope, headers: Headers) -> None:
        """Sizes and numbers."""
        if self._gate.closing:
            raise ApiError(503, "the server is ending", retry_after=10)
        if self._gate.running > self._settings.connections:
            raise ApiError(503, f"{self._settings.connections} requests are in work already", retry_after=1)
        length = sum(len(name) + len(value) + 4 for name, value in headers.raw)
        if length + len(scope["raw_path"]) + len(scope["query_string"]) > self._settings.max_header:
            raise ApiError(431, f"headers: expected at most {self._settings.max_header} bytes")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """The key, where there is one and the path is not open to all; `ApiError` 401 without it."""
        if scope["path"] not in _OPEN and not has_key(headers, self._key):
            raise ApiError(401, "Authorization: expected Bearer and this server's API key", code="invalid_api_key")


def has_key(headers: Headers, key: bytes | None) -> bool:
    """Whether a request brings the key (None: none is needed), compared in a time that tells nothing about it."""
    if key is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode("latin-1"), key) and scheme.lower() == "bearer"


def allowed_host(header: str, settings: Settings) -> bool:
    """Whether a Host header names this server.

    An address is always right where it can be the one that was connected to: no name was made to point here then.
    """
    found = _HOST.fullmatch(header)
    if found is None:
        return False
    name = found[1].strip("[]").lower().removesuffix(".")
    if _is_local(name) or name in {h.strip("[]").lower() for h in (settings.host, *settings.allow_hosts)}:
        return True
    address = _address(name)
    everywhere = _address(settings.host)
    if everywhere is None or not everywhere.is_unspecified:
        return False
    return address is not None or name == socket.gethostname().lower()


def allowed_origin(origin: str, host: str, settings: Settings) -> bool:
    """Whether pages of `origin` may ask a server that was asked as `host`: its own, this machine's, those allowed."""
    origin = origin.lower()
    if origin in {o.lower() for o in settings.allow_origins} or "*" in settings.allow_origins:
        return True
    if origin in (f"http://{host.lower()}", f"https://{host.lower()}"):
        return True
    found = _ORIGIN.fullmatch(origin)
    if found is None:  # "null" too, which any site can bring about
        return False
    if found[1] in _DESKTOP:
        return True
    place = _HOST.fullmatch(found[2])
    return found[1] in ("http", "https") and place is not None and _is_local(place[1].strip("[]"))


def _is_local(name: str) -> bool:
    """Whether browsers connect to this machine for that name or address, whatever a DNS server says."""
    return is_loopback(name) or name.endswith(".localhost")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _preflight(headers: Headers) -> Response:
    """What a browser wants to know before it lets a page of an allowed origin ask."""
    allowed = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "content-type"),
        "Access-Control-Max-Age": "600",
    }
    return Response(status_code=204, headers=allowed)


def shown_path(scope: Scope) -> str:
    """The path for a line of the log: as it was sent, without the query, and not all of a long one."""
    return scope["raw_path"].decode("ascii", "replace")[:_LONGEST_PATH]


def _told(error: BaseException, *, texts: bool) -> str:
    """A failure of ours and where it is; its message only where the log may hold `texts`, which it may quote."""
    if isinstance(error, ApiError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, GriffinError):
        return str(error)
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"unexpected {type(error).__name__}{f': {error}' if texts else ''}\n{where}"


class _Exchange:
    """One request on its way: sees to what every answer has, and to a body that is left unread."""

    def __init__(self, headers: Headers, receive: Receive, send: Send, settings: Settings, gate: Gate) -> None:
        self._receive, self._send, self._settings, self._gate = receive, send, settings, gate
        self._more = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._expects = "expect" in headers  # the client waits for a word before it sends its body
        self.origin: str | None = None  # once it is an allowed one
        self.begun = False  # the answer

    async def receive(self) -> Message:
        """As the server's."""
        message = await self._receive()
        self._expects = False
        self._more = self._more and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """As the server's, with our headers."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self.origin is not None:
                headers["Access-Control-Allow-Origin"] = self.origin
                headers["Access-Control-Expose-Headers"] = "Retry-After"
                headers.add_vary_header("Origin")
            self.begun = True
            await self._drain()
            if self._more:
                headers["Connection"] = "close"  # what still comes is no next request
        await self._send(message)

    async def _drain(self) -> None:
        """Read what is left of the body, within bounds: of a connection closed on it, the answer may get lost."""
        left = _DRAIN_SHARE * self._settings.max_body
        self._gate.running -= 1
        try:
            async with asyncio.timeout(_DRAIN_TIME):
                while self._more and not self._expects and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            return
        finally:
            self._gate.running += 1

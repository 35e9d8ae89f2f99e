"""The server's app: all routes, behind the guard, each request counted and told of in the log."""

import contextvars
import logging
import time
from asyncio import to_thread
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin_gguf.runtime.server import ollama, openai, page
from griffin_gguf.runtime.server.answers import Reply
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.guard import GONE, Gate, Guard, error_response, has_key, shown_path
from griffin_gguf.runtime.server.metrics import CONTENT_TYPE_LATEST, Metrics
from griffin_gguf.runtime.server.models import Models
from griffin_gguf.runtime.server.settings import Settings

log = logging.getLogger("griffin.server")

#: How the metrics call a path that is none of ours.
_NOWHERE = "other"


def create_app(models: Models, settings: Settings) -> Starlette:
    """The app that serves `models`; it closes them at its end.

    `app.state` holds `settings`, `models`, `metrics` and `gate`, which whoever runs the app closes when it is to end.
    """
    gate, metrics = Gate(), Metrics(models.loaded)
    routes = [
        Route("/health", _health),
        Route("/metrics", _metrics),
        *page.routes(),
        *ollama.routes(models),
        *openai.routes(models),
    ]

    def replied(name: str, reply: Reply) -> None:
        metrics.answered(name, reply)
        if (record := _record.get()) is not None:
            record.count(reply)
        if settings.log_prompts:
            log.info("answer of %s: %r", name, reply.text)

    models.on_reply = replied
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(_Watch, routes=routes, metrics=metrics),
            Middleware(Guard, settings=settings, gate=gate),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.settings, app.state.models, app.state.metrics, app.state.gate = settings, models, metrics, gate
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncGenerator[None, None]:
    yield
    await app.state.models.close()


async def _health(request: Request) -> Response:
    """That the server is there; to those who may ask also what is loaded."""
    status: dict[str, object] = {"status": "ok"}
    key: str | None = request.app.state.settings.api_key
    if has_key(request.headers, key.encode() if key is not None else None):
        models: Models = request.app.state.models
        status["loaded"] = [one.entry.name for one in models.loaded()]
        status["models"] = [entry.name for entry in await to_thread(models.entries)]  # documents' records are read
    return Response(msgspec.json.encode(status), media_type="application/json")


async def _metrics(request: Request) -> Response:
    """Prometheus's page."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says of a path or a method that it does not have."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path here", 405: f"expected {(error.headers or {}).get('Allow')}, not this method"}
    response = error_response(request.url.path, ApiError(error.status_code, what.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


@dataclass
class _Record:
    """What the log says of a request."""

    status: int = 0
    complete: bool = False
    prompt: int = 0
    cached: int = 0
    answer: int = 0

    def count(self, reply: Reply) -> None:
        """Add an answer's tokens."""
        self.prompt += reply.prompt_tokens
        self.cached += reply.cached_tokens
        self.answer += reply.answer_tokens

    def __str__(self) -> str:
        tokens = f", {self.prompt} tokens in ({self.cached} cached), {self.answer} out" if self.prompt else ""
        return tokens + ("" if self.complete and self.status != GONE else ", the client went away")


#: Of the request that the running task belongs to.
_record: contextvars.ContextVar[_Record | None] = contextvars.ContextVar("record", default=None)


class _Watch:
    """Middleware: counts every request and writes its line of the log, without what a query may hold."""

    def __init__(self, app: ASGIApp, routes: list[Route], metrics: Metrics) -> None:
        self._app, self._routes, self._metrics = app, routes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, began = _Record(), time.perf_counter()
        token = _record.set(record)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            record.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        finally:
            _record.reset(token)
            self._metrics.requested(self._route(scope), record.status)
            milliseconds = 1000 * (time.perf_counter() - began)
            log.info("%s %s %d %.0f ms%s", scope["method"], shown_path(scope), record.status, milliseconds, record)

    def _route(self, scope: Scope) -> str:
        """The path as the table of routes has it: of those there are few, whatever is asked for."""
        found = (route.path for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return next(found, _NOWHERE)

"""Running the app: a socket, uvicorn, and an end in good order.

SIGTERM or Ctrl-C: nothing new is accepted, requests that wait for a slot are refused (503), answers that are being made
have `grace` seconds to end by themselves and are cancelled then. A second one cancels them at once.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator

import uvicorn
from starlette.applications import Starlette

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.server.connection import protocol
from griffin_gguf.runtime.server.guard import Gate
from griffin_gguf.runtime.server.models import Models
from griffin_gguf.runtime.server.settings import Settings

log = logging.getLogger("griffin.server")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 128
_LAST_WORDS = 5  # seconds for connections to close once all answers have ended


def bind(settings: Settings) -> socket.socket:
    """A socket bound to the settings' address. Raises `GriffinError` where that cannot be had."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, number, _, address = found[0]
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise GriffinError(f"{where}: no such address: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a server can follow its predecessor
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise GriffinError(
                f"{where}: is in use already, by another server (Ollama?); --port takes another"
            ) from None
        raise GriffinError(f"{where}: cannot be listened at: {error.strerror}") from None
    return bound


def url(settings: Settings, bound: socket.socket) -> str:
    """Where this machine finds the server: "http://127.0.0.1:11434"."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


def run(app: Starlette, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal says to end and all is in order; `ready` is called once requests are taken."""
    Server(app, ready).run([bound])


class Server(uvicorn.Server):
    """uvicorn's server of `app` (`create_app`'s), with bounds on time and an end of our own."""

    def __init__(self, app: Starlette, ready: Callable[[], None]) -> None:
        settings: Settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(settings),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # a client may say anything of its own address
                server_header=False,
                h11_max_incomplete_event_size=settings.max_header,
                timeout_keep_alive=settings.idle_time,  # type: ignore[arg-type]  # any number of seconds will do
                timeout_graceful_shutdown=settings.grace + 2 * _LAST_WORDS,  # type: ignore[arg-type]
            )
        )
        self._gate: Gate = app.state.gate
        self._models: Models = app.state.models
        self._grace, self._ready = settings.grace, ready
        self._hurry = asyncio.Event()  # of somebody who does not want to wait for the grace time

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in good order."""
        self._gate.closing = True
        self._models.refuse_waiting()
        log.info("ending: running answers have %g seconds", self._grace)
        cutting = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut(self) -> None:
        """Cancel what is still being answered after the grace time; then close what does not close by itself."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._grace)
        log.warning("ending: %d requests are cut off", self._gate.running)
        self._models.cancel_all()
        await asyncio.sleep(_LAST_WORDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Let signals end the server; uvicorn would raise them again afterwards, though all is in order then."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, before = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._asked_to_end)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _asked_to_end(self) -> None:
        if self.should_exit:
            self._hurry.set()
        self.should_exit = True

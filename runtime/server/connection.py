"""One client's connection: uvicorn's, with bounds on time, and on what is read of it before others have their turn.

uvicorn limits how long a connection may idle between requests, nothing else. Here a client has `header_time` from its
first byte to the end of a request's headers, and `send_time` to take what was written for it, however slowly either
trickles; and of connections there are at most twice as many as `connections` lets ask at once. (A body's time is
`guard.read_body`'s, which can say so in the shape of the interface that was asked.)

All that came in one piece is parsed in one go, before anybody is asked for a key: so pieces are small, and a body may
not come in chunks of a byte or two, each of which costs as much as one of many.
"""

import asyncio
import json
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from griffin_gguf.runtime.server.settings import Settings

#: Connections for each request that may be in work.
_CONNECTIONS = 2

#: Bytes taken from a socket at once.
_PIECE = 4096

#: Chunks that a body may have, of any size, and the bytes that each beyond them takes, on average.
_CHUNKS, _CHUNK = 1024, 32


def protocol(settings: Settings) -> type[H11Protocol]:
    """The class that uvicorn makes an instance of for each connection."""
    return type("Connection", (_Connection,), {"settings": settings})


class _Messages(h11.Connection):
    """What a client says, as h11 has it; `next_event` also raises `h11.RemoteProtocolError` for tiny chunks."""

    tiny_chunks = False

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, most)
        self._chunks = self._nbytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What comes next."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._nbytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._nbytes += len(event.data)
            if self._chunks > _CHUNKS + self._nbytes // _CHUNK:
                self.tiny_chunks = True
                raise h11.RemoteProtocolError("tiny chunks")
        return event


class _Connection(H11Protocol):
    settings: Settings
    conn: _Messages

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Messages(self.settings.max_header)
        self._head: asyncio.TimerHandle | None = None
        self._taken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; the first request's time runs from here."""
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS * self.settings.connections:
            transport.abort()
            return
        if hasattr(transport, "max_size"):  # where asyncio itself reads the socket
            transport.max_size = _PIECE  # type: ignore[attr-defined]
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of every byte that is not taken at once
        self._head = self.loop.call_later(self.settings.header_time, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._head = _stopped(self._head)
        self._taken = _stopped(self._taken)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Go on to the next request, whose beginning may be here already."""
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        """Wait for the client to take what was written."""
        super().pause_writing()
        self._taken = self._taken or self.loop.call_later(self.settings.send_time, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._taken = _stopped(self._taken)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or one of tiny chunks."""
        tiny = f"body: expected chunks of at least {_CHUNK} bytes, on average"
        self._refuse(400, tiny if self.conn.tiny_chunks else msg)

    def _watch_head(self) -> None:
        """Let the time run while a request's headers have begun and not ended."""
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not begun:
            self._head = _stopped(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(self.settings.header_time, self._too_slow)

    def _too_slow(self) -> None:
        self._refuse(408, f"headers: expected within {self.settings.header_time:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        """Say what is wrong where an answer can still be given, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": message}).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Connection", "close"),
                ("Content-Length", str(len(body))),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if cycle := cast("RequestResponseCycle | None", self.cycle):  # whoever makes another answer is not to give it
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    """Stop a timer, if one runs; what takes its place."""
    if timer is not None:
        timer.cancel()

"""Bounds on time and on connections, over real sockets: clients that trickle, never read, leave, or talk nonsense."""

import asyncio
import gc
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from griffin_gguf.runtime.server import connection
from griffin_gguf.runtime.server.guard import Gate, Guard, Stream, read_body
from griffin_gguf.runtime.server.run import Server, bind
from griffin_gguf.runtime.server.settings import Settings

_PATIENCE = 20.0  # seconds that a test waits at most for what must come
SHORT = {"header_time": 0.4, "body_time": 0.4, "send_time": 0.4, "idle_time": 0.4}
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Counting(Gate):
    """A gate that also counts who came."""

    seen = 0

    def __setattr__(self, name: str, value: int) -> None:
        if name == "running" and value > getattr(self, name, 0):
            self.__dict__["seen"] = self.seen + 1
        super().__setattr__(name, value)


class NoModels:
    """A server of none."""

    def refuse_waiting(self) -> None: ...

    def cancel_all(self) -> None: ...


async def echo(request: Request) -> Response:
    return PlainTextResponse(await read_body(request) or b"nothing")


async def endless(request: Request) -> Response:
    left: threading.Event = request.app.state.left

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            left.set()

    return Stream(pieces(), "text/plain")


@contextmanager
def serve(**options: Any) -> Iterator[tuple[int, Starlette]]:
    """The app at a port, in a thread of its own."""
    chosen = Settings(port=0, **options)
    gate, ready = Counting(), threading.Event()
    app = Starlette(
        routes=[Route("/", echo, methods=["GET", "POST"]), Route("/endless", endless)],
        middleware=[Middleware(Guard, settings=chosen, gate=gate)],
    )
    app.state.settings, app.state.gate, app.state.models, app.state.left = chosen, gate, NoModels(), threading.Event()
    bound = bind(chosen)
    server = Server(app, ready.set)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        assert ready.wait(_PATIENCE)
        yield bound.getsockname()[1], app
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)) as client:
        client.settimeout(_PATIENCE)
        yield client


def everything(client: socket.socket) -> bytes:
    """What the server says until it closes the connection; a reset is a close."""
    found = b""
    try:
        while part := client.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def trickle(client: socket.socket, text: bytes) -> bytes:
    """What comes back while `text` is sent a byte every 50 ms, until the server closes."""
    client.settimeout(0.05)
    found = b""
    for byte in text:
        try:
            client.send(bytes([byte]))
            part = client.recv(65536)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return found
        if not part:
            return found
        found += part
    raise AssertionError(f"the server took {len(text)} bytes, one at a time, and said {found!r}")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_headers_a_byte_at_a_time() -> None:
    with serve(**SHORT) as (port, _), connected(port) as client:
        answer = trickle(client, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 500)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(head) == 408
    assert b"connection: close" in head.lower()
    assert "headers" in json.loads(body)["error"]


def test_headers_a_byte_at_a_time_after_a_request_that_was_right() -> None:
    with serve(**SHORT) as (port, _), connected(port) as client:
        client.sendall(GET)
        assert status(client.recv(65536)) == 200
        answer = trickle(client, GET[:-2] + b"X-Long: " + b"x" * 500)
    assert status(answer) == 408


def test_headers_a_byte_at_a_time_behind_a_request_in_the_same_packet() -> None:
    with serve(header_time=0.4) as (port, _), connected(port) as client:
        client.sendall(GET + b"GE")
        answer = everything(client)
    assert [status(part) for part in answer.split(b"HTTP/1.1")[1:]] == [200, 408]


def test_a_body_a_byte_at_a_time() -> None:
    with serve(**SHORT) as (port, _), connected(port) as client:
        client.sendall(POST % 5000)
        answer = trickle(client, b"x" * 500)
    assert status(answer) == 408
    assert "body" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_body_in_tiny_chunks() -> None:
    """Each costs as much as one of many bytes."""
    with serve() as (port, _):
        for chunks in (b"1\r\nx\r\n" * 100_000, b"400\r\n" + b"x" * 1024 + b"\r\n" + b"1\r\nx\r\n" * 100_000):
            with connected(port) as client:
                answer = sent(client, CHUNKED + chunks)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert status(head) == 400
            assert b"connection: close" in head.lower()
            assert "chunks" in json.loads(body)["error"]


@pytest.mark.parametrize(("size", "count"), [(1, 1000), (64, 10_000), (65_536, 64)])
def test_a_body_in_chunks(size: int, count: int) -> None:
    chunk = b"%x\r\n" % size + b"x" * size + b"\r\n"
    with serve() as (port, _), connected(port) as client:
        for _ in range(2):  # each request's chunks are its own
            client.sendall(CHUNKED + chunk * count + b"0\r\n\r\n")
            answer = b""
            while answer.count(b"x") < size * count:
                answer += client.recv(65536)
            assert status(answer) == 200


def test_no_piece_of_what_comes_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them others have their turn."""
    sizes, take = list[int](), connection.H11Protocol.data_received
    monkeypatch.setattr(
        connection.H11Protocol, "data_received", lambda self, data: (sizes.append(len(data)), take(self, data))[1]
    )
    with serve() as (port, _), connected(port) as client:
        client.sendall(POST % 10**6 + b"x" * 10**6)
        assert status(client.recv(1000)) == 200
    assert sum(sizes) == 10**6 + len(POST % 10**6)
    assert max(sizes) <= 4096


def sent(client: socket.socket, text: bytes) -> bytes:
    """What the server says to `text`, of which it may not take all."""
    with suppress(ConnectionResetError, BrokenPipeError):
        client.sendall(text)
    return everything(client)


def test_silence() -> None:
    with serve(**SHORT) as (port, _):
        with connected(port) as client:
            assert status(everything(client)) == 408  # not a byte
        with connected(port) as client:
            client.sendall(GET)
            answer = everything(client)  # closed a while after the answer
    assert (status(answer), answer.count(b"HTTP/1.1")) == (200, 1)


def test_a_client_that_reads_nothing_ends_the_answer() -> None:
    with serve(**SHORT) as (port, app), connected(port) as client:
        client.sendall(GET.replace(b"/ ", b"/endless "))
        assert app.state.left.wait(_PATIENCE)


def test_a_client_that_leaves_ends_the_answer() -> None:
    with serve() as (port, app):
        with connected(port) as client:
            client.sendall(GET.replace(b"/ ", b"/endless "))
            client.recv(1000)
        assert app.state.left.wait(_PATIENCE)


def test_a_body_that_is_too_long_is_refused_and_the_client_gets_to_read_it() -> None:
    with serve(max_body=100_000) as (port, _):
        with connected(port) as client:
            client.sendall(POST % 700_000 + b"x" * 700_000 + GET[:-2] + b"Connection: close\r\n\r\n")
            answers = everything(client).split(b"HTTP/1.1")[1:]
            assert [status(answer) for answer in answers] == [413, 200]  # all was read: what follows is a request
            assert b"connection: close" not in answers[0].lower()
        with connected(port) as client:
            client.sendall(POST % 10**9 + b"x" * 900_000)
            answer = everything(client)
    assert status(answer) == 413
    assert b"connection: close" in answer.lower()


def test_a_client_that_asks_first_sends_no_body_in_vain() -> None:
    with serve() as (port, _), connected(port) as client:
        client.sendall((POST % 10**9).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        answer = everything(client)
    assert (status(answer), b"100 Continue" in answer) == (413, False)


def test_nonsense_behind_a_request_that_is_being_refused(caplog: pytest.LogCaptureFixture) -> None:
    """One of the two answers is given, and neither in the middle of the other."""
    with serve(max_body=10) as (port, _), connected(port) as client:
        nowhere = CHUNKED.replace(b"POST / ", b"POST /nowhere ")
        client.sendall(nowhere + b"400\r\n" + b"x" * 1024 + b"\r\nzz\r\n")
        answer = everything(client)
    assert answer.count(b"HTTP/1.1") == 1
    assert status(answer) == 400
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_that_never_comes_is_no_request_in_work() -> None:
    """Its refusal waits a while for it; others are let in meanwhile."""
    with serve(connections=2, api_key="right") as (port, app):
        refused = [socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) for _ in range(3)]
        try:
            for client in refused:
                client.sendall((POST % 10).replace(b"POST / ", b"POST /endless "))
            deadline = time.monotonic() + _PATIENCE
            while app.state.gate.seen < len(refused):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with connected(port) as client:
                client.sendall(GET)
                assert status(client.recv(65536)) == 200
            for client in refused:
                client.sendall(b"x" * 10)
                assert status(client.recv(65536)) == 401
        finally:
            for client in refused:
                client.close()


def test_headers_without_end() -> None:
    with serve(max_header=2000) as (port, _), connected(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000)
        answer = everything(client)
    assert status(answer) == 400


def test_more_connections_than_there_may_be() -> None:
    with serve(connections=2) as (port, _):
        held = [socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) for _ in range(4)]
        try:
            with connected(port) as client:
                assert everything(client) == b""
            held.pop().close()
            for client in held:  # those that were there first are served
                client.sendall(GET)
                assert status(client.recv(65536)) == 200
        finally:
            for client in held:
                client.close()


NONSENSE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"\x00" * 100, b"\r\n" * 10, b"HELLO\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdeXX\r\n",
    b"POST / HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdeXX\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%00%ff%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
]  # fmt: skip


def test_nonsense_is_refused_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with serve(**SHORT) as (port, _):
        for text in NONSENSE:
            with connected(port) as client:
                client.sendall(text)
                client.shutdown(socket.SHUT_WR)
                answer = everything(client)
                assert not answer or 200 <= status(answer) < 500, (text, answer)
        with connected(port) as client:
            client.sendall(GET)
            assert status(client.recv(65536)) == 200
        gc.collect()  # a task that failed unseen is told of when it goes
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]

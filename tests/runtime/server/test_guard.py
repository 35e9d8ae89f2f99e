"""Who may ask and how much, on an app of two routes; what is allowed is written out here, not computed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message

from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.guard import Gate, Guard, Stream, allowed_host, allowed_origin, parse, while_connected
from griffin_gguf.runtime.server.guard import read_body as read
from griffin_gguf.runtime.server.settings import Settings

HERE = "http://127.0.0.1:11434"


class Wanted(msgspec.Struct):
    model: str
    count: int = 0
    weight: float = 0.0
    options: dict[str, Any] | None = None


async def size(request: Request) -> Response:
    return PlainTextResponse(str(len(await read(request))))


async def fail(request: Request) -> Response:
    raise KeyError(request.headers["x-text"])


async def broken(request: Request) -> Response:
    raise FileFormatError("model.gguf", "tensor x", "is torn")


async def caused(request: Request) -> Response:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        raise ApiError(500, "internal error") from error


def client(gate: Gate | None = None, base: str = HERE, **options: Any) -> TestClient:
    chosen = Settings(**options)
    routes = [Route(path, size, methods=["POST", "GET"]) for path in ("/api/chat", "/v1/models", "/health", "/")]
    app = Starlette(
        routes=[*routes, Route("/fail", fail), Route("/broken", broken), Route("/caused", caused)],
        middleware=[Middleware(Guard, settings=chosen, gate=gate or Gate())],
    )
    app.state.settings = chosen
    return TestClient(app, base_url=base)


# Host


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:11434", "127.0.0.1", "localhost", "LocalHost:80", "localhost.:1", "127.8.9.10:5", "[::1]:11434",
        "griffin.localhost:11434",
    ],
)  # fmt: skip
def test_loopback_by_any_name_and_port(host: str) -> None:
    assert allowed_host(host, Settings())


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:11434", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost",
        "192.168.1.20:11434", "0.0.0.0:11434", "", ":11434", "localhost:", "localhost:port", "localhost:123456",
        "user@localhost", "localhost/x", "localhost evil.example", "localhost,evil.example", "[::1", "::1", "[evil]",
        "localhost:1:2", "127.1", "2130706433", "localhöst", "localhost\u0660",
    ],
)  # fmt: skip
def test_no_other_host(host: str) -> None:
    assert not allowed_host(host, Settings())


def test_hosts_of_an_address_that_others_reach() -> None:
    one = Settings(host="192.168.1.20", api_key="k", allow_hosts=("Griffin.example.org",))
    assert allowed_host("192.168.1.20:11434", one)
    assert allowed_host("griffin.example.org", one)
    assert not allowed_host("192.168.1.21", one)
    assert not allowed_host("x.griffin.example.org", one)
    every = Settings(host="0.0.0.0", api_key="k")
    assert allowed_host("192.168.1.21:11434", every)  # an address was not made to point here
    assert allowed_host("[fe80::1]", every)
    assert not allowed_host("evil.example", every)


def test_a_foreign_host_is_turned_away_before_anything_else() -> None:
    answer = client(base="http://evil.example").post("/api/chat", content=b"{}")
    assert (answer.status_code, list(answer.json())) == (403, ["error"])
    assert "Host" in answer.json()["error"]


# Origin


@pytest.mark.parametrize(
    "origin",
    [
        HERE, "http://localhost", "http://localhost:3000", "https://127.0.0.1:8443", "http://[::1]:5",
        "http://tauri.localhost", "app://obsidian.md", "file://", "tauri://localhost", "vscode-webview://1a2b",
    ],
)  # fmt: skip
def test_pages_of_this_machine_may_ask(origin: str) -> None:
    answer = client().post("/api/chat", content=b"{}", headers={"Origin": origin})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example", "http://localhost.evil.example", "http://evil.example:11434", "null", "", "localhost",
        "http://localhost@evil.example", "http://127.0.0.1.evil.example", "http://0.0.0.0:3000",
        "http://192.168.1.20", "http://localhost/", "chrome-extension://abc", "http://", "http://evil.example#localhost",
    ],
)  # fmt: skip
def test_other_pages_may_not(origin: str) -> None:
    answer = client().post("/api/chat", content=b"{}", headers={"Origin": origin})
    assert answer.status_code == 403
    assert "Origin" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers


def test_origins_that_were_allowed() -> None:
    one = Settings(allow_origins=("https://App.example.org",))
    assert allowed_origin("https://app.example.org", "localhost", one)
    assert not allowed_origin("http://app.example.org", "localhost", one)
    assert not allowed_origin("https://app.example.org:8443", "localhost", one)
    assert allowed_origin("https://any.example", "localhost", Settings(allow_origins=("*",)))


def test_the_origin_of_a_server_behind_another_name_is_its_own() -> None:
    named = client(base="http://griffin.example.org", allow_hosts=("griffin.example.org",))
    for origin, status in {"https://griffin.example.org": 200, "https://other.example.org": 403}.items():
        assert named.post("/api/chat", content=b"{}", headers={"Origin": origin}).status_code == status


def test_a_preflight_is_answered_without_the_key() -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    asking = client(api_key="right")
    answer = asking.options("/v1/models", headers={"Origin": "http://localhost:3000"} | asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert asking.options("/v1/models", headers={"Origin": "https://evil.example"} | asked).status_code == 403


def test_a_page_can_read_why_it_was_refused() -> None:
    answer = client(api_key="right").get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


# The key


@pytest.mark.parametrize("given", ["Bearer right", "bearer right", "Bearer  right "])
def test_the_key_opens(given: str) -> None:
    assert client(api_key="right").get("/v1/models", headers={"Authorization": given}).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "right",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer righ",
        "Bearer right2",
        "Basic right",
        b"Bearer \xff",
    ],
)
def test_nothing_else_does(given: str | bytes | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    answer = client(api_key="right").get("/v1/models", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "right" not in answer.text


def test_what_tells_nothing_needs_no_key() -> None:
    asking = client(api_key="right")
    assert [asking.get(path).status_code for path in ("/", "/health", "/api/chat")] == [200, 200, 401]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.20", "::", "griffin.example.org", ""])
def test_no_server_for_others_without_a_key(host: str) -> None:
    with pytest.raises(UnsupportedError, match="expected an API key"):
        Settings(host=host)
    assert Settings(host=host, api_key="k").host == host
    assert Settings(host=host, open_to_all=True).host == host


def test_settings_do_not_show_the_key() -> None:
    assert "right" not in repr(Settings(api_key="right"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1), ("port", 65536), ("slots", 0), ("slots", 513), ("waiting", -1), ("cache_nbytes", -1),
        ("max_body", 0), ("grace", -1.0), ("grace", float("nan")), ("api_key", ""), ("api_key", "a b "),
        ("api_key", "schlüssel"), ("api_key", "a\nb"),
        ("allow_hosts", ("http://x",)), ("allow_origins", ("example.org",)), ("allow_origins", ("https://x/y",)),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=field):
        Settings(**{field: value})


# Sizes and numbers


def test_a_body_up_to_the_limit() -> None:
    asking = client(max_body=1000)
    assert asking.post("/api/chat", content=b"x" * 1000).text == "1000"
    assert asking.post("/api/chat", content=b"x" * 1001).status_code == 413
    assert asking.post("/api/chat", content=iter([b"x" * 600, b"x" * 400])).text == "1000"  # chunks, no length
    assert asking.post("/api/chat", content=iter([b"x" * 600, b"x" * 401])).status_code == 413


def test_a_packed_body_is_not_unpacked() -> None:
    assert client().post("/api/chat", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}).status_code == 415


def test_headers_up_to_the_limit() -> None:
    asking = client(max_header=2000)
    assert asking.get("/", headers={"X-Long": "x" * 1500}).status_code == 200
    assert asking.get("/", headers={"X-Long": "x" * 2000}).status_code == 431
    assert asking.get("/?" + "x" * 2000).status_code == 431


def test_no_more_requests_than_connections() -> None:
    gate = Gate(running=2)
    answer = client(gate, connections=2).get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert gate.running == 2
    gate.running = 1
    assert client(gate, connections=2).get("/").status_code == 200


def test_a_server_that_ends_lets_nobody_in() -> None:
    answer = client(Gate(closing=True)).get("/health")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


# What every answer has


@pytest.mark.parametrize("path", ["/", "/nowhere", "/fail"])
def test_every_answer_has_the_headers(path: str) -> None:
    answer = client().get(path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_what_a_failure_came_from_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for path, words in {"/broken": "tensor x: is torn", "/caused": "ZeroDivisionError"}.items():
        caplog.clear()
        assert client().get(path).status_code == 500
        assert words in caplog.text


@pytest.mark.parametrize("texts", [False, True])
def test_a_failure_of_ours_tells_no_text(texts: bool, caplog: pytest.LogCaptureFixture) -> None:
    answer = client(log_prompts=texts).get("/fail", headers={"X-Text": "a secret"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "KeyError" in caplog.text
    assert "test_guard.py" in caplog.text
    assert ("a secret" in caplog.text) == texts


def test_bodies_are_logged_only_if_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "griffin.server")
    client().post("/api/chat", content=b"a secret")
    assert "a secret" not in caplog.text
    client(log_prompts=True).post("/api/chat", content=b"a secret")
    assert "a secret" in caplog.text


# JSON


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "nothing"), (b"  \n", "nothing"), (b"{", "JSON"), (b"\xff", "JSON"), (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"model":"m"} x', "JSON"), (b"{'model':'m'}", "JSON"), (b'{"model":"m",}', "JSON"),
        (b"null", "body"), (b"[]", "body"), (b'"m"', "body"), (b"7", "body"), (b"{}", "model"),
        (b'{"model":7}', "model"), (b'{"model":null}', "model"), (b'{"model":"m","count":"1"}', "count"),
        (b'{"model":"m","count":1.5}', "count"), (b'{"model":"m","count":true}', "count"),
        (b'{"model":"m","count":' + b"9" * 5000 + b"}", "count"), (b'{"model":"m","weight":1e999}', "weight"),
        (b'{"model":"m","weight":NaN}', "JSON"), (b'{"model":"m","weight":Infinity}', "JSON"),
        (b'{"model":"\xff"}', "UTF-8"), (b'{"model":"\\ud800"}', "JSON"), (b'{"model":"\\udc00\\ud800"}', "JSON"),
        (b'{"model":"a\nb"}', "JSON"), (b'{"model":"m","options":[]}', "options"),
        (b"[" * 10**6, "body"), (b'{"x":' + b"[" * 10**4 + b"]" * 10**4 + b"}", "deeply"),
        (b'{"model":"m","options":{"a":' + b'{"a":' * 10**4 + b"1" + b"}" * 10**4 + b"}}", "deeply"),
        (b'{"model":"m","options":{"a":[' + b"[]," * 150_000 + b"0]}}", "at most 150000 objects, arrays and strings"),
        (b'{"model":"m","options":{"a":[' + b"{}," * 150_000 + b"0]}}", "at most 150000 objects, arrays and strings"),
        (b'{"model":"m","options":{' + b'"a":0,' * 150_000 + b'"b":0}}', "at most 150000 objects, arrays and strings"),
        (b'{"model":"\\\\","new":[' + b'"\\"[",' * 150_000 + b"0]}", "at most 150000 objects, arrays and strings"),
        (b'{"model":"m"', "JSON"), (b"--frontier\r\nContent-Disposition: form-data", "JSON"), (b"model=m", "JSON"),
    ],
)  # fmt: skip
def test_what_is_no_such_json_is_said_in_a_line(body: bytes, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(body, Wanted)
    assert refused.value.status == 400
    assert says in refused.value.message
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 200


@pytest.mark.parametrize("unit", ["{[", '"', "\\", '\\"', '["\\'])
def test_what_a_string_holds_does_not_count(unit: str) -> None:
    body = json.dumps({"model": unit * 200_000, "options": {unit: [unit] * 1000}}).encode()
    assert parse(body, Wanted) == Wanted(unit * 200_000, options={unit: [unit] * 1000})


def test_unknown_fields_are_passed_over_and_the_last_of_two_counts() -> None:
    assert parse(b'{"model":"a","new":[{}],"model":"b"}', Wanted) == Wanted("b")


@tries(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ud80model0123e-.+ntrufals', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with suppress(ApiError):
        assert isinstance(parse(body, Wanted), Wanted)


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()))
def test_json_of_others_is_read_as_they_mean_it(options: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "options": options}).encode()
    try:
        found = parse(body, Wanted)
    except ApiError:
        with pytest.raises(UnicodeEncodeError):  # lone surrogates, which are no text
            json.dumps(options, ensure_ascii=False).encode()
    else:
        assert found.options == options


# Clients that go away


class Client:
    """What a request says of its client: there, until `leaves` is set."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.request = Request({"type": "http", "headers": []}, self._receive)

    async def _receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def test_work_for_a_client_that_stays_is_done() -> None:
    async def go() -> None:
        async def work() -> int:
            return 7

        async def wrong() -> int:
            raise ApiError(404, "no")

        assert await while_connected(Client().request, work()) == 7
        with pytest.raises(ApiError, match="no"):
            await while_connected(Client().request, wrong())
        assert len(asyncio.all_tasks()) == 1  # nobody watches any more

    asyncio.run(go())


def test_work_for_a_client_that_left_is_cancelled() -> None:
    async def go() -> None:
        leaving, ended = Client(), list[str]()

        async def work() -> None:
            try:
                leaving.leaves.set()
                await asyncio.Event().wait()
            finally:
                ended.append("cleaned up")

        with pytest.raises(ApiError) as gone:
            await while_connected(leaving.request, work())
        assert gone.value.status == 499
        assert ended == ["cleaned up"]

    asyncio.run(go())


def test_a_stream_gives_back_what_it_holds_when_its_client_leaves() -> None:
    async def go() -> None:
        leaving, ended, sent = Client(), list[str](), list[Message]()
        held = AsyncExitStack()
        held.callback(ended.append, "given back")

        async def pieces() -> AsyncIterator[bytes]:
            try:
                yield b"one"
                await asyncio.Event().wait()
            finally:
                ended.append("cleaned up")

        async def send(message: Message) -> None:
            sent.append(message)
            if message.get("body"):
                leaving.leaves.set()
                await asyncio.sleep(0)

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "headers": []}
        await Stream(pieces(), "text/plain", held)(scope, leaving.request.receive, send)
        assert ended == ["cleaned up", "given back"]
        assert [m.get("body") for m in sent] == [None, b"one"]

    asyncio.run(go())

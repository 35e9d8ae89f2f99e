"""The whole app: what a client sends makes nothing fail, reaches no file and no other client, and ends with it."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from endless import endless_file
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from served_models import CHECKPOINT, Alone
from serving import Serving, running
from starlette.testclient import TestClient

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime.server.app import create_app
from griffin_gguf.runtime.server.models import Models
from griffin_gguf.runtime.server.settings import Settings

_PATIENCE = 60.0  # seconds that a test waits at most for what must come

ASKING = {
    "/api/generate": {"prompt": "The sea"},
    "/api/chat": {"messages": [{"role": "user", "content": "The sea"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "The sea"}]},
    "/v1/completions": {"prompt": "The sea"},
}
POSTS = [*ASKING, "/api/show", "/api/embed", "/api/embeddings", "/v1/embeddings"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In F32, which rounds by 1e-5 at most: no answer of a batch differs from one alone."""
    (made,) = convert(CHECKPOINT, [(tmp_path_factory.mktemp("models") / "demo.gguf", "F32")])
    return made


@pytest.fixture(scope="module")
def endless(demo: Path) -> Path:
    return endless_file(demo)


@pytest.fixture(scope="module")
def here(demo: Path) -> Iterator[TestClient]:
    """The app in this process, where what it does can be watched."""
    chosen = Settings(threads=1, keep_alive=-1)
    with TestClient(create_app(Models([demo], chosen), chosen), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def server(demo: Path, endless: Path) -> Iterator[Serving]:
    with running(demo, endless, slots=2, waiting=1, keep_alive=-1) as found:
        yield found


def gauges(url: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {(s.name, s.labels.get("model", "")): s.value for family in families for s in family.samples}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def busy(url: str, name: str = "endless") -> tuple[float, float]:
    """Answers that have a slot, and requests that wait."""
    found = gauges(url)
    return found.get(("griffin_running", name), 0), found.get(("griffin_waiting", name), 0)


@contextmanager
def answering(url: str, **more: Any) -> Iterator[Iterator[str]]:
    """The lines of an endless answer, which has begun."""
    body = {"model": "endless", "prompt": "The sea", "options": {"num_predict": -1, "temperature": 0}} | more
    with httpx.stream("POST", f"{url}/api/generate", json=body, timeout=_PATIENCE) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield lines


# What is told


def test_health_tells_strangers_nothing(demo: Path) -> None:
    chosen = Settings(threads=1, api_key="right")
    with TestClient(create_app(Models([demo], chosen), chosen), base_url="http://localhost") as client:
        assert client.get("/health").json() == {"status": "ok"}
        told = client.get("/health", headers={"Authorization": "Bearer right"}).json()
        assert told == {"status": "ok", "models": ["demo"], "loaded": []}
        assert [client.get(path).status_code for path in ("/chat", "/metrics", "/api/tags", "/v1/models")] == [
            200,
            401,
            401,
            401,
        ]


def test_health_lets_others_go_on(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the documents' records, which may be many and on a slow disk."""
    begun, goes_on, chosen = threading.Event(), threading.Event(), Settings(threads=1)
    models = Models([demo], chosen)

    def entries() -> list[Any]:
        begun.set()
        assert goes_on.wait(_PATIENCE)
        return []

    monkeypatch.setattr(models, "entries", entries)
    with (
        TestClient(create_app(models, chosen), base_url="http://localhost") as client,
        ThreadPoolExecutor(2) as pool,
    ):
        health = pool.submit(client.get, "/health")
        assert begun.wait(_PATIENCE)
        other = pool.submit(client.get, "/api/version")
        try:
            assert other.result(_PATIENCE / 4).status_code == 200
        finally:
            goes_on.set()
        assert health.result().json()["models"] == []


def test_the_page_keeps_its_own_policy(here: TestClient) -> None:
    assert "script-src 'sha256-" in here.get("/chat").headers["content-security-policy"]


def test_paths_and_methods_that_are_not_there(here: TestClient) -> None:
    for path in ("/nowhere", "/api/nowhere", "/api/chat/", "/chat/x", "/%00", "/../etc/passwd", "//etc/passwd"):
        answer = here.get(path)
        assert (answer.status_code, list(answer.json())) == (404, ["error"]), path
    answer = here.get("/v1/nowhere")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = here.get("/api/chat")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_metrics_count_by_route_not_by_path(here: TestClient) -> None:
    for path in ("/v1/models/one", "/v1/models/two", "/nowhere/1", "/nowhere/2"):
        here.get(path)
    page = here.get("/metrics").text
    assert 'griffin_requests_total{route="/v1/models/{id:path}",status="404"}' in page
    assert 'griffin_requests_total{route="other",status="404"}' in page
    assert "/nowhere" not in page
    assert "two" not in page


def test_the_log_has_a_line_for_each_request(here: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "griffin.server")
    body = {"model": "demo", "stream": False, "options": {"num_predict": 3}} | ASKING["/api/generate"]
    tokens = here.post("/api/generate?secret=1", json=body).json()["prompt_eval_count"]
    line = caplog.messages[-1]
    assert line.startswith("POST /api/generate 200 ")
    assert f"{tokens} tokens in" in line
    assert line.endswith("3 out")
    assert "secret" not in caplog.text


# What clients send


WRONG = [
    b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"\x00", b'{"model":7}', b'{"model":{}}',
    b'{"model":NaN}', b'{"model":"\\ud800"}', b'{"model":"\xff"}', b'{"model":"demo","x":' + b"[" * 10**5, b"[" * 10**6,
    b'{"model":"demo","x":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", b'{"model":"demo"} {}', b'{"model":"demo",}',
    b"prompt=The+sea&model=demo", b"--x\r\nContent-Disposition: form-data; name=model\r\n\r\ndemo\r\n--x--",
]  # fmt: skip

_NUMBERS = [-1, -(2**63), 2**63, 10**30, -0.5, 1e308, "1", [1], {"a": 1}]
_FIELDS = [
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed", "num_predict", "max_tokens",
    "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "stop", "max_completion_tokens",
    "best_of",
]  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
def test_wrong_bodies(here: TestClient, path: str) -> None:
    for body in WRONG:
        for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x"):
            refused(here.post(path, content=body, headers={"Content-Type": kind}), path, body)


@pytest.mark.parametrize("path", ASKING)
def test_numbers_out_of_range(here: TestClient, path: str) -> None:
    """Where a number may be meant it may be taken, but nothing fails."""
    for field in _FIELDS:
        for value in _NUMBERS:
            options = {field: value} if path.startswith("/v1/") else {"options": {"num_predict": 1, field: value}}
            body = {"model": "demo", "max_tokens": 1, "stream": False} | ASKING[path] | options
            if field in ("num_predict", "max_tokens", "max_completion_tokens") and isinstance(value, int) and value > 0:
                continue  # as long an answer as that is what was asked for
            if field == "num_predict" and value == -1:
                continue
            answer = here.post(path, json=body)
            if answer.status_code != 200:
                refused(answer, path, json.dumps(body).encode())


@tries(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(POSTS),
    body=st.dictionaries(
        st.sampled_from(
            ["messages", "prompt", "input", "format", "options", "stream", "tools", "images", "keep_alive"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)
            ),
            max_leaves=6,
        ),
    ),
)
def test_json_of_any_shape(here: TestClient, path: str, body: dict[str, Any]) -> None:
    limit = {"max_tokens": 1, "options": {"num_predict": 1}}
    answer = here.post(path, json={"model": "demo"} | limit | body | {"stream": False, **limit})
    if answer.status_code != 200:
        refused(answer, path, json.dumps(body).encode())


def refused(answer: Any, path: str, body: bytes) -> None:
    """It is the client's error, in the shape of the interface that was asked."""
    assert 400 <= answer.status_code < 500 or answer.status_code == 501, (path, body[:200], answer.text)
    error = answer.json()["error"]
    message = error["message"] if path.startswith("/v1/") else error
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    assert "Traceback" not in message


NAMES = [
    "../demo", "..", "/etc/passwd", "/etc/shadow.gguf", "file:///etc/passwd", "demo/../demo", "demo\x00", "\x00", "",
    "demo@../../etc", "demo@", "@", "demo@/etc/passwd", "demo@\x00", "x" * 10**6, "demo@" + "x" * 10**6, "demo.gguf",
    "DEMO:other", "..\\demo", "%2e%2e%2fdemo", "~root", "$HOME", "demo\nX: y", "\N{GRINNING FACE}", " ",
]  # fmt: skip


def test_names_of_models_are_looked_up_and_never_opened(
    here: TestClient, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIFFIN_DATA", str(tmp_path / "none"))
    body = {"model": "demo", "stream": False, "options": {"num_predict": 1}} | ASKING["/api/generate"]
    assert here.post("/api/generate", json=body).status_code == 200  # so that all that is loaded once is loaded
    opened, watched = list[str](), [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watched and (event == "open" or event.startswith(("os.", "shutil.", "subprocess."))):
            opened.append(str(arguments[:1]))

    sys.addaudithook(watch)  # it can never be taken away, only be told to rest
    for name in NAMES:
        for path in POSTS:
            answer = here.post(path, json={"model": name} | ASKING.get(path, {"input": "x"}))
            assert answer.status_code in (400, 404), (path, name[:50], answer.text)
            refused(answer, path, name[:50].encode())
            assert len(answer.content) < 1000
        assert here.get(f"/v1/models/{_escaped(name[:1000])}").status_code in (200, 404), name  # 200: the list of all
    assert opened == []
    demo.open("rb").close()
    watched.clear()
    assert opened == [str((str(demo),))]  # it would have been seen


def _escaped(name: str) -> str:
    return "".join(f"%{byte:02x}" for byte in name.encode("utf-8", "surrogatepass"))


# Clients beside each other


CLIENTS = 8
MOST = 12  # tokens of an answer


def talk(number: int) -> list[list[tuple[str, str]]]:
    """A client's conversations, about a text of its own: one that grows, and one that goes another way."""
    text = " ".join((CHECKPOINT / "heldout.txt").read_text().split()[100 * number : 100 * number + 40])
    begun = [("user", text)]
    return [
        begun,
        [*begun, ("assistant", "Yes."), ("user", text[:80])],
        [*begun, ("assistant", "No."), ("user", "Why?")],
    ]


def said(url: str, number: int, turns: list[tuple[str, str]]) -> str:
    """What the server answers, by one of its interfaces, streamed or not."""
    messages = [{"role": role, "content": content} for role, content in turns]
    body = {"model": "demo", "messages": messages, "stream": number % 3 == 0, "temperature": 0, "max_tokens": MOST}
    body["options"] = {"temperature": 0, "num_predict": MOST}
    path = "/api/chat" if number % 2 else "/v1/chat/completions"
    answer = httpx.post(f"{url}{path}", json=body, timeout=_PATIENCE)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and "[DONE]" not in line]
    return "".join(_text(json.loads(line)) for line in lines)


def _text(part: dict[str, Any]) -> str:
    if "message" in part:
        return part["message"]["content"]
    choice = part["choices"][0]
    return choice.get("message", choice.get("delta")).get("content") or ""


def test_clients_never_see_each_other(demo: Path) -> None:
    """Each talks about a text of its own, and gets what the model answers when it is alone."""
    alone = Alone(demo)
    wanted = [[alone.answer(alone.chat_tokens(*turns), MOST)[0] for turns in talk(n)] for n in range(CLIENTS)]
    alone.model.close()
    with running(demo, slots=3) as server, ThreadPoolExecutor(CLIENTS) as pool:

        def client(number: int) -> list[str]:
            return [said(server.url, number, turns) for turns in talk(number)]

        for _ in range(2):  # the second time much of it comes out of the cache
            assert list(pool.map(client, range(CLIENTS))) == wanted
        cached = gauges(server.url)["griffin_cached_tokens_total", "demo"]
    assert cached > 0
    assert len(set(map(tuple, wanted))) == CLIENTS  # or they would tell nothing apart


# Queues and clients that leave


def test_a_full_queue_says_when_to_come_back(server: Serving) -> None:
    with ThreadPoolExecutor(1) as pool, answering(server.url), answering(server.url):
        body = {"model": "endless", "stream": False, "options": {"num_predict": 2}} | ASKING["/api/generate"]
        third = pool.submit(httpx.post, f"{server.url}/api/generate", json=body, timeout=_PATIENCE)
        wait_for(lambda: busy(server.url) == (2, 1))
        for path, content in ASKING.items():
            answer = httpx.post(f"{server.url}{path}", json={"model": "endless"} | content)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            refused(answer, path, b"")
        # Other models, and what needs none, are not in the way.
        elsewhere = {"model": "demo", "stream": False, "options": {"num_predict": 1}} | ASKING["/api/generate"]
        assert httpx.post(f"{server.url}/api/generate", json=elsewhere, timeout=_PATIENCE).status_code == 200
    assert third.result().status_code == 200
    wait_for(lambda: busy(server.url) == (0, 0))


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: Serving, path: str, stream: bool) -> None:
    """Its answer would never end by itself."""
    with asking_forever(server.url, path, stream):
        wait_for(lambda: busy(server.url) == (1, 0))
    wait_for(lambda: busy(server.url) == (0, 0))


def test_clients_may_leave_at_any_moment(server: Serving) -> None:
    for number in range(120):
        with asking_forever(server.url, list(ASKING)[number % 4], number % 3 == 0):
            time.sleep(number % 15 / 1000)
    wait_for(lambda: busy(server.url) == (0, 0))


@contextmanager
def asking_forever(url: str, path: str, stream: bool) -> Iterator[None]:
    """A client that asked for an answer without end, and leaves it."""
    wish = {"model": "endless", "stream": stream, "temperature": 0, "max_tokens": 10**9} | ASKING[path]
    wish["options"] = {"temperature": 0, "num_predict": -1}
    with closing(socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0))) as client:
        text = json.dumps(wish).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        client.sendall(head.encode() + text)
        yield


def test_a_client_that_leaves_the_queue_is_gone_from_it(server: Serving) -> None:
    with answering(server.url), answering(server.url):
        body = {"model": "endless", "stream": False} | ASKING["/api/generate"]
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/api/generate", json=body, timeout=httpx.Timeout(_PATIENCE, read=1.0))
        wait_for(lambda: busy(server.url) == (2, 0))
    wait_for(lambda: busy(server.url) == (0, 0))

"""`griffin serve` as people run it: what it says, what it refuses, and how it ends."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import done, refused, start_python
from serving import Serving, running

_PATIENCE = 60.0  # seconds that a test waits at most for what must come

SECRET = "xyzzy plugh"
GREEDY = {"temperature": 0.0}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def ask(server: Serving, **more: Any) -> httpx.Response:
    body = {"model": "endless", "prompt": "The sea", "stream": False, "options": GREEDY} | more
    return httpx.post(f"{server.url}/api/generate", json=body, timeout=_PATIENCE)


@contextmanager
def answering(server: Serving, count: int) -> Iterator[Iterator[str]]:
    """The lines of an answer of so many tokens, which has begun."""
    body = {"model": "endless", "prompt": "The sea", "options": GREEDY | {"num_predict": count}}
    with httpx.stream("POST", f"{server.url}/api/generate", json=body, timeout=5 * _PATIENCE) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield lines


def queued(server: Serving, pool: ThreadPoolExecutor) -> "Future[httpx.Response]":
    """A request that waits for a slot."""
    waiting = pool.submit(ask, server)
    wait_for(lambda: 'griffin_waiting{model="endless"} 1.0' in httpx.get(f"{server.url}/metrics").text)
    return waiting


# What it says


def test_the_start_tells_where_everything_is(model: Path, plain_model: Path) -> None:
    with running(model, plain_model) as server:
        assert httpx.get(server.url).text == "Ollama is running"
        assert httpx.get(f"{server.url}/chat").headers["content-type"].startswith("text/html")
        for text in (server.url, f"{server.url}/chat", f"{server.url}/v1", str(model), str(plain_model), model.stem):
            assert text in server.said
        assert "Traceback" not in server.said
        assert server.said.count("\n") < 10


@pytest.mark.parametrize("shown", [False, True])
def test_texts_are_in_the_log_only_if_asked(model: Path, shown: bool) -> None:
    name, limit = model.stem, {"num_predict": 4}
    bodies: list[tuple[str, Any]] = [
        ("/api/generate", {"model": name, "prompt": SECRET, "stream": False, "options": limit}),
        ("/api/generate", {"model": name, "prompt": SECRET, "stream": True, "options": limit}),
        ("/api/chat", {"model": name, "messages": [{"role": "user", "content": SECRET}], "options": limit}),
        ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}),
        ("/v1/completions?secret=" + SECRET, {"model": name, "prompt": SECRET, "max_tokens": 4}),
        ("/api/embed", {"model": name, "input": SECRET}),
        ("/api/chat", {"model": name, "messages": [{"role": SECRET, "content": SECRET}]}),  # refused
        ("/api/generate", {"model": SECRET, "prompt": SECRET}),
        ("/api/generate", {"model": name, "prompt": [SECRET]}),
        ("/api/generate", {"model": name, "prompt": SECRET, "format": {"type": SECRET}}),
    ]
    options: dict[str, Any] = {"log_prompts": True} if shown else {}
    with running(model, **options) as server:
        for path, body in bodies:
            httpx.post(f"{server.url}{path}", json=body, timeout=_PATIENCE)
        httpx.post(f"{server.url}/api/chat", content=b'{"model": ' + SECRET.encode())
        answer = httpx.post(f"{server.url}/api/generate", json=bodies[0][1], timeout=_PATIENCE).json()["response"]
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(_PATIENCE) == 0
        wait_for(lambda: "unloaded" in server.said)
    assert server.said.count("POST /api/generate 200") == 3
    assert "POST /v1/completions 200" in server.said
    assert ("xyzzy" in server.said) == shown
    assert (answer in server.said) == shown


def test_the_key_comes_from_the_environment_too(model: Path) -> None:
    ways: list[dict[str, Any]] = [{"environment": {"GRIFFIN_API_KEY": "right"}}, {"api_key": "right"}]
    for options in ways:
        with running(model, **options) as server:
            statuses = [
                httpx.get(f"{server.url}/api/tags", headers=headers).status_code
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer right"})
            ]
            assert statuses == [401, 401, 200]
            assert "right" not in server.said


def test_other_names_and_origins(model: Path) -> None:
    with running(model, allow_host=["one.example", "two.example"], allow_origin="https://app.example") as server:
        for headers, status in [
            ({"Host": "one.example"}, 200),
            ({"Host": "two.example:80"}, 200),
            ({"Host": "three.example"}, 403),
            ({"Origin": "https://app.example"}, 200),
            ({"Origin": "https://other.example"}, 403),
        ]:
            assert httpx.get(f"{server.url}/api/tags", headers=headers).status_code == status


def test_limits_are_those_given(model: Path) -> None:
    with running(model, max_body="1KiB", host="0.0.0.0", no_api_key=True) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert ask(server, model=model.stem, prompt="x" * 2000).status_code == 413


# What it refuses


def test_no_server_for_others_without_a_key(model: Path) -> None:
    assert "API key" in refused("serve", model, "--host", "0.0.0.0")
    both = refused("serve", model, "--host", "0.0.0.0", "--api-key", "k", "--no-api-key", code=2)
    assert "--no-api-key" in both


def test_a_port_in_use_is_said_in_a_line(model: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        said = refused("serve", model, "--port", port)
    assert f"127.0.0.1:{port}" in said
    assert "in use" in said


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "999.1.1.1"])
def test_an_address_that_is_not_ours_is_said_in_a_line(model: Path, host: str) -> None:
    assert host in refused("serve", model, "--host", host, "--port", "0", "--api-key", "k")


def test_files_that_cannot_be_served(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    for paths in ((broken,), (model, broken), (tmp_path / "absent.gguf",), (tmp_path,)):
        assert str(tmp_path) in refused("serve", *paths, "--port", "0")
    double = tmp_path / model.name
    double.write_bytes(model.read_bytes())
    assert str(double) in refused("serve", model, double, "--port", "0")


def test_more_slots_than_a_step_takes(model: Path) -> None:
    said = refused("serve", model, "--port", "0", "--slots", "513")
    assert "slots: expected at most 512, found 513" in said


def test_a_folder_that_cannot_hold_the_cache(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for folder in (file, file / "below", Path("/proc/self")):
        said = refused("serve", model, "--port", "0", "--cache-dir", folder)
        assert f"--cache-dir {folder}: " in said


def test_the_folder_of_the_cache_is_made_at_the_start_for_its_owner_alone(model: Path, tmp_path: Path) -> None:
    with running(model, cache_dir=tmp_path / "new" / "cache"):
        assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700
        assert list((tmp_path / "new" / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--keep-alive", "soon"), ("--keep-alive", "nan"), ("--cache", "many"), ("--cache-disk", "1G"),
        ("--max-body", "0"), ("--slots", "0"), ("--port", "65536"), ("--grace", "-1"),
    ],
)  # fmt: skip
def test_options_out_of_range(model: Path, options: tuple[str, str]) -> None:
    assert options[0] in refused("serve", model, *options, code=2)


@pytest.mark.parametrize("absent", ["starlette", "uvicorn", "prometheus_client", "llguidance"])
def test_what_to_install_where_the_extra_is_absent(absent: str) -> None:
    code = f"""
import sys
sys.modules[{absent!r}] = None
sys.argv = ["griffin", "serve", "any.gguf", "--port", "0"]
from griffin_gguf.cli.main import main
main()
"""
    with start_python(code) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err == f"griffin: error: serve needs {absent}: pip install 'griffin-gguf[server]'\n"


def test_help_needs_no_extra() -> None:
    code = """
import sys
for name in ("starlette", "uvicorn", "prometheus_client", "llguidance"):
    sys.modules[name] = None
sys.argv = ["griffin", "serve", "--help"]
from griffin_gguf.cli.main import main
main()
"""
    with start_python(code) as process:
        out, _ = process.communicate()
    assert process.returncode == 0
    assert "--api-key" in out
    assert done("serve", "--help").count("griffin serve") >= 3


# How it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_answers_are_finished_and_waiting_ones_refused(endless_model: Path, number: int) -> None:
    with running(endless_model, slots=1, waiting=2, grace=300) as server, ThreadPoolExecutor(1) as pool:
        with answering(server, 1000) as lines:
            waiting = queued(server, pool)
            os.kill(server.process.pid, number)
            assert waiting.result().status_code == 503
            assert "retry-after" in waiting.result().headers
            assert server.process.poll() is None
            with pytest.raises(httpx.ConnectError):
                ask(server)
            last = json.loads(list(lines)[-1])
        assert (last["done"], last["eval_count"]) == (True, 1000)
        assert server.process.wait(_PATIENCE) == 0
    assert "Traceback" not in server.said


def test_answers_that_take_longer_than_the_grace_are_cut(endless_model: Path) -> None:
    with running(endless_model, grace=0.2) as server, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, server, options=GREEDY | {"num_predict": -1})
        with answering(server, -1) as lines:
            os.kill(server.process.pid, signal.SIGTERM)
            assert "error" in json.loads(list(lines)[-1])
        assert whole.result().status_code == 503
        assert server.process.wait(_PATIENCE) == 0
    assert "Traceback" not in server.said


def test_a_second_signal_does_not_wait(endless_model: Path) -> None:
    with running(endless_model, grace=10_000) as server, answering(server, -1) as lines:
        os.kill(server.process.pid, signal.SIGINT)
        wait_for(lambda: "ending" in server.said)
        os.kill(server.process.pid, signal.SIGINT)
        assert "error" in json.loads(list(lines)[-1])
        assert server.process.wait(_PATIENCE) == 0


def test_connections_that_idle_keep_nobody_waiting(model: Path) -> None:
    with running(model, grace=10_000) as server, httpx.Client(base_url=server.url) as client:
        port = httpx.URL(server.url).port or 0
        with closing(socket.create_connection(("127.0.0.1", port))) as half:
            half.sendall(b"GET / HTTP/1.1\r\nHost:")
            assert client.get("/").status_code == 200
            os.kill(server.process.pid, signal.SIGTERM)
            assert server.process.wait(_PATIENCE) == 0


def test_the_port_is_free_for_the_next_at_once(model: Path) -> None:
    with running(model) as first:
        port = httpx.URL(first.url).port
        assert httpx.get(first.url).status_code == 200
        first.process.terminate()
        assert first.process.wait(_PATIENCE) == 0
        with running(model, port=port) as second:
            assert second.url == first.url

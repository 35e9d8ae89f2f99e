"""Ollama's API against a running server: loading, vectors, refusals, and clients that go away."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from endless import endless_file
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_requests import ask, moment, refusal
from served_models import DOCUMENT, NAME, Alone
from serving import Serving, running

GREEDY = {"temperature": 0, "num_predict": 12}
PROMPT = "Tell me about the sea."


# --- loading ---


def loaded(client: httpx.Client) -> dict[str, dict[str, Any]]:
    found = client.get("/api/ps").json()
    ollama.ProcessResponse.model_validate(found)
    return {model["name"]: model for model in found["models"]}


@pytest.mark.parametrize(
    ("path", "empty"), [("/api/generate", {}), ("/api/generate", {"prompt": ""}), ("/api/chat", {"messages": []})]
)
def test_an_empty_request_loads_and_unloads(client: httpx.Client, path: str, empty: dict[str, Any]) -> None:
    found = ask(client, path, keep_alive="10m", **empty)
    assert (found["done"], found["done_reason"]) == (True, "load")
    assert found.get("response", found.get("message", {}).get("content")) == ""
    model = loaded(client)[f"{NAME}:latest"]
    assert model["model"] == model["name"]
    assert model["size"] > 0
    assert model["context_length"] == 1024
    ahead = moment(model["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=9) < ahead <= timedelta(minutes=10)
    ask(client, path, keep_alive=-1, **empty)
    assert moment(loaded(client)[f"{NAME}:latest"]["expires_at"]).year > 2200
    found = ask(client, path, keep_alive=0, **empty)
    assert (found["done"], found["done_reason"]) == (True, "unload")
    assert f"{NAME}:latest" not in loaded(client)


def test_keep_alive_0_unloads_after_the_answer(client: httpx.Client) -> None:
    found = ask(client, "/api/generate", prompt=PROMPT, options=GREEDY, keep_alive=0)
    assert found["response"]
    deadline = time.monotonic() + 30
    while f"{NAME}:latest" in loaded(client):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(client, "/api/generate", prompt=PROMPT, options=GREEDY)["load_duration"] > 0


# --- vectors ---


def test_embed_gives_unit_vectors_of_what_the_model_makes_of_texts(client: httpx.Client, alone: Alone) -> None:
    texts = ["The sea.", "A ship on the sea, and another one behind it.", ""]
    found = ask(client, "/api/embed", input=texts)
    ollama.EmbedResponse.model_validate(found)
    batch = [alone.model.tokenizer.encode(text) for text in texts]
    rows = np.concatenate([alone.model.embed([tokens]) for tokens in batch])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(found["embeddings"], rows, atol=1e-4)
    assert np.allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-5)
    assert found["prompt_eval_count"] == sum(map(len, batch))
    one = ask(client, "/api/embed", input=texts[0], truncate=False)["embeddings"]
    assert np.allclose(one, rows[:1], atol=1e-4)
    older = ask(client, "/api/embeddings", prompt=texts[0])
    ollama.EmbeddingsResponse.model_validate(older)
    assert np.allclose(older["embedding"], rows[0], atol=1e-4)


def test_shorter_vectors_are_of_unit_length_too(client: httpx.Client) -> None:
    whole = np.array(ask(client, "/api/embed", input="The sea.")["embeddings"][0])
    short = np.array(ask(client, "/api/embed", input="The sea.", dimensions=64)["embeddings"][0])
    assert np.allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    for dimensions in (-1, whole.size + 1):
        said = refusal(client, "/api/embed", input="x", dimensions=dimensions)
        assert said == f"dimensions: expected from 1 to {whole.size}, found {dimensions}"


def test_no_text_gives_no_vector(client: httpx.Client) -> None:
    for nothing in ({}, {"input": ""}, {"input": []}):
        assert ask(client, "/api/embed", **nothing)["embeddings"] == []
    assert ask(client, "/api/embeddings", prompt="")["embedding"] == []
    assert "read from its beginning" in refusal(client, "/api/embed", model=DOCUMENT, input="x")


# --- refusals ---


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("generate", {"suffix": "x"}, f'"{NAME}" does not support insert'),
        ("generate", {"images": ["aGk="]}, f'"{NAME}" does not support vision'),
        ("generate", {"think": True}, f'"{NAME}" does not support thinking'),
        ("generate", {"think": "high"}, f'"{NAME}" does not support thinking'),
        ("generate", {"raw": True, "system": "x"}, "raw mode does not support template, system, or context"),
        ("generate", {"raw": True, "context": [2]}, "raw mode does not support template, system, or context"),
        ("generate", {"template": "{{ .Prompt }}"}, "template: not supported: turns are written by the model's own"),
        ("generate", {"context": [2, 99999]}, "context[1]: expected a token from 0 to 2559, found 99999"),
        ("generate", {"context": [-1]}, "context[0]: expected a token from 0 to 2559, found -1"),
        ("generate", {"top_logprobs": 21}, "top_logprobs: expected from 0 to 20, found 21"),
        ("generate", {"options": {"temperature": -1}}, "options.temperature: expected from 0 to 1000, found -1"),
        ("generate", {"options": {"mirostat": 1}}, "options.mirostat: not supported here"),
        ("generate", {"options": []}, "options: expected"),
        ("generate", {"keep_alive": "soon"}, "keep_alive: expected a duration"),
        ("generate", {"format": "yaml"}, 'format: expected "json" or a JSON schema'),
        ("generate", {"prompt": 5}, "prompt: expected"),
        ("chat", {"tools": [{"type": "function"}]}, f'"{NAME}" does not support tools'),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, f'"{NAME}" does not support tools'),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "does not support vision"),
        ("chat", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role: expected one of system, user"),
        ("chat", {"messages": [{"content": "x"}]}, "messages[0]"),
        ("chat", {"messages": "x"}, "messages: expected"),
        ("embed", {"input": [5]}, "input[0]: expected"),
        ("embed", {"input": {}}, "input: expected"),
        ("embed", {"input": ["a"] * 2049}, "input: expected at most 2048 texts, found 2049"),
        ("chat", {"messages": [{"role": "user", "content": "a"}] * 10_001}, "messages: expected `array` of length"),
        ("generate", {"options": {"stop": ["a"] * 100_000}}, "options.stop: expected at most 64 strings"),
        ("embeddings", {"prompt": []}, "prompt: expected"),
        ("embed", {"input": "x", "keep_alive": []}, "keep_alive: expected"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    client: httpx.Client, path: str, body: dict[str, Any], said: str
) -> None:
    text = {"prompt": "x"} if path in ("generate", "embeddings") else {}
    for stream in (True, False):
        found = refusal(client, f"/api/{path}", **{"stream": stream, **text, **body})
        assert said in found
        assert "\n" not in found


@pytest.mark.parametrize("path", ["generate", "chat", "embed", "embeddings", "show"])
def test_models_that_are_not_here(client: httpx.Client, path: str) -> None:
    assert refusal(client, f"/api/{path}", 404, model="nothing", prompt="x") == "model 'nothing' not found"
    assert refusal(client, f"/api/{path}", 400, model="") == "model is required"


def test_a_schema_that_is_none_is_refused(client: httpx.Client) -> None:
    found = refusal(client, "/api/generate", prompt="x", format={"type": "nonsense"})
    assert found


@pytest.mark.parametrize("body", [b"", b"  ", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "\\ud800"}', b"null"])
def test_bodies_that_are_no_requests(client: httpx.Client, body: bytes) -> None:
    for path in ("generate", "chat", "embed", "embeddings", "show"):
        response = client.post(f"/api/{path}", content=body)
        assert response.status_code == 400
        assert list(response.json()) == ["error"]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = [
    "prompt", "suffix", "system", "template", "context", "stream", "raw", "format", "keep_alive", "options", "images",
    "think", "logprobs", "top_logprobs", "messages", "tools", "input", "dimensions", "verbose", "name",
]  # fmt: skip


@settings(max_examples=150)
@given(
    st.sampled_from(["generate", "chat", "embed", "embeddings", "show"]),
    st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=4),
)
def test_no_request_breaks_the_server(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    if isinstance(body.get("options"), dict):
        body["options"]["num_predict"] = 2
    else:
        body.setdefault("options", {"num_predict": 2})
    response = client.post(f"/api/{path}", json={"model": NAME, **body})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert list(response.json()) == ["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"), ("DELETE", "delete"),
        ("POST", "blobs/sha256:00"), ("HEAD", "blobs/sha256:00"),
    ],
)  # fmt: skip
def test_the_set_of_models_is_fixed(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, f"/api/{path}", json={"model": NAME})
    assert response.status_code == 501
    if method != "HEAD":
        what = path.partition("/")[0]
        assert response.json()["error"].startswith(f"{what}: not supported: the models here are the files")


# --- clients that go, servers that end ---

ENDLESS = {"model": "endless", "prompt": PROMPT, "options": {"num_predict": -1}}


@contextmanager
def endless_server(files: list[Path], **options: Any) -> Iterator[tuple[Serving, httpx.Client]]:
    with (
        running(endless_file(files[0]), **options) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield server, client


def test_who_goes_away_makes_room(files: list[Path]) -> None:
    with endless_server(files, slots=1, waiting=0) as (_, client):
        for _ in range(3):
            with client.stream("POST", "/api/generate", json=ENDLESS) as response:
                lines = response.iter_lines()  # the connection lasts as long as this does
                assert json.loads(next(lines))["done"] is False
                busy = client.post("/api/generate", json=ENDLESS)
                assert busy.status_code == 429
                assert "Retry-After" in busy.headers
            deadline = time.monotonic() + 30
            while is_refused(client):
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_who_waits_for_a_whole_answer_and_goes_makes_room(files: list[Path]) -> None:
    with endless_server(files, slots=1, waiting=0) as (_, client):
        ask(client, "/api/generate", **(ENDLESS | {"options": {"num_predict": 1}}))  # it is loaded now
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/api/generate", json=ENDLESS | {"stream": False}, timeout=0.3)
            deadline = time.monotonic() + 30
            while is_refused(client):
                assert time.monotonic() < deadline
                time.sleep(0.02)


def is_refused(client: httpx.Client) -> bool:
    body = ENDLESS | {"stream": False, "options": {"num_predict": 1}}
    return client.post("/api/generate", json=body).status_code == 429


def test_an_answer_that_is_broken_off_ends_with_why(files: list[Path]) -> None:
    with endless_server(files, grace=0.2) as (server, client):
        with client.stream("POST", "/api/generate", json=ENDLESS) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines))["done"] is False
            server.process.terminate()
            *_, last = lines
        assert json.loads(last) == {"error": "the server ended this answer"}

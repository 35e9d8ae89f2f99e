"""Asking a running server in Ollama's way, with plain requests."""

import json
from datetime import UTC, datetime
from typing import Any

import httpx
from served_models import NAME


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": NAME, "stream": False, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/json")
    return response.json()


def stream(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={"model": NAME, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.iter_lines()]


def refusal(client: httpx.Client, path: str, status: int = 400, **body: Any) -> str:
    response = client.post(path, json={"model": NAME, **body})
    assert response.status_code == status, response.text
    found = response.json()
    assert list(found) == ["error"]
    return found["error"]


def moment(text: str) -> datetime:
    """A time as Ollama writes it, which has more digits than Python reads."""
    assert text.endswith("Z")
    seconds, _, fraction = text[:-1].partition(".")
    assert len(fraction) == 9
    return datetime.fromisoformat(f"{seconds}.{fraction[:6]}").replace(tzinfo=UTC)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

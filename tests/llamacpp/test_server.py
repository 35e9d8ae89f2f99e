"""The patched llama-server: chat, turns that read only what is new, slots that are saved and restored."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import pytest
from served_models import Alone

pytestmark = pytest.mark.llamacpp

_PATIENCE = 60.0  # seconds until it takes requests
TEXT = "The old gentleman took off his hat, and said that " * 12


@contextmanager
def serving(programs: Path, model: Path, slots: Path) -> Iterator[httpx.Client]:
    """A client of a llama-server of its own, with two slots."""
    options = ("-t", "1", "-np", "2", "-c", "4096", "--slot-save-path", str(slots))
    with started(programs / "llama-server", slots / "server.log", "-m", str(model), *options) as client:
        yield client


@contextmanager
def started(program: Path, log_path: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of that server, started with these options and a port."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    with (
        log_path.open("ab") as log,
        subprocess.Popen([program, *options, "--port", str(port)], stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            _wait(client)
            yield client
        finally:
            process.terminate()


def _wait(client: httpx.Client) -> None:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("llama-server does not come up")


def asked(client: httpx.Client, path: str, **body: Any) -> Any:
    """The JSON of a request's answer."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def completed(client: httpx.Client, prompt: str, slot: int = 0) -> tuple[str, int, int]:
    """What comes after `prompt`, how many tokens of it were read, and how many were not read again."""
    found = asked(client, "/completion", prompt=prompt, n_predict=8, temperature=0, id_slot=slot, cache_prompt=True)
    return found["content"], found["timings"]["prompt_n"], found["timings"]["cache_n"]


def test_chat_completions(programs: Path, demo: dict[str, Path], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is a cynic?"}]
    with serving(programs, demo["F32"], tmp_path) as client:
        found = asked(client, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=24)
    alone = Alone(demo["F32"])
    expected, _ = alone.answer(alone.chat_tokens(("user", "What is a cynic?")), 24)
    assert found["choices"][0]["message"]["content"].strip() == expected.strip()


def test_a_longer_prompt_reads_only_what_is_new(programs: Path, demo: dict[str, Path], tmp_path: Path) -> None:
    with serving(programs, demo["BF16"], tmp_path) as client:
        answer, read, _ = completed(client, TEXT)
        longer = TEXT + answer + " and went home."
        again, new, kept = completed(client, longer)
        fresh, everything, _ = completed(client, longer, slot=1)
    assert again == fresh
    assert new <= 12
    assert kept >= read
    assert everything >= kept + new - 1


def test_a_slot_is_saved_and_restored(programs: Path, demo: dict[str, Path], tmp_path: Path) -> None:
    with serving(programs, demo["BF16"], tmp_path) as client:
        answer, _, _ = completed(client, TEXT)
        saved = asked(client, "/slots/0?action=save", filename="slot.bin")
    longer = TEXT + answer + " and went home."
    with serving(programs, demo["BF16"], tmp_path) as client:
        restored = asked(client, "/slots/0?action=restore", filename="slot.bin")
        again, new, kept = completed(client, longer)
        fresh, _, _ = completed(client, longer, slot=1)
    assert restored["n_restored"] == saved["n_saved"]
    assert again == fresh
    assert new <= 12
    assert kept >= saved["n_saved"] - 1


def test_two_clients_at_once_do_not_see_each_other(programs: Path, demo: dict[str, Path], tmp_path: Path) -> None:
    with serving(programs, demo["F32"], tmp_path) as client:
        alone = [completed(client, text)[0] for text in (TEXT, TEXT[60:])]
    with serving(programs, demo["F32"], tmp_path) as client:
        both = asked(client, "/completion", prompt=[TEXT, TEXT[60:]], n_predict=8, temperature=0)
    assert [answer["content"] for answer in both] == alone


#: What Ollama gives a model whose prompts it makes itself (llm/llama_server.go, `startLlamaServer`).
OLLAMA = (
    *("--host", "127.0.0.1", "--no-webui", "--offline", "-c", "512", "-np", "1"),
    *("--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps", "--no-jinja", "--chat-template", "chatml"),
    *("--flash-attn", "auto", "-b", "512", "-ub", "512", "-t", "1", "--context-shift", "--keep", "4"),
)


def wrapper(folder: Path, program: str) -> Path:
    """The wrapper of docs/ollama.md around a program, as its line makes it."""
    page = (Path(__file__).parents[2] / "docs" / "ollama.md").read_text()
    (script,) = re.findall(r"printf '([^']+)' ", page)
    path = folder / Path(program).name
    path.write_text(script.replace("\\n", "\n").replace("%s", program))
    path.chmod(0o755)
    return path


def test_as_ollama_starts_it(
    programs: Path, demo: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the wrapper of docs/ollama.md, with the libraries of a llama.cpp without Griffins on the path.

    It writes on where the context is full.
    """
    others = str(Path(llama_cpp.__path__[0]) / "lib")
    monkeypatch.setenv("LD_LIBRARY_PATH", others)
    monkeypatch.setenv("DYLD_LIBRARY_PATH", others)
    monkeypatch.setenv("GGML_BACKEND_PATH", "/none/libggml-cuda.so")
    said = subprocess.run([wrapper(tmp_path, "/usr/bin/env")], capture_output=True, text=True, check=True).stdout
    assert not any(name in said for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "GGML_BACKEND_PATH"))
    with started(
        wrapper(tmp_path, f"{programs}/llama-server"), tmp_path / "server.log", "--model", str(demo["F32"]), *OLLAMA
    ) as client:
        short = asked(client, "/completion", prompt=TEXT, n_predict=24, temperature=0, cache_prompt=True)
        long = asked(client, "/completion", prompt=TEXT, n_predict=900, temperature=0.8, seed=3, ignore_eos=True)
    alone = Alone(demo["F32"])
    expected, _ = alone.answer(alone.model.tokenizer.encode(TEXT), 24)
    assert short["content"] == expected
    assert long["tokens_predicted"] == 900

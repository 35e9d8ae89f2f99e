"""Programs that speak Ollama's API, against a running server: its own Python client, LangChain, and `llm`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel, ConfigDict, Field
from served_models import NAME, PLAIN, Alone
from serving import serving

GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 10}
PROMPT = "Tell me about the sea."


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a model of few words finds no end of further fields
    name: str = Field(max_length=10)
    age: int = Field(ge=0, le=150)


@pytest.fixture(scope="module")
def url(files: list[Path]) -> Iterator[str]:
    with serving(*files) as found:
        yield found


@pytest.fixture(scope="module")
def answers(files: list[Path]) -> dict[str, str]:
    """What the model answers to several prompts, by itself."""
    alone = Alone(files[0])
    prompts = [PROMPT, "What is a king?", "And then?", "Tell me about the sea, and the land."]
    found = {p: alone.answer(alone.chat_tokens(("user", p)), GREEDY["num_predict"])[0] for p in prompts}
    alone.model.close()
    return found


@pytest.fixture(scope="module")
def expected(answers: dict[str, str]) -> str:
    """The answer to `PROMPT`."""
    return answers[PROMPT]


# --- ollama, the Python package ---


def test_ollama_client(url: str, expected: str) -> None:
    client = ollama.Client(url)
    messages = [{"role": "user", "content": PROMPT}]
    assert client.generate(NAME, PROMPT, options=GREEDY).response == expected
    assert client.chat(NAME, messages, options=GREEDY).message.content == expected
    pieces = list(client.generate(NAME, PROMPT, options=GREEDY, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == expected
    assert pieces[-1].eval_count == len(pieces[-1].context or []) - (pieces[-1].prompt_eval_count or 0)
    chunks = list(client.chat(NAME, messages, options=GREEDY, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == expected
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_ollama_client_knows_the_models(url: str) -> None:
    client = ollama.Client(url)
    names = {model.model for model in client.list().models}
    assert names == {f"{NAME}:latest", f"{PLAIN}:latest"}
    for name in names:
        assert name is not None
        assert "completion" in (client.show(name).capabilities or [])
    client.generate(NAME, keep_alive="1h")
    assert f"{NAME}:latest" in {model.name for model in client.ps().models}


def test_ollama_client_asks_for_json_of_a_schema(url: str) -> None:
    client, options = ollama.Client(url), {"seed": 3, "num_predict": 300}
    format = Person.model_json_schema()
    found = client.chat(NAME, [{"role": "user", "content": "Who?"}], format=format, options=options)
    Person.model_validate_json(found.message.content or "")
    found = client.generate(NAME, "Who?", format=format, options=options)
    Person.model_validate_json(found.response or "")


def test_ollama_client_embeds(url: str) -> None:
    client = ollama.Client(url)
    found = client.embed(NAME, ["The sea.", "A ship."])
    assert [len(vector) for vector in found.embeddings] == [256, 256]
    assert client.embed(NAME, "The sea.", dimensions=32).embeddings[0] != found.embeddings[0][:32]
    assert client.embeddings(NAME, "The sea.").embedding == pytest.approx(found.embeddings[0], abs=1e-4)


def test_ollama_client_reads_errors(url: str) -> None:
    client = ollama.Client(url)
    attempts: list[tuple[int, str, Any]] = [
        (404, "model 'nothing' not found", lambda: client.generate("nothing", PROMPT)),
        (404, "model 'nothing' not found", lambda: list(client.chat("nothing", stream=True))),
        (404, "model 'nothing' not found", lambda: client.show("nothing")),
        (400, "options.top_p: expected above 0", lambda: client.generate(NAME, PROMPT, options={"top_p": 7})),
        (400, "", lambda: client.generate(NAME, PROMPT, format={"type": "nonsense"})),
        (400, "does not support thinking", lambda: client.chat(NAME, think=True)),
        (501, "pull: not supported", lambda: client.pull("nothing")),
        (501, "delete: not supported", lambda: client.delete(NAME)),
        (501, "copy: not supported", lambda: client.copy(NAME, "other")),
        (501, "create: not supported", lambda: client.create("other", from_=NAME)),
    ]
    for status, said, attempt in attempts:
        with pytest.raises(ollama.ResponseError) as refused:
            attempt()
        assert refused.value.status_code == status
        assert said in refused.value.error


def test_ollama_async_client_has_many_answers_at_once(url: str, answers: dict[str, str]) -> None:
    async def whole(client: ollama.AsyncClient, prompt: str) -> str:
        return (await client.generate(NAME, prompt, options=GREEDY)).response or ""

    async def streamed(client: ollama.AsyncClient, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        chunks: AsyncIterator[ollama.ChatResponse] = await client.chat(NAME, messages, options=GREEDY, stream=True)
        return "".join([chunk.message.content or "" async for chunk in chunks])

    async def talk() -> list[str]:
        client = ollama.AsyncClient(url)
        return await asyncio.gather(*(way(client, prompt) for prompt in answers for way in (whole, streamed)))

    assert asyncio.run(talk()) == [answer for answer in answers.values() for _ in range(2)]


# --- langchain-ollama ---


def chat_ollama(url: str, **more: Any) -> ChatOllama:
    return ChatOllama(model=NAME, base_url=url, validate_model_on_init=True, **(GREEDY | more))


def test_langchain_chats(url: str, expected: str) -> None:
    chat = chat_ollama(url)
    found = chat.invoke([HumanMessage(PROMPT)])
    assert found.content == expected
    assert found.response_metadata["done_reason"] == "length"
    assert found.usage_metadata is not None
    assert found.usage_metadata["output_tokens"] == GREEDY["num_predict"]
    assert "".join(str(chunk.content) for chunk in chat.stream(PROMPT)) == expected
    assert asyncio.run(chat.ainvoke(PROMPT)).content == expected
    turns = [SystemMessage("Be brief."), HumanMessage(PROMPT), AIMessage(expected), HumanMessage("Go on.")]
    assert chat.invoke(turns).content


def test_langchain_gets_structured_output(url: str) -> None:
    chat = chat_ollama(url, temperature=0.8, seed=3, num_predict=300)
    found = chat.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert isinstance(found, Person)


def test_langchain_completes(url: str, expected: str) -> None:
    model = OllamaLLM(model=NAME, base_url=url, validate_model_on_init=True, **GREEDY)
    assert model.invoke(PROMPT) == expected
    assert "".join(model.stream(PROMPT)) == expected
    stop = expected[4:7]
    assert model.invoke(PROMPT, stop=[stop]) == expected[: expected.index(stop)]


def test_langchain_embeds(url: str) -> None:
    model = OllamaEmbeddings(model=NAME, base_url=url, validate_model_on_init=True)
    found = model.embed_documents(["The sea.", "A ship."])
    assert [len(vector) for vector in found] == [256, 256]
    assert model.embed_query("A ship.") == pytest.approx(found[1], abs=1e-4)


def test_langchain_reads_errors(url: str) -> None:
    with pytest.raises(ValueError, match="not found"):
        ChatOllama(model="nothing", base_url=url, validate_model_on_init=True)
    with pytest.raises(ollama.ResponseError, match="model 'nothing' not found"):
        ChatOllama(model="nothing", base_url=url).invoke(PROMPT)
    with pytest.raises(ollama.ResponseError, match=r"options\.mirostat: not supported here"):
        chat_ollama(url, mirostat=2).invoke(PROMPT)
    with pytest.raises(ollama.ResponseError, match="does not support tools"):
        chat_ollama(url).bind_tools([Person]).invoke(PROMPT)


# --- llm ---

#: Runs commands of `llm` one after the other: each start of it takes seconds. Results are [exit code, output].
_DRIVER = """
import json, sys
from click.testing import CliRunner
from llm.cli import cli
results = [CliRunner().invoke(cli, arguments, input="") for arguments in json.load(sys.stdin)]
json.dump([[result.exit_code, result.output] for result in results], sys.stdout)
"""


@pytest.fixture(scope="module")
def said(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each command, in a process that knows no server but this one."""
    model, seeded = ["-m", f"ollama/{NAME}"], ["-o", "seed", "3", "-o", "num_predict", "300"]
    greedy = [part for name, value in GREEDY.items() for part in ("-o", name, str(value))]
    commands = {
        "streamed": [*model, *greedy, PROMPT],
        "whole": [*model, *greedy, "--no-stream", PROMPT],
        "next": ["-c", *greedy, "Go on."],
        "logs": ["logs", "--json", "-n", "1"],
        "person": [*model, *seeded, "--schema", json.dumps(Person.model_json_schema()), "Who?"],
        "models": ["ollama", "models"],
        "embed": ["embed", *model, "-c", "The sea."],
        "unknown": ["-m", "ollama/nothing", "x"],
        "option": [*model, "-o", "top_p", "7", "x"],
        "plain": ["-m", f"ollama/{PLAIN}", "x"],
    }
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(list(commands.values())),
        env=os.environ | {"LLM_USER_PATH": str(tmp_path_factory.mktemp("llm")), "OLLAMA_HOST": url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: (code, output) for name, (code, output) in zip(commands, json.loads(done.stdout), strict=True)}


def test_llm(said: dict[str, tuple[int, str]], expected: str) -> None:
    for name in ("streamed", "whole"):
        assert (said[name][0], said[name][1].rstrip("\n")) == (0, expected.rstrip("\n"))
    log = json.loads(said["logs"][1])[0]
    assert log["response"] == said["next"][1].rstrip("\n")
    assert log["output_tokens"] == GREEDY["num_predict"]
    Person.model_validate_json(said["person"][1])
    assert f"{NAME}:latest" in said["models"][1]
    assert f"{PLAIN}:latest" in said["models"][1]
    assert len(json.loads(said["embed"][1])) == 256


def test_llm_reads_errors(said: dict[str, tuple[int, str]]) -> None:
    wanted = {
        "unknown": "nothing",
        "option": "options.top_p: expected above 0 and at most 1",
        "plain": "chat template",
    }
    for name, words in wanted.items():
        assert said[name][0] == 1
        assert words in said[name][1]

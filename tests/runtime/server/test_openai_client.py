"""OpenAI's own Python package against a running server: sync and async, whole and streamed, and its exceptions."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field
from served_models import NAME, PLAIN, Alone
from serving import serving

MOST = 10
PROMPT = "Tell me about the sea."
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]
TEXT = "Once there was a little"


class Person(BaseModel):
    name: str = Field(max_length=10)
    mood: Literal["glad", "sad"]
    age: int = Field(ge=0, le=150)


@pytest.fixture(scope="module")
def url(files: list[Path]) -> Iterator[str]:
    with serving(*files) as found:
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none needed", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def expected(files: list[Path]) -> tuple[str, str]:
    """What the model answers to `PROMPT`, and how it goes on from `TEXT`."""
    alone = Alone(files[0])
    answer, _ = alone.answer(alone.chat_tokens(("user", PROMPT)), MOST)
    text, _ = alone.answer(alone.model.tokenizer.encode(TEXT), MOST)
    alone.model.close()
    return answer, text


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME, PLAIN]
    assert client.models.retrieve(NAME).owned_by == "griffin"


def test_chat(client: OpenAI, expected: tuple[str, str]) -> None:
    found = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_tokens=MOST, logprobs=True)
    choice = found.choices[0]
    assert choice.message.content == expected[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert b"".join(bytes(one.bytes or []) for one in choice.logprobs.content or []).decode() == expected[0]
    assert found.usage is not None
    assert found.usage.completion_tokens == MOST
    with client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0,
        max_tokens=MOST,
        stream=True,
        stream_options={"include_usage": True},
    ) as chunks:
        *pieces, last = list(chunks)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[0]
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    # The prompt was read for the answer before this one.
    assert last.usage.prompt_tokens_details.cached_tokens == last.usage.prompt_tokens == found.usage.prompt_tokens


def test_a_helper_that_gathers_a_stream(client: OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a whale?"}]
    whole = client.chat.completions.create(model=NAME, messages=messages, temperature=0)
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=NAME, messages=messages, temperature=0) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert found.choices[0].message.content == whole.choices[0].message.content


def test_completions(client: OpenAI, expected: tuple[str, str]) -> None:
    found = client.completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=MOST, logprobs=1)
    assert found.choices[0].text == expected[1]
    assert found.choices[0].logprobs is not None
    assert "".join(found.choices[0].logprobs.tokens or []) == expected[1]
    chunks = client.completions.create(model=PLAIN, prompt=TEXT, temperature=0, max_tokens=MOST, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[1]


def test_json_of_a_pydantic_model(client: OpenAI) -> None:
    found = client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "Who?"}], response_format=Person, seed=3, max_tokens=300
    )
    assert isinstance(found.choices[0].message.parsed, Person)


def test_embeddings(client: OpenAI) -> None:
    """The package asks for base64 and unpacks it; a person who asks for numbers gets the same."""
    packed = client.embeddings.create(model=NAME, input=["The sea", "A horse"])
    plain = client.embeddings.create(model=NAME, input=["The sea", "A horse"], encoding_format="float")
    rows = [np.array([one.embedding for one in found.data]) for found in (packed, plain)]
    assert rows[0] == pytest.approx(rows[1], abs=1e-6)
    assert np.linalg.norm(rows[0], axis=1) == pytest.approx(np.ones(2), abs=1e-6)
    assert rows[0][0] @ rows[0][1] < 0.999
    assert packed.usage.prompt_tokens == plain.usage.prompt_tokens > 2


def test_async(url: str, expected: tuple[str, str]) -> None:
    async def whole(client: AsyncOpenAI) -> str | None:
        found = await client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_tokens=MOST)
        return found.choices[0].message.content

    async def streamed(client: AsyncOpenAI) -> str:
        chunks = await client.chat.completions.create(
            model=NAME, messages=MESSAGES, temperature=0, max_tokens=MOST, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def completed(client: AsyncOpenAI) -> str:
        found = await client.completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=MOST)
        return found.choices[0].text

    async def vectors(client: AsyncOpenAI) -> str:
        found = await client.embeddings.create(model=NAME, input=["a"] * 20)
        return f"{len(found.data)} vectors"

    async def all_at_once() -> list[str | None]:
        async with AsyncOpenAI(base_url=url, api_key="none needed", max_retries=0) as client:
            work = [whole(client), streamed(client), completed(client), vectors(client)]
            return list(await asyncio.gather(*work, *(streamed(client) for _ in range(4))))

    answer, text = expected
    assert asyncio.run(all_at_once()) == [answer, answer, text, "20 vectors"] + [answer] * 4


def test_errors_are_its_own_exceptions(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'nothing' not found") as missing:
        client.chat.completions.create(model="nothing", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    with pytest.raises(openai.BadRequestError, match="temperature: expected from 0") as bad:
        client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            stream=True,
        )
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=PLAIN, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError, match="there is no such path here"):
        client.responses.create(model=NAME, input="a")


def test_a_full_server_is_a_rate_limit(files: list[Path]) -> None:
    with (
        serving(files[0], slots=1, waiting=0) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none needed", max_retries=0) as client,
    ):
        endless = client.completions.create(model=NAME, prompt=TEXT, seed=1, max_tokens=10**6, stream=True)
        next(endless)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=NAME, messages=MESSAGES)
        assert refused.value.code == "rate_limit_exceeded"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        endless.close()
        # Its own way of dealing with that: it tries again.
        patient = client.with_options(max_retries=5)
        assert patient.completions.create(model=NAME, prompt=TEXT, max_tokens=1).choices[0].finish_reason == "length"


def test_a_key(files: list[Path]) -> None:
    with serving(files[0], api_key="sesame") as url:
        with OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"
        with OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [NAME]

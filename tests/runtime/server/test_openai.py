"""OpenAI's API against a running server: what it says is what the model says alone, in OpenAI's shapes."""

import base64
import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from served_models import DOCUMENT, NAME, PLAIN, Alone
from serving import running

from griffin_gguf.runtime.logprobs import TokenLogprobs
from griffin_gguf.runtime.sampling import softmax
from griffin_gguf.runtime.server.answers import Piece
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.guard import parse
from griffin_gguf.runtime.server.openai_forms import ChatForm, TextForm
from griffin_gguf.runtime.server.openai_messages import ChatRequest, CompletionRequest, EmbeddingRequest
from griffin_gguf.runtime.server.openai_requests import Asked, messages, prompts, texts

PROMPT = "Tell me about the sea."
TEXT = "Once there was a little"
MOST = 12

#: What differs between two answers that say the same.
OWN: dict[str, Any] = {"id": "", "created": 0, "usage": None}

#: What a request gets where it asks for nothing.
DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def user(text: str = PROMPT) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def valid(kind: type[BaseModel], found: dict[str, Any]) -> dict[str, Any]:
    """`found`, which OpenAI's own type must take, with no field that it does not know."""
    _check_no_more(kind.model_validate(found, strict=True))
    return found


def _check_no_more(made: Any) -> None:
    if isinstance(made, list):
        for one in made:
            _check_no_more(one)
    elif isinstance(made, BaseModel):
        assert not made.model_extra
        for name in made.model_fields_set:
            _check_no_more(getattr(made, name))


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": NAME, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    wanted = {"messages": user(), "temperature": 0, "max_tokens": MOST} | body
    return valid(ChatCompletion, post(client, "/v1/chat/completions", **wanted))


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    wanted = {"prompt": TEXT, "temperature": 0, "max_tokens": MOST} | body
    return valid(Completion, post(client, "/v1/completions", **wanted))


def stream(client: httpx.Client, path: str, kind: type[BaseModel], **body: Any) -> list[dict[str, Any]]:
    """All events but the last, which says that it is the last."""
    with client.stream("POST", path, json={"model": NAME, "stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        *events, done, rest = response.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in found:
        valid(kind, _ended(chunk) if kind is Completion else chunk)
    return found


def _ended(chunk: dict[str, Any]) -> dict[str, Any]:
    """A completion's chunk as if it were the last: there is no type for one that is not."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    return chunk | {"choices": choices}


def refusal(client: httpx.Client, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": NAME, **body})
    assert response.status_code == status, response.text
    found = response.json()
    assert list(found) == ["error"]
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return found["error"]


def text_of(found: dict[str, Any], index: int = 0) -> str:
    return found["choices"][index]["message"]["content"]


def counted(client: httpx.Client, name: str) -> float:
    """A number of the server's metrics, for `NAME`."""
    page = client.get("/metrics").text
    return float(re.findall(rf'^griffin_{name}{{model="{NAME}"}} (\S+)$', page, re.MULTILINE)[0])


# Models


def test_all_models_and_one(client: httpx.Client, files: list[Path]) -> None:
    found = client.get("/v1/models").json()
    assert found["object"] == "list"
    assert [valid(Model, one)["id"] for one in found["data"]] == [NAME, DOCUMENT, PLAIN, f"{PLAIN}@story"]
    assert found["data"][0]["created"] == int(files[0].stat().st_mtime)
    assert client.get(f"/v1/models/{NAME}").json() == found["data"][0]
    assert client.get(f"/v1/models/{DOCUMENT}").json() == found["data"][1]


def test_a_model_that_is_not_there(client: httpx.Client) -> None:
    expected = {
        "message": "model 'nobody/nothing' not found",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    response = client.get("/v1/models/nobody/nothing")
    assert (response.status_code, response.json()) == (404, {"error": expected})
    for path, body in (
        ("/v1/chat/completions", {"messages": user()}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ):
        assert refusal(client, path, 404, **body | {"model": "nobody/nothing"}) == expected


# Chat


def test_an_answer_is_the_models_own(client: httpx.Client, alone: Alone) -> None:
    tokens = alone.chat_tokens(("user", PROMPT))
    text, said = alone.answer(tokens, MOST)
    found = chat(client)
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": "length",
            "logprobs": None,
        }
    ]
    assert (found["object"], found["model"]) == ("chat.completion", NAME)
    assert abs(found["created"] - time.time()) < 60
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), len(said) == MOST and MOST)
    assert usage["total_tokens"] == len(tokens) + MOST
    again = chat(client)
    assert again["id"] != found["id"]
    assert again["system_fingerprint"] == found["system_fingerprint"]
    assert again["choices"] == found["choices"]


def test_an_answer_that_ends_by_itself(client: httpx.Client, alone: Alone) -> None:
    tokens = alone.chat_tokens(("user", "What is a whale?"))
    text, said = alone.answer(tokens, 400)
    assert len(said) < 400, "the model ends this answer itself"
    found = chat(client, messages=user("What is a whale?"), max_tokens=400)
    assert text_of(found) == text
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == len(said) + 1


def test_a_stream_adds_up_to_the_whole(client: httpx.Client) -> None:
    whole = chat(client)
    body = {"messages": user(), "temperature": 0, "max_tokens": MOST}
    first, *middle, last = stream(client, "/v1/chat/completions", ChatCompletionChunk, **body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == text_of(whole)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    for chunk in (first, *middle):
        assert chunk["choices"][0]["finish_reason"] is None
    chunks = (first, *middle, last)
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    assert first["system_fingerprint"] == whole["system_fingerprint"]
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_tells_the_usage_where_that_is_wanted(client: httpx.Client) -> None:
    whole = chat(client)
    body = {"messages": user(), "temperature": 0, "max_tokens": MOST, "stream_options": {"include_usage": True}}
    *chunks, last = stream(client, "/v1/chat/completions", ChatCompletionChunk, **body)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}


def test_a_second_turn_reads_only_what_is_new(client: httpx.Client, alone: Alone) -> None:
    messages = user("Tell me about a horse that nobody has asked for yet.")
    first = chat(client, messages=messages)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 16
    messages += [{"role": "assistant", "content": text_of(first)}, *user("And then?")]
    second = chat(client, messages=messages)["usage"]
    known = first["usage"]["total_tokens"] - 1  # the state has not read the last token of the answer
    assert second["prompt_tokens_details"]["cached_tokens"] >= known
    assert second["prompt_tokens"] - known < 20
    again = chat(client, messages=messages)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"]


def test_roles_and_parts(client: httpx.Client) -> None:
    system = {"role": "system", "content": "Speak of ships."}
    expected = text_of(chat(client, messages=[system, *user("One.\nTwo.")]))
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    developer = {"role": "developer", "content": [{"type": "text", "text": "Speak of ships."}]}
    assert text_of(chat(client, messages=[developer, {"role": "user", "content": parts, "name": "ann"}])) == expected
    assert text_of(chat(client, messages=user("One.\nTwo."))) != expected


def test_an_answer_that_was_begun_goes_on(client: httpx.Client, alone: Alone) -> None:
    assert alone.template is not None
    messages = [*user(), {"role": "assistant", "content": "The sea is"}]
    tokens = alone.template.prompt(alone.model.tokenizer, messages).tokens
    assert alone.model.tokenizer.decode(tokens).endswith("The sea is")
    assert text_of(chat(client, messages=messages)) == alone.answer(tokens, MOST)[0]


def test_a_document_is_read_before_a_conversation(client: httpx.Client) -> None:
    found = chat(client, model=DOCUMENT)
    assert found["model"] == DOCUMENT
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert text_of(found) != text_of(chat(client))
    assert text_of(found) == text_of(chat(client, model=DOCUMENT))


def test_a_model_without_a_template_only_completes(client: httpx.Client, alone: Alone) -> None:
    assert "no chat template" in refusal(client, "/v1/chat/completions", model=PLAIN, messages=user())["message"]
    found = complete(client, model=PLAIN)
    assert found["choices"][0]["text"] == alone.answer(alone.model.tokenizer.encode(TEXT), MOST)[0]


def test_json_of_a_schema(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    found = json.loads(text_of(chat(client, response_format=wanted, max_tokens=300, temperature=1, seed=3)))
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
    found = chat(client, response_format={"type": "json_object"}, max_tokens=100, temperature=1, seed=3)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert isinstance(json.loads(text_of(found)), dict)
    assert text_of(chat(client, response_format={"type": "text"})) == text_of(chat(client))


def test_a_completion_is_json_of_a_schema_too(client: httpx.Client) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "minItems": 2, "maxItems": 2}
    wanted = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    found = complete(client, response_format=wanted, max_tokens=100)["choices"][0]
    assert found["finish_reason"] == "stop"
    assert [0 <= number <= 99 for number in json.loads(found["text"])] == [True, True]


# How tokens are chosen, and where an answer ends


def test_without_options_openais_defaults_hold(client: httpx.Client, alone: Alone) -> None:
    tokens = alone.chat_tokens(("user", PROMPT))
    body = {"messages": user(), "seed": 11, "max_tokens": 60}
    found = valid(ChatCompletion, post(client, "/v1/chat/completions", **body))
    assert text_of(found) == alone.answer(tokens, 60, seed=11, **DEFAULTS)[0]


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.5, "top_p": 0.7, "seed": 5},
    {"seed": -3},
    {"top_p": 0, "seed": 1},
    {"temperature": 0, "presence_penalty": 2},
    {"temperature": 0, "frequency_penalty": 1.5},
    {"temperature": 0, "frequency_penalty": -0.5, "presence_penalty": -0.5},
    {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.3, "repeat_last_n": 20, "seed": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_each_option_does_what_it_does_alone(client: httpx.Client, alone: Alone, options: dict[str, Any]) -> None:
    chosen = DEFAULTS | options
    if chosen.get("seed", 0) < 0:
        chosen["seed"] += 2**64
    if chosen["top_p"] == 0:
        chosen |= {"top_p": 1.0, "temperature": 0.0}  # the likeliest token alone
    expected = alone.answer(alone.model.tokenizer.encode(TEXT), 40, **chosen)[0]
    body = {"prompt": TEXT, "max_tokens": 40, **options}
    assert post(client, "/v1/completions", **body)["choices"][0]["text"] == expected


def test_penalties_change_an_answer(client: httpx.Client) -> None:
    texts = {complete(client, max_tokens=40, **penalty)["choices"][0]["text"] for penalty in ({}, *OPTIONS[3:5])}
    assert len(texts) == 3


def test_how_long_an_answer_may_be(client: httpx.Client) -> None:
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16
    assert complete(client, max_tokens=0)["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "logprobs": None,
    }
    assert chat(client, max_tokens=3, max_completion_tokens=5)["usage"]["completion_tokens"] == 5
    assert chat(client, max_tokens=None)["choices"][0]["finish_reason"] == "stop"


def test_minus_one_is_none_as_other_servers_clients_have_it(client: httpx.Client) -> None:
    assert chat(client, max_tokens=-1) | OWN == chat(client, max_tokens=None) | OWN
    assert chat(client, max_completion_tokens=-1, max_tokens=3) | OWN == chat(client, max_tokens=None) | OWN
    asked = Asked.of(CompletionRequest(model=NAME, max_tokens=-1))
    assert asked.wish(0, 8192).max_tokens == 81920
    assert Asked.of(CompletionRequest(model=NAME)).wish(0, 8192).max_tokens == 16
    body = {"temperature": 1, "seed": 4}
    assert complete(client, top_k=-1, **body)["choices"] == complete(client, top_k=0, **body)["choices"]


def test_a_stop_string_ends_an_answer(client: httpx.Client) -> None:
    whole = complete(client)["choices"][0]["text"]
    stop = whole.split()[2]
    for stops in (stop, [stop], ["never said", stop]):
        found = complete(client, stop=stops)["choices"][0]
        assert found["text"] == whole[: whole.index(stop)]
        assert found["finish_reason"] == "stop"
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": MOST, "stop": stop}
    chunks = stream(client, "/v1/completions", Completion, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[: whole.index(stop)]


# Several answers


def test_several_answers_draw_each_for_itself(client: httpx.Client, alone: Alone) -> None:
    question = "What does nobody know of the moon?"
    tokens = alone.chat_tokens(("user", question))
    expected = [alone.answer(tokens, MOST, **DEFAULTS, seed=seed)[0] for seed in (7, 8, 9)]
    body = {"messages": user(question), "temperature": 1, "seed": 7, "n": 3, "max_tokens": MOST}
    fed, cached = counted(client, "prompt_tokens_total"), counted(client, "cached_tokens_total")
    found = chat(client, **body)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [text_of(found, i) for i in range(3)] == expected
    assert len(set(expected)) == 3
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(tokens), 3 * MOST)
    # The first has read the prompt, and the others go on from there.
    assert counted(client, "prompt_tokens_total") - fed == 3 * len(tokens)
    known = usage["prompt_tokens_details"]["cached_tokens"]
    assert counted(client, "cached_tokens_total") - cached == known + 2 * len(tokens)
    assert known < len(tokens)

    options = {"stream_options": {"include_usage": True}}
    *chunks, last = stream(client, "/v1/chat/completions", ChatCompletionChunk, **body, **options)
    texts, ends = defaultdict[int, str](str), list[int]()
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert [texts[i] for i in range(3)] == expected
    assert sorted(ends) == [0, 1, 2]
    assert last["usage"]["completion_tokens"] == 3 * MOST


def test_several_prompts(client: httpx.Client, alone: Alone) -> None:
    encode = alone.model.tokenizer.encode
    texts = [TEXT, "The king of"]
    expected = [alone.answer(encode(text), MOST)[0] for text in texts for _ in range(2)]
    found = complete(client, prompt=texts, n=2, best_of=2)
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["prompt_tokens"] == sum(len(encode(text)) for text in texts)
    as_tokens = complete(client, prompt=[encode(text) for text in texts], n=2)
    assert as_tokens["choices"] == found["choices"]
    assert complete(client, prompt=encode(TEXT))["choices"] == found["choices"][:1]
    beginning = alone.answer(encode(""), MOST)[0]
    assert complete(client, prompt=None)["choices"][0]["text"] == beginning
    assert complete(client, prompt="")["choices"][0]["text"] == beginning


# Log probabilities


def every_logprob(alone: Alone, tokens: list[int], said: list[int]) -> np.ndarray:
    """Of all tokens at each place of the answer, [T, V]."""
    logits = alone.model.forward(tokens + said, alone.model.new_state(), every=True)
    return np.log([softmax(row) for row in logits[len(tokens) - 1 : -1]])


def test_a_chats_logprobs_are_the_models(client: httpx.Client, alone: Alone) -> None:
    tokens = alone.chat_tokens(("user", PROMPT))
    text, said = alone.answer(tokens, MOST)
    expected = every_logprob(alone, tokens, said)
    choice = chat(client, logprobs=True, top_logprobs=3)["choices"][0]
    found = choice["logprobs"]["content"]
    assert bytes(byte for one in found for byte in one["bytes"]).decode() == text
    for place, one in enumerate(found):
        assert one["logprob"] == pytest.approx(expected[place, said[place]], abs=1e-3)
        best = np.sort(expected[place])[::-1][:3]
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(best.tolist(), abs=1e-3)
        assert one["top_logprobs"][0]["token"] == one["token"]  # at temperature 0
    bare = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in bare] == [[]] * MOST
    body = {"messages": user(), "temperature": 0, "max_tokens": MOST, "logprobs": True, "top_logprobs": 3}
    chunks = [chunk["choices"][0] for chunk in stream(client, "/v1/chat/completions", ChatCompletionChunk, **body)]
    assert [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["content"]] == found


def test_tokens_that_are_no_text(alone: Alone) -> None:
    tokenizer = alone.model.tokenizer
    end = tokenizer.control_tokens["<end_of_turn>"]
    first, second = tokenizer.encode("\u0416", bos=False)[-2:]  # no token of the vocabulary has this letter
    assert tokenizer.piece(first) + tokenizer.piece(second) == "\u0416".encode()
    pieces = [
        Piece("", [TokenLogprobs(first, -1.0, ((end, -0.5), (first, -1.0)))]),
        Piece(
            "\u0416!",
            [TokenLogprobs(second, -np.inf, ()), TokenLogprobs(tokenizer.encode("!", bos=False)[-1], 0.0, ())],
        ),
    ]
    chat = msgspec.to_builtins(ChatForm(0, tokenizer, True).complete(pieces, "stop"))
    one, two, _ = chat["logprobs"]["content"]
    assert (one["token"], one["bytes"], two["bytes"]) == ("\ufffd", [0xD0], [0x96])
    assert one["top_logprobs"][0] == {"token": "<end_of_turn>", "logprob": -0.5, "bytes": None}
    assert two["logprob"] == -9999.0
    text = msgspec.to_builtins(TextForm(0, tokenizer, True).complete(pieces, "stop"))["logprobs"]
    assert text["tokens"] == ["bytes:\\xd0", "bytes:\\x96", "!"]
    assert text["text_offset"] == [0, 0, 1]
    assert text["top_logprobs"][0] == {"<end_of_turn>": -0.5, "bytes:\\xd0": -1.0}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_completions_logprobs_lie_over_its_text(client: httpx.Client, alone: Alone, streamed: bool) -> None:
    tokens = alone.model.tokenizer.encode(TEXT)
    text, said = alone.answer(tokens, MOST)
    expected = every_logprob(alone, tokens, said)
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": MOST, "logprobs": 2}
    if streamed:
        choices = [chunk["choices"][0] for chunk in stream(client, "/v1/completions", Completion, **body)]
    else:
        choices = complete(client, **body)["choices"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    found = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    assert "".join(choice["text"] for choice in choices) == text
    for start, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert text[start:].startswith(token)
    assert "".join(found["tokens"]) == text
    assert found["token_logprobs"] == pytest.approx(
        [expected[place, token] for place, token in enumerate(said)], abs=1e-3
    )
    for place, top in enumerate(found["top_logprobs"]):
        best = np.sort(expected[place])[::-1][:2]
        assert list(top.values()) == pytest.approx(best.tolist(), abs=1e-3)
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] == [
        {token: pytest.approx(value, abs=1e-3)}
        for token, value in zip(found["tokens"], found["token_logprobs"], strict=True)
    ]


# What is refused


CHAT, TEXTS, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TEXT_PART = {"type": "text", "text": ""}
PICTURE = [{"type": "image_url", "image_url": {"url": "data:,"}}]

#: Path, what is asked for, the field at fault and a word of the message.
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {}, None, "missing required field `messages`"),
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'tool'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "`int`"),
    (CHAT, {"messages": [{"role": "user", "content": PICTURE}]}, "messages[0].content[0]", "'image_url'"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}] * 2}, "messages", "roles must alternate"),
    (CHAT, {"temperature": -1}, "temperature", "from 0 to 1000"),
    (CHAT, {"temperature": "warm"}, "temperature", "`str`"),
    (CHAT, {"top_p": 1.5}, "top_p", "at most 1"),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty", "from -2 to 2"),
    (CHAT, {"frequency_penalty": -2.5}, "frequency_penalty", "from -2 to 2"),
    (CHAT, {"max_tokens": -2}, "max_tokens", "at least 0, or -1 for no limit, found -2"),
    (CHAT, {"max_completion_tokens": -2}, "max_completion_tokens", "found -2"),
    (CHAT, {"top_k": -2}, "top_k", "at least 0, found -2"),
    (CHAT, {"messages": user() * 10_001}, "messages", "length <= 10000"),
    (CHAT, {"messages": [{"role": "user", "content": [TEXT_PART] * 5001}] * 2}, "messages", "at most 10000 parts"),
    (CHAT, {"n": 0}, "n", "from 1 to 32"),
    (CHAT, {"n": 33}, "n", "found 33"),
    (CHAT, {"stop": [""]}, "stop", "empty"),
    (CHAT, {"stop": ["a"] * 65}, "stop", "at most 64"),
    (CHAT, {"stop": ["a"] * 100_000}, "stop", "at most 64"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "not supported"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "not supported"),
    (CHAT, {"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "not supported"),
    (CHAT, {"audio": {"voice": "x", "format": "wav"}}, "audio", "not supported"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "not supported"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    (TEXTS, {"prompt": []}, "prompt", "at least one"),
    (TEXTS, {"prompt": ["a", 3]}, "prompt", "found both"),
    (TEXTS, {"prompt": [3, -1]}, "prompt", "found -1"),
    (TEXTS, {"prompt": ["a"] * 20, "n": 2}, "prompt", "at most 32"),
    (TEXTS, {"prompt": ["a"] * 100_000}, "prompt", "at most 32"),
    (TEXTS, {"prompt": [[1]] * 100_000}, "prompt", "at most 32"),
    (TEXTS, {"prompt": [1, "a"]}, "prompt", "found both"),
    (TEXTS, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    (TEXTS, {"prompt": "a", "echo": True}, "echo", "not supported"),
    (TEXTS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (TEXTS, {"prompt": "a", "best_of": 3}, "best_of", "found 3"),
    (TEXTS, {"prompt": "a", "logprobs": 6}, "logprobs", "from 0 to 5"),
    (VECTORS, {"input": ""}, "input", "empty"),
    (VECTORS, {"input": []}, "input", "empty"),
    (VECTORS, {"input": ["a", ""]}, "input", "empty"),
    (VECTORS, {"input": ["a"] * 2049}, "input", "at most 2048"),
    (VECTORS, {"input": [[1, 10**9]]}, "input", "1000000000"),
    (VECTORS, {"input": "a", "dimensions": 0}, "dimensions", "from 1 to"),
    (VECTORS, {"input": "a", "dimensions": 10**6}, "dimensions", "from 1 to"),
    (VECTORS, {"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
    (VECTORS, {"input": "a", "model": DOCUMENT}, "model", f"ask {NAME}"),
]


@pytest.mark.parametrize(("path", "body", "param", "word"), REFUSED)
def test_what_cannot_be_done_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any], param: str | None, word: str
) -> None:
    wanted = body if path != CHAT or not body or "messages" in body else {"messages": user(), **body}
    found = refusal(client, path, **wanted)
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, None)
    assert word in found["message"]
    assert "\n" not in found["message"]
    # As a stream it is an error too, not a stream that tells of one.
    if path != VECTORS:
        assert refusal(client, path, **wanted, stream=True) == found


def test_what_changes_nothing_is_taken(client: httpx.Client) -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True, "service_tier": "auto",
        "prompt_cache_key": "x", "safety_identifier": "y", "tools": [], "tool_choice": "none", "logit_bias": {},
        "modalities": ["text"], "functions": None, "stop": None, "n": None, "response_format": None,
        "stream_options": None, "top_logprobs": 0, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0,
    }  # fmt: skip
    assert chat(client, **harmless)["choices"] == chat(client)["choices"]
    harmless = {"echo": False, "suffix": "", "best_of": 1, "logit_bias": None, "user": "me"}
    assert complete(client, **harmless)["choices"] == complete(client)["choices"]


def test_a_body_that_is_no_json(client: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b"\xff"):
        response = client.post(CHAT, content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/nothing").json()["error"]["param"] is None


#: Any JSON, with words that mean something in some field or other.
words = st.sampled_from(["user", "text", "json_schema", "none", "float", "", "\u0416", "a" * 2000])
numbers = st.one_of(st.integers(), st.sampled_from([0, 1, -1, 2, 2**63, 2**64]), st.floats(allow_nan=False))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
SOUND: dict[Any, dict[str, Any]] = {
    ChatRequest: {"model": NAME, "messages": user()},
    CompletionRequest: {"model": NAME, "prompt": TEXT},
    EmbeddingRequest: {"model": NAME, "input": TEXT},
}


def problem_of(kind: Any, body: dict[str, Any]) -> ApiError | None:
    try:
        wanted = parse(json.dumps(body).encode(), kind)
        if kind is EmbeddingRequest:
            assert all(texts(wanted))
            return None
        asked = Asked.of(wanted)
        assert asked.wish(asked.n - 1, 8192).max_tokens is not None
        assert messages(wanted) if kind is ChatRequest else prompts(wanted, asked.n)
    except ApiError as error:
        return error
    return None


@settings(max_examples=300)
@given(kind=st.sampled_from(list(SOUND)), data=st.data())
def test_whatever_is_asked_for_is_taken_or_refused(kind: Any, data: st.DataObject) -> None:
    assert problem_of(kind, SOUND[kind]) is None
    names = st.sampled_from(kind.__struct_fields__)
    found = problem_of(kind, SOUND[kind] | data.draw(st.dictionaries(names, anything, min_size=1, max_size=3)))
    if found is not None:
        assert found.status == 400
        assert found.message.isprintable()
        assert len(found.message) < 500


# Vectors


def test_vectors_are_the_models_at_unit_length(client: httpx.Client, alone: Alone) -> None:
    texts = ["The sea", "A horse and a king", "the sea " * 300]
    tokens = [alone.model.tokenizer.encode(text) for text in texts]
    rows = alone.model.embed(tokens)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = valid(CreateEmbeddingResponse, post(client, VECTORS, input=texts))
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert [one["index"] for one in found["data"]] == [0, 1, 2]
    assert np.abs(vectors[:2] - expected[:2]).max() < 1e-5
    assert np.abs(vectors - expected).max() < 1e-2  # Q8_0 rounds otherwise where a text is cut otherwise
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert found["usage"] == {"prompt_tokens": sum(map(len, tokens)), "total_tokens": sum(map(len, tokens))}
    assert found["model"] == NAME

    packed = post(client, VECTORS, input=texts, encoding_format="base64")["data"]
    unpacked = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in packed]
    assert np.abs(np.stack(unpacked) - vectors).max() < 1e-5
    as_tokens = post(client, VECTORS, input=tokens, encoding_format="float")["data"]
    assert np.abs(np.array([one["embedding"] for one in as_tokens]) - vectors).max() < 1e-5
    one = post(client, VECTORS, input=tokens[0])["data"]
    assert np.abs(np.array(one[0]["embedding"]) - vectors[0]).max() < 1e-5


def test_fewer_dimensions_are_the_first_ones_at_unit_length(client: httpx.Client) -> None:
    whole = np.array(post(client, VECTORS, input="The sea")["data"][0]["embedding"])
    cut = np.array(post(client, VECTORS, input="The sea", dimensions=10)["data"][0]["embedding"])
    assert cut == pytest.approx(whole[:10] / np.linalg.norm(whole[:10]), abs=1e-6)


# A server that is full, clients that go, a server that ends


def idle(client: httpx.Client) -> bool:
    return counted(client, "running") == counted(client, "waiting") == 0


def wait_until(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


LONG: dict[str, Any] = {"prompt": TEXT, "model": NAME, "stream": True, "max_tokens": 10**6, "seed": 1}


def test_a_full_server_says_so(files: list[Path]) -> None:
    with running(files[0], slots=1, waiting=1) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert refusal(client, TEXTS, 429, prompt=["a", "b", "c"])["code"] == "rate_limit_exceeded"
        wait_until(lambda: idle(client))
        with client.stream("POST", TEXTS, json=LONG) as first, client.stream("POST", TEXTS, json=LONG) as second:
            assert first.status_code == second.status_code == 200
            response = client.post(CHAT, json={"model": NAME, "messages": user(), "stream": True})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: idle(client))
        assert text_of(chat(client)) != ""


def test_whoever_goes_takes_all_answers_along(client: httpx.Client) -> None:
    with client.stream("POST", TEXTS, json=LONG | {"n": 4}) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: counted(client, "running") == 4)
    wait_until(lambda: idle(client))
    with pytest.raises(httpx.ReadTimeout):
        client.post(TEXTS, json=LONG | {"n": 3, "stream": False}, timeout=httpx.Timeout(60, read=0.3))
    wait_until(lambda: idle(client))


def test_an_answer_that_is_cut_off_ends_in_an_error(files: list[Path]) -> None:
    with running(files[0], grace=0) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", TEXTS, json=LONG | {"n": 2}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.terminate()
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        assert set(events[-1]) == {"error"}
        assert events[-1]["error"]["type"] == "api_error"
        assert all("choices" in event for event in events[:-1])

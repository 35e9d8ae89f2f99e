"""OpenAI's API: what its own client libraries and the programs built on them speak.

    GET  /v1/models  /v1/models/{id}     what is here
    POST /v1/chat/completions            the next message of a conversation
    POST /v1/completions                 text that goes on from a prompt
    POST /v1/embeddings                  vectors

Streams are server-sent events that end with `data: [DONE]`. An answer is begun before anything is sent, so that what is
wrong with a request is a status; what goes wrong later is a last event {"error": ...}.
"""

import asyncio
import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.server import openai_requests
from griffin_gguf.runtime.server.embeddings import PLACE, in_pieces, numbers, vectors
from griffin_gguf.runtime.server.guard import Stream, parse, read_body, while_connected
from griffin_gguf.runtime.server.models import Entry, Models, Served
from griffin_gguf.runtime.server.openai_answers import Answers
from griffin_gguf.runtime.server.openai_forms import ChatForm, Form, TextForm
from griffin_gguf.runtime.server.openai_messages import (
    ChatRequest,
    CompletionRequest,
    EmbeddingList,
    EmbeddingObject,
    EmbeddingRequest,
    EmbeddingUsage,
    ModelList,
    ModelObject,
)
from griffin_gguf.runtime.server.openai_requests import Asked


def routes(models: Models) -> list[Route]:
    """All routes of this API, over `models`."""
    api = _Api(models)
    return [
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{id:path}", api.model, methods=["GET"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
    ]


class _Api:
    """The endpoints."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def models(self, request: Request) -> Response:
        """All models."""
        return _json(ModelList([_model(entry) for entry in self._models.entries()]))

    async def model(self, request: Request) -> Response:
        """One model."""
        return _json(_model(self._models.find(request.path_params["id"])))

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        wanted = parse(await read_body(request), ChatRequest)
        asked = Asked.of(wanted)
        messages = openai_requests.messages(wanted)
        return await self._answer(request, asked, ChatForm, lambda served: [served.chat(messages)])

    async def completions(self, request: Request) -> Response:
        """Text that goes on from each of some prompts."""
        wanted = parse(await read_body(request), CompletionRequest)
        asked = Asked.of(wanted)
        prompts = openai_requests.prompts(wanted, asked.n)

        def made(served: Served) -> list[ChatPrompt]:
            return [openai_requests.prompt_of(served, prompt) for prompt in prompts]

        return await self._answer(request, asked, TextForm, made)

    async def _answer(
        self, request: Request, asked: Asked, form: type[Form], prompts: Callable[[Served], Sequence[ChatPrompt]]
    ) -> Response:
        """Answers to what `prompts` makes, in a thread: templates and long texts take their time."""
        async with AsyncExitStack() as held:
            served = await held.enter_async_context(self._models.use(asked.model))
            answers = Answers(asked, served, form, held)
            await while_connected(request, answers.begin(await asyncio.to_thread(prompts, served)))
            if asked.stream:
                return Stream(answers.events(), "text/event-stream", held.pop_all())
            return _json(await while_connected(request, answers.whole()))
        raise AssertionError("unreachable: nothing that is held takes an error away")

    async def embeddings(self, request: Request) -> Response:
        """A vector for each of several texts."""
        wanted = parse(await read_body(request), EmbeddingRequest)
        texts = openai_requests.texts(wanted)
        async with self._models.use(wanted.model) as served:

            def encoded() -> list[list[int]]:
                return [openai_requests.tokens_of(served, text) for text in texts]

            tokens, entry = await asyncio.to_thread(encoded), served.entry
            size = entry.embedding if wanted.dimensions is None else wanted.dimensions
            making = vectors(served, tokens, size, request.app.state.settings.waiting)
            found = await while_connected(request, making)
        count = sum(map(len, tokens))
        answer = EmbeddingList(PLACE, entry.name, EmbeddingUsage(count, count))
        return Stream(in_pieces(answer, _objects(found, wanted.encoding_format == "base64")), "application/json")


def _model(entry: Entry) -> ModelObject:
    owner = entry.metadata.get("general.organization")
    return ModelObject(entry.name, int(entry.modified.timestamp()), owner if isinstance(owner, str) else "griffin")


def _objects(rows: NDArray[np.float32], packed: bool) -> Iterator[bytes]:
    """Yield an object for each vector, as JSON."""
    for i, row in enumerate(rows):
        vector = _packed(row) if packed else msgspec.Raw(numbers(row))
        yield msgspec.json.encode(EmbeddingObject(i, vector))


def _packed(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _json(message: Any) -> Response:
    return Response(msgspec.json.encode(message), media_type="application/json")

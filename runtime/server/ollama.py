"""Ollama's native API: what its own client libraries and the programs built on them speak.

    GET  /  /api/version  /api/tags  /api/ps        what is here
    POST /api/show                                  one model
    POST /api/generate  /api/chat                   text, as a stream of JSON lines or whole
    POST /api/embed  /api/embeddings                vectors

An answer is begun before anything is sent, so that what is wrong with a request is a status; what goes wrong later is a
last line {"error": ...}. What would change the set of models (pull, create, delete, ...) is 501.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from time import perf_counter_ns
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.server import ollama_models, ollama_options, ollama_prompts
from griffin_gguf.runtime.server.embeddings import PLACE, bounded, in_pieces, numbers, vectors
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.guard import Stream, parse, read_body, while_connected
from griffin_gguf.runtime.server.models import Models, Served
from griffin_gguf.runtime.server.ollama_answers import Answer, Asked
from griffin_gguf.runtime.server.ollama_messages import (
    ChatRequest,
    EmbedAnswer,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    Message,
    ShowRequest,
    VectorRequest,
)

#: The version of Ollama whose API this is. Clients compare it with those at which features came.
API_VERSION = "0.30.0"

#: What would change the set of models.
_UNBUILT = {
    "/api/pull": ["POST"],
    "/api/push": ["POST"],
    "/api/create": ["POST"],
    "/api/copy": ["POST"],
    "/api/delete": ["DELETE"],
    "/api/blobs/{digest}": ["POST", "HEAD"],
}


def routes(models: Models) -> list[Route]:
    """All routes of this API, over `models`."""
    api = _Api(models)
    answered = [
        Route("/", api.root, methods=["GET"]),
        Route("/api/version", api.version, methods=["GET"]),
        Route("/api/tags", api.tags, methods=["GET"]),
        Route("/api/ps", api.ps, methods=["GET"]),
        Route("/api/show", api.show, methods=["POST"]),
        Route("/api/generate", api.generate, methods=["POST"]),
        Route("/api/chat", api.chat, methods=["POST"]),
        Route("/api/embed", api.embed, methods=["POST"]),
        Route("/api/embeddings", api.embeddings, methods=["POST"]),
    ]
    return answered + [Route(path, api.unbuilt, methods=methods) for path, methods in _UNBUILT.items()]


class _Api:
    """The endpoints."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def root(self, request: Request) -> Response:
        """What Ollama's programs look for to see whether it is there."""
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        """The version whose API this is."""
        return _json({"version": API_VERSION})

    async def tags(self, request: Request) -> Response:
        """All models."""
        return _json({"models": ollama_models.listed(self._models.entries())})

    async def ps(self, request: Request) -> Response:
        """The models in memory."""
        return _json({"models": ollama_models.running(self._models.loaded())})

    async def show(self, request: Request) -> Response:
        """One model."""
        wanted = parse(await read_body(request), ShowRequest)
        entry = self._models.find(_required(wanted.model or wanted.name))
        return _json(await asyncio.to_thread(ollama_models.shown, entry, bool(wanted.verbose)))

    async def generate(self, request: Request) -> Response:
        """Text that answers a prompt, or goes on from it."""
        started = perf_counter_ns()
        wanted = parse(await read_body(request), GenerateRequest)
        self._models.find(_required(wanted.model))
        asked = Asked.of(wanted, started, lambda text: {"response": text})
        ollama_prompts.check_generate(wanted)
        if not wanted.prompt:
            return await self._load(asked)

        def prompt(served: Served) -> ChatPrompt:
            return ollama_prompts.generate_prompt(served, wanted)

        return await self._answer(request, asked, prompt, context=not wanted.raw)

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        started = perf_counter_ns()
        wanted = parse(await read_body(request), ChatRequest)
        self._models.find(_required(wanted.model))
        asked = Asked.of(wanted, started, lambda text: {"message": Message("assistant", text)})
        messages = ollama_prompts.messages(wanted)
        if not messages:
            return await self._load(asked)
        return await self._answer(request, asked, lambda served: served.chat(messages), context=False)

    async def _load(self, asked: Asked) -> Response:
        """What a request without a prompt is for: the model is loaded, or with a `keep_alive` of 0 unloaded."""
        if asked.keep_alive == 0:
            await self._models.unload(asked.model)
            return _json(asked.chunk("", done=True, done_reason="unload"))
        async with self._models.use(asked.model, asked.keep_alive):
            return _json(asked.chunk("", done=True, done_reason="load"))

    async def _answer(
        self, request: Request, asked: Asked, prompt_of: Callable[[Served], ChatPrompt], context: bool
    ) -> Response:
        """The answer to what `prompt_of` makes, in a thread: templates and long texts take their time."""
        async with AsyncExitStack() as held:
            served = await held.enter_async_context(self._models.use(asked.model, asked.keep_alive))
            prompt = await asyncio.to_thread(prompt_of, served)
            wish = asked.wish(len(prompt.tokens), served.entry.context)
            reply = await held.enter_async_context(served.answer(prompt, wish))
            answer = Answer(asked, served.model.tokenizer, prompt, reply, context)
            if asked.stream:
                return Stream(answer.lines(), "application/x-ndjson", held.pop_all())
            return _json(await while_connected(request, answer.whole()))
        raise AssertionError("unreachable: nothing that is held takes an error away")

    async def embed(self, request: Request) -> Response:
        """A vector for each of several texts, of which none is too long: `truncate` has nothing to do."""
        started = perf_counter_ns()
        wanted = parse(await read_body(request), EmbedRequest)
        texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input or []
        bounded(len(texts))
        # An empty text alone is none, as in Ollama.
        found, tokens, load_ns = await self._vectors(request, wanted, [] if texts == [""] else texts, wanted.dimensions)
        answer = EmbedAnswer(
            model=wanted.model,
            embeddings=PLACE,
            total_duration=perf_counter_ns() - started,
            load_duration=load_ns,
            prompt_eval_count=tokens,
        )
        return Stream(in_pieces(answer, map(numbers, found)), "application/json")

    async def embeddings(self, request: Request) -> Response:
        """A vector for one text; the older form."""
        wanted = parse(await read_body(request), EmbeddingsRequest)
        found, _, _ = await self._vectors(request, wanted, [wanted.prompt] if wanted.prompt else [], None)
        return _json({"embedding": found[0].tolist() if len(found) else []})

    async def _vectors(
        self, request: Request, wanted: VectorRequest, texts: Sequence[str], dimensions: int | None
    ) -> tuple[NDArray[np.float32], int, int]:
        """The texts' vectors, f32 [n, dimensions], their number of tokens and the time loading took.

        Without texts the model is loaded.
        """
        entry = self._models.find(_required(wanted.model))
        ollama_options.options(wanted.options)
        alive = ollama_options.keep_alive(wanted.keep_alive)
        waiting = request.app.state.settings.waiting
        async with self._models.use(wanted.model, alive) as served:
            encode = served.model.tokenizer.encode
            batch = await asyncio.to_thread(lambda: [encode(text) for text in texts])
            if not batch:
                return np.empty((0, entry.embedding), np.float32), 0, served.load_ns
            found = await while_connected(request, vectors(served, batch, dimensions or entry.embedding, waiting))
            return found, sum(map(len, batch)), served.load_ns
        raise AssertionError("unreachable: the context takes no error away")

    async def unbuilt(self, request: Request) -> Response:
        """What is not here."""
        what = request.url.path.split("/")[2]
        raise ApiError(501, f"{what}: not supported: the models here are the files that the server was started with")


def _required(model: str) -> str:
    if not model:
        raise ApiError(400, "model is required")
    return model


def _json(message: Any) -> Response:
    return Response(msgspec.json.encode(message), media_type="application/json")

"""Answers in OpenAI's form: several at once to one request, as a stream of events or whole."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

import msgspec

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.server.answers import Piece, Reply
from griffin_gguf.runtime.server.errors import ApiError, as_api_error
from griffin_gguf.runtime.server.guard import openai_error
from griffin_gguf.runtime.server.models import Served
from griffin_gguf.runtime.server.openai_forms import Form, finish_of
from griffin_gguf.runtime.server.openai_messages import AnswerObject, Choice, Kind, PromptDetails, Usage
from griffin_gguf.runtime.server.openai_requests import Asked


class _Running:
    """One answer on its way."""

    def __init__(self, form: Form, reply: Reply) -> None:
        self.form, self.reply = form, reply
        self._coming = aiter(reply)
        self._first: Piece | None = None

    async def read_prompt(self) -> None:
        """Wait for the first piece."""
        self._first = await anext(self._coming, None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield all pieces, once."""
        if self._first is not None:
            yield self._first
        async for piece in self._coming:
            yield piece


class Answers:
    """All answers to one request: `begin`, then once either `whole` or `events`. `held` gives back what they hold."""

    def __init__(self, asked: Asked, served: Served, form: type[Form], held: AsyncExitStack) -> None:
        self._asked, self._served, self._form, self._held = asked, served, form, held
        self._running: list[_Running] = []
        self._id, self._created = form.prefix + secrets.token_hex(12), int(time.time())
        self._fingerprint = fingerprint(served)

    async def begin(self, prompts: Sequence[ChatPrompt]) -> None:
        """Ask for `n` answers to each prompt. Raises `ApiError`, with 429 where there is no room for all of them.

        Others to a prompt begin when the first has read it: they go on from the state that it leaves in the cache.
        """
        n = self._asked.n
        for number in range(n):
            if number == 1:
                await asyncio.gather(*(one.read_prompt() for one in self._running))
            for place, prompt in enumerate(prompts):
                wish = self._asked.wish(number, self._served.entry.context)
                reply = await self._held.enter_async_context(self._served.answer(prompt, wish))
                logprobs = self._asked.top_logprobs is not None
                form = self._form(place * n + number, self._served.model.tokenizer, logprobs)
                self._running.append(_Running(form, reply))

    async def whole(self) -> AnswerObject:
        """All of them, when the last has ended."""
        found = await asyncio.gather(*(self._complete(one) for one in self._running))
        choices = sorted(found, key=lambda choice: choice.index)
        return self._object(self._form.whole, choices, usage=self._usage())

    async def _complete(self, one: _Running) -> Choice:
        pieces = [piece async for piece in one.pieces()]
        return one.form.complete(pieces, finish_of(one.reply))

    async def events(self) -> AsyncIterator[bytes]:
        """Yield a chunk for each piece of each answer as it comes, then their end, or what went wrong."""
        try:
            for one in self._running:
                if (choice := one.form.opening()) is not None:
                    yield self._chunk([choice])
            async for choice in self._choices():
                yield self._chunk([choice])
            if self._asked.usage:
                yield event(self._object(self._form.chunk, [], usage=self._usage()))
            yield b"data: [DONE]\n\n"
        except (ApiError, GriffinError) as error:
            yield event(openai_error(as_api_error(error)))

    async def _choices(self) -> AsyncIterator[Choice]:
        """Yield what each answer adds, whichever is the next to have something."""
        if len(self._running) == 1:
            async for choice in _choices_of(self._running[0]):
                yield choice
            return
        queue = asyncio.Queue[Choice | Exception | None]()
        tasks = [asyncio.ensure_future(_forward(one, queue)) for one in self._running]
        try:
            left = len(tasks)
            while left:
                found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _chunk(self, choices: list[Choice]) -> bytes:
        more: dict[str, Any] = {"usage": None} if self._asked.usage else {}
        return event(self._object(self._form.chunk, choices, **more))

    def _object(self, kind: Kind, choices: list[Choice], **more: Any) -> AnswerObject:
        return AnswerObject(
            id=self._id,
            object=kind,
            created=self._created,
            model=self._served.entry.name,
            system_fingerprint=self._fingerprint,
            choices=choices,
            **more,
        )

    def _usage(self) -> Usage:
        """Of all answers; a prompt counts as the first of its answers read it."""
        replies = [one.reply for one in self._running]
        first = replies[: len(replies) // self._asked.n]
        prompt, answer = sum(r.prompt_tokens for r in first), sum(r.answer_tokens for r in replies)
        return Usage(prompt, answer, prompt + answer, PromptDetails(sum(r.cached_tokens for r in first)))


async def _choices_of(one: _Running) -> AsyncIterator[Choice]:
    async for piece in one.pieces():
        yield one.form.piece(piece)
    yield one.form.ending(finish_of(one.reply))


async def _forward(one: _Running, queue: "asyncio.Queue[Choice | Exception | None]") -> None:
    try:
        async for choice in _choices_of(one):
            queue.put_nowait(choice)
        queue.put_nowait(None)
    except (ApiError, GriffinError) as error:
        queue.put_nowait(error)


def event(message: Any) -> bytes:
    """A message as a server-sent event."""
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


def fingerprint(served: Served) -> str:
    """Stands for all that an answer is made by beside the request: the weights, the device and this program.

    With a seed, the same one gives the same draws. Logits are computed for all answers of a step at once, and may be
    rounded otherwise beside others: where two tokens are nearly as likely, that can make another answer of it.
    """
    parts = (served.entry.digest, served.model.backend, version("griffin-gguf"))
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

"""Answers in Ollama's form: a request for text once it is checked, and the lines or the whole that come of it."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import msgspec

from griffin_gguf.runtime.chat import ChatPrompt
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.logprobs import TokenLogprobs
from griffin_gguf.runtime.server import ollama_models, ollama_options
from griffin_gguf.runtime.server.answers import Reply, Wish
from griffin_gguf.runtime.server.errors import ApiError, as_api_error
from griffin_gguf.runtime.server.ollama_messages import AnswerChunk, AnswerRequest, Logprob, TokenLogprob
from griffin_gguf.runtime.server.ollama_prompts import cannot
from griffin_gguf.runtime.tokenizer import Tokenizer

_MOST_LOGPROBS = 20
_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not


@dataclass(frozen=True)
class Asked:
    """A request for text, checked: all but its prompt. `called` makes of text what generate or chat calls it."""

    model: str  # as the request names it
    started: int  # perf_counter_ns
    stream: bool
    keep_alive: float | None
    options: ollama_options.Options
    schema: dict[str, Any] | bool | None
    top_logprobs: int | None
    called: Callable[[str], dict[str, Any]]

    @classmethod
    def of(cls, wanted: AnswerRequest, started: int, called: Callable[[str], dict[str, Any]]) -> "Asked":
        """Raises `ApiError` or `UnsupportedError` for what cannot be done."""
        top = wanted.top_logprobs or 0
        if not 0 <= top <= _MOST_LOGPROBS:
            raise ApiError(400, f"top_logprobs: expected from 0 to {_MOST_LOGPROBS}, found {top}")
        if wanted.think:
            raise cannot(wanted.model, "thinking")
        return cls(
            model=wanted.model,
            started=started,
            stream=wanted.stream is not False,
            keep_alive=ollama_options.keep_alive(wanted.keep_alive),
            options=ollama_options.options(wanted.options),
            schema=ollama_options.schema(wanted.format),
            top_logprobs=top if wanted.logprobs else None,
            called=called,
        )

    def wish(self, prompt: int, context: int) -> Wish:
        """What is wanted of the answer to so many tokens; `context` as in `Options.max_tokens`."""
        limit = self.options.max_tokens(prompt, context)
        return Wish(
            self.options.sampling,
            max_tokens=limit,
            stop_strings=self.options.stop,
            schema=self.schema,
            top_logprobs=self.top_logprobs,
        )

    def chunk(self, text: str, done: bool = False, **more: Any) -> AnswerChunk:
        """A line of the answer, or all of it."""
        return AnswerChunk(model=self.model, created_at=ollama_models.now(), done=done, **self.called(text), **more)


@dataclass(frozen=True)
class Answer:
    """A reply on its way to the client; with `context` it tells the tokens from which the next request goes on."""

    asked: Asked
    tokenizer: Tokenizer
    prompt: ChatPrompt
    reply: Reply
    context: bool

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield a line for each piece, then one with the figures, or with what went wrong."""
        try:
            async for piece in self.reply:
                yield line(self.asked.chunk(piece.text, logprobs=self._logprobs(piece.logprobs)))
            yield line(self._end("", None))
        except (ApiError, GriffinError) as error:
            yield line({"error": as_api_error(error).message})

    async def whole(self) -> AnswerChunk:
        """All of it at once."""
        text, logprobs = "", list[TokenLogprobs]()
        async for piece in self.reply:
            text += piece.text
            logprobs += piece.logprobs
        return self._end(text, self._logprobs(logprobs))

    def _end(self, text: str, logprobs: list[Logprob] | None) -> AnswerChunk:
        reply = self.reply
        return self.asked.chunk(
            text,
            done=True,
            done_reason=reply.finish,
            context=[*self.prompt.tokens, *reply.tokens] if self.context else None,
            total_duration=perf_counter_ns() - self.asked.started,
            load_duration=reply.load_ns,
            prompt_eval_count=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            prompt_eval_duration=reply.prompt_ns,
            eval_count=reply.answer_tokens,
            eval_duration=reply.answer_ns,
            logprobs=logprobs,
        )

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> list[Logprob] | None:
        if self.asked.top_logprobs is None:
            return None
        return [
            Logprob(
                *self._token(one.token, one.logprob),
                top_logprobs=[TokenLogprob(*self._token(*top)) for top in one.top],
            )
            for one in found
        ]

    def _token(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        raw = self.tokenizer.piece(token) or self.tokenizer.name(token).encode()  # a control token has a name only
        return raw.decode("utf-8", "replace"), max(logprob, _LEAST_LOGPROB), list(raw)


def line(message: Any) -> bytes:
    """A message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"

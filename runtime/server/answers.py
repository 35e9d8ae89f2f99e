"""One answer of a server: from a prompt's tokens to pieces of text, with as little of the prompt read as can be.

The engine works in a thread, the server in an event loop: here they meet. The prompt's longest beginning that the cache
has is not read again, and snapshots go into the cache from where other prompts may part from this one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.chat_prompt import NEAREST, ChatPrompt
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.generate import Finish, Terms
from griffin_gguf.runtime.grammar import json_constraint
from griffin_gguf.runtime.logprobs import TokenLogprobs
from griffin_gguf.runtime.prompt_cache import PromptCache
from griffin_gguf.runtime.request import Request, Watch
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server.errors import ApiError, as_api_error
from griffin_gguf.runtime.snapshot import Snapshot

_WORDS: dict[Finish | None, Literal["stop", "length"]] = {Finish.STOP: "stop", Finish.LENGTH: "length"}

#: Tokens between two snapshots of a long prompt.
STEP = 512


@dataclass(frozen=True)
class Wish:
    """How an answer shall be. `schema`: a JSON schema that it follows, True for any JSON object, None for any text.

    `max_tokens` None sets no limit; with `top_logprobs` log probabilities come along, of each token and so many others.
    """

    sampling: Sampling
    max_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    schema: dict[str, Any] | bool | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and what there is of log probabilities since the last piece."""

    text: str
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Ground:
    """What answers of a loaded model rest on. A text that has read something begins from `start`, known as `root`."""

    engine: Engine
    cache: PromptCache
    stop_tokens: frozenset[int]
    start: Snapshot | None = None
    root: str = ""

    @property
    def read(self) -> int:
        """Tokens that stand before every prompt."""
        return self.start.position if self.start else 0


class Reply:
    """An answer: a context manager that asks for it, and an iterator over its pieces.

    Leaving the context cancels what is not complete; `on_end` is called then. Entering and iterating raise `ApiError`.
    The figures: `prompt_tokens` of everything before the answer, a document included, of which `cached_tokens` were
    not read for this answer; `load_ns`, until the model was there, `prompt_ns` from the slot to the first token,
    `answer_ns` from there to the end, `total_ns` of all, waiting included.
    """

    def __init__(
        self, ground: Ground, prompt: ChatPrompt, wish: Wish, load_ns: int, on_end: Callable[["Reply"], None]
    ) -> None:
        self._ground, self._prompt, self._wish, self._on_end = ground, prompt, wish, on_end
        self._changed = asyncio.Event()
        self._request: Request | None = None
        self.prompt_tokens = self.cached_tokens = ground.read
        self.prompt_tokens += len(prompt.tokens)
        self.load_ns = load_ns
        self._began = perf_counter_ns()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def changed() -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(self._changed.set)

        asking = asyncio.ensure_future(asyncio.to_thread(self._ask, changed))
        try:
            self._request = await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(_forget)
            raise
        except Exception as error:
            raise as_api_error(error) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._asked.cancel()
        self._on_end(self)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        request = self._asked
        while True:
            self._changed.clear()
            done = request.done  # before the pieces: what comes after is seen the next time
            text = "".join(request.pieces.popleft() for _ in range(len(request.pieces)))
            if text or (done and request.logprobs):
                yield Piece(text, request.take_logprobs())
            if done:
                break
            if not request.pieces:
                await self._changed.wait()
        if request.error is not None:
            raise as_api_error(request.error) from request.error
        if request.finish is Finish.CANCELLED:
            raise ApiError(503, "the server ended this answer")

    @property
    def _asked(self) -> Request:
        assert self._request is not None, "the context is entered first"
        return self._request

    @property
    def finish(self) -> Literal["stop", "length"] | None:
        """Why it ended; None where it has not come to an end of its own."""
        return _WORDS.get(self._asked.finish)

    @property
    def stop_token(self) -> int | None:
        """The control token that ended it, if one did."""
        return self._asked.stop_token

    @property
    def text(self) -> str:
        """What was given out."""
        return self._asked.text

    @property
    def tokens(self) -> list[int]:
        """The answer's, without a stop token."""
        return self._asked.tokens

    @property
    def answer_tokens(self) -> int:
        """How many the model said, the stop token among them."""
        return len(self.tokens) + (self.stop_token is not None)

    @property
    def prompt_ns(self) -> int:
        """Reading the prompt, up to the first token."""
        return self._between(self._asked.started_ns, self._asked.first_ns)

    @property
    def answer_ns(self) -> int:
        """From the first token to the end."""
        return self._between(self._asked.first_ns, self._asked.ended_ns)

    @property
    def total_ns(self) -> int:
        """From the request's arrival, loading included, to the end."""
        return self.load_ns + self._between(self._began, self._asked.ended_ns)

    def _between(self, start: int | None, stop: int | None) -> int:
        return 0 if start is None else (stop or perf_counter_ns()) - start

    def _ask(self, changed: Callable[[], None]) -> Request:
        """Find what is known of the prompt and submit the rest; not in the event loop: files may be read."""
        ground, wish = self._ground, self._wish
        ids = np.array(self._prompt.tokens, np.int32)
        found = ground.cache.find(ids, ground.root)
        known, start = found or (0, ground.start)
        self.cached_tokens += known
        constraint = None
        if wish.schema is not None:
            constraint = json_constraint(ground.engine.model.tokenizer, wish.schema, ground.stop_tokens)
        before = self._prompt.tokens[:known]
        terms = Terms(
            wish.sampling,
            wish.max_tokens,
            ground.stop_tokens,
            wish.stop_strings,
            constraint,
            wish.top_logprobs,
            before,
        )
        marks = [mark - known for mark in self._marks() if mark - known >= NEAREST or mark == len(ids)]
        watch = Watch(marks, partial(self._keep, ids, known), changed)
        return ground.engine.ask(self._prompt.tokens[known:], terms, start=start, watch=watch)

    def _marks(self) -> list[int]:
        """Counts of the prompt's tokens after which the state is worth keeping."""
        read, end = self._ground.read, len(self._prompt.tokens)
        steps = range(STEP - read % STEP, end - STEP // 2, STEP)
        return sorted({*self._prompt.marks, *steps, end})

    def _keep(self, ids: NDArray[np.int32], known: int, request: Request, count: int, snapshot: Snapshot) -> None:
        """Put the state after so many tokens beyond the `known` ones into the cache; called by the engine's thread."""
        cache, root, prompt = self._ground.cache, self._ground.root, self._prompt
        if known + count <= len(ids):
            cache.add(ids[: known + count], snapshot, root)
        else:
            cache.add(np.array([*prompt.tokens, *request.tokens][: known + count], np.int32), snapshot, root)
        whole = request.finish is Finish.LENGTH or request.stop_token is not None
        if whole:  # the text is that of all tokens: no stop string has cut it
            end = len(prompt.tokens) - prompt.begun
            text = request.text if not prompt.begun else self._begun() + request.text
            cache.remember(prompt.tokens[:end], text, [*prompt.tokens[end:], *request.tokens], root)

    def _begun(self) -> str:
        """The text of an answer that the prompt begins."""
        return self._ground.engine.model.tokenizer.decode(self._prompt.tokens[-self._prompt.begun :])


def _forget(asking: "asyncio.Future[Request]") -> None:
    """End a request whose asker went away while it was submitted."""
    if not asking.cancelled() and asking.exception() is None:
        asking.result().cancel()

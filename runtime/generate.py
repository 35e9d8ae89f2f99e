"""The loop: feed, sample, decode, until a stop.

What a state holds afterwards decides whether a conversation can go on, so it is exact here: the state holds
every token of the prompt and of the answer except those in `Generation.unfed`, which is at most the last
token sampled (or, after `cancel` during the prompt, the rest of the prompt). A stop token is neither: it is in
`Generation.stop_token`. To go on, feed

    generation.unfed + chat_template.encode_next(...)      a chat: the template writes the answer's end itself
    generation.unfed + [generation.stop_token] + tokens    without a template, where the end should be seen
"""

from collections.abc import Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling, pick
from griffin_gguf.runtime.state import CHUNK
from griffin_gguf.runtime.tokenizer import StreamDecoder, Tokenizer


class LanguageModel(Protocol):
    """What the loop asks of a model: `griffin_gguf.runtime.Model`, or a fake of a few lines."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model's file."""
        ...

    def forward(self, tokens: Sequence[int], state: Any) -> NDArray[np.float32]:
        """Feed `tokens` (one or more) to `state`; the logits after the last of them, float32 [V]."""
        ...


class Finish(Enum):
    """Why a generation ended; the values are the words of Ollama's and OpenAI's interfaces, but for the last."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # `max_tokens`
    CANCELLED = "cancelled"  # `cancel` or `close`, or an error out of the model


class Generation:
    """One answer in the making: iterate over it for pieces of text, each given out once it is certain.

    All attributes are right at every moment, also after `close`: `text` is what was given out; `tokens` the
    answer's ids (without a stop token, but with those of a stop string, which the model has said too); `finish`
    None until the end; `unfed` and `stop_token` as in this module's head. `prefill_seconds` and
    `decode_seconds` count the model's and the sampler's time, not the reader's.

    An exception out of the model, KeyboardInterrupt included, leaves that model's state unknown: whoever wants
    Ctrl-C to end an answer but keep the state calls `cancel` from a signal handler.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: Any,
        tokens: Sequence[int],
        sampling: Sampling,
        max_tokens: int | None,
        stop_tokens: AbstractSet[int],
        stop_strings: Sequence[str],
    ) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.unfed: list[int] = list(tokens)
        self.stop_token: int | None = None
        self.finish: Finish | None = None
        self.prompt_tokens = len(tokens)
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._model, self._state = model, state
        self._sampling, self._rng = sampling, sampling.generator()
        self._recent = list(tokens)
        self._max_tokens, self._stop_tokens = max_tokens, stop_tokens
        self._decoder, self._held = StreamDecoder(model.tokenizer), HeldText(stop_strings)
        self._cancelled = False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """End after the token or prompt chunk now in work; for signal handlers and other threads."""
        self._cancelled = True

    def close(self) -> None:
        """End here: for a reader that wants no more. What was held back is not given out."""
        self._pieces.close()
        self.finish = self.finish or Finish.CANCELLED

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        fed = self.prompt_tokens if self.tokens else self.prompt_tokens - len(self.unfed)
        return fed / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of those fed one by one: all of the answer but what is unfed."""
        fed = len(self.tokens) - len(self.unfed) if self.tokens else 0
        return fed / max(self.decode_seconds, 1e-9)

    def _run(self) -> Generator[str]:
        try:
            while self.finish is None:
                piece = self._advance()
                self.text += piece
                if piece:
                    yield piece
        finally:
            self.finish = self.finish or Finish.CANCELLED

    def _advance(self) -> str:
        """Feed what is unfed and sample one token; the text that became certain by it."""
        if len(self.tokens) == self._max_tokens:
            return self._end(Finish.LENGTH)
        started, in_prompt = perf_counter(), not self.tokens
        logits = self._feed()
        token = None if logits is None else pick(logits, self._recent, self._sampling, self._rng)
        seconds = perf_counter() - started
        if in_prompt:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
        if token is None:
            return self._end(Finish.CANCELLED)
        if token in self._stop_tokens:
            self.stop_token = token
            return self._end(Finish.STOP)
        self.tokens.append(token)
        self._recent.append(token)
        self.unfed = [token]
        piece, stopped = self._held.push(self._decoder.push(token))
        if stopped:
            self.finish = Finish.STOP
        return piece

    def _feed(self) -> NDArray[np.float32] | None:
        """Feed all that is unfed; the last logits, or None where `cancel` came first."""
        logits = None
        while self.unfed:
            if self._cancelled:
                return None
            logits = self._model.forward(self.unfed[:CHUNK], self._state)
            del self.unfed[:CHUNK]
        return logits

    def _end(self, finish: Finish) -> str:
        """Set the reason; the text that was held back for what can no longer come."""
        self.finish = finish
        piece, stopped = self._held.push(self._decoder.flush())
        return piece if stopped else piece + self._held.flush()


class HeldText:
    """Text on its way to the reader, held back as long as it may be the beginning of a stop string.

    It ends before the stop string that is complete first, the longest of several: however the text is cut into
    pieces, the same comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=1)
        self._text = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`; what is certain now, and whether a stop string ended it."""
        self._text += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            return self._take(min(found)[1]), True
        for size in range(min(len(self._text), self._longest - 1), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return self._take(len(self._text) - size), False
        return self._take(len(self._text)), False

    def flush(self) -> str:
        """What was held back."""
        return self._take(len(self._text))

    def _take(self, size: int) -> str:
        taken, self._text = self._text[:size], self._text[size:]
        return taken


def generate(
    model: LanguageModel,
    state: Any,
    tokens: Sequence[int],
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    stop_tokens: AbstractSet[int] = frozenset(),
    stop_strings: Sequence[str] = (),
) -> Generation:
    """Feed `tokens` to `state`, then sample until a stop; nothing happens before the first piece is asked for.

    `tokens` is what the state does not hold yet, at least one token; the repeat penalty looks back over these and
    the answer. `sampling` None takes the defaults, `max_tokens` None sets no limit. Raises `UnsupportedError` for
    a value out of range; while iterating, whatever the model or `sampling.pick` raises.
    """
    if not tokens:
        raise UnsupportedError("tokens: expected at least one token to begin with, found none")
    if max_tokens is not None and max_tokens < 0:
        raise UnsupportedError(f"max_tokens: expected at least 0, found {max_tokens}")
    if not all(stop_strings):
        raise UnsupportedError("stop_strings: expected no empty string among them")
    return Generation(model, state, tokens, sampling or Sampling(), max_tokens, stop_tokens, stop_strings)

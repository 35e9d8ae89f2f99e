"""The loop: feed, sample, decode, until a stop.

What a state holds afterwards decides whether a conversation can go on, so it is exact here: the state holds
every token of the prompt and of the answer except those in `Generation.unfed`, which is at most the last
token sampled (or, after `cancel` during the prompt, the rest of the prompt). A stop token is neither: it is in
`Generation.stop_token`. To go on, feed

    generation.unfed + chat_template.encode_next(...)      a chat: the template writes the answer's end itself
    generation.unfed + [generation.stop_token] + tokens    without a template, where the end should be seen
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from sys import maxsize
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.logprobs import TokenLogprobs, token_logprobs
from griffin_gguf.runtime.sampling import Ids, Said, Sampling, choose
from griffin_gguf.runtime.speculate import Speculation
from griffin_gguf.runtime.state import CHUNK
from griffin_gguf.runtime.tokenizer import StreamDecoder, Tokenizer

_NONE = (np.empty(0, np.intp), np.empty(0, np.int32))  # ids, and how often each is there


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


class Constraint(Protocol):
    """What an answer may say, such as JSON of a schema; of one answer alone, since it knows where that is."""

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of `logits`, f32 [V], with -inf for every token that may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind `token`, which came next: a stop token perhaps."""
        ...


@dataclass(frozen=True)
class Terms:
    """How the tokens of an answer are chosen, and where it ends. Raises `UnsupportedError` for a value out of range.

    `max_tokens` None sets no limit. A `constraint` belongs to one answer. With `top_logprobs`, log probabilities are
    noted of each token and of so many of the likeliest. `before` is what the state has read already: the repeat
    penalty looks back over it, the tokens to be fed, and the answer.
    """

    sampling: Sampling
    max_tokens: int | None = None
    stop_tokens: AbstractSet[int] = frozenset()
    stop_strings: Sequence[str] = ()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    before: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_logprobs"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UnsupportedError(f"{name}: expected at least 0, found {value}")
        if not all(self.stop_strings):
            raise UnsupportedError("stop_strings: expected no empty string among them")


class Answer:
    """What becomes of the logits of one text, whoever computes them: tokens, pieces of text, an end.

    All attributes are right at every moment: `text` is what was given out; `tokens` the answer's ids (without a
    stop token, but with those of a stop string, which the model has said too), and `logprobs` what the model thought
    of each, where that is asked for and `take_logprobs` has not taken it; `finish` None until the end; `unfed` and
    `stop_token` as in this module's head; `prompt_tokens` counts those it began with.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int], terms: Terms) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.unfed: list[int] = list(tokens)
        self.stop_token: int | None = None
        self.finish: Finish | None = None
        self.prompt_tokens = len(tokens)
        self.logprobs: list[TokenLogprobs] = []
        self._terms, self._rng = terms, terms.sampling.generator()
        self._history = History(terms.sampling, chain(terms.before, tokens), tokenizer.vocab_size)
        self._decoder, self._held = StreamDecoder(tokenizer), HeldText(terms.stop_strings)

    @property
    def room(self) -> int | None:
        """Tokens that it may still have; None: no limit."""
        most = self._terms.max_tokens
        return None if most is None else most - len(self.tokens)

    def take(self, logits: NDArray[np.float32]) -> str:
        """Sample a token by `logits`, float32 [V], those after all that was unfed; the text that is certain by it."""
        self.unfed = []
        token = self._choose(logits)
        if token in self._terms.stop_tokens:
            self.stop_token = token
            return self.end(Finish.STOP)
        if self._terms.top_logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self._terms.top_logprobs))
        self.tokens.append(token)
        self._history.add(token)
        self.unfed = [token]
        piece, stopped = self._held.push(self._decoder.push(token))
        if stopped:
            self.finish = Finish.STOP
        self.text += piece
        return piece

    def _choose(self, logits: NDArray[np.float32]) -> int:
        constraint = self._terms.constraint
        allowed = logits if constraint is None else constraint.allow(logits)
        token = choose(allowed, self._history.said(), self._terms.sampling, self._rng)
        if constraint is not None:
            constraint.accept(token)
        return token

    def take_logprobs(self) -> list[TokenLogprobs]:
        """What was noted since the last call, from any thread; it is not kept any longer.

        A token with 20 alternatives takes some 2.5 KB, which a long answer that is passed on need not hold.
        """
        count = len(self.logprobs)  # what comes meanwhile stays for the next call
        taken = self.logprobs[:count]
        del self.logprobs[:count]
        return taken

    def end(self, finish: Finish) -> str:
        """Set the reason; the text that was held back for what can no longer come."""
        self.finish = finish
        piece, stopped = self._held.push(self._decoder.flush())
        if not stopped:
            piece += self._held.flush()
        self.text += piece
        return piece


class History:
    """What the penalties of a `sampling` look at, kept token by token: `said` is what `pick` finds in all of the text.

    `before` are the tokens before the answer. Where a penalty is on, a token costs a pass over V counts, however long
    the text is; where none is, nothing is kept.
    """

    def __init__(self, sampling: Sampling, before: Iterable[int], vocab: int) -> None:
        last = sampling.repeat_last_n
        recent = sampling.repeat_penalty != 1 and last != 0
        answer = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._recent = _Counts(before, None if last < 0 else min(last, maxsize), vocab) if recent else None
        self._answer = _Counts((), None, vocab) if answer else None

    def add(self, token: int) -> None:
        """Go on behind a token of the answer."""
        for counts in (self._recent, self._answer):
            if counts is not None:
                counts.add(token)

    def said(self) -> Said:
        """For the next token."""
        recent = _NONE if self._recent is None else self._recent.found()
        return Said(recent[0], *(_NONE if self._answer is None else self._answer.found()))


class _Counts:
    """How often each token is among the last `window` of a text; None: among all."""

    def __init__(self, tokens: Iterable[int], window: int | None, vocab: int) -> None:
        # Of an unbounded text the counts are enough; else the oldest token must be known when it leaves.
        self._window = None if window is None else deque(tokens, window)
        counted = tokens if self._window is None else self._window
        self._counts = np.bincount(np.fromiter(counted, np.intp), minlength=vocab).astype(np.int32)  # [V]
        self._there = self._counts > 0  # of a byte each, looked through in no time

    def add(self, token: int) -> None:
        if self._window is not None:
            if len(self._window) == self._window.maxlen:
                self._count(self._window[0], -1)
            self._window.append(token)
        self._count(token, 1)

    def _count(self, token: int, more: int) -> None:
        self._counts[token] += more
        self._there[token] = self._counts[token] > 0

    def found(self) -> tuple[Ids, NDArray[np.int32]]:
        """The ids that are there at all, ascending, and how often each is."""
        ids = np.flatnonzero(self._there)
        return ids, self._counts[ids]


class Generation(Answer):
    """One answer in the making: iterate over it for pieces of text, each given out once it is certain.

    The attributes are those of `Answer`, right also after `close`. `prefill_seconds` and `decode_seconds` count
    the model's and the sampler's time, not the reader's; `drafted` tokens were verified and `accepted` of them right.

    An exception out of the model, KeyboardInterrupt included, leaves that model's state unknown: whoever wants
    Ctrl-C to end an answer but keep the state calls `cancel` from a signal handler.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: Any,
        tokens: Sequence[int],
        terms: Terms,
        speculation: Speculation | None,
    ) -> None:
        super().__init__(model.tokenizer, tokens, terms)
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.drafted = self.accepted = 0
        self._model, self._state, self._speculation = model, state, speculation
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
        """Tokens per second of those fed after the prompt: all of the answer but what is unfed."""
        fed = len(self.tokens) - len(self.unfed) if self.tokens else 0
        return fed / max(self.decode_seconds, 1e-9)

    def _run(self) -> Generator[str]:
        try:
            while self.finish is None:
                piece = self._advance()
                if piece:
                    yield piece
        finally:
            self.finish = self.finish or Finish.CANCELLED

    def _advance(self) -> str:
        """Feed what is unfed and sample a token, or several where a draft is right; the text certain by them."""
        if self.room == 0:
            return self.end(Finish.LENGTH)
        started, in_prompt = perf_counter(), not self.tokens
        piece = self._read() if in_prompt else self._speak()
        seconds = perf_counter() - started
        if in_prompt:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
        return self.end(Finish.CANCELLED) if piece is None else piece

    def _read(self) -> str | None:
        """Feed the prompt and sample the first token; None where `cancel` came first."""
        # Where there is nothing to feed, `generate` has seen that the state has its last logits.
        logits: Any = getattr(self._state, "logits", None)
        while self.unfed:
            if self._cancelled:
                return None
            chunk = self.unfed[:CHUNK]
            logits = self._model.forward(chunk, self._state)
            del self.unfed[:CHUNK]
            if self._speculation:
                self._speculation.read(chunk)
        return self.take(logits)

    def _speak(self) -> str | None:
        """Feed the last token and sample the next; None where `cancel` came first."""
        if self._cancelled:
            return None
        if self._speculation is None:
            return self.take(self._model.forward(self.unfed, self._state))
        most = self.room - 1 if self.room is not None else None
        return self._verify(self._speculation, self._speculation.draft(self.unfed[0], most))

    def _verify(self, speculation: Speculation, draft: list[int]) -> str:
        """Feed the last token and a draft, and sample while the draft says the same; take the rest of it back."""
        fed, before = self.unfed + draft, len(self.tokens)
        rows = speculation.verify(fed, self._state)
        piece, kept = "", 0
        try:
            for kept, logits in enumerate(rows):
                piece += self.take(logits)
                done = self.finish or self.room == 0 or self._cancelled
                if done or self.tokens[-1:] != draft[kept : kept + 1]:
                    break
        finally:
            if kept < len(draft):
                self._state.rollback(self._state.position - len(draft) + kept)
        self.drafted += len(draft)
        self.accepted += kept
        came = self.tokens[before:] + ([] if self.stop_token is None else [self.stop_token])
        speculation.learn(len(draft), fed[: kept + 1], came)
        return piece


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
    speculation: Speculation | None = None,
    constraint: Constraint | None = None,
    top_logprobs: int | None = None,
    before: Sequence[int] = (),
) -> Generation:
    """Feed `tokens` to `state`, then sample until a stop; nothing happens before the first piece is asked for.

    `tokens` is what the state does not hold yet: at least one token, or none where the state has its last logits, as
    a restored one does. `sampling` None takes the defaults; the rest of what decides about the answer is as in
    `Terms`. A `speculation` drafts tokens that are verified several at once: it belongs to this state, and has been
    told all that the state has read. Raises `UnsupportedError` for a value out of range; while iterating, whatever
    the model or `sampling.pick` raises.
    """
    if not tokens and getattr(state, "logits", None) is None:
        raise UnsupportedError("tokens: expected at least one token to begin with, found none")
    chosen = sampling or Sampling()
    terms = Terms(chosen, max_tokens, stop_tokens, stop_strings, constraint, top_logprobs, before)
    return Generation(model, state, tokens, terms, speculation)

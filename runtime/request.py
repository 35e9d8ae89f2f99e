"""One answer of an engine: what its reader sees, and what the engine knows of it."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.generate import Answer, Terms
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import State
from griffin_gguf.runtime.tokenizer import Tokenizer


class Worker(Protocol):
    """What a request asks of its engine."""

    def wait(self, request: "Request") -> str | None:
        """The next piece of an answer as soon as there is one; None after its end."""
        ...

    def cancel(self, request: "Request") -> None:
        """End `request` after the step now in work."""
        ...


@dataclass(frozen=True)
class Watch:
    """What is told of a request while it is worked on, by the thread that does the steps: be short.

    `marks` are counts of its tokens: where so many are read, `on_snapshot(request, count, snapshot)` is given the
    state, and once more at the answer's end, of the tokens that the state holds then. (A step's part of a prompt ends
    at a mark.) The logits are only in the one of the whole prompt. `on_change` is called whenever there are pieces,
    and at the end.
    """

    marks: Sequence[int] = ()
    on_snapshot: "Callable[[Request, int, Snapshot], None] | None" = None
    on_change: Callable[[], None] | None = None


class Request(Answer):
    """One answer of an engine: iterate over it, from any thread, for pieces of text as they become certain.

    The iteration ends with the answer; where that failed, it raises why: `error`, a `GriffinError`. The attributes are
    those of `Answer`. `state` holds what its `unfed` says; it is the one that was given, else the engine's own until
    the end and None after it. `submitted_ns`, `started_ns` (it has a slot), `first_ns` (its first token is there) and
    `ended_ns` are times of `time.perf_counter_ns`, None until then.
    """

    def __init__(
        self,
        engine: Worker,
        tokenizer: Tokenizer,
        tokens: Sequence[int],
        terms: Terms,
        state: State | None = None,
        start: Snapshot | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(tokenizer, tokens, terms)
        self.state, self.start = state, start
        self.error: GriffinError | None = None
        self.watch = watch or Watch()
        self.submitted_ns = perf_counter_ns()
        self.started_ns: int | None = None
        self.first_ns: int | None = None
        self.ended_ns: int | None = None
        self._engine = engine
        self.own_state = state is None
        self.pieces = deque[str]()
        self.cancelled = self.done = False
        self._marks = deque(sorted({mark for mark in self.watch.marks if 0 < mark <= len(tokens)}))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._engine.wait(self)
        if piece is None:
            if self.error is not None:
                raise self.error
            raise StopIteration
        return piece

    @property
    def hunger(self) -> int:
        """Tokens of the prompt that the next step may feed: as far as a snapshot is wanted."""
        read = self.prompt_tokens - len(self.unfed)
        return (self._marks[0] if self._marks else self.prompt_tokens) - read

    def report(self) -> None:
        """Hand over the snapshot that is wanted of the state as it is now, where one is."""
        if self.watch.on_snapshot is None:
            return
        held = self.prompt_tokens + len(self.tokens) - len(self.unfed)
        if self._marks and self._marks[0] == held:
            self._marks.popleft()
            self.watch.on_snapshot(self, held, self.held.snapshot(logits=held == self.prompt_tokens))
        elif self.finish is not None:
            self.watch.on_snapshot(self, held, self.held.snapshot(logits=False))

    def cancel(self) -> None:
        """End after the step now in work; the slot is free then."""
        self._engine.cancel(self)

    @property
    def held(self) -> State:
        """The state while there is one."""
        assert self.state is not None, "what has a slot has a state"
        return self.state

    @property
    def known_logits(self) -> NDArray[np.float32]:
        """Those that a given state came with."""
        assert self.held.logits is not None, "what has nothing to feed has logits"
        return self.held.logits

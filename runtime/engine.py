"""Many answers at once: continuous batching over `Model.forward_batch`.

A step is one pass over the weights, for all requests that have a slot: every running answer gets its next token, and
what room the step has left goes to prompts, in equal shares. Between steps requests join (first come, first served)
and leave; a cancelled one is gone before the next step. Weights are read once a step, which is why sixteen answers
cost little more than a few.

    with Engine(model, slots=8) as engine:                         a thread of the engine's own works
        request = engine.submit(tokens, max_tokens=200)
        for piece in request: ...                                  from any thread

Without `with` or `start` there is no thread: `step` does the work, or whoever iterates over a request.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.engine_memory import Memory
from griffin_gguf.runtime.errors import BackendError, BusyError, GriffinError, NoRoomError, UnsupportedError
from griffin_gguf.runtime.generate import Finish, Terms
from griffin_gguf.runtime.model import Model, Tokens
from griffin_gguf.runtime.request import Request, Watch
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import State

_log = logging.getLogger("griffin.engine")

#: Tokens of prompts that a step takes while answers run: enough to use the weights well, few enough not to be felt.
BESIDE = 128

_Logits = NDArray[np.float32]  # [V]

#: Requests that may wait for a slot.
WAITING = 64


class Engine:
    """Slots for `slots` answers of `model`, at most `waiting` requests before them; see this module's head.

    `beside` is how many tokens of prompts a step takes while answers run; while none does it is the model's chunk. So
    a running answer waits at most for a pass over so many tokens. `memory` is the bound that was reckoned; room for the
    states is taken at once. Raises `UnsupportedError` for values out of range, `NoRoomError` where less memory
    is free.

    The model must not be used elsewhere meanwhile for anything that is traced; all else just waits its turn.
    """

    def __init__(self, model: Model, slots: int = 8, beside: int = BESIDE, waiting: int = WAITING) -> None:
        _expect("slots", slots, 1, model.chunk)
        _expect("beside", beside, 1, model.chunk)
        _expect("waiting", waiting, 0, None)
        self.model = model
        self.slots, self.beside, self.waiting = slots, beside, waiting
        self.memory = Memory.of(model, slots)
        if self.memory.total > self.memory.free:
            raise NoRoomError(f"{model.path}: no room: {self.memory}")
        model.reserve(slots)
        self._waiting = deque[Request]()
        self._active: list[Request] = []  # in the order in which they came
        self._changed = threading.Condition()  # guards all that more than one thread sees
        self._stepping = threading.Lock()  # who holds it may use the model; taken before `_changed`
        self._worker: threading.Thread | None = None
        self._closed = False
        self._broken: BackendError | None = None
        self._refusing: GriffinError | None = None

    def submit(
        self,
        tokens: Tokens,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop_tokens: AbstractSet[int] = frozenset(),
        stop_strings: Sequence[str] = (),
        state: State | None = None,
    ) -> Request:
        """Ask for an answer as `generate` gives it: `tokens` fed to a new state, or to `state`, then a continuation.

        A `state` moves on, and is in nobody else's use until the request is done; with its last logits (of one that
        was restored) `tokens` may be empty. Raises `BusyError` where too many wait already, `UnsupportedError` for
        values out of range, a state in use or a closed engine, `BackendError` where the device has failed.
        """
        terms = Terms(sampling or Sampling(), max_tokens, stop_tokens, stop_strings)
        return self.ask(tokens, terms, state)

    def ask(
        self,
        tokens: Tokens,
        terms: Terms,
        state: State | None = None,
        start: Snapshot | None = None,
        watch: Watch | None = None,
    ) -> Request:
        """`submit` with all that there is to say. Many requests may `start` from one snapshot, which none changes."""
        assert state is None or start is None, "one text has one beginning"
        known = state if state is not None else start
        if not len(tokens) and (known is None or known.logits is None):
            raise UnsupportedError("tokens: expected at least one token to begin with, found none")
        ids = _checked(tokens, self.model.hp.vocab)
        request = Request(self, self.model.tokenizer, ids, terms, state, start, watch)
        with self._changed:
            self._check_alive()
            if state is not None and any(other.state is state for other in (*self._active, *self._waiting)):
                raise UnsupportedError("state: is in use by another request")
            if len(self._waiting) >= self.waiting + self.slots - len(self._active):
                raise BusyError(f"engine: {len(self._active)} requests have slots, {len(self._waiting)} wait already")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def step(self) -> bool:
        """One pass for all that have a slot; False where nothing was to do.

        Raises what the model raises where the device fails: all requests have ended by a `BackendError` that says so
        then, and the engine takes no more. What is wrong with one request ends that request alone.
        """
        with self._stepping:
            try:
                return self._step()
            except BaseException as error:  # of whatever kind: who waits for an answer must hear of it
                self._break(error)
                raise

    def cancel(self, request: Request) -> None:
        """End `request` after the step now in work."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self._give(request, request.end(Finish.CANCELLED))
            self._changed.notify_all()

    def cancel_all(self) -> None:
        """End all that have a slot, likewise."""
        with self._changed:
            for request in self._active:
                request.cancelled = True

    def refuse_waiting(self, error: GriffinError) -> None:
        """Take no more: `ask`, and iterating over those that have no slot yet, raise `error`."""
        with self._changed:
            self._refusing = error
            waiting = list(self._waiting)
            self._waiting.clear()
            for request in waiting:
                request.error = error
                self._give(request, request.end(Finish.CANCELLED))

    @property
    def broken(self) -> bool:
        """Whether the device has failed, so that nothing more can come of this engine."""
        return self._broken is not None

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def wait(self, request: Request) -> str | None:
        """The next piece of an answer as soon as there is one; None after its end."""
        while True:
            with self._changed:
                if request.pieces:
                    return request.pieces.popleft()
                if request.done:
                    return None
                if self._worker is not None:
                    self._changed.wait()
                    continue
            self.step()

    def start(self) -> None:
        """Let a thread do the steps, until `close`."""
        with self._changed:
            self._check_alive()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="griffin-engine", daemon=True)
                self._worker.start()

    def close(self) -> None:
        """End all requests after the step now in work, as if cancelled, and take no more. The model stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        with self._stepping, self._changed:
            self._end_all(None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        """What the engine's thread does."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._active or self._waiting)
                if self._closed:
                    return
            try:
                self.step()
            except BaseException:  # all who wait for an answer have it, and all who come will
                return

    def _check_alive(self) -> None:
        if self._closed:
            raise UnsupportedError("engine: is closed")
        if self._broken is not None:
            raise self._broken
        if self._refusing is not None:
            raise self._refusing

    def _step(self) -> bool:
        shares = self._plan()
        if not shares:
            return False
        results = self._forward(shares)
        pieces = [self._spoken(r, n, logits) for (r, n), logits in zip(shares, results, strict=True)]
        with self._changed:
            for (request, _), piece in zip(shares, pieces, strict=True):
                self._give(request, piece)
        return True

    def _plan(self) -> list[tuple[Request, int]]:
        """Free slots and fill them; then each request that has one with the number of tokens it may feed now."""
        while admitted := self._admit():
            for request in admitted:
                self._begin(request)
        running = [r for r in self._active if r.tokens]
        prompts = [r for r in self._active if not r.tokens]
        room = min(self.beside, self.model.chunk - len(running)) if running else self.model.chunk
        shares = fair_shares([r.hunger for r in prompts], room)
        fed = {id(r): n for r, n in zip(prompts, shares, strict=True)} | {id(r): 1 for r in running}
        # A text that has its logits needs no token; one that got no share waits.
        return [(r, fed[id(r)]) for r in self._active if fed[id(r)] or not r.unfed]

    def _admit(self) -> list[Request]:
        """End what was cancelled, and give free slots to those who have waited longest: these."""
        with self._changed:
            for request in [r for r in self._active if r.cancelled]:
                self._give(request, request.end(Finish.CANCELLED))
            admitted = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.slots - len(self._active)))]
            self._active += admitted
        for request in admitted:
            request.started_ns = perf_counter_ns()
        return admitted

    def _begin(self, request: Request) -> None:
        """Give a request that has a slot its state, unless nothing is to do for it."""
        ended = None
        if request.room == 0:
            ended = Finish.LENGTH
        elif request.state is None:
            try:
                request.state, request.start = self.model.new_state(request.start), None
            except (GriffinError, MemoryError) as error:
                request.error, ended = _fault(error), Finish.CANCELLED
        if ended is not None:
            with self._changed:
                self._give(request, request.end(ended))

    def _forward(self, shares: list[tuple[Request, int]]) -> list[_Logits | GriffinError]:
        """The logits of each, or what is wrong with it."""
        fed = [(r.unfed[:n], r.held) for r, n in shares if n]
        logits: Sequence[_Logits | GriffinError]
        try:
            logits = self.model.forward_batch(fed) if fed else []
        except UnsupportedError:
            # One of them is at fault, and all states are as before: each for itself.
            logits = [self._alone(tokens, state) for tokens, state in fed]
        found = iter(logits)
        return [next(found) if n else request.known_logits for request, n in shares]

    def _alone(self, tokens: list[int], state: State) -> _Logits | GriffinError:
        try:
            return self.model.forward(tokens, state)
        except UnsupportedError as error:
            return error

    def _spoken(self, request: Request, fed: int, logits: _Logits | GriffinError) -> str:
        """Note what was fed; sample where that was all; the text that is certain now."""
        if isinstance(logits, GriffinError):
            request.error = logits
            return request.end(Finish.CANCELLED)
        del request.unfed[:fed]
        try:
            request.report()
            return "" if request.unfed else self._said(request, logits)
        except Exception as error:  # a constraint's or a watch's: the other answers have no part in it
            request.error = _fault(error)
            return request.end(Finish.CANCELLED)

    def _said(self, request: Request, logits: _Logits) -> str:
        """Sample; the text that is certain by that, all of it at the end."""
        piece = request.take(logits)
        request.first_ns = request.first_ns or perf_counter_ns()
        if request.finish is None and request.room == 0:
            piece += request.end(Finish.LENGTH)
        if request.finish is not None:
            request.report()
        return piece

    def _give(self, request: Request, piece: str) -> None:
        """Hand a piece over; after the last, let the slot go."""
        if piece:
            request.pieces.append(piece)
        if request.finish is not None:
            request.done, request.ended_ns = True, perf_counter_ns()
            if request.own_state:
                request.state = None
            if request in self._active:
                self._active.remove(request)
        self._changed.notify_all()
        if request.watch.on_change is not None and (piece or request.done):
            request.watch.on_change()

    def _break(self, error: BaseException) -> None:
        """The states are unknown now: end everything."""
        with self._changed:
            why = str(error) or type(error).__name__
            self._broken = BackendError(f"engine: stopped, since the device failed: {why}")
            self._end_all(self._broken)

    def _end_all(self, error: GriffinError | None) -> None:
        requests = (*self._active, *self._waiting)
        self._waiting.clear()
        for request in requests:
            if request.finish is None:
                request.error = error
                self._give(request, request.end(Finish.CANCELLED))
            else:
                self._give(request, "")


def fair_shares(needs: Sequence[int], room: int) -> list[int]:
    """How `room` tokens are shared by texts of so many: equally, and what one does not need goes to the others.

    What cannot be divided goes to the first, who have waited longest.
    """
    shares = [0] * len(needs)
    while room and (hungry := [i for i, need in enumerate(needs) if shares[i] < need]):
        each = max(1, room // len(hungry))
        for i in hungry:
            share = min(each, needs[i] - shares[i], room)
            shares[i] += share
            room -= share
    return shares


def _fault(error: Exception) -> GriffinError:
    """What the reader of an answer is told went wrong with it."""
    if isinstance(error, GriffinError):
        return error
    _log.error("an answer has failed", exc_info=error)
    return BackendError(f"engine: {str(error) or type(error).__name__}")


def _checked(tokens: Sequence[Any] | NDArray[Any], vocab: int) -> list[int]:
    """The tokens, all of them before the first is fed."""
    for token in tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
            raise UnsupportedError(f"tokens: {token!r} is outside the vocabulary of {vocab}")
    return [int(token) for token in tokens]


def _expect(field: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise UnsupportedError(f"{field}: expected at least {low}{most}, found {value}")

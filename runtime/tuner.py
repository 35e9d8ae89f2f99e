"""Which `Tuning` is the fastest here, found by measuring: one choice after another, each as a duel.

A duel sets the best so far against one other way, in turn, round by round, so that whatever else the machine does
hits both alike. What counts is the time of an exchange: PROMPT tokens read, ANSWER tokens written, one at a time.
The best so far stays unless the other is faster by a margin, in the median of the rounds and in most of them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import compute_threads, resident_bytes, usable_cores
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Tuning

#: (rounds done, rounds at most)
Progress = Callable[[int, int], None]

PROMPT, ANSWER = 512, 128
ROUNDS = 5

#: How much faster than the best so far another way must be. Repacked weights are a copy in memory, made at every
#: start, where mapped ones are shared between programs and there at once: they must earn it.
MARGIN = 0.02
_MARGINS: dict[tuple[str, Any], float] = {("buffers", "repacked"): 0.1, ("buffers", "both"): 0.05}

_DECODE_SECONDS = 0.4  # decoding is timed for about so long a round
_DECODE_TOKENS = range(4, 65)
_HOPELESS = 2.0  # times slower in the first round: there is no second


@dataclass(frozen=True)
class Speed:
    """One side of a duel: medians over its rounds, and what loading it took.

    `prefill` and `decode` are tokens a second, `seconds` the time of an exchange, `load` seconds until the weights are
    in place. `memory` is how many bytes the process has grown by beyond mapped files, None where that is not known.
    """

    prefill: float
    decode: float
    seconds: float
    load: float
    memory: int | None


@dataclass(frozen=True)
class Duel:
    """`value` against `best` for one field of a `Tuning`.

    `ratio` is the time of an exchange with `value` as a part of that with `best`, the median over the rounds; `value`
    has won if it is under 1 − `margin`, and most rounds under 1. Where it could not be tried, `problem` says why, and
    there are no speeds.
    """

    field: str
    best: Any
    value: Any
    margin: float
    rounds: int
    won: bool
    ratio: float | None = None
    speed_of_best: Speed | None = None
    speed: Speed | None = None
    problem: str | None = None


def tune(path: Path, *, rounds: int = ROUNDS, progress: Progress | None = None) -> tuple[Tuning, list[Duel]]:
    """Find the fastest way to run the Griffin GGUF at `path` on ggml's best device; nothing is stored.

    Takes minutes with a large model, and the memory of two at a time. Raises what `load` raises for the file.
    """
    duels: list[Duel] = []
    contenders = [(field, value) for field, values in _fields() for value in values]
    total = len(contenders) * rounds
    with GgufFile.open(path) as file, ExitStack() as stack:
        subject = _Subject(file)
        best = stack.enter_context(_Runner(subject, Tuning()))
        for number, (field, value) in enumerate(contenders):
            tell = partial(_tell, progress, number * rounds, total)
            duel, winner = _duel(subject, best, field, value, rounds, tell)
            duels.append(duel)
            if winner is not best:
                best.close()
                best = stack.enter_context(winner)
        _tell(progress, total, total, 0)
        return best.tuning, duels


def _tell(progress: Progress | None, before: int, total: int, rounds: int) -> None:
    if progress:
        progress(before + rounds, total)


def _fields() -> Iterator[tuple[str, list[Any]]]:
    """What to try beside the default of every field. Buffers come last: no more than two copies are ever in memory."""
    default, cores = compute_threads(), usable_cores()
    yield "threads", sorted({1, default // 4, default // 2, 3 * default // 4, cores} - {0, default}, reverse=True)
    yield "attention", ["plain"]
    yield "chunk", [256, 128]
    yield "buffers", ["repacked", "both"]


def _duel(
    subject: "_Subject", best: "_Runner", field: str, value: Any, rounds: int, tell: Callable[[int], None]
) -> "tuple[Duel, _Runner]":
    """Set one other value against the best so far; the loser, if it is the other, is closed."""
    margin = _MARGINS.get((field, value), MARGIN)
    head = (field, getattr(best.tuning, field), value, margin)
    if problem := subject.no_room_for(value):
        return Duel(*head, 0, won=False, problem=problem), best
    try:
        other = _Runner(subject, replace(best.tuning, **{field: value}))
    except BackendError as error:
        return Duel(*head, 0, won=False, problem=str(error)), best
    try:
        ratios = _rounds(best, other, margin, rounds, tell)
    except BaseException:
        other.close()
        raise
    won = _has_won(ratios, margin, rounds)
    duel = Duel(*head, len(ratios), won, median(ratios), best.speed(), other.speed())
    if not won:
        other.close()
    return duel, other if won else best


def _rounds(best: "_Runner", other: "_Runner", margin: float, rounds: int, tell: Callable[[int], None]) -> list[float]:
    """Times of an exchange, other by best, round by round, until the outcome is certain."""
    ratios: list[float] = []
    best.forget()
    while not _has_won(ratios, margin, rounds) and not _has_lost(ratios, margin, rounds):
        order = (best, other) if len(ratios) % 2 else (other, best)
        seconds = {runner is other: runner.turn() for runner in order}
        ratios.append(seconds[True] / seconds[False])
        tell(len(ratios))
        if ratios[0] > _HOPELESS:
            break
    return ratios


def _has_won(ratios: list[float], margin: float, rounds: int) -> bool:
    """Whether, however the rounds to come end, the median will be under 1 − margin and three quarters under 1."""
    return 2 * sum(r < 1 - margin for r in ratios) > rounds and 4 * sum(r < 1 for r in ratios) >= 3 * rounds


def _has_lost(ratios: list[float], margin: float, rounds: int) -> bool:
    """Whether it can no longer win, however the rounds to come end."""
    best_case = [*ratios, *[0.0] * (rounds - len(ratios))]
    return not _has_won(best_case, margin, rounds)


class _Subject:
    """The model that is measured, and what it is fed."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokenizer = Tokenizer.from_gguf(file.path, file.metadata)
        self.prompt = np.random.default_rng(0).integers(0, file.hyperparameters().vocab, PROMPT, np.int32)

    def no_room_for(self, value: Any) -> str | None:
        """Why there is no room for a copy of the weights, where one is to be made."""
        needed = sum(info.nbytes for info in self.file.tensors.values())
        available = psutil.virtual_memory().available
        if value not in ("repacked", "both") or needed < available:
            return None
        return f"a copy of the weights takes {needed:,} bytes, and {available:,} are free"


class _Runner:
    """A model loaded in one way. A context manager."""

    def __init__(self, subject: _Subject, tuning: Tuning) -> None:
        self.tuning = tuning
        self._prompt, self._turns = subject.prompt, list[tuple[float, float]]()
        self._count = _DECODE_TOKENS.start
        before, begun = resident_bytes()[1], time.perf_counter()
        file = GgufFile.open(subject.file.path)
        try:
            self._model = Model(file, subject.tokenizer, GgmlBackend(file, tuning))
        except BaseException:
            file.close()
            raise
        self._load = time.perf_counter() - begun
        self.turn()  # touches pages, builds graphs
        self.forget()
        after = resident_bytes()[1]
        self._memory = None if before is None or after is None else after - before

    def turn(self) -> float:
        """Run a round: seconds of an exchange."""
        state = self._model.new_state()
        self._seconds(self._prompt[:1], state)  # wakes this one's threads, and leaves the other's time to sleep
        prefill = self._seconds(self._prompt, state)
        decode = median(self._seconds(self._prompt[:1], state) for _ in range(self._count))
        self._count = min(max(int(_DECODE_SECONDS / decode), _DECODE_TOKENS.start), _DECODE_TOKENS[-1])
        self._turns.append((prefill, decode))
        return prefill + ANSWER * decode

    def _seconds(self, tokens: Any, state: Any) -> float:
        begun = time.perf_counter()
        self._model.forward(tokens, state)
        return time.perf_counter() - begun

    def forget(self) -> None:
        """Leave out of `speed` what was measured up to now."""
        self._turns.clear()

    def speed(self) -> Speed:
        """Medians of the rounds since `forget`."""
        prefill, decode = (median(times) for times in zip(*self._turns, strict=True))
        return Speed(PROMPT / prefill, 1 / decode, prefill + ANSWER * decode, self._load, self._memory)

    def close(self) -> None:
        """Give the memory back."""
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

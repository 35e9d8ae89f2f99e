"""Texts that begin alike, read once where they are alike.

A state is a small value: what several texts have in common is read once, and each goes on from a copy. Sorted, texts
with a common beginning are neighbours, so a range of them is a branch of a tree:

    texts [0, 7)                     a b c          read once for all seven
    texts [0, 3)  [3, 4)  [4, 7)     d e | f | g    from the same state, in one pass

Branches wait on a stack, and a pass reads those on top. Where texts part, the branch of most texts comes last and goes
on in the state itself: while another is read, with at most half of the texts, that state waits. So few wait at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import psutil
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.model import Model, Tokens
from griffin_gguf.runtime.state import State

#: (tokens read, tokens to read)
Progress = Callable[[int, int], None]

_LOGITS_BYTES = 64 << 20  # float32 logits of a pass in which every token's are wanted
_CHUNKS = 16  # passes over the weights, at most, between two reports of progress
_STATES = 3  # states at once for each text of a batch; beyond, passes shrink before more are made


@dataclass(frozen=True)
class Reached:
    """How far some texts have been read that are alike up to there.

    `texts` are their indices, `read` counts tokens, `logits` f32 [T, V] are those after each of the last T of them.
    `state` holds what was read until the next is asked for: whoever wants to keep it copies it.
    """

    texts: list[int]
    read: int
    logits: NDArray[np.float32]
    state: State


@dataclass
class _Fork:
    """A state from which `waiting` branches go on: copies of it, but for the last."""

    state: State
    waiting: int


@dataclass
class _Branch:
    """Sorted texts [low, high), alike up to token `stop`, of which `start` are read; `every` token's logits wanted."""

    low: int
    high: int
    start: int
    stop: int
    every: bool
    fork: _Fork | None  # None at the beginning of a text


class Reading:
    """All of `texts`, read by `model` with at most `batch` branches in a pass: iterate over it, once, for `Reached`.

    Text i is reached at its end, and its logits are given after token `wanted[i]`, counted from 1, and each later one.
    `asked` counts the tokens of all texts, `total` those that need reading, `read` those that have been read.
    Raises `UnsupportedError` for an empty text and where the states of such a batch have no room.
    """

    def __init__(self, model: Model, texts: Sequence[Tokens], wanted: Sequence[int], batch: int) -> None:
        if not all(len(text) for text in texts):
            raise UnsupportedError("texts: expected at least one token in each, found none")
        arrays = [np.asarray(text, np.int32) for text in texts]
        # Big-endian bytes sort as the tokens do, and a text before those that go on from it.
        self._order = sorted(range(len(texts)), key=lambda i: arrays[i].astype(">u4").tobytes())
        self._texts = [arrays[i] for i in self._order]
        self._wanted = np.asarray([wanted[i] for i in self._order], np.int64)
        self._model, self._batch = model, batch
        self._most = min(_STATES * batch, len(texts) + 1)
        self._live = 0  # states that there are
        self._check_room()
        self.asked = sum(map(len, arrays))
        self.total = self.asked - sum(_alike(one, other) for one, other in pairwise(self._texts))
        self.read = 0

    def __iter__(self) -> Iterator[Reached]:
        self._model.reserve(self._most)
        stack = self._branches(0, len(self._texts), 0, None)
        while stack:
            yield from self._pass(stack)

    def _pass(self, stack: list[_Branch]) -> Iterator[Reached]:
        """Read on with branches from the stack, and put on it what comes after them."""
        chosen = self._choose(stack)
        every = chosen[0][0].every
        most = max(1, self._tokens(every) // len(chosen))
        pieces = [self._texts[branch.low][branch.start : branch.stop][:most] for branch, _ in chosen]
        fed = [(piece, state) for piece, (_, state) in zip(pieces, chosen, strict=True)]
        logits = self._model.forward_batch(fed, every=every)
        self.read += sum(map(len, pieces))
        for (branch, state), piece, rows in zip(chosen, pieces, logits, strict=True):
            branch.start += len(piece)
            yield Reached(self._order[branch.low : branch.high], branch.start, np.atleast_2d(rows), state)
            stack += self._after(branch, state)

    def _check_room(self) -> None:
        needed, free = self._most * self._model.state_nbytes, psutil.virtual_memory().available
        if needed > free:
            raise UnsupportedError(
                f"{self._model.path}: {self._batch} texts at once take {self._most} states, {needed:,} bytes, and "
                f"{free:,} are free; expected a smaller batch"
            )

    def _tokens(self, every: bool) -> int:
        """How many tokens are fed between two reports."""
        return _LOGITS_BYTES // (4 * self._model.hp.vocab) if every else _CHUNKS * self._model.chunk

    def _choose(self, stack: list[_Branch]) -> list[tuple[_Branch, State]]:
        """Take branches of one kind off the stack, each with the state that it goes on in: as many as may be."""
        chosen, every = list[tuple[_Branch, State]](), stack[-1].every
        while stack and stack[-1].every == every and len(chosen) < self._batch:
            fork = stack[-1].fork
            made = fork is None or fork.waiting > 1
            if chosen and made and self._live >= self._most:
                break
            chosen.append((stack.pop(), self._state(fork)))
            self._live += made
        return chosen

    def _state(self, fork: _Fork | None) -> State:
        if fork is None:
            return self._model.new_state()
        fork.waiting -= 1
        return fork.state.copy() if fork.waiting else fork.state

    def _after(self, branch: _Branch, state: State) -> list[_Branch]:
        """What comes after that much of a branch: its rest, or those that it parts into."""
        if branch.start < branch.stop:
            branch.fork = _Fork(state, 1)
            return [branch]
        found = self._branches(branch.low, branch.high, branch.stop, state)
        self._live -= not found
        return found

    def _branches(self, low: int, high: int, start: int, state: State | None) -> list[_Branch]:
        """How texts [low, high) go on that are alike up to token `start`; the branch of most texts first."""
        while low < high and len(self._texts[low]) == start:  # these end here: they come before those that go on
            low += 1
        groups = [list(group) for _, group in groupby(range(low, high), key=lambda i: int(self._texts[i][start]))]
        fork = _Fork(state, len(groups)) if state is not None else None
        found = [self._branch(group[0], group[-1] + 1, start, fork) for group in groups]
        return sorted(found, key=lambda branch: branch.low - branch.high)

    def _branch(self, low: int, high: int, start: int, fork: _Fork | None) -> _Branch:
        """As far as all of these texts are alike, and either every token's logits are wanted or at most the last's."""
        alike, wanted = _alike(self._texts[low], self._texts[high - 1]), int(self._wanted[low:high].min())
        every = wanted <= start
        return _Branch(low, high, start, alike if every else min(alike, wanted), every, fork)


def _alike(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Tokens with which both begin. Of sorted texts, all between two that begin alike do so too."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if different.size else size

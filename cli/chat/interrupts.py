"""Ctrl-C while a chat works."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import UnsupportedOperation
from select import select
from time import monotonic

from griffin_gguf.runtime.generate import Generation

_TOGETHER = 1.0  # seconds within which two of them are meant for the program


class Interrupts:
    """What Ctrl-C does to a line at work: it ends the answer, one that has not begun included, and nothing else.

    So neither the time before an answer nor that in which it is kept is a wrong time to press it. With `piped`, a
    second one for the same answer sets `ending`, and so does one within a second of a first at which the next lines
    were waiting already: the program is to end once this answer is kept. A third raises `KeyboardInterrupt` where it
    comes.
    """

    def __init__(self, piped: bool = False) -> None:
        self.ending = False
        self._piped = piped
        self._came = False
        self._last = float("-inf")
        self._generation: Generation | None = None

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Take Ctrl-C until the block ends."""
        before = signal.signal(signal.SIGINT, lambda *_: self._take())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def stopping(self, generation: Generation) -> Generator[None]:
        """It is this answer that ends; at once where Ctrl-C came before it."""
        self._generation = generation
        if self._came:
            generation.cancel()
        try:
            yield
        finally:
            self._generation = None

    def forget(self) -> None:
        """What came was for the line before."""
        self._came = False

    def _take(self) -> None:
        if self.ending:
            raise KeyboardInterrupt
        now = monotonic()
        self.ending = self._piped and (self._came or now - self._last < _TOGETHER)
        self._came = True
        if _lines_wait():
            self._last = now
        if self._generation is not None:
            self._generation.cancel()


def _lines_wait() -> bool:
    """Whether stdin has more already, or has ended: then nobody writes a line for each answer that they read."""
    try:
        return bool(select([sys.stdin.fileno()], [], [], 0)[0])
    except UnsupportedOperation:  # another program has put a text in the place of stdin
        return True

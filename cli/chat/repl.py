"""The loop of a chat: a line, and what becomes of it."""

import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from io import UnsupportedOperation
from typing import Any

from griffin_gguf.cli.chat.commands import COMMANDS, command_of, obey
from griffin_gguf.cli.chat.plain import checked
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import complain, note
from griffin_gguf.runtime.errors import FileFormatError, GriffinError

#: Around a message of several lines.
QUOTES = '"""'

#: Gives the next message, in its quotes if it has any and without space around it; None at the end.
Read = Callable[[Talk], str | None]


def run(talk: Talk, read: Read) -> None:
    """Take messages and commands until one of them ends it.

    Raises `KeyboardInterrupt` where Ctrl-C was meant for the program, once the answer that it ended is kept.
    """
    with talk.interrupts.heeded():
        while not talk.over and (line := read(talk)) is not None:
            draft, talk.draft = talk.draft, None
            try:
                take(talk, line, draft)
            except (GriffinError, OSError) as error:
                if not talk.typed:
                    raise
                complain(_worded(error))
                if talk.session and not talk.session.saved:
                    note("Not kept so far; the next line tries again. With --no-save nothing is kept on disk.")
            if talk.interrupts.ending:
                raise KeyboardInterrupt


def take(talk: Talk, line: str, draft: str | None = None) -> None:
    """Answer a message or carry out a command, and have kept what came of it.

    With `draft`, the last message as it was put into the prompt, what is no command takes its place.
    """
    text = unquoted(checked("your message", line))
    if not text:
        return
    command = command_of(line)
    if draft is None and command is not None:
        obey(talk, *command)
    elif draft is None:
        talk.answer(partial(talk.conversation.ask, text))
    elif command is not None and command[0] in COMMANDS and command_of(draft) is None:
        obey(talk, *command)
    else:
        talk.answer(partial(talk.conversation.edit, text), again=True)
    talk.conversation.commit()


def say(talk: Talk, text: str) -> None:
    """Answer a message, whatever it looks like, and have kept what came of it."""
    talk.answer(partial(talk.conversation.ask, text))
    talk.conversation.commit()


def unquoted(line: str) -> str:
    """The message without the quotes around it, if there are any."""
    return line.removeprefix(QUOTES).removesuffix(QUOTES).strip() if line.startswith(QUOTES) else line


def open_quotes(text: str) -> bool:
    """Whether a message begins with quotes that do not end yet."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


class Piped:
    """Reads lines of stdin that say something, or several of them from quotes to quotes; see `Read`.

    Ctrl-C ends the program meanwhile. Raises `FileFormatError` for what is not UTF-8.
    """

    def __init__(self) -> None:
        self._number = 0
        try:  # unbuffered, so that what waits is where `Interrupts` looks for it
            self._lines: Any = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
        except UnsupportedOperation:  # another program has put a text in the place of stdin
            self._lines = sys.stdin.buffer

    def __call__(self, talk: Talk) -> str | None:
        """See `Read`."""
        talk.interrupts.forget()
        with _interruptible():
            text = ""
            while not text.strip() or open_quotes(text):
                line = self._line()
                if not line:
                    break
                text += line
        return text.strip() or None

    def _line(self) -> str:
        raw: bytes = self._lines.readline()
        self._number += 1
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8: {error.reason} at byte {error.start}"
            raise FileFormatError("stdin", f"line {self._number}", problem) from None


@contextmanager
def _interruptible() -> Generator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt`, as it does where nothing else is said."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worded(error: GriffinError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

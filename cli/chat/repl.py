"""The loop of a chat: a line, and what becomes of it."""

import re
import sys
from collections.abc import Callable
from functools import partial

from griffin_gguf.cli.chat.commands import obey
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import complain
from griffin_gguf.runtime.errors import GriffinError

#: Around a message of several lines.
QUOTES = '"""'

_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)

#: Gives the next message, in its quotes if it has any and without space around it; None at the end.
Read = Callable[[Talk], str | None]


def run(talk: Talk, read: Read) -> None:
    """Take messages and commands until one of them ends it."""
    while not talk.over and (line := read(talk)) is not None:
        editing, talk.draft = talk.draft is not None, None
        try:
            take(talk, line, editing)
        except (GriffinError, OSError) as error:
            if not talk.typed:
                raise
            complain(str(error))


def take(talk: Talk, line: str, editing: bool = False) -> None:
    """Answer a message or carry out a command, and have kept what came of it."""
    text = unquoted(line)
    if not text:
        return
    if editing:
        talk.answer(partial(talk.conversation.edit, text))
    elif (found := _COMMAND.fullmatch(line)) is not None:
        obey(talk, found[1], (found[2] or "").strip())
    else:
        talk.answer(partial(talk.conversation.ask, text))
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


def piped(_: Talk) -> str | None:
    """See `Read`: a line of stdin that says something, or several of them from quotes to quotes."""
    text = ""
    while not text.strip() or open_quotes(text):
        line = sys.stdin.readline()
        if not line:
            break
        text += line
    return text.strip() or None

"""The commands of a chat: one table, and a function for each."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from griffin_gguf.cli.chat import show
from griffin_gguf.cli.chat.settings import OPTIONS, changed
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import note
from griffin_gguf.runtime import sessions
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sessions import Session

_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)


def _nothing() -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Command:
    """`run` takes the rest of the line, without spaces around it; `choices` are what it may be, for completion."""

    arguments: str
    help: str
    run: Callable[[Talk, str], None]
    choices: Callable[[], Iterable[str]] = _nothing


def command_of(line: str) -> tuple[str, str] | None:
    """Name and rest of a line that is a command: it begins with the name of one, or is no more than a slash and a word.

    So `/tmp is full` is a message, and a mistyped `/udno` is not.
    """
    found = _COMMAND.fullmatch(line)
    if found is None or (found[1] not in COMMANDS and found[2]):
        return None
    return found[1], (found[2] or "").strip()


def obey(talk: Talk, name: str, rest: str) -> None:
    """Carry out a command. Raises `GriffinError` of one line for what it cannot do, or a name that is none's."""
    command = COMMANDS.get(name)
    if command is None:
        raise UnsupportedError(f"/{name}: is no command; /help lists them. Text between triple quotes is never one")
    if rest and not command.arguments:
        raise UnsupportedError(f"/{name}: expected nothing behind it, found {rest!r}")
    if not rest and command.arguments[:1] not in ("", "["):
        raise UnsupportedError(f"/{name}: expected {command.arguments} behind it")
    command.run(talk, rest)


def _help(_: Talk, __: str) -> None:
    show.commands([(f"/{name} {command.arguments}".rstrip(), command.help) for name, command in COMMANDS.items()])


def _system(talk: Talk, rest: str) -> None:
    if not rest:
        show.system(talk)
        return
    talk.conversation.system = "" if rest in ('""', "''") else rest
    if talk.conversation.turns:
        note("The model hears of it with your next message. What it has read before stays read; /clear begins anew.")


def _set(talk: Talk, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not value:
        show.settings(talk, name)
        return
    talk.conversation.settings = changed(talk.conversation.settings, name, value.strip())


def _show(talk: Talk, rest: str) -> None:
    parts = {"model": show.model, "settings": show.settings, "system": show.system, "messages": show.messages}
    if rest and rest not in parts:
        raise UnsupportedError(f"/show {rest}: expected {', '.join(parts)} or nothing")
    for part in [parts[rest]] if rest else list(parts.values())[:3]:
        part(talk)


def _clear(talk: Talk, _: str) -> None:
    session = talk.session
    talk.keep()
    talk.begin()
    if session and session.name:
        note(f"A new conversation. The other one stays: /load {session.name}")


def _undo(talk: Talk, _: str) -> None:
    turn = talk.conversation.undo()
    note(f"Taken back: {show.short(turn.user)}")
    show.left_to_read(talk)


def _regen(talk: Talk, _: str) -> None:
    if talk.conversation.settings.sampling.temperature == 0:
        note("At temperature 0 the answer is the same again; /set temperature 0.8 lets it vary.")
    talk.answer(talk.conversation.regenerate, again=True)


def _edit(talk: Talk, rest: str) -> None:
    if rest:
        talk.answer(partial(talk.conversation.edit, rest), again=True)
    elif not talk.typed:
        raise UnsupportedError("/edit: expected TEXT behind it where no one is at a terminal")
    else:
        talk.draft = talk.conversation.last.user


def _fork(talk: Talk, rest: str) -> None:
    _check_other(talk, rest)
    talk.keep()
    session = sessions.keep(talk.model, rest, talk.conversation)
    before = talk.session
    talk.conversation.shelf.close()
    talk.conversation.shelf = session
    note(f"Now in {rest}." + (f" The other one stays as it is: /load {before.name}" if before and before.name else ""))


def _save(talk: Talk, rest: str) -> None:
    _check_other(talk, rest)
    sessions.keep(talk.model, rest, talk.conversation).close()
    note(f"Saved as {rest}: /load {rest}, or griffin chat {talk.model.path} --session {rest}")


def _load(talk: Talk, rest: str) -> None:
    _check_other(talk, rest)
    talk.keep()
    session = Session.open(talk.model, rest)
    try:
        conversation = session.conversation(session.settings(), talk.speculation)
    except BaseException:
        session.close()
        raise
    talk.take_up(conversation)
    show.resumed(talk)


def _check_other(talk: Talk, name: str, remedy: str = "") -> None:
    """Raise `UnsupportedError` where the session of that name is the one that is open here."""
    if talk.session and talk.session.name == name:
        raise UnsupportedError(f"session {name}: is the one you are in{remedy}")


def _sessions(talk: Talk, _: str) -> None:
    show.sessions(sessions.entries(), talk)


def _delete(talk: Talk, rest: str) -> None:
    _check_other(talk, rest, "; /clear begins another, then delete it")
    sessions.delete(rest)
    note(f"Deleted {rest}.")


def _stats(talk: Talk, _: str) -> None:
    show.stats(talk)


def _bye(talk: Talk, _: str) -> None:
    talk.over = True


COMMANDS = {
    "help": Command("", "This list.", _help),
    "system": Command("[TEXT]", 'Show or set the system text; /system "" takes it away.', _system),
    "set": Command("[OPTION VALUE]", "Set an option of sampling, max_tokens or stop; alone: all of them.", _set,
                   lambda: OPTIONS),
    "show": Command("[PART]", "Show model, settings, system or messages.", _show,
                    lambda: ("model", "settings", "system", "messages")),
    "clear": Command("", "Begin a new conversation; system text, settings and document stay.", _clear),
    "undo": Command("", "Take back your last message and its answer.", _undo),
    "regen": Command("", "Another answer to your last message; with a seed it is drawn by the next seed.", _regen),
    "edit": Command("[TEXT]", "Another last message; alone: the old one comes into the prompt, Ctrl-C: out.", _edit),
    "fork": Command("NAME", "Go on under NAME; the conversation so far stays under its own.", _fork),
    "save": Command("NAME", "Keep a copy as NAME and stay here.", _save),
    "load": Command("NAME", "Go on with the conversation NAME.", _load, sessions.names),
    "sessions": Command("", "List the conversations that are kept.", _sessions),
    "delete": Command("NAME", "Delete the conversation NAME.", _delete, sessions.names),
    "stats": Command("", "Tokens, speeds, size of state and snapshots.", _stats),
    "bye": Command("", "End; so does Ctrl-D.", _bye),
}  # fmt: skip

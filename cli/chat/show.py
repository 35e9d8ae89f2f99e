"""What a chat tells beside its answers: on stderr, so that stdout has the answers and nothing else."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.text import Text

from griffin_gguf.cli.chat.plain import plain
from griffin_gguf.cli.chat.settings import OPTIONS, value_of
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import cell, clean, err, note, only_cut, size, table
from griffin_gguf.quant.file_types import type_name
from griffin_gguf.runtime.conversation import Conversation
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.sessions import Entry, model_name

_SHORT = 60  # characters of a text where it is only to be recognized
_FIRST, _LAST = 3, 7  # lines of the last message and of its answer where a conversation is gone on with
_NARROW = 90  # columns of a terminal, below which a list has no room for what is least looked for


def greeting(talk: Talk) -> None:
    """How a chat at a terminal begins."""
    name, kind = clean(model_name(talk.model)), type_name(talk.model.file.metadata)
    err.print(Text.assemble((name, "bold"), (f" {kind}", "dim")))
    note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.\n")
    if (session := talk.session) and session.record:
        resumed(talk)
    elif beginning := talk.conversation.beginning:
        note(f"It has read the document {clean(beginning.name)}, {_count(beginning.snapshot.position, 'token')}.")


def farewell(talk: Talk) -> None:
    """Where the conversation can be found again. Raises `GriffinError` where it could not be kept."""
    session = talk.session
    if session is None:
        return
    try:
        talk.keep()
    except GriffinError as error:
        raise GriffinError(f"the conversation is NOT kept: {error}") from error
    if session.name and talk.conversation.turns:
        note(f"Kept as {session.name}: griffin chat {talk.model.path} -c goes on.")


def resumed(talk: Talk) -> None:
    """A conversation is gone on with: which one, and how it ended, in a few lines."""
    conversation, session = talk.conversation, talk.session
    name = session.name if session else None
    for turn in conversation.turns[-1:]:
        _said(_part(turn.user, err.width - 4, _FIRST), _part(turn.answer, err.width, _LAST, end=True))
    note(f"{name}: {_count(len(conversation.turns), 'turn')}, {_count(conversation.tokens, 'token')}.")
    left_to_read(talk)


def left_to_read(talk: Talk) -> None:
    """Say so where going back costs something."""
    if count := talk.conversation.left_to_read():
        note(f"The state of that moment is no longer kept: the next message reads {_count(count, 'token')} again.")


def commands(rows: Sequence[tuple[str, str]]) -> None:
    """The commands, and what else can be typed."""
    _pairs(dict(rows))
    note('Between """ and """ a message has several lines; Alt-Enter begins one too. Tab completes.')


def settings(talk: Talk, name: str = "") -> None:
    """All options as /set takes them, or those whose names begin so."""
    rows = table("option", "value", "")
    for option, facts in OPTIONS.items():
        if option.startswith(name):
            rows.add_row(option, cell(value_of(talk.conversation.settings, option)), Text(facts.help, "dim"))
    rows.columns[2].no_wrap = False
    err.print(rows if rows.row_count else f"{name}: is no option.")


def system(talk: Talk) -> None:
    """The system text."""
    text = talk.conversation.system
    err.print(Text(plain(text)) if text else Text("no system text", "dim"))


def messages(talk: Talk) -> None:
    """All that was said."""
    for turn in talk.conversation.turns:
        if turn.system:
            err.print(Text(plain(turn.system), "dim italic"))
        _said(plain(turn.user), plain(turn.answer))


def model(talk: Talk) -> None:
    """What model this is."""
    model, conversation = talk.model, talk.conversation
    weights = sum(info.nbytes for info in model.file.tensors.values())
    beginning = conversation.beginning
    _pairs(
        {
            "model": f"{model_name(model)} {type_name(model.file.metadata)}, {model.path}",
            "memory": f"{size(weights)} of weights + {size(model.state_nbytes)} of state, at any length",
            "window": f"{model.hp.window:,} tokens of attention; beyond, {model.hp.recurrent.count(True)} recurrences",
            "template": "of the file" if conversation.template else "none: what you write is continued",
            **({"document": f"{beginning.name}, {beginning.snapshot.position:,} tokens"} if beginning else {}),
        }
    )


def sessions(entries: Sequence[Entry], talk: Talk) -> None:
    """What is kept, the latest first; then what is wrong with some."""
    if not entries:
        note("none is kept yet")
        return
    own = talk.session.name if talk.session else None
    wide = not err.is_terminal or err.width >= _NARROW
    rows = table("name", *["model"] * wide, "turns", "size", "changed", "last message", right=("turns", "size"))
    for entry in entries:
        record = entry.record
        name = Text(entry.name, "bold" if entry.name == own else "")
        when = datetime.fromisoformat(entry.changed).astimezone().strftime("%Y-%m-%d %H:%M")
        named = [cell(record.model_name if record else "")] if wide else []
        last = short(record.turns[-1].user) if record and record.turns else ""
        turns = str(len(record.turns)) if record else "?"
        rows.add_row(name, *named, turns, size(entry.nbytes), when, cell(last))
    only_cut(rows, "model", "last message")
    err.print(rows, crop=False)
    for entry in entries:
        if entry.problem:
            note(clean(str(entry.problem)))


def stats(talk: Talk) -> None:
    """Tokens, speeds, sizes."""
    conversation, tally, session = talk.conversation, talk.conversation.tally, talk.session
    names = conversation.snapshots()
    kept = sum(conversation.shelf.has(name) for name in names)
    where = f", {size(session.nbytes)} in {session.path}" if session and session.name else ", in memory only"
    _pairs(
        {
            "conversation": f"{_count(len(conversation.turns), 'turn')}, {_count(conversation.tokens, 'token')}",
            "read in all": f"{_count(conversation.tokens_read, 'token')}{_spare(conversation)}",
            "reading": _speed(tally.read, tally.reading),
            "writing": _speed(tally.written, tally.writing),
            "state": f"{size(talk.model.state_nbytes)}, the same at any length",
            "snapshots": f"{kept} of {len(names)}{where}",
        }
    )


def short(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(clean(text.replace("\n", " ")).split())
    return line if len(line) <= _SHORT else f"{line[:_SHORT]}…"


def _speed(tokens: int, seconds: float) -> str:
    """Of this run, not of the conversation."""
    return f"{_count(tokens, 'token')} since the start, {tokens / max(seconds, 1e-9):,.1f}/s"


def _spare(conversation: Conversation) -> str:
    """Why more was read than the conversation has, where that is so."""
    document = conversation.beginning.snapshot.position if conversation.beginning else 0
    more = conversation.tokens_read + document - conversation.tokens
    return f", {more:,} of them since taken back or answered anew" if more > 0 else ", none of them twice"


def _said(user: str, answer: str) -> None:
    err.print(Text.assemble((">>> ", "bold green"), user.replace("\n", "\n... ")))
    err.print(Text(answer), end="\n\n")


def _part(text: str, width: int, most: int, end: bool = False) -> str:
    """Its first lines, or its last, as a terminal of that width breaks them; all of a text that is no longer."""
    near = text[-most * width :] if end else text[: most * width]  # no more can be on so many lines
    lines = [line.plain.rstrip() for line in Text(plain(near)).wrap(err, width)]
    if len(near) == len(text) and len(lines) <= most:
        return plain(text)
    return "\n".join(["…", *lines[-most:]] if end else [*lines[:most], "…"])


def _pairs(lines: Mapping[str, str]) -> None:
    rows = table("", "")
    rows.show_header, rows.box = False, None
    rows.columns[1].no_wrap = False
    for name, line in lines.items():
        rows.add_row(Text(name, "bold"), Text(clean(line)))
    err.print(rows)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"

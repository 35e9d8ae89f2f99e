"""What a chat tells beside its answers: on stderr, so that stdout has the answers and nothing else."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.text import Text

from griffin_gguf.cli.chat.settings import OPTIONS, value_of
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import cell, clean, err, note, size, table
from griffin_gguf.quant.file_types import type_name
from griffin_gguf.runtime.conversation import Conversation
from griffin_gguf.runtime.sessions import Entry, model_name
from griffin_gguf.runtime.turns import Turn

_SHORT = 60  # characters of a text where it is only to be recognized


def greeting(talk: Talk) -> None:
    """How a chat at a terminal begins."""
    err.print(Text.assemble((model_name(talk.model), "bold"), (f" {type_name(talk.model.file.metadata)}", "dim")))
    note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.\n")
    if (session := talk.session) and session.record:
        resumed(talk)
    elif beginning := talk.conversation.beginning:
        note(f"It has read the document {beginning.name}, {_count(beginning.snapshot.position, 'token')}.")


def farewell(talk: Talk) -> None:
    """Where the conversation can be found again."""
    if (session := talk.session) and session.name and talk.conversation.turns:
        note(f"Kept as {session.name}: griffin chat {talk.model.path} -c goes on.")


def resumed(talk: Talk) -> None:
    """A conversation is gone on with: which one, and how it ended."""
    conversation, session = talk.conversation, talk.session
    name = session.name if session else None
    _turns(conversation.turns[-1:])
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
    err.print(Text(text) if text else Text("no system text", "dim"))


def messages(talk: Talk) -> None:
    """All that was said."""
    _turns(talk.conversation.turns)


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
    """What is kept, the latest first."""
    own = talk.session.name if talk.session else None
    rows = table("name", "model", "turns", "size", "changed", "last message", right=("turns", "size"))
    for entry in entries:
        name = Text(entry.name, "bold" if entry.name == own else "")
        when = datetime.fromisoformat(entry.changed).astimezone().strftime("%Y-%m-%d %H:%M")
        if (record := entry.record) is None:
            rows.add_row(name, "", "", size(entry.nbytes), when, cell(str(entry.problem)))
            continue
        last = short(record.turns[-1].user) if record.turns else ""
        rows.add_row(name, cell(record.model_name), str(len(record.turns)), size(entry.nbytes), when, cell(last))
    err.print(rows if entries else Text("none is kept yet", "dim"))


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


def _turns(turns: Sequence[Turn]) -> None:
    for turn in turns:
        if turn.system:
            err.print(Text(turn.system, "dim italic"))
        err.print(Text.assemble((">>> ", "bold green"), turn.user.replace("\n", "\n... ")))
        err.print(Text(turn.answer), end="\n\n")


def _pairs(lines: Mapping[str, str]) -> None:
    rows = table("", "")
    rows.show_header, rows.box = False, None
    rows.columns[1].no_wrap = False
    for name, line in lines.items():
        rows.add_row(Text(name, "bold"), Text(clean(line)))
    err.print(rows)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"

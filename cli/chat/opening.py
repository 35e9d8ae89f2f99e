"""How a chat begins: with an old conversation or a new one."""

from dataclasses import dataclass
from typing import Any

from griffin_gguf.cli.chat.repl import Read
from griffin_gguf.cli.chat.settings import with_values
from griffin_gguf.runtime import documents, sessions
from griffin_gguf.runtime.conversation import Conversation, Shelf
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.places import data_folder
from griffin_gguf.runtime.sessions import Session
from griffin_gguf.runtime.speculate import Speculation
from griffin_gguf.runtime.turns import Beginning, Settings


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    `resume`: the latest session; `name`: the session of that name, if need be a new one; `kept`: a new conversation is
    a session; `document`: what a new one begins after; `system`: its system text, None where nothing was said of it;
    `options`: settings that were given.
    """

    resume: bool
    name: str | None
    kept: bool
    document: str | None
    system: str | None
    options: dict[str, Any]


def opened(model: Model, wanted: Wanted, speculation: Speculation | None) -> Conversation:
    """The conversation, ready to go on. Raises `GriffinError` where it cannot be had."""
    name = sessions.latest(model) if wanted.resume else wanted.name
    if name is not None and sessions.exists(name):
        if wanted.document is not None:
            raise UnsupportedError(f"session {name}: has begun already, so it cannot begin after {wanted.document}")
        shelf = Session.open(model, name)
    else:
        shelf = Session.begin(model, name) if wanted.kept else Shelf()
    try:
        if isinstance(shelf, Session) and shelf.record:
            conversation = shelf.conversation(with_values(shelf.settings(), wanted.options), speculation)
        else:
            settings = with_values(Settings(), wanted.options)
            conversation = Conversation(model, settings, shelf, speculation, _beginning(model, wanted.document))
        if wanted.system is not None:
            conversation.system = wanted.system
    except BaseException:
        shelf.close()
        raise
    return conversation


def terminal(kept: bool) -> Read:
    """A prompt whose history is kept, or not."""
    from griffin_gguf.cli.chat.terminal import Terminal  # here: prompt_toolkit is needed at a terminal only

    return Terminal(data_folder() / "chat-history" if kept else None)


def _beginning(model: Model, document: str | None) -> Beginning | None:
    if document is None:
        return None
    found = documents.find(document)
    return Beginning(found.name, found.form, found.snapshot(model))

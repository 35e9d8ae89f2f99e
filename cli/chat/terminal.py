"""The prompt at a terminal, by prompt_toolkit."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from griffin_gguf.cli.chat.commands import COMMANDS
from griffin_gguf.cli.chat.repl import open_quotes
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.console import note

_STYLE = Style.from_dict({"prompt": "bold ansigreen", "hint": "ansibrightblack"})


class Terminal:
    """Reads what a person types: with history, completion of commands, and messages of several lines.

    `history` is a file that keeps what was typed, None for none. `io` are prompt_toolkit's `input` and `output` where
    they are not the terminal.
    """

    def __init__(self, history: Path | None, **io: Any) -> None:
        if history is not None:
            try:
                history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                history.touch(mode=0o600)
            except OSError as error:
                note(_not_kept(history, error))
                history = None
        self._history = InMemoryHistory() if history is None else _Kept(history)
        io = io or {"output": create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)}
        self._prompt: PromptSession[str] = PromptSession(
            history=self._history,
            completer=_Commands(),
            complete_while_typing=Condition(lambda: self._prompt.default_buffer.text.startswith("/")),
            multiline=Condition(lambda: open_quotes(self._prompt.default_buffer.text)),
            prompt_continuation=[("class:prompt", "... ")],
            key_bindings=_bindings(),
            style=_STYLE,
            **io,
        )
        self._hint = "Write a message, or /help"

    def __call__(self, talk: Talk) -> str | None:
        """See `Read`. Ctrl-C clears the line; on an empty one it helps."""
        editing = talk.draft is not None
        hint, self._hint = self._hint, ""
        try:
            line = self._prompt.prompt(
                [("class:prompt", "edit> " if editing else ">>> ")],
                default=talk.draft or "",
                placeholder=[("class:hint", hint)],
                pre_run=talk.interrupts.forget,  # from here on Ctrl-C is the prompt's
            )
        except EOFError:
            return None
        except KeyboardInterrupt:
            talk.draft = None
            if not self._prompt.default_buffer.text:
                note("Ctrl-D or /bye ends the chat, /help lists the commands.")
            return ""
        finally:
            if isinstance(self._history, _Kept) and (problem := self._history.problem()):
                note(problem)
        return line.strip()


class _Kept(FileHistory):
    """History in a file; from where that fails on it is in memory alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._failed: OSError | None = None
        self._told = False

    def load_history_strings(self) -> Iterable[str]:
        """See `FileHistory`."""
        try:
            return super().load_history_strings()
        except OSError as error:
            self._failed = error
            return ()

    def store_string(self, string: str) -> None:
        """See `FileHistory`."""
        if self._failed:
            return
        try:
            super().store_string(string)
        except OSError as error:
            self._failed = error

    def problem(self) -> str | None:
        """What is to be told of a failure, once."""
        if self._failed is None or self._told:
            return None
        self._told = True
        return _not_kept(self._path, self._failed)


def _not_kept(path: Path, error: OSError) -> str:
    place = error.filename or path
    return f"{place}: {error.strerror}: what you type is not kept. With --no-save nothing is kept on disk."


class _Commands(Completer):
    """Commands, and what may stand behind them."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See `Completer`."""
        name, space, rest = document.text_before_cursor.partition(" ")
        if not name.startswith("/"):
            return
        if not space:
            for known, command in COMMANDS.items():
                if known.startswith(name[1:]):
                    yield Completion(f"/{known}", -len(name), display_meta=command.help)
        elif (command := COMMANDS.get(name[1:])) is not None:
            yield from (Completion(choice, -len(rest)) for choice in command.choices() if choice.startswith(rest))


def _bindings() -> KeyBindings:
    """Alt-Enter, and Ctrl-J where Enter is another key than it: one more line."""
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings

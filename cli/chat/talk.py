"""One person's chat as it runs: what commands work on, and how an answer gets to the screen."""

import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from griffin_gguf.cli.chat.interrupts import Interrupts
from griffin_gguf.cli.chat.plain import plain
from griffin_gguf.cli.chat.wrap import Wrap
from griffin_gguf.cli.console import err, note
from griffin_gguf.cli.progress import Report, progress
from griffin_gguf.cli.running import show_timings
from griffin_gguf.runtime.conversation import Conversation, Shelf
from griffin_gguf.runtime.generate import Finish, Generation
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sessions import Session
from griffin_gguf.runtime.speculate import Speculation
from griffin_gguf.runtime.state import CHUNK

#: How the conversation is asked for an answer: it tells how far the prompt has been read.
Asking = Callable[[Report], AbstractContextManager[Generation]]


class Talk:
    """A conversation, and the person who has it.

    `typed`: at a terminal, where an error is told and the chat goes on. `kept`: a conversation that begins here is a
    session. `over` ends the chat; `draft`, where it is not None, is put into the next prompt, and what comes of it
    replaces the last message. `interrupts` say what Ctrl-C ends.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        speculation: Speculation | None = None,
        *,
        typed: bool = False,
        kept: bool = False,
        timings: bool = False,
    ) -> None:
        self.model, self.conversation, self.speculation = model, conversation, speculation
        self.typed, self.kept, self.timings = typed, kept, timings
        self.interrupts = Interrupts(piped=not typed)
        self.over = False
        self.draft: str | None = None

    @property
    def session(self) -> Session | None:
        """Where the conversation is kept."""
        shelf = self.conversation.shelf
        return shelf if isinstance(shelf, Session) else None

    def answer(self, asking: Asking, again: bool = False) -> None:
        """Show an answer as it comes, and why it ended where the model did not end it.

        With `again` it is to take the last one's place.
        """
        with ExitStack() as stack:
            bar = stack.enter_context(_reading())
            generation = stack.enter_context(asking(bar))
            stack.enter_context(self.interrupts.stopping(generation))
            _stream(generation)
        self._explain(generation, again)
        if self.timings:
            show_timings(generation, self.model.backend)
        if self.typed:
            note("")

    def keep(self) -> None:
        """Have kept what could not be, before another takes its place. Raises `GriffinError` where it still cannot."""
        if self.session and not self.session.saved:
            self.conversation.commit()

    def take_up(self, conversation: Conversation) -> None:
        """Go on with another conversation; this one is kept as it is. See `keep`."""
        self.conversation.shelf.close()
        self.conversation = conversation

    def begin(self) -> None:
        """Begin anew with the same settings, system text and document; a session stays as it is. See `keep`."""
        if self.session is None:
            self.conversation.clear()
            return
        before = self.conversation
        shelf = Session.begin(self.model) if self.kept else Shelf()
        conversation = Conversation(self.model, before.settings, shelf, self.speculation, before.beginning)
        conversation.system = before.system
        self.take_up(conversation)

    def _explain(self, generation: Generation, again: bool) -> None:
        if generation.finish is Finish.CANCELLED:
            kept = "the last message and its answer stay" if again else "the message is not kept"
            note("(stopped)" if generation.tokens else f"(stopped before it began: {kept})")
        elif generation.finish is Finish.LENGTH:
            note(f"(cut after {self.conversation.settings.max_tokens} tokens; -n and /set max_tokens allow more)")


def _stream(generation: Generation) -> None:
    """Write the text as it comes: with whole words on a terminal, elsewhere as it is, and a newline."""
    wrap = Wrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    for piece in generation:
        sys.stdout.write(wrap.push(plain(piece)) if wrap else piece)
        sys.stdout.flush()
    sys.stdout.write(f"{wrap.flush()}\n" if wrap else "\n")
    sys.stdout.flush()


@contextmanager
def _reading() -> Generator[Report]:
    """A bar on a terminal while a prompt is read that takes more than a moment; it goes before the answer comes."""
    with ExitStack() as stack:
        bar: Report | None = None

        def report(done: int, total: int) -> None:
            nonlocal bar
            if total <= CHUNK or not err.is_terminal:
                return
            bar = bar or stack.enter_context(progress("reading", unit="tokens"))
            bar(done, total)
            if done == total:
                stack.close()

        yield report

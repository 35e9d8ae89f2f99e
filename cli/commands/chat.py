"""`griffin chat`: a conversation in the terminal."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import note
from griffin_gguf.cli.options import (
    Backend,
    DeviceNames,
    DraftFile,
    LayersOn,
    Lookup,
    MinP,
    Model,
    RepeatLastN,
    RepeatPenalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    add_command,
    parse_devices,
)
from griffin_gguf.cli.running import load_model, show_timings, speculating, stream

if TYPE_CHECKING:
    from griffin_gguf.cli.conversation import Conversation
    from griffin_gguf.runtime.generate import Generation

_HELP = "/clear forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer, /help says this."
_COMMAND = re.compile(r"/\w+")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "chat", chat, "griffin chat model.gguf", "griffin chat model.gguf --temp 0.3 -n 500")


def chat(
    path: Model,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="The longest answer, in tokens.")
    ] = 2048,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    seed: Seed = None,
    draft: DraftFile = None,
    lookup: Lookup = False,
    backend: Backend = "auto",
    threads: Threads = None,
    device: DeviceNames = None,
    layers_on: LayersOn = None,
    timings: Annotated[bool, typer.Option("--timings", help="Tell tokens and speeds after each answer.")] = False,
) -> None:
    """Talk with a model, by the chat template in its file.

    Each turn, only what is new is processed, however long the conversation. Ctrl-C stops an answer, Ctrl-D or /bye
    ends the conversation, /clear begins a new one. Through a pipe, every line is a turn. A file without a chat
    template goes on from what you write instead.
    """
    from griffin_gguf.cli.conversation import Conversation
    from griffin_gguf.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
    with (
        load_model(path, backend, threads, parse_devices(device, layers_on)) as model,
        speculating(model, draft, lookup, backend, threads) as speculation,
    ):
        conversation = Conversation(model, sampling, max_tokens, speculation)
        if conversation.template is None:
            note(f"{path} has no chat template: what you write is continued, not answered.")
        if sys.stdin.isatty():
            note(_HELP)
        for line in _lines():
            if _COMMAND.fullmatch(line):
                _obey(line, conversation)
                continue
            with conversation.ask(line) as generation, _stoppable(generation):
                stream(generation)
            if not sys.stdout.isatty():
                sys.stdout.write("\n")
                sys.stdout.flush()
            _explain(generation, max_tokens)
            if timings:
                show_timings(generation, model.backend)


def _obey(command: str, conversation: "Conversation") -> None:
    """Carry out a line that is one word after a slash; /bye ends `_lines` itself."""
    if command == "/clear":
        conversation.clear()
    else:
        note(_HELP if command == "/help" else f"{command} is no command. {_HELP}")


def _lines() -> Iterator[str]:
    """What the person writes, until /bye or the end."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  gives `input` line editing and a history
    while True:
        try:
            line = input(">>> " if typed and sys.stdout.isatty() else "").strip()
        except KeyboardInterrupt:
            if not typed:
                raise
            note(f"\n{_HELP}")
            continue
        except EOFError:
            if typed:
                note("")
            return
        if line == "/bye":
            return
        if line:
            yield line


@contextmanager
def _stoppable(generation: "Generation") -> Iterator[None]:
    """Let Ctrl-C end the answer and keep what the model has read."""
    before = signal.signal(signal.SIGINT, lambda *_: generation.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _explain(generation: "Generation", max_tokens: int) -> None:
    """Say why an answer ended where the model did not end it."""
    from griffin_gguf.runtime.generate import Finish

    if generation.finish is Finish.CANCELLED:
        note("(stopped)")
    elif generation.finish is Finish.LENGTH:
        note(f"(cut after {max_tokens} tokens; -n allows more)")

"""`griffin chat`: a conversation in the terminal."""

import sys
from typing import Annotated, Any

import typer

from griffin_gguf.cli.chat.plain import checked
from griffin_gguf.cli.console import note
from griffin_gguf.cli.options import (
    Backend,
    DeviceNames,
    DraftFile,
    FrequencyPenalty,
    LayersOn,
    Lookup,
    MinP,
    Model,
    PresencePenalty,
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
from griffin_gguf.cli.running import load_model, speculating
from griffin_gguf.cli.text import read_stdin, without_newline

_KEPT = "Conversations"

#: Options that a conversation remembers: those of `Settings`, by the names of this command's parameters.
_REMEMBERED = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
    "frequency_penalty", "seed", "max_tokens", "stop",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "chat",
        chat,
        "griffin chat model.gguf",
        "griffin chat model.gguf -c",
        "griffin chat model.gguf --system 'Answer in one sentence.' --temp 0.3 -n 500",
        "cat notes.txt | griffin chat model.gguf -p 'Summarize this.'",
    )


def chat(
    context: typer.Context,
    path: Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Only this message; text through a pipe goes in front of it."
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A text that the model reads before everything.")
    ] = None,
    document: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="Begin after this document (griffin read), without reading it."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--continue", "-c", rich_help_panel=_KEPT, help="Go on with the latest one with this model."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--session", metavar="NAME", rich_help_panel=_KEPT, help="Go on with that one, or begin it where it is new."
        ),
    ] = None,
    no_save: Annotated[
        bool, typer.Option("--no-save", rich_help_panel=_KEPT, help="Keep nothing on disk, what you type included.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="The longest answer, in tokens.")
    ] = 2048,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End an answer before this text. May be given repeatedly."),
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
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

    Each turn, only what is new is processed, however long the conversation, and memory stays the same. Ctrl-C stops
    an answer, /undo, /regen and /edit go back without reading anything again, /help lists all commands. A file
    without a chat template goes on from what you write instead.

    At a terminal the conversation is kept after every turn, and -c goes on with it at once. Through a pipe every line
    is a turn, or with -p all of it a document that the one message is about; nothing is kept then, unless --session
    or -c says so.
    """
    _check(resume, name, no_save, document)
    typed = sys.stdin.isatty() and prompt is None
    for option, text in (("--prompt", prompt), ("--system", system)):
        checked(option, text or "")
    message = None if prompt is None else _message(prompt)
    given = _given(context)
    from griffin_gguf.cli.chat import opening, repl, show
    from griffin_gguf.cli.chat.talk import Talk

    kept = not no_save and (typed or resume or name is not None)
    wanted = opening.Wanted(resume, name, kept, document, system, given)
    with (
        load_model(path, backend, threads, parse_devices(device, layers_on)) as model,
        speculating(model, draft, lookup, backend, threads) as speculation,
    ):
        conversation = opening.opened(model, wanted, speculation)
        talk = Talk(model, conversation, speculation, typed=typed, kept=kept, timings=timings)
        try:
            if conversation.template is None:
                note(f"{path} has no chat template: what you write is continued, not answered.")
            if message is not None:
                repl.say(talk, message)
            elif typed:
                show.greeting(talk)
                repl.run(talk, opening.terminal(kept))
                show.farewell(talk)
            else:
                repl.run(talk, repl.Piped())
        finally:
            talk.conversation.shelf.close()


def _check(resume: bool, name: str | None, no_save: bool, document: str | None) -> None:
    """Refuse options that contradict each other."""
    for one, other, both in (
        ("--continue", "--session", resume and name is not None),
        ("--continue", "--no-save", resume and no_save),
        ("--session", "--no-save", name is not None and no_save),
        ("--continue", "--from", resume and document is not None),
    ):
        if both:
            raise typer.BadParameter(f"{one} and {other}: expected one of the two")


def _message(prompt: str) -> str:
    """What was piped, then the prompt: a memory of fixed size knows best what it has read last."""
    if sys.stdin.isatty():
        return prompt
    piped = without_newline(read_stdin())
    return f"{piped}\n\n{prompt}" if piped.strip() else prompt


def _given(context: typer.Context) -> dict[str, Any]:
    """The remembered options that were given on the command line."""
    values = {name: context.params[name] for name in _REMEMBERED if _is_given(context, name)}
    return values | ({"stop": tuple(values["stop"] or ())} if "stop" in values else {})


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

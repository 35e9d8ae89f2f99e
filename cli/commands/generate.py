"""`griffin generate`: go on from a text."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
from griffin_gguf.cli.running import load_model, show_timings, speculating, stream
from griffin_gguf.cli.text import argument, read_stdin, read_text, without_newline


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "generate",
        generate,
        "griffin generate model.gguf -p 'It was a dark and stormy night' -n 100",
        "griffin generate model.gguf -f prompt.txt --temp 0 > answer.txt",
        "cat notes.txt | griffin generate model.gguf --stop '###'",
        "griffin generate 9b.gguf -f question.txt --draft 2b.gguf",
        "griffin generate model.gguf --from my-notes -p 'In short,' -n 100",
        "griffin generate model.gguf -f letter.txt --schema address.json",
    )


def generate(
    path: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to go on from; - reads stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read it from a file.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="NAME", help="Begin behind this document, which griffin read has kept."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="End after so many tokens.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text. May be given repeatedly."),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            "--schema",
            metavar="FILE",
            help="The text is to be JSON by this JSON Schema (needs the server extra); true: any object.",
        ),
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
) -> None:
    """Go on from a text, streaming the continuation.

    Only the continuation goes to stdout, timings to stderr. Text from stdin or a file is taken without its last
    newline. Memory stays the same however long the text grows. With --from the text follows right behind a document, or
    the document itself is continued where there is none. With --schema it is made sure that the text is JSON by the
    schema, but the model does not see that: what is wanted, the prompt must say.
    """
    text = _prompt(prompt, file, needed=start is None)
    stops = [argument("--stop", one) for one in stop or ()]
    rules = _schema(schema) if schema else None
    from griffin_gguf.runtime.chat import stop_tokens
    from griffin_gguf.runtime.documents import find
    from griffin_gguf.runtime.generate import generate as generate_text
    from griffin_gguf.runtime.grammar import json_constraint
    from griffin_gguf.runtime.sampling import Sampling

    sampling = Sampling(
        temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, presence_penalty, frequency_penalty
    )
    document = find(start) if start is not None else None
    with (
        load_model(path, backend, threads, parse_devices(device, layers_on)) as model,
        speculating(model, draft, lookup, backend, threads) as speculation,
    ):
        ends = stop_tokens(model.file.metadata, model.tokenizer)
        generation = generate_text(
            model,
            model.new_state(document.snapshot(model) if document else None),
            model.tokenizer.encode(text, bos=document is None),
            sampling,
            max_tokens,
            ends,
            stops,
            speculation,
            json_constraint(model.tokenizer, rules, ends) if rules is not None else None,
        )
        stream(generation)
        if rules is not None and generation.stop_token is None:
            note("cut by --max-tokens or --stop: the JSON may not be complete")
        show_timings(generation, model.backend)


def _prompt(prompt: str | None, file: Path | None, needed: bool) -> str:
    """The text, from the one place that was named or else from a pipe; empty where there is none and none `needed`."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("--prompt and --file: expected one of the two")
    if file is not None:
        return without_newline(read_text(file))
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return without_newline(read_stdin())
    if prompt is None and needed:
        raise typer.BadParameter("no text to go on from: give it by --prompt, by --file or through a pipe")
    return argument("--prompt", prompt or "")


def _schema(path: Path) -> dict[str, Any] | bool:
    """A JSON Schema out of a file. Raises `FileFormatError` for anything else, errors as of `read_text`."""
    import msgspec

    from griffin_gguf.runtime.errors import FileFormatError

    try:
        return msgspec.json.decode(read_text(path), type=dict[str, Any] | bool)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FileFormatError(path, "schema", f"expected a JSON Schema, but {error}") from None

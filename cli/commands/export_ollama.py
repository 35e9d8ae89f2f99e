"""`griffin export-ollama`: a GGUF and a Modelfile, side by side."""

import os
from pathlib import Path
from typing import Annotated

import typer

from griffin_gguf.cli.commands.convert import new_folder
from griffin_gguf.cli.console import note, out
from griffin_gguf.cli.options import (
    FrequencyPenalty,
    MinP,
    Model,
    PresencePenalty,
    RepeatLastN,
    RepeatPenalty,
    Temperature,
    TopK,
    TopP,
    add_command,
)
from griffin_gguf.cli.text import read_text, write_text

_BLOCK = 16 << 20  # bytes copied at a time


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "export-ollama",
        export_ollama,
        "griffin export-ollama model.gguf -o ollama-model",
        "griffin export-ollama model.gguf -o ollama-model --system 'Answer in one sentence.' --license LICENSE",
        "cd ollama-model && ollama create my-griffin -f Modelfile",
    )


def export_ollama(
    path: Model,
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to fill.", show_default=False)
    ],
    template: Annotated[
        Path | None,
        typer.Option("--template", metavar="FILE", help="Ollama's template, in Go's syntax, in place of ours."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="What every conversation begins with, before its first turn."),
    ] = None,
    license_file: Annotated[
        Path | None,
        typer.Option("--license", metavar="FILE", help="The licence's text; else what the GGUF says of its licence."),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the GGUF; else it is a hard link where that works.")
    ] = False,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
) -> None:
    """Put a GGUF beside a Modelfile for Ollama: template, stops, parameters, system text and licence.

    Ollama as released does not have this architecture yet: the folder is for builds that do. Until then
    [bold]griffin serve[/bold] speaks Ollama's API. [bold]griffin verify --for ollama[/bold] checks the file by
    Ollama's rules.
    """
    from griffin_gguf.cli.modelfile import TODAY, Modelfile, go_template, license_of
    from griffin_gguf.runtime.chat import ChatTemplate
    from griffin_gguf.runtime.errors import UnsupportedError
    from griffin_gguf.runtime.gguf_file import GgufFile
    from griffin_gguf.runtime.sampling import Sampling

    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        repeat_penalty,
        repeat_last_n,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    with GgufFile.open(path) as file:
        if (parts := len(file.paths)) > 1:
            raise UnsupportedError(
                f"{path}: is the first of {parts} files, and Ollama takes one; griffin quantize makes it one"
            )
        context = file.hyperparameters().context
        own = ChatTemplate.from_gguf(path, file.metadata)
        turns, stops = (read_text(template), ()) if template else go_template(own)
        terms = read_text(license_file) if license_file else license_of(path, file.metadata)
    text = Modelfile(path.name, turns, stops, sampling, context, system, terms).text()
    with new_folder(folder):
        _place(path, folder / path.name, copy)
        write_text(folder / "Modelfile", text)
    out().print(f"{folder / 'Modelfile'}\n{folder / path.name}", markup=False, soft_wrap=True)
    note(TODAY)


def _place(source: Path, target: Path, copy: bool) -> None:
    """Link or copy `source` to `target`, which appears when it is complete."""
    from griffin_gguf.runtime.atomic import atomic

    if target.exists() and target.samefile(source):
        return
    if not copy and _link(source, target):
        return
    with source.open("rb") as data, atomic(target) as file:
        while block := data.read(_BLOCK):
            file.write(block)
        file.sync()


def _link(source: Path, target: Path) -> bool:
    """Put a hard link at `target`; False where the file system does not."""
    partial = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")
    try:
        os.link(source.resolve(), partial)
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        return False
    return True

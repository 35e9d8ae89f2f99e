"""`griffin report`: what each quantization costs and is worth."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.commands.convert import new_folder, plan_targets, run
from griffin_gguf.cli.console import clean, note, out, table
from griffin_gguf.cli.options import TYPES_HELP, Backend, Json, Threads, add_command, parse_backend, parse_types
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text, write_text

if TYPE_CHECKING:
    from griffin_gguf.quant.report import Report
    from griffin_gguf.runtime.model import BackendName

#: Text that the demo model has not seen: the default to measure on.
HELD_OUT = Path(__file__).parents[1] / "demo_model" / "heldout.txt"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "report",
        report,
        "griffin report model-BF16.gguf model-Q4_K_M.gguf",
        "griffin report ./recurrentgemma-2b --type BF16 --type Q4_K_M -f my-text.txt -o report",
    )


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="GGUF files, or checkpoint folders.", show_default=False)
    ],
    types: Annotated[
        list[str],
        typer.Option("--type", metavar="TYPE", help=f"What to convert checkpoints to: {TYPES_HELP}. Repeatable."),
    ] = ["BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"],  # noqa: B006  typer copies it
    text: Annotated[
        Path | None,
        typer.Option("--text", "-f", metavar="FILE", help="Text to measure on; else a chapter of a novel."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", metavar="N", min=2, help="Measure on so many tokens of it at most.")
    ] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Also write report.json and report.md there.")
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure files side by side: size, memory, speed, and perplexity with its standard error.

    Each file runs in a process of its own, so that its peak memory is its own. A checkpoint's folder is converted
    first, in a temporary folder.
    """
    words = read_text(text or HELD_OUT)
    kinds = parse_types(types)
    chosen = parse_backend(backend)
    for source in sources:
        _check(source)
    with new_folder(output) if output else nullcontext(), TemporaryDirectory(prefix="griffin-report-") as work:
        files = {
            file: name
            for i, source in enumerate(sources)
            for file, name in _files(source, Path(work) / str(i), kinds, threads).items()
        }
        found = measure_files(
            files, words, text=(text or HELD_OUT).name, tokens=tokens, backend=chosen, threads=threads
        )
        if output:
            write_text(output / "report.json", found.to_json())
            write_text(output / "report.md", found.to_markdown())
    if as_json:
        out().file.write(found.to_json())
        return
    show(found)
    if output:
        out().print(f"{output / 'report.json'}\n{output / 'report.md'}", markup=False, soft_wrap=True)


def measure_files(
    files: Mapping[Path, str],
    words: str,
    *,
    text: str,
    tokens: int,
    backend: "BackendName" = "auto",
    threads: int | None = None,
) -> "Report":
    """Measure file after file, each under the name that it shall have; `text` is the name of `words`."""
    from griffin_gguf.quant.measure import measure
    from griffin_gguf.quant.report import Report

    found = Report(text, threads)
    for file, name in files.items():
        with progress(f"Measuring {clean(file.name)}", unit="tokens") as tell:
            row = measure(file, words, tokens=tokens, backend=backend, threads=threads, progress=tell)
        found.rows.append(replace(row, path=name))
    return found


def show(found: "Report") -> None:
    """Print the table, and what its numbers are."""
    headings = ["\n".join(heading.rsplit(" ", 1)) for heading in found.headings]  # narrow: units in a second line
    named = len({row.type for row in found.rows}) < len(found.rows)  # else the type says which file it is
    rows = table(*["file"] * named, *headings, right=tuple(headings[1:]))
    for name, cells in zip(found.names, found.cells, strict=True):
        rows.add_row(*[clean(name)] * named, *cells)
    out().print(rows)
    note(found.legend)


def _check(source: Path) -> None:
    """Find out what cannot be measured before anything is."""
    from griffin_gguf.runtime.errors import GriffinError
    from griffin_gguf.runtime.gguf_file import GgufFile

    if not source.exists():
        raise GriffinError(f"{source}: there is no such file or folder")
    if source.is_file():
        with GgufFile.open(source) as file:
            file.hyperparameters()


def _files(source: Path, work: Path, types: Sequence[str], threads: int | None) -> dict[Path, str]:
    """The GGUF files to measure and their names: `source` itself, or what a checkpoint converts to."""
    if not source.is_dir():
        return {source: str(source)}
    targets = plan_targets(str(source), work, types)
    work.mkdir()
    run(source, targets, threads=threads)
    return {path: f"{source} as {kind}" for path, kind in targets}

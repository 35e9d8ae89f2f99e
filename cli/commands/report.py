"""`griffin report`: what each quantization costs and is worth."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.commands.convert import new_folder, plan_targets, run
from griffin_gguf.cli.console import clean, note, out, table
from griffin_gguf.cli.options import TYPES, Backend, Json, Threads, add_command, parse_backend, parse_types
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text

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
        typer.Option(
            "--type", metavar="TYPE", help=f"What to convert checkpoints to, of {', '.join(TYPES)}. Repeatable."
        ),
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
    from griffin_gguf.runtime.errors import GriffinError

    words = read_text(text or HELD_OUT)
    kinds = parse_types(types)
    chosen = parse_backend(backend)
    for source in sources:
        if not source.exists():
            raise GriffinError(f"{source}: there is no such file or folder")
    with TemporaryDirectory(prefix="griffin-report-") as work:
        files = [file for source in sources for file in _files(source, Path(work), kinds, threads)]
        found = measure_files(files, words, tokens=tokens, backend=chosen, threads=threads)
    if output:
        with new_folder(output):
            (output / "report.json").write_text(found.to_json(), encoding="utf-8")
            (output / "report.md").write_text(found.to_markdown(), encoding="utf-8")
    if as_json:
        out().file.write(found.to_json())
        return
    show(found)
    if output:
        out().print(f"{output / 'report.json'}\n{output / 'report.md'}", markup=False, soft_wrap=True)


def measure_files(
    files: Sequence[Path], text: str, *, tokens: int, backend: "BackendName" = "auto", threads: int | None = None
) -> "Report":
    """Measure file after file, showing how far it is."""
    from griffin_gguf.quant.measure import measure
    from griffin_gguf.quant.report import Report

    found = Report()
    for file in files:
        with progress(f"Measuring {clean(file.name)}", unit="tokens") as tell:
            found.rows.append(measure(file, text, tokens=tokens, backend=backend, threads=threads, progress=tell))
    return found


def show(found: "Report") -> None:
    """Print the table, and what its numbers are."""
    headings = ["\n".join(heading.rsplit(" ", 1)) for heading in found.headings]  # narrow: units in a second line
    names = [clean(Path(row.path).name) for row in found.rows]
    named = len({row.type for row in found.rows}) < len(names)  # else the type says which file it is
    rows = table(*["file"] * named, *headings, right=tuple(headings[1:]))
    for name, cells in zip(names, found.cells, strict=True):
        rows.add_row(*[name] * named, *cells)
    out().print(rows)
    predicted = max(row.tokens for row in found.rows)
    backends = ", ".join(sorted({row.backend for row in found.rows}))
    note(f"Perplexity over {predicted} tokens ± standard error; median speeds ({backends}).")


def _files(source: Path, work: Path, types: Sequence[str], threads: int | None) -> list[Path]:
    """The GGUF files to measure: `source` itself, or what a checkpoint converts to."""
    if not source.is_dir():
        return [source]
    targets = plan_targets(str(source), work, types)
    run(source, targets, threads=threads)
    return [path for path, _ in targets]

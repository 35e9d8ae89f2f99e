"""`griffin report`: what each quantization costs and is worth."""

from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli import __version__
from griffin_gguf.cli.commands.convert import new_folder, plan_targets, run
from griffin_gguf.cli.console import note, out
from griffin_gguf.cli.options import TYPES_HELP, Backend, Json, Threads, add_command, parse_backend, parse_types
from griffin_gguf.cli.reporting import KEPT, measure_report, show_report, workplace, write_report
from griffin_gguf.cli.text import read_text

if TYPE_CHECKING:
    from griffin_gguf.quant.report.data import Report

#: Text that the demo model has not seen: the default to measure on.
HELD_OUT = Path(__file__).parents[1] / "demo_model" / "heldout.txt"

#: Endings of the files that a checkpoint consists of.
_PARTS = (".safetensors", ".json", ".model", ".jinja")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "report",
        report,
        "griffin report model-BF16.gguf model-Q4_K_M.gguf -f my-text.txt -o report",
        "griffin report ./recurrentgemma-2b --type BF16 --type Q4_K_M -f my-text.txt -o report",
        "griffin report griffin-Q4_K_M.gguf gemma-Q4_K_M.gguf --quick",
    )


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="GGUF files, of other architectures too where llama.cpp runs them, or checkpoint folders.",
            show_default=False,
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", "-f", metavar="FILE", help="Text to measure on; else chapters of a novel."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write report.html, report.md, report.json and the plots there. What has been measured is kept there "
            "at once: the same command goes on where it stopped.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: 4,096 tokens, few runs, nothing about long texts.")
    ] = False,
    types: Annotated[
        list[str],
        typer.Option("--type", metavar="TYPE", help=f"What to convert checkpoints to: {TYPES_HELP}. Repeatable."),
    ] = ["BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"],  # noqa: B006  typer copies it
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            "-n",
            metavar="N",
            min=16,
            help="Read so many tokens of the text at most; else ten times what a model was trained on at once, or all.",
            show_default=False,
        ),
    ] = None,
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", metavar="N", min=16, help="Tokens of a window, for llama.cpp's protocol.")
    ] = 512,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="Compare the files of its model with this one; else with the one of most bits a weight.",
        ),
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure files side by side: size, memory, speed, perplexity, and the distance from the best of them.

    Perplexity is measured in two ways: by llama.cpp's protocol, in windows that each begin anew, and in one pass that
    carries the state over the whole text. Each file is loaded and timed in a fresh process. A checkpoint is converted
    first, into DIR/models; without -o in a temporary folder.
    """
    from griffin_gguf.quant.drawing import check_matplotlib
    from griffin_gguf.quant.report.data import Settings

    if tokens is not None and tokens < ctx:
        raise typer.BadParameter(f"--tokens {tokens}: expected a window of {ctx} (--ctx) at least")
    words, name = read_text(text or HELD_OUT), (text or HELD_OUT).name
    kinds, settings = parse_types(types), Settings(ctx, tokens, quick, parse_backend(backend), threads)
    for source in sources:
        _check(source)
    _check_before_converting(sources, words, name, ctx, reference)
    if output:
        check_matplotlib()
    with new_folder(output) if output else nullcontext(), workplace(output if _folders(sources) else None) as models:
        files = {
            file: label for source in sources for file, label in _files(source, Path(models), kinds, threads).items()
        }
        found = measure_report(files, words, name, settings, folder=output, reference=reference)
        written = write_report(found, output) if output else []
    _show(found, written, as_json=as_json)


def _show(found: "Report", written: list[Path], *, as_json: bool) -> None:
    if as_json:
        out().file.write(found.to_json())
        return
    show_report(found)
    for path in written:
        out().print(str(path), markup=False, soft_wrap=True)


def _check(source: Path) -> None:
    """Find out what cannot be measured before anything is."""
    from griffin_gguf.quant.report.run import Source
    from griffin_gguf.runtime.errors import GriffinError

    if not source.exists():
        raise GriffinError(f"{source}: there is no such file or folder")
    if source.is_file():
        Source.open(source, str(source))


def _check_before_converting(sources: Sequence[Path], words: str, name: str, ctx: int, reference: Path | None) -> None:
    """What would be found out after a conversion only: a token is a byte at least, and a reference is given by path."""
    from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

    nbytes = len(words.encode())
    if nbytes + 1 < ctx:  # BOS
        raise FileFormatError(name, "text", f"has {nbytes} bytes; expected a window of {ctx} tokens at least")
    if reference is not None and not any(reference.exists() and source.samefile(reference) for source in sources):
        raise UnsupportedError(f"{reference}: reference: is none of the files to measure")


def _folders(sources: Sequence[Path]) -> bool:
    return any(source.is_dir() for source in sources)


def _files(source: Path, models: Path, types: Sequence[str], threads: int | None) -> dict[Path, str]:
    """The GGUF files to measure and their names: `source` itself, or what a checkpoint converts to.

    These lie in a folder whose name tells what they were made of: one that was converted before is not converted again.
    """
    if not source.is_dir():
        return {source: str(source)}
    work = models / f"{source.resolve().name}-{_made_of(source)}"
    work.mkdir(exist_ok=True)
    targets = plan_targets(str(source), work, types)
    missing = [(path, kind) for path, kind in targets if not path.exists()]
    if missing:
        run(source, missing, threads=threads)
    else:
        note(f"{work}: {len(targets)} files are there already")
    return {path: f"{source} as {kind}" for path, kind in targets}


def _made_of(checkpoint: Path) -> str:
    """Eight digits that are others for another checkpoint, for one that has changed, and for another version of us."""
    files = sorted(path for path in checkpoint.iterdir() if path.suffix in _PARTS and path.name != KEPT)
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(repr((__version__, str(checkpoint.resolve()), stamps)).encode()).hexdigest()[:8]

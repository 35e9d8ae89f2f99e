"""`griffin llamacpp`: RecurrentGemma inside llama.cpp, as a patch and as programs built with it."""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from griffin_gguf.cli.console import note, out
from griffin_gguf.cli.options import add_command


def register(app: typer.Typer) -> None:
    """Add the commands."""
    llamacpp = typer.Typer(
        name="llamacpp",
        help="RecurrentGemma inside llama.cpp: its programs built with our patch, or the patch itself.",
        epilog="\n\n".join(
            (
                "[bold]Examples[/bold]",
                "griffin llamacpp build --into ~/llamacpp",
                "griffin llamacpp patch > recurrentgemma.patch",
            )
        ),
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    add_command(
        llamacpp,
        "build",
        build,
        "griffin llamacpp build --into ~/llamacpp",
        "griffin llamacpp build --into ~/llamacpp -D GGML_CUDA=ON",
    )
    add_command(
        llamacpp,
        "patch",
        patch,
        "griffin llamacpp patch > recurrentgemma.patch",
        "griffin llamacpp patch --source ~/llama.cpp > recurrentgemma.patch",
    )
    app.add_typer(llamacpp, name="llamacpp")


def build(
    into: Annotated[
        Path,
        typer.Option("--into", metavar="DIR", help="The folder for source, build and programs.", show_default=False),
    ],
    archive: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="FILE",
            help="llama-cpp-python's source distribution, where it need not be fetched from the package index.",
        ),
    ] = None,
    definitions: Annotated[
        list[str] | None,
        typer.Option("--define", "-D", metavar="NAME=VALUE", help="A setting for cmake; may be repeated."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", metavar="N", min=1, help="Compilers at once; all cores unless given."),
    ] = None,
) -> None:
    """Build llama.cpp's programs with RecurrentGemma in them: server, quantize, perplexity, imatrix, bench, cli.

    The source is the llama.cpp inside the source distribution of the llama-cpp-python that griffin runs on. It takes
    cmake, a C++ compiler, half a GB of disk, and 5 to 20 minutes on two cores. A run that was interrupted goes on.
    """
    for text in definitions or ():
        if not re.fullmatch(r"[^=\s]+=.*", text):
            raise typer.BadParameter(f"{text!r} is no setting; expected NAME=VALUE", param_hint="--define")
    from griffin_gguf.cli.progress import progress
    from griffin_gguf.runtime.llamacpp.build import compile_programs, configure, prepare
    from griffin_gguf.runtime.machine import usable_cores

    prepare(into, archive, note)
    note("Configuring")
    configure(into, definitions or ())
    with progress("Compiling", unit="steps") as report:
        programs = compile_programs(into, jobs or usable_cores(), report)
    out().print("\n".join(map(str, programs)), markup=False, soft_wrap=True)
    note("How Ollama comes to run these: docs/ollama.md in griffin-gguf's repository.")


def patch(
    tree: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="PATH",
            help="A source tree of llama.cpp to write the patch for, or the source distribution of the pinned "
            "llama-cpp-python, which else is fetched from the package index.",
        ),
    ] = None,
) -> None:
    """Print the patch that brings RecurrentGemma to llama.cpp, for git apply or patch -p1.

    It is made for one tree, so its lines fit. Where a tree is too old or too new, the error names the line that it
    lacks.
    """
    from griffin_gguf.runtime.llamacpp import source
    from griffin_gguf.runtime.llamacpp.patch import patched, unified_diff

    with TemporaryDirectory(prefix="griffin-") as name:
        if tree is None or tree.is_file():
            folder = Path(name)
            if tree is None:
                note(f"Fetching {source.DESCRIPTION}")
            archive = tree or source.download(folder)
            tree = folder / "llama.cpp"
            source.unpack(archive, tree)
        sys.stdout.buffer.write(unified_diff(patched(tree)))

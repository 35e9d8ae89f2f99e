"""Options that several commands share, worded once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from griffin_gguf.quant.recipes import FileType
    from griffin_gguf.runtime.model import BackendName

#: The file types, for help pages: quant/recipes.py, which has them, is slow to import. A test compares the two.
TYPES = ("F32", "BF16", "F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")

_BACKENDS: tuple["BackendName", ...] = ("auto", "ggml", "numpy")

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file that griffin wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", min=1, max=512, help="CPU threads; all cores unless given."),
]
Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="auto, ggml or numpy; auto takes ggml where it loads.")
]

_SAMPLING = "Sampling"
Temperature = Annotated[
    float,
    typer.Option("--temp", metavar="X", min=0, rich_help_panel=_SAMPLING, help="0 always takes the likeliest token."),
]
TopK = Annotated[
    int,
    typer.Option("--top-k", metavar="N", min=0, rich_help_panel=_SAMPLING, help="Only the N likeliest tokens; 0: all."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="X",
        min=0,
        max=1,
        rich_help_panel=_SAMPLING,
        help="Only the likeliest tokens that together have this probability; 1: all.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        metavar="X",
        min=0,
        max=1,
        rich_help_panel=_SAMPLING,
        help="Only tokens at least this probable relative to the likeliest; 0: all.",
    ),
]
RepeatPenalty = Annotated[
    float,
    typer.Option(
        "--repeat-penalty",
        metavar="X",
        min=0.01,
        rich_help_panel=_SAMPLING,
        help="Above 1 makes recent tokens less likely; 1: none.",
    ),
]
RepeatLastN = Annotated[
    int,
    typer.Option(
        "--repeat-last-n", metavar="N", min=-1, rich_help_panel=_SAMPLING, help="How many tokens are recent; -1: all."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        rich_help_panel=_SAMPLING,
        help="The same seed gives the same text; random if none.",
    ),
]


def parse_type(name: str) -> "FileType":
    """A file type by its name, in either case; a usage error names the choices."""
    from griffin_gguf.quant.recipes import file_type
    from griffin_gguf.runtime.errors import UnsupportedError

    try:
        return file_type(name)
    except UnsupportedError as error:
        raise typer.BadParameter(str(error)) from None


def parse_types(names: list[str]) -> list[str]:
    """The canonical names of several file types, each once, in the order given."""
    return list(dict.fromkeys(parse_type(name).name for name in names))


def parse_backend(name: str) -> "BackendName":
    """A backend by its name; a usage error names the choices."""
    for known in _BACKENDS:
        if name == known:
            return known
    raise typer.BadParameter(f"{name!r} is no backend; choose one of {', '.join(_BACKENDS)}")


def add_command(app: typer.Typer, name: str, command: Callable[..., None], *examples: str) -> None:
    """Add `command` under `name`; its help page is its docstring, then the examples."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    page = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal breaks the lines
    app.command(name, help=page, epilog="\n\n".join(("[bold]Examples[/bold]", *examples)))(command)

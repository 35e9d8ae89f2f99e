"""Options that several commands share, worded once."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from griffin_gguf.quant.file_types import FileType
    from griffin_gguf.quant.imatrix import ImportanceMatrix
    from griffin_gguf.runtime.model import BackendName

_BACKENDS: tuple["BackendName", ...] = ("auto", "ggml", "numpy")

#: How help pages speak of file types.
TYPES_HELP = "Q4_K_M, Q8_0, BF16 or another of the types that [bold]griffin quantize --list-types[/bold] shows"

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file that griffin wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", min=1, max=512, help="CPU threads; all cores unless given."),
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Weigh errors by this importance matrix (griffin imatrix)."),
]
SplitMaxSize = Annotated[
    str | None,
    typer.Option(
        "--split-max-size",
        metavar="SIZE",
        help="Split into NAME-00001-of-0000N.gguf of at most so many bytes of tensors: 2G, 500M.",
    ),
]
Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="auto, ggml or numpy; auto takes ggml where it loads.")
]

_DEVICES = "Devices"
DeviceNames = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME[,NAME...]",
        rich_help_panel=_DEVICES,
        help="Run on these (griffin devices lists them; rpc:HOST:PORT is a server's), each with a part of the layers; "
        "the best one unless given.",
    ),
]
LayersOn = Annotated[
    list[str] | None,
    typer.Option(
        "--layers-on",
        metavar="NAME=N",
        rich_help_panel=_DEVICES,
        help="So many layers on that device; those without a number share the rest by free memory. May be repeated.",
    ),
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
PresencePenalty = Annotated[
    float,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        min=-2,
        max=2,
        rich_help_panel=_SAMPLING,
        help="Above 0 makes tokens less likely that the answer has already; 0: off.",
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        "--frequency-penalty",
        metavar="X",
        min=-2,
        max=2,
        rich_help_panel=_SAMPLING,
        help="The same, the more so the more often it has them; 0: off.",
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

_SPECULATION = "Speculation"
DraftFile = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        metavar="SMALL",
        rich_help_panel=_SPECULATION,
        help="A smaller model of the same vocabulary guesses tokens; MODEL reads several at once and keeps its own.",
    ),
]
Lookup = Annotated[
    bool,
    typer.Option(
        "--lookup",
        rich_help_panel=_SPECULATION,
        help="The same with guesses from the text itself: for answers that quote or repeat their prompt.",
    ),
]


def parse_type(name: str) -> "FileType":
    """A file type by its name, in either case; a usage error names the choices."""
    from griffin_gguf.quant.file_types import file_type
    from griffin_gguf.runtime.errors import UnsupportedError

    try:
        return file_type(name)
    except UnsupportedError as error:
        raise typer.BadParameter(str(error)) from None


def parse_types(names: list[str]) -> list[str]:
    """The canonical names of several file types, each once, in the order given."""
    return list(dict.fromkeys(parse_type(name).name for name in names))


#: Suffix of a size -> bytes.
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "4.5GB" (10⁹), "4.5GiB" (2³⁰), "500M" or "123456"; a usage error for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    count = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if not count:
        raise typer.BadParameter(f"{text!r} is no size; expected one such as 4.5GB, 500M or 2GiB")
    return count


def parse_devices(device: str | None, layers_on: list[str] | None) -> dict[str, int | None]:
    """Devices by name in the order of --device, with their numbers of layers; usage errors name what is wrong."""
    names = [name.strip() for name in device.split(",")] if device else []
    if len(set(names)) < len(names) or not all(names):
        raise typer.BadParameter(f"--device {device}: expected names, each once, with commas between them")
    found: dict[str, int | None] = dict.fromkeys(names)
    for text in layers_on or ():
        name, _, count = text.rpartition("=")
        if name not in found:
            raise typer.BadParameter(f"--layers-on {text}: expected NAME=N with a NAME that --device has")
        if not count.isdecimal() or found[name] is not None:
            raise typer.BadParameter(f"--layers-on {text}: expected one number of layers for {name}")
        found[name] = int(count)
    return found


def load_imatrix(path: Path | None) -> "ImportanceMatrix | None":
    """The importance matrix, where one was given."""
    from griffin_gguf.quant.imatrix import ImportanceMatrix

    return ImportanceMatrix.load(path) if path else None


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

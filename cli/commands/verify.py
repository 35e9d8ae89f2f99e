"""`griffin verify`: whether a GGUF is sound."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import clean, out, print_json, size
from griffin_gguf.cli.options import Json, Threads, add_command
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.verify import Verification


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "verify", verify, "griffin verify model.gguf", "griffin verify model.gguf --sha256")


def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF of any architecture.", show_default=False)],
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Compare every tensor with the checksum that the file records of it.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check a GGUF: its structure, every block's scales, and with --sha256 its checksums.

    Prints a line for everything that is wrong. Exit code 0: the file is sound; 1: it is damaged.
    """
    from griffin_gguf.quant.verify import verify as check

    with progress("Verifying") as report:
        found = check(path, sha256=sha256, threads=threads, progress=report)
    if as_json:
        print_json(_document(path, found, sha256=sha256))
    else:
        _show(path, found, sha256=sha256)
    if not found.sound:
        raise typer.Exit(1)


def _show(path: Path, found: "Verification", *, sha256: bool) -> None:
    """Print what was found, and the verdict last."""
    lines = found.damaged + [f"warning: {line}" for line in found.odd] + [f"note: {line}" for line in found.unchecked]
    count = len(found.damaged)
    checksums = ", all as their checksums say" if sha256 else ""
    lines.append(
        f"{path}: sound: {found.tensors} tensors, {size(found.size)}{checksums}"
        if found.sound
        else f"{path}: damaged: {count} finding{'s' if count > 1 else ''}"
    )
    for line in lines:
        out().print(clean(line), markup=False, soft_wrap=True)


def _document(path: Path, found: "Verification", *, sha256: bool) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "path": str(path),
        "files": [str(one) for one in found.paths],
        "sound": found.sound,
        "sha256": sha256,
        "tensors": found.tensors,
        "size": found.size,
        "damaged": found.damaged,
        "warnings": found.odd,
        "unchecked": found.unchecked,
    }

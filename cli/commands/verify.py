"""`griffin verify`: whether a GGUF is sound."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import clean, note, out, print_json, size
from griffin_gguf.cli.options import Json, Threads, add_command
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.ollama_rules import Findings
    from griffin_gguf.quant.verify import Verification

_RUNNERS = ("ollama",)


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "verify",
        verify,
        "griffin verify model.gguf",
        "griffin verify model.gguf --sha256",
        "griffin verify --for ollama model.gguf",
    )


def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF of any architecture.", show_default=False)],
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Compare every tensor with the checksum that the file records of it.")
    ] = False,
    runner: Annotated[
        str | None,
        typer.Option("--for", metavar="RUNNER", help="Hold it against what a program asks of its files too: ollama."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check a GGUF: its structure, every block's scales, and with --sha256 its checksums.

    With --for ollama also against all that Ollama's decoder refuses or would silently read as something else.

    Prints a line for everything that is wrong. Exit code 0: the file is sound; 1: it is damaged, or does not fit.
    """
    from griffin_gguf.quant.verify import verify as check

    if runner is not None and runner not in _RUNNERS:
        raise typer.BadParameter(f"{runner!r} is no program known here; choose {', '.join(_RUNNERS)}")
    with progress("Verifying") as report:
        found = check(path, sha256=sha256, threads=threads, progress=report)
    fit = _fit(path) if runner else None
    if as_json:
        print_json(_document(path, found, fit, sha256=sha256))
    else:
        _show(path, found, fit, sha256=sha256)
    if not found.sound or (fit is not None and fit.broken):
        raise typer.Exit(1)


def _fit(path: Path) -> "Findings":
    from griffin_gguf.quant.ollama_rules import check_for_ollama

    return check_for_ollama(path)


def _show(path: Path, found: "Verification", fit: "Findings | None", *, sha256: bool) -> None:
    """Print what was found, and the verdict last."""
    broken = found.damaged + (fit.broken if fit else [])
    odd = found.odd + (fit.odd if fit else [])
    lines = broken + [f"warning: {line}" for line in odd] + [f"note: {line}" for line in found.unchecked]
    count = f"{len(broken)} finding{'s' if len(broken) > 1 else ''}"
    checksums = ", all as their checksums say" if sha256 else ""
    if not found.sound:
        verdict = f"damaged: {count}"
    elif broken:
        verdict = f"sound, but not as Ollama reads it: {count}"
    else:
        rules = ", and as Ollama reads it" if fit else ""
        verdict = f"sound{rules}: {found.tensors} tensors, {size(found.size)}{checksums}"
    for line in [*lines, f"{path}: {verdict}"]:
        out().print(clean(line), markup=False, soft_wrap=True)
    if fit:
        from griffin_gguf.cli.modelfile import TODAY

        note(TODAY)


def _document(path: Path, found: "Verification", fit: "Findings | None", *, sha256: bool) -> dict[str, Any]:
    """What `--json` prints."""
    rules = {} if fit is None else {"ollama": {"broken": fit.broken, "warnings": fit.odd}}
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
        **rules,
    }

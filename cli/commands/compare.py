"""`griffin compare`: two reports beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from griffin_gguf.cli.console import cell, clean, note, out, print_json, size, table
from griffin_gguf.cli.options import Json, add_command

if TYPE_CHECKING:
    from griffin_gguf.quant.report.compare import Compared, Line
    from griffin_gguf.quant.report.data import Report


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "compare", compare, "griffin compare before/report.json after/report.json")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A report.json.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two reports: what has become of each file's size, memory, speed and perplexity.

    Files of one type are compared with each other. A speed has changed where no run of the one report was like any of
    the other's: by chance that is so in 0.8 % of five runs each, in 10 % of three. Perplexities are compared only over
    the same text.
    """
    from griffin_gguf.quant.report.compare import compare as compare_reports

    found = compare_reports(_read(first), _read(second))
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    _show(found)


def _read(path: Path) -> "Report":
    from griffin_gguf.quant.report.data import Report

    return Report.from_json(path, path.read_bytes())


def _show(found: "Compared") -> None:
    lines = table("file", "", "A", "B", "B / A", "", right=("A", "B", "B / A"))
    before = ""
    for line in found.lines:
        name = cell("" if line.row == before else line.row)
        before = line.row
        verdict = {True: "changed", False: "runs overlap", None: ""}[line.beyond]
        first, second = _value(line, line.first), _value(line, line.second)
        lines.add_row(name, line.measure, first, second, f"{line.ratio:.3f}", verdict)
    out().print(lines)
    for text in found.notes:
        note(clean(text))
    if found.unmatched:
        note(clean(f"only in one of them: {', '.join(found.unmatched)}"))


def _value(line: "Line", value: float) -> str:
    if line.unit == "bytes":
        return size(value)
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{text} {line.unit}".rstrip()

"""`griffin inspect`: what is in a GGUF."""

from pathlib import Path
from typing import Annotated, Any

import typer

from griffin_gguf.cli.console import clean, note, out, print_json, size, table
from griffin_gguf.cli.options import Json, add_command

_WORDS = 60  # characters of a key's value


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "inspect", inspect, "griffin inspect model.gguf", "griffin inspect model.gguf --json")


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF of any architecture.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show a GGUF's hyperparameters, keys, tensors and sizes, and the memory that running it takes.

    The whole header is checked on the way. Nothing is loaded, so this takes a moment whatever the file's size.
    """
    from griffin_gguf.cli.inspection import describe
    from griffin_gguf.runtime.gguf_file import GgufFile

    with GgufFile.open(path) as file:
        found = describe(file)
    if as_json:
        print_json(found)
        return
    _show_summary(found)
    keys = found["metadata"]
    if found["hyperparameters"]:
        _show_pairs("hyperparameter", found["hyperparameters"])
        keys = {name: value for name, value in keys.items() if not name.startswith(f"{found['architecture']}.")}
    _show_pairs("key", keys)
    _show_tensors(found)
    if not found["hyperparameters"]:
        note(f"The architecture {found['architecture']!r} is not one that griffin runs: only listed here.")


def _show_summary(found: dict[str, Any]) -> None:
    """Print what matters most."""
    lines = {
        "file": f"{found['path']} ({size(found['size'])})",
        "model": f"{found['name'] or 'unnamed'}, {found['architecture']}",
        "weights": f"{found['parameters']:,} in {found['type']}, {found['bits_per_weight']:.2f} bits each",
    }
    if (parts := len(found["files"])) > 1:
        lines["parts"] = f"{parts} files, of which this is the first"
    if memory := found["memory"]:
        lines["memory"] = f"{size(memory['weights'])} of weights + {size(memory['state'])} of state, at any length"
    rows = table("", "")
    rows.show_header, rows.box = False, None
    for name, line in lines.items():
        rows.add_row(f"[bold]{name}[/bold]", _text(line))
    out().print(rows)


def _show_pairs(heading: str, pairs: dict[str, Any]) -> None:
    rows = table(heading, "value")
    rows.columns[0].min_width = min(max(map(len, pairs), default=0), _WORDS)  # narrow terminals cut values, not names
    for name, value in pairs.items():
        rows.add_row(_text(name), _text(_value(value)))
    out().print(rows)


def _show_tensors(found: dict[str, Any]) -> None:
    """Print the tensors one by one, then by type."""
    rows = table("tensor", "type", "shape", "size", right=("shape", "size"))
    for tensor in found["tensors"]:
        shape = " × ".join(map(str, tensor["shape"]))
        rows.add_row(_text(tensor["name"]), tensor["type"], shape, size(tensor["nbytes"]))
    out().print(rows)
    sums = table("type", "tensors", "size", right=("tensors", "size"))
    for name, row in found["types"].items():
        sums.add_row(name, str(row["tensors"]), size(row["nbytes"]))
    out().print(sums)


def _value(value: Any) -> str:
    """One value, short; which layers are recurrent (R) or attention (A) as one word."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, bool) for v in value):
        return "".join("R" if v else "A" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    """`text` from a file as rich shows it: on one line, not too long, and no markup."""
    from rich.markup import escape

    line = clean(text)
    return escape(line if len(line) <= _WORDS else line[: _WORDS - 1] + "…")

"""What reaches a person: the two consoles, tables, sizes, and text that is safe to show."""

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from griffin_gguf.quant.wording import clean

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["cell", "clean", "complain", "err", "note", "only_cut", "out", "print_json", "size", "table"]

#: Columns to lay tables out for where the output is no terminal: nothing is cut off in a pipe or a file.
_PIPE_WIDTH = 200

#: Progress, notes and errors. Both consoles follow `sys.stdout` and `sys.stderr` wherever those point.
err = Console(stderr=True, highlight=False, emoji=False)


def out() -> Console:
    """The console for results."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def cell(text: str) -> "Text":
    """`text` for a cell of a table: as it is, where rich would read brackets as markup."""
    from rich.text import Text

    return Text(clean(text))


def note(text: str) -> None:
    """Say something to the person that is no result: on a terminal in lines of whole words, elsewhere in one."""
    err.print(text, markup=False, soft_wrap=not err.is_terminal, style="dim")


def complain(text: str) -> None:
    """The one line of an error."""
    err.print("griffin: error: ", style="bold red", end="")
    err.print(clean(text), markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """A result for machines: indented, keys as they come."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def size(count: float) -> str:
    """Bytes in binary units: 1572864 is 1.5 MiB."""
    units = ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if count < 1024 or unit == units[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes everything")


def table(*columns: str, right: tuple[str, ...] = (), tight: bool = False) -> "Table":
    """An empty table; the columns named in `right` hold numbers. `tight` where many of them must fit a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1) if tight else (0, 1), pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


def only_cut(rows: "Table", *columns: str) -> None:
    """Let only these columns of a filled table be cut where a terminal is narrow: all others are what is looked for.

    Print it with `crop=False`, so that a line that is too long even then is broken, and nothing of it lost.
    """
    from rich.cells import cell_len
    from rich.text import Text

    for column in rows.columns:
        if column.header not in columns:
            column.min_width = max(cell_len(str(value)) for value in (column.header, *column.cells))
            continue
        column.no_wrap = False  # rich takes from such columns first, and then from all alike
        for value in column.cells:
            if isinstance(value, Text):
                value.no_wrap, value.overflow = True, "ellipsis"

"""How far a long job is: a bar on a terminal, a line every tenth of the way elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from griffin_gguf.cli.console import err, note, size

#: (done, total), as the libraries report it.
Report = Callable[[int, int], None]


@contextmanager
def progress(label: str, *, unit: str = "bytes") -> Iterator[Report]:
    """Show `label` and how far it is on stderr until the block ends; `unit` is "bytes" or a name for a count."""
    if not err.is_terminal:
        yield _lines(label, unit)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts: ProgressColumn = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    unit_column = () if unit == "bytes" else (TextColumn(unit),)
    columns = (TextColumn("{task.description}"), BarColumn(), counts, *unit_column, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str, unit: str) -> Report:
    """Lines for a log: one every 10 %, with the time that is left."""
    start, told = monotonic(), -1

    def report(done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // total if total else 100
        if percent // 10 == told:
            return
        told = percent // 10
        amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
        left = (monotonic() - start) * (total - done) / done if done else None
        note(f"{label}: {percent} % ({amount})" + (f", {left:.0f} s left" if left else ""))

    return report

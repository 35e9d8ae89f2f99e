"""How far a long job is: a bar on a terminal, a line every tenth of the way elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from griffin_gguf.cli.console import err, note, size

#: Least characters for what is being done; and those that the bar, the counts and the time take.
_LABEL, _COUNTS = 16, 80

#: (done, total), as the libraries report it.
Report = Callable[[int, int], None]
#: (what is being done, done, total), of a job of several steps.
Tell = Callable[[str, int, int], None]


@contextmanager
def progress(label: str, *, unit: str = "bytes") -> Iterator[Report]:
    """Show `label` and how far it is on stderr until the block ends; `unit` is "bytes" or a name for a count."""
    with progress_of_steps(label, unit=unit) as tell:
        yield lambda done, total: tell(label, done, total)


@contextmanager
def progress_of_steps(label: str, *, unit: str = "bytes") -> Iterator[Tell]:
    """The same for a job of several steps: how far all of it is, and what is being done; `label` before the first."""
    if not err.is_terminal:
        yield _lines(unit)
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
    from rich.table import Column

    counts: ProgressColumn = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    unit_column = () if unit == "bytes" else (TextColumn(unit),)
    label_column = Column(max_width=max(_LABEL, err.width - _COUNTS), no_wrap=True, overflow="ellipsis")
    described = TextColumn("{task.description}", markup=False, table_column=label_column)
    columns = (described, BarColumn(), counts, *unit_column, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def _lines(unit: str) -> Tell:
    """Lines for a log: one every 10 % and at every step, with the time that is left."""
    start, told = monotonic(), ("", -1)

    def report(label: str, done: int, total: int) -> None:
        nonlocal told
        percent = 100 * done // total if total else 100
        if (label, percent // 10) == told:
            return
        told = label, percent // 10
        amount = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
        left = (monotonic() - start) * (total - done) / done if done else None
        note(f"{label}: {percent} % ({amount})" + (f", {left:.0f} s left" if left else ""))

    return report

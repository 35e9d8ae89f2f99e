"""A report as `griffin report` and `griffin demo` make it: measured with progress, shown, written."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from griffin_gguf.cli.console import cell, clean, note, out, table
from griffin_gguf.cli.progress import progress_of_steps
from griffin_gguf.cli.text import write_text

if TYPE_CHECKING:
    from griffin_gguf.quant.report.data import Report, Settings

#: The measurements, kept from the first on.
KEPT = "report.json"

_WIDE = 100  # columns of a terminal from which on all that is short enough is shown


def measure_report(
    files: Mapping[Path, str],
    words: str,
    text: str,
    settings: "Settings",
    *,
    folder: Path | None,
    reference: Path | None = None,
) -> "Report":
    """Measure `files`, each under the name that it shall have, on `words`, which come from `text`.

    In `folder` the measurements are kept as they come, and those that are there are not made again.
    """
    from griffin_gguf.quant.report.data import Report
    from griffin_gguf.quant.report.run import Run, Source

    kept = folder / KEPT if folder else None
    earlier = Report.from_json(kept, kept.read_bytes()) if kept and kept.exists() else None
    sources = [Source.open(path, name) for path, name in files.items()]
    run = Run(sources, words, text, settings, reference=reference, kept=earlier)
    if run.known:
        note(f"{kept}: {run.known} of {run.steps} measurements are there already")
    try:
        with progress_of_steps("Measuring", unit="tokens") as tell:
            return run.run(
                lambda label, done, total: tell(clean(label), done, total),
                (lambda report: write_text(kept, report.to_json())) if kept else None,
            )
    except BaseException:
        if kept and kept.exists():
            note(f"{kept}: keeps what has been measured; the same command goes on from there")
        raise


def write_report(report: "Report", folder: Path) -> list[Path]:
    """The page, the Markdown and the plots, beside the measurements; all that lies there then."""
    from griffin_gguf.quant.report.page import to_html, to_markdown
    from griffin_gguf.quant.report.plots import PLOTS, draw
    from griffin_gguf.runtime.errors import GriffinError

    try:
        with TemporaryDirectory(prefix=".plots-", dir=folder) as work:
            plots = draw(report, Path(work))
            drawn = sorted(Path(work).iterdir())
            for path in drawn:
                path.replace(folder / path.name)
    except OSError as error:
        raise GriffinError(f"{folder}: plots cannot be written: {error.strerror}") from error
    for name in PLOTS.keys() - plots.keys():  # of an earlier report that had more to show
        for end in ("svg", "png"):
            (folder / f"{name}.{end}").unlink(missing_ok=True)
    memory = report.machine.memory
    write_text(folder / "report.md", to_markdown(report, memory))
    write_text(folder / "report.html", to_html(report, plots, memory))
    return [folder / name for name in ("report.html", "report.md", KEPT, *(path.name for path in drawn))]


def show_report(report: "Report") -> None:
    """The table, what its numbers are, and the advice."""
    from griffin_gguf.quant.report.advice import sentence
    from griffin_gguf.quant.report.table import brief, cells, legend, told_by_type

    rows, chosen = report.files, brief(report, wide=out().width >= _WIDE)
    headings = ["\n".join(column.heading.replace("bits/", "bits /").rsplit(" ", 1)) for column in chosen]
    named = not told_by_type(rows)  # else the type says which file it is
    lines = table(*["file"] * named, *headings, right=tuple(headings[1:]), tight=True)
    if named:
        lines.columns[0].no_wrap = False
    for row, line in zip(rows, cells(rows, chosen), strict=True):
        lines.add_row(*[cell(row.name)] * named, *map(cell, line))
    out().print(lines)
    note(legend(report))
    out().print(clean(sentence(report, report.machine.memory)), markup=False, style="bold")


def workplace(folder: Path | None) -> "TemporaryDirectory[str] | nullcontext[str]":
    """Where checkpoints are converted to: `models` in the folder, where they stay, else a temporary folder."""
    if folder is None:
        return TemporaryDirectory(prefix="griffin-report-")
    models = folder / "models"
    models.mkdir(exist_ok=True)
    return nullcontext(str(models))

"""The table of a report: one list of columns for the terminal, Markdown and the page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from griffin_gguf.quant.evaluate import Divergence
from griffin_gguf.quant.report.data import Quality, Report, Row, Spread
from griffin_gguf.quant.wording import clean, clipped, digits, size_text

#: What stands where nothing was measured, or nothing can be.
NONE = "—"

_NAMED = 24  # characters of a label
_PER_BYTE = "bits/byte"


@dataclass(frozen=True)
class Column:
    """A heading, what it means, what stands in a row's cell, and what in few characters."""

    heading: str
    meaning: str
    cell: Callable[[Row], str]
    short: Callable[[Row], str] | None = None  # as `cell` if None


def _speed(spread: Spread) -> str:
    return f"{digits(spread.median)} ± {digits((spread.high - spread.low) / 2)}"


def _perplexity(quality: Quality) -> str:
    return f"{quality.perplexity:.3f} ± {quality.stderr:.3f}"


def _more(row: Row) -> str:
    """Perplexity beyond the reference's, in percent, with the standard error of the paired difference."""
    if not row.windows or not row.windows.distance:
        return NONE
    far = row.windows.distance
    return f"{100 * far.log_ratio:+.2f} ± {100 * far.log_ratio_stderr:.2f}"


def _mean(far: Divergence | None) -> str:
    assert far
    return f"{far.mean:.3g} ± {far.stderr:.1g}"


def _far(cell: Callable[[Quality], str]) -> Callable[[Row], str]:
    return lambda row: cell(row.windows) if row.windows and row.windows.distance else NONE


def _distance(name: str, format: str) -> Callable[[Row], str]:
    return _far(lambda q: f"{getattr(q.distance, name):{format}}")


COLUMNS: tuple[Column, ...] = (
    Column("type", "the file type", lambda r: r.type),
    Column("bits/weight", "bits of tensor data a weight", lambda r: f"{r.bits_per_weight:.2f}"),
    Column("file", "size of the file", lambda r: size_text(r.file_size)),
    Column(
        "RAM needed",
        "most memory of its own plus most mapped pages, the weights among them, while it reads and writes",
        lambda r: size_text(r.cost.memory.needed) if r.cost else NONE,
    ),
    Column(
        "load s",
        "median time until it is ready, of three in one process",
        lambda r: f"{r.cost.load.median:.2f}" if r.cost else NONE,
    ),
    Column(
        "read tok/s",
        "prompt tokens a second, median ± half the distance of the quartiles",
        lambda r: _speed(r.cost.prefill) if r.cost else NONE,
        lambda r: digits(r.cost.prefill.median) if r.cost else NONE,
    ),
    Column(
        "write tok/s",
        "answer tokens a second, likewise",
        lambda r: _speed(r.cost.decode) if r.cost else NONE,
        lambda r: digits(r.cost.decode.median) if r.cost else NONE,
    ),
    Column(
        "perplexity",
        "by llama.cpp's protocol ± standard error: windows, BOS first, the later half scored",
        lambda r: _perplexity(r.windows) if r.windows else NONE,
        lambda r: f"{r.windows.perplexity:.3f}" if r.windows else NONE,
    ),
    Column("Δ %", "ln of perplexity over the reference's, in hundredths ± paired standard error", _more),
    Column("KL", "mean KL divergence from the reference, nats a token", _distance("mean", ".2g")),
    Column("same top-1", "how often both find the same token likeliest", _distance("top1", ".1%")),
    Column(
        "one pass",
        "perplexity over the text in one pass, the state carried all the way ± standard error",
        lambda r: _perplexity(r.stream) if r.stream else NONE,
    ),
    Column(
        _PER_BYTE,
        "of text, in windows: comparable between vocabularies",
        lambda r: f"{r.windows.bits_per_byte:.4f}" if r.windows else NONE,
    ),
)


def brief(report: Report, *, wide: bool) -> list[Column]:
    """The columns for a terminal, of short cells: some 75 characters, with `wide` some 20 more.

    Perplexities of several vocabularies cannot be compared: bits per byte take their place.
    """
    chosen = ["type", "file", "RAM needed", "read tok/s", "write tok/s"]
    chosen += ["perplexity" if report.one_vocabulary else _PER_BYTE, "Δ %", "KL"]
    chosen += ["bits/weight", "same top-1"] if wide else []
    return [replace(c, cell=c.short or c.cell) for c in COLUMNS if c.heading in chosen]


#: Further columns of what tells a file from its reference, for the page and Markdown.
DIVERGENCE: tuple[Column, ...] = (
    Column("mean", "mean KL ± standard error", _far(lambda q: _mean(q.distance))),
    Column("median", "median KL", _distance("median", ".3g")),
    Column("99 %", "99 % of tokens diverge less", _distance("p99", ".3g")),
    Column("largest", "largest KL of one token", _distance("maximum", ".3g")),
    Column("same top-1", "how often both find the same token likeliest", _distance("top1", ".2%")),
    Column("RMS Δp", "root mean square change of the right token's probability", _distance("rms_change", ".3%")),
)  # fmt: skip


def told_by_type(rows: Sequence[Row]) -> bool:
    """Whether types alone tell the rows apart."""
    return len({row.precision or row.type for row in rows}) == len(rows)


def labels(rows: Sequence[Row]) -> dict[int, str]:
    """What a row is called where there is little room, by its `id`: its type where that says which, else its name.

    Names that are too long are cut in the middle; those that are the same then get a number.
    """
    if told_by_type(rows):
        return {id(row): clean(row.precision or row.type) for row in rows}
    found: dict[int, str] = {}
    for row in rows:
        end = f", {row.precision}" if row.precision else ""
        label = clipped(clean(row.name.removesuffix(end)), _NAMED) + end
        same = sum(known == label or known.startswith(f"{label} (") for known in found.values())
        found[id(row)] = f"{label} ({same + 1})" if same else label
    return found


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The table without its headings."""
    return [[column.cell(row) for column in columns] for row in rows]


def legend(report: Report) -> str:
    """What the numbers are, in a line."""
    scored = next((row.windows.tokens for row in report.files if row.windows), 0)
    others = "" if report.one_vocabulary else "; of other vocabularies by their own tokens: compare bits per byte"
    counts = sorted({row.cost.threads for row in report.files if row.cost})
    threads = "1 thread" if counts == [1] else f"{' and '.join(map(str, counts))} threads"
    trained = next((row.context for row in report.rows if row.reference), 0)
    far = f", {report.text.tokens / trained:.3g} times the length that the reference was trained on" if trained else ""
    runs_on = ", ".join(sorted({row.cost.runs_on for row in report.files if row.cost}))
    return (
        f"Perplexity over {scored:,} tokens of {report.text.name} in windows of {report.settings.ctx}, the later half "
        f"of each scored, ± standard error; one pass: all {report.text.tokens:,} tokens with carried state{far}"
        f"{others}; speeds: median ± half the quartiles' distance ({runs_on}, {threads})."
    )


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(headings) - left)
    safe = [[escaped(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in (headings, marks, *safe))


def escaped(text: str) -> str:
    """`text` in Markdown as it is: names in files are other people's."""
    return re.sub(r"([\\|`*\[\]<>&])", r"\\\1", clean(text))

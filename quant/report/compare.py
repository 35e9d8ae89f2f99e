"""Two reports beside each other: what has changed, and whether it can be told from noise."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from griffin_gguf.quant.report.data import Report, Row, Spread
from griffin_gguf.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class Line:
    """One measure of a file in both reports, and the second over the first.

    `beyond` says that no run of the one was like any of the other: of five runs each of the same thing, that happens in
    0.8 % by chance, of three in 10 %. None where there are no runs: of sizes every change is a change.
    """

    row: str
    measure: str
    unit: str
    first: float
    second: float
    ratio: float
    beyond: bool | None


@dataclass(frozen=True)
class Compared:
    """All of it. `notes` tell what the two do not have in common, `unmatched` which rows only one has."""

    lines: list[Line]
    notes: list[str]
    unmatched: list[str]


@dataclass(frozen=True)
class _Value:
    """A value and the range that repetitions of it fall into."""

    value: float
    low: float
    high: float


def _exact(value: float) -> _Value:
    return _Value(value, value, value)


def _spread(spread: Spread) -> _Value:
    return _Value(spread.median, spread.least, spread.most)


#: Measure, unit, its value in a row; None where it was not measured.
MEASURES: tuple[tuple[str, str, Callable[[Row], _Value | None]], ...] = (
    ("file", "bytes", lambda r: _exact(r.file_size)),
    ("RAM needed", "bytes", lambda r: _exact(r.cost.memory.needed) if r.cost else None),
    ("load", "s", lambda r: _spread(r.cost.load) if r.cost else None),
    ("read", "tok/s", lambda r: _spread(r.cost.prefill) if r.cost else None),
    ("write", "tok/s", lambda r: _spread(r.cost.decode) if r.cost else None),
    ("perplexity", "", lambda r: _exact(r.windows.perplexity) if r.windows else None),
    ("perplexity, one pass", "", lambda r: _exact(r.stream.perplexity) if r.stream else None),
    ("KL", "nats", lambda r: _exact(r.windows.distance.mean) if r.windows and r.windows.distance else None),
)

#: Measures that depend on the text: those of two texts are not set side by side.
_OF_TEXT = frozenset({"perplexity", "perplexity, one pass", "KL"})


def compare(first: Report, second: Report) -> Compared:
    """Set side by side what both have measured of files of one type, or of one name where a type comes twice.

    Raises `UnsupportedError` where they have no row in common.
    """
    one, other = _by_name(first), _by_name(second)
    common = [name for name in one if name in other]
    if not common:
        raise UnsupportedError(f"reports: no row in common: {', '.join(one)} and {', '.join(other)}")
    same_text = first.text.sha256 == second.text.sha256 and first.settings.ctx == second.settings.ctx
    lines = [line for name in common for line in _lines(name, one[name], other[name], same_text)]
    return Compared(lines, list(_notes(first, second)), sorted(set(one) ^ set(other)))


def _lines(name: str, first: Row, second: Row, same_text: bool) -> Iterator[Line]:
    for measure, unit, value in MEASURES:
        a, b = value(first), value(second)
        if a is None or b is None or (measure in _OF_TEXT and not same_text):
            continue
        measured = a.low < a.high or b.low < b.high
        ratio = b.value / a.value if a.value else float("inf")
        beyond = a.high < b.low or b.high < a.low if measured else None
        yield Line(name, measure, unit, a.value, b.value, ratio, beyond)


def _by_name(report: Report) -> dict[str, Row]:
    """Rows by what they are called: by type, and by name where a type comes twice."""
    names = [_kind(row) for row in report.rows]
    counts = Counter(names)
    return {
        name if counts[name] == 1 else row.name: row for row, name in zip(report.rows, names, strict=True)
    }  # fmt: skip


def _kind(row: Row) -> str:
    parts: Sequence[str | None] = (row.architecture, row.type, row.precision)
    return " ".join(part for part in parts if part)


def _notes(first: Report, second: Report) -> Iterator[str]:
    """What to know before the figures are believed."""
    if first.text.sha256 != second.text.sha256:
        yield f"other texts ({first.text.name}, {second.text.name}): perplexities and KL are left out"
    elif first.settings.ctx != second.settings.ctx:
        yield f"windows of {first.settings.ctx} and {second.settings.ctx}: perplexities and KL are left out"
    if first.machine != second.machine:
        yield f"other machines or programs: {_machine(first)}; {_machine(second)}"
    for what, value in _SETTINGS:
        one, other = value(first), value(second)
        if one != other:
            yield f"{what}: {one} and {other}"
    for which, report in (("first", first), ("second", second)):
        if not report.complete:
            yield f"the {which} report is not finished"


def _of_costs(field: str) -> Callable[[Report], str]:
    return lambda report: ", ".join(sorted({str(getattr(row.cost, field)) for row in report.files if row.cost})) or "?"


def _references(report: Report) -> str:
    return ", ".join(_kind(row) for row in report.files if row.reference)


#: What must be the same for figures to be compared.
_SETTINGS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("threads", _of_costs("threads")),
    ("run by", _of_costs("runs_on")),
    ("references, to which KL is taken", _references),
)


def _machine(report: Report) -> str:
    found = report.machine
    return f"{found.cpu}, {found.cores} cores, griffin-gguf {found.griffin}, llama-cpp-python {found.llama_cpp_python}"

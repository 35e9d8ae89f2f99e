"""What a report holds: the contents of report.json, read back strictly.

Sizes are bytes, times seconds, speeds tokens a second, losses and divergences nats a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from statistics import fmean, quantiles, stdev
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from griffin_gguf.quant.evaluate import Divergence, Perplexity, Scores, mean_and_error
from griffin_gguf.quant.memory import Memory
from griffin_gguf.runtime.errors import FileFormatError

FORMAT, VERSION = "griffin-report", 1


@dataclass(frozen=True)
class Spread:
    """Speeds of several runs: median, quartiles, range, mean and sample standard deviation."""

    median: float
    low: float
    high: float
    least: float
    most: float
    mean: float
    sd: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least two."""
        low, median, high = quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, min(values), max(values), fmean(values), stdev(values), len(values))


@dataclass(frozen=True)
class At:
    """Decoding at a position of a text."""

    position: int
    decode: Spread


@dataclass(frozen=True)
class Cost:
    """What running a file takes, in a fresh process.

    `memory` is of loading, one prompt and one answer, with room for the text of `by_position` where a model's memory
    depends on that. `state` is a text's memory, None where it grows with the text.
    """

    key: str
    runs_on: str  # "ggml", "numpy" or "llama.cpp"
    threads: int
    load: Spread
    memory: Memory
    state: int | None
    prompt: int  # tokens of the prompt
    answer: int  # and of an answer: one run
    prefill: Spread
    decode: Spread
    by_position: list[At]


@dataclass(frozen=True)
class Bin:
    """Tokens [start, stop) of a text: how many were predicted, the mean loss, the mean KL to the reference."""

    start: int
    stop: int
    tokens: int
    nll: float
    nll_stderr: float
    kl: float | None
    kl_stderr: float | None


@dataclass(frozen=True)
class Quality:
    """How well a file predicts the text, in one of the two ways of `quant.evaluate`.

    `tokens` were predicted, `nbytes` of text. `halves_kl` are means over the later half of each window, in either way
    over the same tokens: so what one way adds to the other can be told window by window; None without a reference.
    """

    key: str
    tokens: int
    nbytes: int
    perplexity: float
    stderr: float
    nll: float
    nll_stderr: float
    bits_per_byte: float
    seconds: float
    distance: Divergence | None
    bins: list[Bin]
    halves_kl: list[float] | None

    @classmethod
    def of(
        cls,
        key: str,
        scores: Scores,
        nbytes: int,
        distance: Divergence | None,
        bins: list[Bin],
        halves: list[float] | None,
    ) -> Self:
        """Of what was scored."""
        found = Perplexity.of(scores)
        bits = found.bits_per_byte(nbytes)
        return cls(
            key, found.tokens, nbytes, found.value, found.stderr, found.nll, found.nll_stderr, bits, scores.seconds,
            distance, bins, halves,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A file, or the reference with a recurrence of another `precision`, and what was measured of it.

    Rows of one `family` are one model in several types; its reference is `reference`, also where it is the only one.
    What is None was not measured.
    """

    name: str
    path: str
    type: str
    architecture: str
    family: int
    reference: bool
    precision: str | None
    parameters: int
    vocabulary: str  # a digest: what has the same cuts texts into the same tokens
    context: int  # tokens that it was trained on at once
    weights: int
    file_size: int
    cost: Cost | None = None
    windows: Quality | None = None
    stream: Quality | None = None

    @property
    def bits_per_weight(self) -> float:
        """Of tensor data."""
        return 8 * self.weights / self.parameters

    @property
    def measures(self) -> list[Cost | Quality]:
        """What is there of them."""
        return [measure for measure in (self.cost, self.windows, self.stream) if measure is not None]


@dataclass(frozen=True)
class Text:
    """What was read: the first `nbytes` of the file `name`, so many `tokens` of the first model's."""

    name: str
    nbytes: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Settings:
    """What was asked for: see `griffin report --help`."""

    ctx: int
    tokens: int | None
    quick: bool
    backend: str
    threads: int | None


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    griffin: str
    llama_cpp_python: str


@dataclass(frozen=True)
class Report:
    """Everything. `complete` is False while it is being measured: what is missing then can be measured later."""

    made: str  # ISO 8601, UTC
    machine: Machine
    text: Text
    settings: Settings
    rows: list[Row] = field(default_factory=list[Row])
    #: Measured in this folder before, of other files or with other settings: kept for when they are asked for again.
    other_costs: list[Cost] = field(default_factory=list[Cost])
    other_qualities: list[Quality] = field(default_factory=list[Quality])
    complete: bool = False
    format: str = FORMAT
    version: int = VERSION

    @property
    def measures(self) -> list[Cost | Quality]:
        """All that has been measured."""
        return [*(measure for row in self.rows for measure in row.measures), *self.other_costs, *self.other_qualities]

    @property
    def files(self) -> list[Row]:
        """Rows that are files as they lie on the disk."""
        return [row for row in self.rows if row.precision is None]

    @property
    def precisions(self) -> list[Row]:
        """Rows of other precisions of the recurrence."""
        return [row for row in self.rows if row.precision is not None]

    @property
    def one_vocabulary(self) -> bool:
        """Whether losses a token can be compared: else those per byte can."""
        return len({row.vocabulary for row in self.rows}) == 1

    def reference_of(self, row: Row) -> Row:
        """The reference of its family."""
        return next(other for other in self.rows if other.family == row.family and other.reference)

    def to_json(self) -> str:
        """Every field, unrounded."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, path: Path, raw: bytes) -> "Report":
        """Read back what `to_json` wrote. Raises `FileFormatError` naming `path` and the field for anything else."""
        try:
            head = msgspec.json.decode(raw, type=_Head)
        except msgspec.MsgspecError as error:
            raise FileFormatError(path, "report", f"is no report.json of griffin: {error}") from None
        if (head.format, head.version) != (FORMAT, VERSION):
            problem = f"expected {FORMAT} {VERSION}, found {head.format} {head.version}"
            raise FileFormatError(path, "format", problem)
        try:
            report = msgspec.json.decode(raw, type=cls)
        except msgspec.MsgspecError as error:
            problem, _, field = str(error).partition(" - at ")
            raise FileFormatError(path, field.strip("`") or "JSON", problem) from None
        families = sorted(row.family for row in report.rows)
        references = sorted(row.family for row in report.rows if row.reference)
        if references != sorted(set(families)):
            raise FileFormatError(path, "rows", f"expected one reference in each family, found {references}")
        return report


@dataclass(frozen=True)
class _Head:
    format: str
    version: int


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of files, whole paths where short ones would be the same."""
    short = [PurePath(path).name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def bins(
    at: NDArray[np.int64], nll: NDArray[np.float64], kl: NDArray[np.float64] | None, edges: Sequence[int]
) -> list[Bin]:
    """Means between `edges` of what was found for the tokens at `at`, rising; bins of under two tokens are left out."""
    found: list[Bin] = []
    cuts = np.searchsorted(at, edges)
    for start, stop, first, last in zip(edges[:-1], edges[1:], cuts[:-1], cuts[1:], strict=True):
        count = int(last - first)
        if count < 2:
            continue
        loss, far = mean_and_error(nll[first:last]), (None, None) if kl is None else mean_and_error(kl[first:last])
        found.append(Bin(start, stop, count, *loss, *far))
    return found

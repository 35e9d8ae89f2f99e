"""What the measurements say: which files are worth their size, which one to take, whether errors gather."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from griffin_gguf.quant.report.data import Report, Row
from griffin_gguf.quant.wording import size_text

#: How much more perplexity is no loss worth speaking of, where a file is faster for it.
TOLERANCE = 0.01
#: The part of a machine's memory that a model may take: the rest is the system's, and other programs'.
SHARE = 0.75
#: Sizes of memory that advice is given for, in bytes.
SIZES = tuple(count << 30 for count in (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128))

_QUARTERS = 4
_LAGS = 6  # windows


def increase(row: Row, over: Row) -> float:
    """By how much the perplexity is above that of `over`, as a part of it, per token of `over`: 0.01 is one percent.

    Both must have windows. It goes by bits per byte, so their vocabularies may differ.
    """
    assert row.windows
    assert over.windows
    one, other = row.windows, over.windows
    return exp((one.bits_per_byte - other.bits_per_byte) * log(2) * other.nbytes / other.tokens) - 1


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Those for which no other is as small and as good, smallest first; those without windows are left out."""
    found: list[Row] = []
    best = float("inf")
    for row in sorted((row for row in rows if row.windows), key=lambda r: (r.file_size, _loss(r))):
        if _loss(row) < best:
            best = _loss(row)
            found.append(row)
    return found


def _loss(row: Row) -> float:
    assert row.windows
    return row.windows.bits_per_byte


@dataclass(frozen=True)
class Choice:
    """The file to take with so much `memory`; None where none fits."""

    memory: int
    row: Row | None


def best(rows: Sequence[Row]) -> Row:
    """What the others are compared with: of the references, the one that predicts best; of any, without references.

    A reference is taken for better than its own quantizations also where these are ahead by chance.
    """
    scored = [row for row in rows if row.windows]
    return min([row for row in scored if row.reference] or scored, key=_loss)


def choose(rows: Sequence[Row], memory: int) -> Choice:
    """Of the files that fit, those within `TOLERANCE` of the best one's perplexity; of these the fastest."""
    fitting = [r for r in rows if r.windows and r.cost and r.cost.memory.needed <= SHARE * memory]
    if not fitting:
        return Choice(memory, None)
    top = best(rows)
    least = max(0.0, min(increase(row, top) for row in fitting))
    good = [row for row in fitting if increase(row, top) <= least + TOLERANCE]
    return Choice(memory, max(good, key=lambda r: r.cost.decode.median if r.cost else 0.0))


def choices(rows: Sequence[Row]) -> list[Choice]:
    """For sizes of memory, as long as another size makes another choice."""
    found: list[Choice] = []
    for choice in (choose(rows, size) for size in SIZES):
        if not found or choice.row is not found[-1].row:
            found.append(choice)
    return found


def sentence(report: Report, memory: int) -> str:
    """The recommendation for a machine with so much memory."""
    rows = [row for row in report.files if row.windows and row.cost]
    if not rows:
        return "Nothing has been measured yet."
    taken = choose(rows, memory).row
    if taken is None or taken.windows is None or taken.cost is None:
        least = min(rows, key=lambda r: r.cost.memory.needed if r.cost else 0)
        assert least.cost
        return (
            f"With {size_text(memory)} of memory none of these files runs well: the smallest, {least.name}, needs "
            f"{size_text(least.cost.memory.needed)}."
        )
    top, words = (
        best(rows),
        f"With {size_text(memory)} of memory take {taken.name}: it needs {size_text(taken.cost.memory.needed)}",
    )
    if taken is top:
        least = min(rows, key=_loss)
        if least is top:
            return f"{words}, and none predicts the text better."
        return f"{words}. The others are compared with it; {least.name} predicts the text better."
    words += f", its perplexity is {against(taken, top)}"
    if top.cost:
        words += f", and it writes {taken.cost.decode.median / top.cost.decode.median:.2g} times as fast"
    return words + "."


def against(row: Row, top: Row) -> str:
    """How a perplexity compares: "0.26 ± 0.05 % above that of X"."""
    assert row.windows
    more, far = 100 * increase(row, top), row.windows.distance
    error = f" ± {100 * far.log_ratio_stderr:.2f}" if far and row.family == top.family else ""
    return f"{abs(more):.2f}{error} % {'above' if more >= 0 else 'below'} that of {top.name}"


@dataclass(frozen=True)
class Drift:
    """Divergence where the state is carried, over that of fresh windows, on the same tokens; a quarter of the text."""

    start: int  # token
    ratio: float
    stderr: float


def drift(row: Row, ctx: int) -> list[Drift]:
    """Whether errors gather in the state: then the ratio grows from quarter to quarter. Empty without a reference.

    The first window is left out, in which both ways are the same.
    """
    if not (row.windows and row.stream and row.windows.halves_kl and row.stream.halves_kl):
        return []
    count = min(len(row.windows.halves_kl), len(row.stream.halves_kl))
    carried, fresh = np.array(row.stream.halves_kl[:count]), np.array(row.windows.halves_kl[:count])
    parts = [part for part in np.array_split(np.arange(1, count), _QUARTERS) if len(part) > 1 and fresh[part].any()]
    return [_ratio(part * ctx, carried[part], fresh[part]) for part in parts]


def _ratio(starts: np.ndarray, carried: np.ndarray, fresh: np.ndarray) -> Drift:
    """Of means, with its standard error to first order.

    Neighbouring windows err alike where a state is carried from one to the next, so covariances up to a few windows
    apart are counted in, with falling weights (Newey and West, Econometrica 55, 1987).
    """
    mean, count = fresh.mean(), len(fresh)
    ratio = carried.mean() / mean
    rest = carried - ratio * fresh
    lags = min(_LAGS, count - 1)
    shared = [2 * (1 - lag / (lags + 1)) * float(rest[lag:] @ rest[:-lag]) for lag in range(1, lags + 1)]
    own = float(rest @ rest)
    variance = max(own + sum(shared), own / 2) / (count * (count - 1))
    return Drift(int(starts[0]), float(ratio), float(variance**0.5 / mean))

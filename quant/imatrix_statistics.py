"""What an importance matrix says of each weight's inputs, as llama-imatrix's `--show-statistics` does.

Activations here are mean squares: one number a column, over the matrices that saw a token.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2, sqrt

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.quant.imatrix import Entry, ImportanceMatrix

_INACTIVE = 1e-5  # at most this


@dataclass(frozen=True)
class Statistics:
    """One weight's activations; shares from 0 to 1."""

    name: str
    elements: int
    total: float
    minimum: float
    maximum: float
    mean: float
    stddev: float
    active: float  # share that is not near 0
    entropy: float  # in bits, of the activations as a distribution
    entropy_normalized: float  # as a share of the largest possible
    zd: float  # share more than one standard deviation above the mean: "Z-score distribution"
    cosine: float | None = None  # similarity to the same weight of the layer before that has it


def statistics(matrix: ImportanceMatrix) -> list[Statistics]:
    """Describe every entry that saw a token, the largest total first.

    llama-imatrix compares layers i and i - 1 alone. Griffin's kinds of layers alternate, so the layer before is
    here the nearest earlier one that has the weight.
    """
    seen = {name: entry for name, entry in matrix.entries.items() if entry.counts.any()}
    rows = [replace(_describe(name, _activations(entry)), cosine=_cosine(name, seen)) for name, entry in seen.items()]
    return sorted(rows, key=lambda row: (-row.total, row.name))


def _activations(entry: Entry) -> NDArray[np.float64]:
    """Mean squares of the matrices that saw a token, flat."""
    rows = np.broadcast_to(entry.counts, len(entry.sums)) > 0
    return entry.means[rows].reshape(-1).astype(np.float64)


def _describe(name: str, x: NDArray[np.float64]) -> Statistics:
    total, mean = float(x.sum()), float(x.mean())
    stddev = sqrt(max(0.0, float((x * x).mean()) - mean * mean))
    share = x[x > 0] / total if total > 0 else np.empty(0)
    entropy = -float((share * np.log2(share)).sum()) + 0.0  # not -0.0
    return Statistics(
        name=name,
        elements=x.size,
        total=total,
        minimum=float(x.min()),
        maximum=float(x.max()),
        mean=mean,
        stddev=stddev,
        active=float((x > _INACTIVE).mean()),
        entropy=entropy,
        entropy_normalized=entropy / log2(x.size) if x.size > 1 else 0.0,
        zd=float((x > mean + stddev).mean()) if stddev > 0 else 0.0,
    )


def _cosine(name: str, entries: Mapping[str, Entry]) -> float | None:
    """Cosine similarity of an entry and the one of its kind before it; None where there is none, or only zeros."""
    found = re.match(r"blk\.(\d{1,4})\.", name)
    if not found:
        return None
    rest = name[found.end() :]
    before = next((n for i in range(int(found[1]) - 1, -1, -1) if (n := f"blk.{i}.{rest}") in entries), None)
    if before is None:
        return None
    x, y = _activations(entries[name]), _activations(entries[before])
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if x.size == y.size and norms > 0 else None

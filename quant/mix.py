"""The choice of a type for each tensor: least cost within a budget of bytes, exactly.

A multiple-choice knapsack: of every tensor's options one is taken, costs add up, bytes add up. Marginal gains along
the tensors' convex hulls give a first answer and a price of a byte; then dynamic programming over (bytes, cost)
keeps only what that price cannot rule out, so that few of the combinations are ever looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have: its bytes, and what it costs (of any unit; the same for all tensors)."""

    type: T
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Mix:
    """A type for every tensor, `nbytes` of data in all, and the sum of the costs, which it was chosen for."""

    types: Mapping[str, T]
    nbytes: int
    cost: float


#: Alternatives by tensor, in file order.
Alternatives = Mapping[str, Sequence[Option]]

_TIE = 1e-9  # relative: combinations no better than this are not looked for


def smallest(tensors: Alternatives) -> int:
    """Bytes of the smallest mix there is."""
    return sum(min(option.nbytes for option in options) for options in tensors.values())


def choose(tensors: Alternatives, budget: int) -> Mix:
    """Take one option of each tensor, at most `budget` bytes in all, so that the sum of costs is least.

    Of equal costs the fewest bytes are taken. More budget never costs more. Raises `UnsupportedError` where even
    the smallest options take more, naming that size.
    """
    ladders = [_undominated(options) for options in tensors.values()]
    least = smallest(tensors)
    if least > budget:
        raise UnsupportedError(f"no mix has only {budget:,} bytes of tensors; the smallest takes {least:,}")
    price, taken = _greedy(ladders, budget)
    cost = sum(ladder[i].cost for ladder, i in zip(ladders, taken, strict=True))
    taken = _better(ladders, budget, price, cost) or taken
    chosen = {name: ladder[i] for name, ladder, i in zip(tensors, ladders, taken, strict=True)}
    return Mix(
        {name: option.type for name, option in chosen.items()},
        sum(option.nbytes for option in chosen.values()),
        sum(option.cost for option in chosen.values()),
    )


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Those that none of at most their bytes equals in cost: bytes rise and costs fall along the list."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if not found or option.cost < found[-1].cost:
            found.append(option)
    return found


def _hull(ladder: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull: each step costs more per byte saved than the one after."""
    found: list[int] = []
    for i, option in enumerate(ladder):
        while len(found) > 1 and _gain(ladder[found[-2]], ladder[found[-1]]) <= _gain(ladder[found[-1]], option):
            found.pop()
        found.append(i)
    return found


def _gain(small: Option, large: Option) -> float:
    """What a byte more buys."""
    return (small.cost - large.cost) / (large.nbytes - small.nbytes)


def _greedy(ladders: Sequence[Sequence[Option]], budget: int) -> tuple[float, list[int]]:
    """Climb where a byte buys most, as long as it fits: the price of a byte where that first ends, and the answer."""
    steps = [
        (_gain(ladder[start], ladder[stop]), i, start, stop)
        for i, ladder in enumerate(ladders)
        for start, stop in pairwise(_hull(ladder))
    ]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    taken, price = [0] * len(ladders), None
    left = budget - sum(ladder[0].nbytes for ladder in ladders)
    for gain, i, start, stop in steps:
        step = ladders[i][stop].nbytes - ladders[i][start].nbytes
        if taken[i] == start and step <= left:
            taken[i] = stop
            left -= step
        elif price is None:
            price = gain
    return price or 0.0, taken


def _better(ladders: Sequence[Sequence[Option]], budget: int, price: float, bound: float) -> list[int] | None:
    """The best answer whose cost is below `bound`, or None.

    At any price of a byte, cost + price · (bytes - budget) is no more than the cost of an answer within the
    budget; so what exceeds the bound by that measure, the rest at its least, leads to nothing better.
    """
    order = sorted(range(len(ladders)), key=lambda i: -ladders[i][-1].nbytes)
    nbytes = [np.array([option.nbytes for option in ladders[i]], np.int64) for i in order]
    costs = [np.array([option.cost for option in ladders[i]]) for i in order]
    rest_bytes = sum(int(b[0]) for b in nbytes)
    rest_value = sum(float((c + price * b).min()) for b, c in zip(nbytes, costs, strict=True))
    limit = bound * (1 - _TIE) + price * budget
    sizes, sums = np.zeros(1, np.int64), np.zeros(1)
    trail: list[NDArray[np.int64]] = []
    for b, c in zip(nbytes, costs, strict=True):
        rest_bytes -= int(b[0])
        rest_value -= float((c + price * b).min())
        sizes, sums = (sizes[:, None] + b).ravel(), (sums[:, None] + c).ravel()
        kept = np.flatnonzero((sizes + rest_bytes <= budget) & (sums + price * sizes + rest_value < limit))
        kept = kept[np.lexsort((sums[kept], sizes[kept]))]
        fewest = np.minimum.accumulate(np.concatenate([[np.inf], sums[kept]]))
        kept = kept[sums[kept] < fewest[:-1]]
        if not kept.size:
            return None
        sizes, sums = sizes[kept], sums[kept]
        trail.append(kept)
    at, taken = len(sums) - 1, [0] * len(ladders)  # costs fall along the list
    for i, ladder_costs, kept in zip(reversed(order), reversed(costs), reversed(trail), strict=True):
        at, taken[i] = divmod(int(kept[at]), len(ladder_costs))
    return taken

"""Speed and memory of a model against how much it has read, beside what the keys and values of others would take.

Tokens go in chunks but for the last of every row, which are decoded one at a time and timed.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.quant.file_types import type_name
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.machine import resident_bytes
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.state import CHUNK, State, ring_rows

#: (tokens read, tokens to read)
Progress = Callable[[int, int], None]

#: Where the comparison begins: the windows of the published models (2,048 tokens) are full by then.
EARLY = 3000

#: Tokens fed at a time, as many of the first as fit, then of the second; what is left is decoded. A chunk of another
#: size takes a graph of its own, once, wherever in the text it comes: so all sizes are to come early.
_PIECES = (CHUNK, 64)
_BLOCK_SECONDS = 0.1  # each state is timed for about this long, then the other
_BLOCKS = range(4, 65)  # tokens in that time


@dataclass(frozen=True)
class Cache:
    """Keys and values of a Transformer in f16, by the config.json that its authors published at `source`.

    A layer keeps a key and a value of `head_width` numbers for each of `kv_heads` and each token: of the last
    `window`, of all where that is None. `context` is how many tokens it was made for.
    """

    name: str
    layers: int
    kv_heads: int
    head_width: int
    context: int
    window: int | None
    source: str

    def nbytes(self, tokens: int) -> int:
        """Bytes after so many tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return 2 * 2 * self.layers * self.kv_heads * self.head_width * kept


#: The Transformers to compare with. Mistral-7B-v0.1 keeps a window of 4,096 tokens, in programs that have a rolling
#: buffer for it; v0.2 and v0.3 have no window ("sliding_window": null) and grow as Llama-3-8B does: 128 KiB a token.
CACHES = (
    Cache("Gemma-7B", 28, 16, 256, 8192, None, "https://huggingface.co/google/gemma-7b"),
    Cache("Llama-3-8B", 32, 8, 128, 8192, None, "https://huggingface.co/meta-llama/Meta-Llama-3-8B"),
    Cache("Mistral-7B-v0.1", 32, 8, 128, 32768, 4096, "https://huggingface.co/mistralai/Mistral-7B-v0.1"),
)


@dataclass(frozen=True)
class Point:
    """One row: after `position` tokens. Sizes in bytes, of the whole process but for `state`."""

    position: int
    speed: float  # of decoding, tokens a second, median
    rss: int
    anonymous: int | None  # of it what was allocated, not mapped from files; Linux only
    state: int


@dataclass(frozen=True)
class Change:
    """What has changed between two positions.

    `speed` is the speed at the later one as a part of that at the earlier: the median over rounds in which both
    states were decoded in turn, so that whatever else the machine does hits both alike; `low` and `high` are the
    quartiles. The others are bytes.
    """

    early: int
    late: int
    speed: float
    low: float
    high: float
    rss: int
    anonymous: int | None
    state: int


@dataclass(frozen=True)
class Depth:
    """Everything measured on one file. `change` is None where it was read to less than twice the early position."""

    path: str
    type: str
    points: list[Point]
    change: Change | None

    def to_json(self) -> str:
        """With the caches of `CACHES` at the same positions."""
        caches = [
            asdict(cache) | {"bytes": [cache.nbytes(point.position) for point in self.points]} for cache in CACHES
        ]
        return json.dumps(asdict(self) | {"caches": caches}, indent=1) + "\n"


def rows(tokens: int, early: int) -> list[int]:
    """Positions to measure at on the way to `tokens`: powers of two from 256, `early`, and the end."""
    powers = [2**i for i in range(8, tokens.bit_length())]
    return sorted({position for position in [*powers, early, tokens] if position <= tokens})


def early_position(model: Model) -> int:
    """Where this model's comparison begins: at `EARLY`, later where its rings of keys are not full by then."""
    return max(EARLY, ring_rows(model.hp))


def measure_depth(
    model: Model,
    positions: Sequence[int],
    text: Sequence[int] = (),
    *,
    decode: int = 32,
    rounds: int = 25,
    progress: Progress | None = None,
    tell: Callable[[Point], None] | None = None,
) -> Depth:
    """Read to the last of the rising `positions`, measuring at each.

    `text` are the tokens to read, over and over again; without them random ones, always the same. Before each position
    at least `decode` tokens are read one at a time. If `early_position` is among the positions and half of the last one
    or less, a copy of the state there is kept and compared with that at the end, in `rounds` rounds. `tell` hears of
    every row as soon as it is there. Raises `UnsupportedError` for positions that do not rise.
    """
    if not positions or any(b <= a for a, b in itertools.pairwise([0, *positions])):
        raise UnsupportedError(f"positions: expected whole numbers that rise from 1, found {list(positions)}")
    early = early_position(model)
    reader, start, points = _Reader(model, text, positions[-1], progress), None, list[Point]()
    for position in positions:
        speed = reader.read(position, decode)
        if position == early and 2 * early <= positions[-1]:
            start = reader.keep()
        points.append(Point(position, speed, *resident_bytes(), reader.state.nbytes))
        if tell:
            tell(points[-1])
    change = reader.compare(start, rounds, points[-1].speed) if start else None
    return Depth(str(model.path), type_name(model.file.metadata), points, change)


@dataclass(frozen=True)
class _Start:
    """What the end is compared with: a copy of the state at the early position, and the memory then."""

    position: int
    state: State
    rss: int
    anonymous: int | None


class _Reader:
    """A text being read."""

    def __init__(self, model: Model, text: Sequence[int], last: int, progress: Progress | None) -> None:
        self._model, self._last, self._progress = model, last, progress
        self.state = model.new_state()
        self._tokens = _repeated(text) if text else _random(model.hp.vocab)
        self._warm()  # so that the first row has all the memory that a chunk needs, and there is room for two states

    def read(self, position: int, decode: int) -> float:
        """Read on to `position`, the last `decode` tokens or some more one at a time: so many a second."""
        for piece in _PIECES:
            while position - decode - self.state.position >= piece:
                self._feed(self.state, self._tokens(piece))
        times = [self._feed(self.state, self._tokens(1)) for _ in range(position - self.state.position)]
        return 1 / median(times)

    def keep(self) -> _Start:
        """A copy of the state as it is now."""
        self._warm()
        state = self.state.copy()
        return _Start(state.position, state, *resident_bytes())

    def _warm(self) -> None:
        """Feed chunks of all sizes to a copy, which then goes: its place, and the graphs for it, are the next one's.

        Twice: first graphs are built, which stay; then there is what every run takes for a moment.
        """
        scratch = self.state.copy()
        for piece in 2 * (*_PIECES, 1):
            self._feed(scratch, np.zeros(piece, np.int32))

    def compare(self, start: _Start, rounds: int, speed: float) -> Change:
        """Decode on both states in turn."""
        rss, anonymous = resident_bytes()
        late = self.state.position
        count = min(max(int(speed * _BLOCK_SECONDS), _BLOCKS.start), _BLOCKS[-1])
        pair, ratios = [start.state, self.state], list[float]()
        for i in range(rounds):
            order = pair if i % 2 else pair[::-1]
            times = {
                state is self.state: median(self._feed(state, self._tokens(1)) for _ in range(count)) for state in order
            }
            ratios.append(times[False] / times[True])
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        grown = None if anonymous is None or start.anonymous is None else anonymous - start.anonymous
        size = self.state.nbytes - start.state.nbytes
        return Change(start.position, late, middle, low, high, rss - start.rss, grown, size)

    def _feed(self, state: State, tokens: NDArray[np.int32]) -> float:
        """Read tokens; the seconds that took."""
        begun = perf_counter()
        self._model.forward(tokens, state)
        seconds = perf_counter() - begun
        if self._progress and state is self.state and state.position <= self._last:
            self._progress(state.position, self._last)
        return seconds


def _random(vocab: int) -> Callable[[int], NDArray[np.int32]]:
    """Tokens drawn evenly, the same in every run."""
    generator = np.random.default_rng(0)
    return lambda count: generator.integers(0, vocab, count, np.int32)


def _repeated(text: Sequence[int]) -> Callable[[int], NDArray[np.int32]]:
    """The tokens of a text, from its beginning again at its end."""
    endless: Iterator[int] = itertools.chain.from_iterable(itertools.repeat(text))
    return lambda count: np.fromiter(itertools.islice(endless, count), np.int32, count)

"""What a model makes of a text: perplexity, and its distance from another model, token by token.

A text can be read in two ways. As a `stream`, in one pass with carried state, however long it is: every token is
predicted from all those before it, which is what a recurrent model is for. Or in `windows` of a fixed length, each
from an empty state, the later half of each scored: llama.cpp's protocol, and so that of published figures.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import exp, log, sqrt
from time import perf_counter
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.machine import usable_cores

#: (done, total) tokens read.
Progress = Callable[[int, int], None]

_Logits = NDArray[np.float32]
_Ids = NDArray[np.int64]

_LOGITS_BYTES = 64 << 20  # float32 logits of one chunk
_MOST_TOKENS = 512
_ROWS_BYTES = 8 << 20  # float64 rows that a thread normalises at a time


class Predictor(Protocol):
    """What is evaluated: `runtime.Model`, a `Runner`, or a stand-in."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        ...

    def new_state(self) -> Any:
        """Begin a text."""
        ...

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        """Continue it: logits [T, V] when `every`, else those of the last token, [V]."""
        ...


@dataclass(frozen=True)
class Reading:
    """Tokens that are read from an empty state; each is predicted, and from `tokens[first + 1]` on scored.

    `start` is where the first of them lies in its text.
    """

    tokens: Sequence[int]
    first: int = 0
    start: int = 0

    @property
    def scored(self) -> int:
        """Predictions that count."""
        return len(self.tokens) - 1 - self.first


def stream(tokens: Sequence[int]) -> list[Reading]:
    """The whole text in one pass; its first token (BOS) is the context to begin with."""
    return [Reading(tokens)]


def windows(tokens: Sequence[int], ctx: int, bos: int | None) -> list[Reading]:
    """As llama-perplexity reads a text: whole windows of `ctx` tokens, the first of each replaced by `bos`.

    Of each the predictions from position ctx // 2 on are scored, so that every one has at least half a window before
    it: ctx - 1 - ctx // 2 a window. What is left at the end is not read. None for a model that begins texts without
    BOS. Raises `UnsupportedError` for a text of less than a window, and for windows too short to score.
    """
    if ctx < 4:
        raise UnsupportedError(f"windows: expected at least 4 tokens each, found {ctx}")
    if len(tokens) < ctx:
        raise UnsupportedError(f"a text of {len(tokens)} tokens is too short; expected a window of {ctx} at least")
    begin = [] if bos is None else [bos]
    return [
        Reading([*begin, *tokens[start + len(begin) : start + ctx]], ctx // 2, start)
        for start in range(0, len(tokens) - ctx + 1, ctx)
    ]


@dataclass(frozen=True, eq=False)
class Scores:
    """One model's losses. `at` [n]: where in the text each predicted token lies; `nll` [n]: in nats."""

    at: NDArray[np.int64]
    nll: NDArray[np.float64]
    seconds: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models' predictions of one text; all arrays [n].

    `kl` is KL(reference ‖ model) in nats; `same` whether both put the same token first; `change` by how much the
    probability of the token that did follow is larger in the model.
    """

    at: NDArray[np.int64]
    reference_nll: NDArray[np.float64]
    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    change: NDArray[np.float64]
    seconds: float

    @property
    def scores(self) -> Scores:
        """The model's alone."""
        return Scores(self.at, self.nll, self.seconds)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood `nll` (in nats), with standard errors.

    They are those of the mean over tokens, taken as independent; of the perplexity, to first order. As llama.cpp's.
    """

    value: float
    stderr: float
    nll: float
    nll_stderr: float
    tokens: int  # predicted
    seconds: float

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """Of what was scored, two tokens at least."""
        mean, stderr = mean_and_error(scores.nll)
        return cls(exp(mean), exp(mean) * stderr, mean, stderr, len(scores.nll), scores.seconds)

    def bits_per_byte(self, size: int) -> float:
        """Bits the model needs per byte of what it predicted, `size` bytes: comparable between tokenizers."""
        return self.nll * self.tokens / (size * log(2))


@dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ model) in nats over the predicted tokens, and what else tells two models apart.

    `top1` is how often both put the same token first, 0 to 1; `rms_change` the root of the mean squared change of the
    probability of the token that did follow; `log_ratio` ln(perplexity / the reference's), whose standard error is
    that of the paired difference and so far smaller than either perplexity's.
    """

    mean: float
    stderr: float
    median: float
    p99: float
    maximum: float
    top1: float
    rms_change: float
    log_ratio: float
    log_ratio_stderr: float
    tokens: int

    @classmethod
    def of(cls, found: Comparison) -> Self:
        """Of what was compared, two tokens at least."""
        mean, stderr = mean_and_error(found.kl)
        ratio, ratio_stderr = mean_and_error(found.nll - found.reference_nll)
        return cls(
            mean,
            stderr,
            float(np.median(found.kl)),
            float(np.quantile(found.kl, 0.99)),
            float(found.kl.max()),
            float(found.same.mean()),
            sqrt(float((found.change**2).mean())),
            ratio,
            ratio_stderr,
            len(found.kl),
        )


def score(model: Predictor, readings: Sequence[Reading], progress: Progress | None = None) -> Scores:
    """Every scored prediction of `model`.

    Raises `UnsupportedError` for fewer than 2 of them, `GriffinError` where logits are not finite.
    """
    begun = perf_counter()
    at, (nll,) = _arrays(readings, 1)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for rows, targets, (logits,) in _run([model], readings, progress):

            def work(block: slice, rows: slice = rows, targets: _Ids = targets, logits: _Logits = logits) -> None:
                nll[rows][block] = _Predictions(logits[block]).losses(targets[block])

            list(pool.map(work, _blocks(logits)))
    return Scores(at, nll, perf_counter() - begun)


def compare(
    reference: Predictor, model: Predictor, readings: Sequence[Reading], progress: Progress | None = None
) -> Comparison:
    """Run both models side by side, so that no logits need be kept.

    Raises as `score` does, and `UnsupportedError` for vocabularies of different sizes.
    """
    if reference.vocab != model.vocab:
        raise UnsupportedError(f"vocabularies of {reference.vocab} and {model.vocab} tokens cannot be compared")
    begun = perf_counter()
    at, (base, nll, kl, change) = _arrays(readings, 4)
    same = np.empty(len(at), np.bool_)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for rows, targets, (wanted, got) in _run([reference, model], readings, progress):

            def work(
                block: slice, rows: slice = rows, targets: _Ids = targets, wanted: _Logits = wanted, got: _Logits = got
            ) -> None:
                same[rows][block] = wanted[block].argmax(axis=1) == got[block].argmax(axis=1)
                p, q = _Predictions(wanted[block]), _Predictions(got[block])
                before, after = p.losses(targets[block]), q.losses(targets[block])
                base[rows][block], nll[rows][block] = before, after
                change[rows][block] = np.exp(-after) - np.exp(-before)
                kl[rows][block] = p.divergence(q)

            list(pool.map(work, _blocks(wanted)))
    return Comparison(at, base, nll, kl, same, change, perf_counter() - begun)


def perplexity(model: Predictor, tokens: Sequence[int], progress: Progress | None = None) -> Perplexity:
    """Of the text as a stream: all but the first token are predicted. Raises as `score` does."""
    return Perplexity.of(score(model, stream(tokens), progress))


def kl(reference: Predictor, model: Predictor, tokens: Sequence[int], progress: Progress | None = None) -> Divergence:
    """Of the text as a stream. Raises as `compare` does."""
    return Divergence.of(compare(reference, model, stream(tokens), progress))


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error, the values taken as independent."""
    return float(values.mean()), float(values.std(ddof=1)) / sqrt(len(values))


def _arrays(readings: Sequence[Reading], count: int) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Where the scored tokens lie, and that many arrays for what is found of them."""
    scored = sum(reading.scored for reading in readings)
    if scored < 2:
        raise UnsupportedError(f"a text of {max(scored, 0)} tokens is too short to measure; expected at least 2")
    at = [np.arange(r.start + r.first + 1, r.start + len(r.tokens)) for r in readings]
    return np.concatenate(at), [np.empty(scored) for _ in range(count)]


#: Some predictions: where in all that is scored, the tokens that did follow [T], logits [T, V] of each model.
_Piece = tuple[slice, _Ids, list[_Logits]]


def _run(models: Sequence[Predictor], readings: Sequence[Reading], progress: Progress | None) -> Iterator[_Piece]:
    """All that is scored, piece by piece. A reading's states are gone before the next one's begin."""
    total = sum(len(reading.tokens) - 1 for reading in readings)
    read = scored = 0
    for reading in readings:
        for start, stop, logits in _predictions(models, reading):
            targets = np.asarray(reading.tokens[start + 1 : stop + 1], np.int64)
            yield slice(scored, scored + stop - start), targets, logits
            scored += stop - start
            if progress:
                progress(read + stop, total)
        read += len(reading.tokens) - 1


def _predictions(models: Sequence[Predictor], reading: Reading) -> Iterator[tuple[int, int, list[_Logits]]]:
    """Logits [T, V] of each model after tokens [start, stop) of a reading, from its first scored one on."""
    step = max(1, min(_MOST_TOKENS, _LOGITS_BYTES // (4 * models[0].vocab)))
    states = [model.new_state() for model in models]

    def forward(start: int, stop: int, every: bool) -> list[_Logits]:
        pairs = zip(models, states, strict=True)
        return [model.forward(reading.tokens[start:stop], state, every) for model, state in pairs]

    if reading.first:  # without logits: of a large vocabulary they are a third of the work
        forward(0, reading.first, False)
    last = len(reading.tokens) - 1
    for start in range(reading.first, last, step):
        stop = min(start + step, last)
        logits = forward(start, stop, True)
        if not all(np.isfinite(rows).all() for rows in logits):
            where = f"{reading.start + start} to {reading.start + stop}"
            raise GriffinError(f"tokens {where}: the model's logits hold NaN or infinity")
        yield start, stop, logits


def _blocks(logits: NDArray[np.float32]) -> Iterator[slice]:
    """Cut rows so that their float64 copies stay small."""
    count, vocab = logits.shape
    step = max(1, _ROWS_BYTES // (8 * vocab))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class _Predictions:
    """Logits [T, V] normalised, in float64: at perplexities near 1, float32 would round the very thing measured."""

    def __init__(self, logits: _Logits) -> None:
        self.shifted = logits.astype(np.float64)
        self.shifted -= self.shifted.max(axis=1, keepdims=True)
        self.weights = np.exp(self.shifted)
        self.total = self.weights.sum(axis=1)

    def losses(self, targets: _Ids) -> NDArray[np.float64]:
        """Negative log-likelihood of each target, nats [T]."""
        return np.log(self.total) - self.shifted[np.arange(len(targets)), targets]

    def divergence(self, other: "_Predictions") -> NDArray[np.float64]:
        """KL(this ‖ other) [T]: Σ p (log p − log q), with log p = shifted − log total."""
        difference = np.einsum("tv,tv->t", self.weights, self.shifted - other.shifted) / self.total
        return difference - np.log(self.total) + np.log(other.total)

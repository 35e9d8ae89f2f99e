"""What a model makes of a text: perplexity, and its distance from another model token by token.

A text runs through in one pass with carried state, however long it is: nothing is cut into windows, and every
token but the first (BOS) is predicted from all those before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError

#: (done, total) predicted tokens.
Progress = Callable[[int, int], None]

_LOGITS_BYTES = 64 << 20  # float32 logits of one chunk
_MOST_TOKENS = 512
_ROWS_BYTES = 8 << 20  # float64 rows normalised at a time


class Predictor(Protocol):
    """What is evaluated: `runtime.Model`, or a stand-in."""

    @property
    def hp(self) -> Hyperparameters:
        """The model's numbers; the vocabulary is read."""
        ...

    def new_state(self) -> Any:
        """Begin a text."""
        ...

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        """Continue it: logits [T, V] when `every`."""
        ...


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood `nll` (in nats), with standard errors."""

    value: float
    stderr: float
    nll: float
    nll_stderr: float
    tokens: int  # predicted
    seconds: float

    def bits_per_byte(self, size: int) -> float:
        """Bits the model needs per byte of the text, `size` bytes of UTF-8: comparable between tokenizers."""
        return self.nll * self.tokens / (size * log(2))


@dataclass(frozen=True)
class Divergence:
    """KL(reference ‖ model) in nats over the predicted tokens, and how often both put the same token first."""

    mean: float
    stderr: float
    median: float
    maximum: float
    top1: float  # share, 0 to 1
    tokens: int
    values: NDArray[np.float64] = field(repr=False, compare=False)  # token by token, in order


def perplexity(model: Predictor, tokens: Sequence[int], progress: Progress | None = None) -> Perplexity:
    """Predict every token of `tokens` but the first, which is the context to begin with (BOS).

    The standard error is that of the mean over tokens, taken as independent; of the perplexity, to first order.
    Raises `UnsupportedError` for fewer than 3 tokens, `GriffinError` where logits are not finite.
    """
    begun = perf_counter()
    nll = np.empty(len(tokens) - 1) if len(tokens) else np.empty(0)
    for at, targets, (logits,) in _run([model], tokens, progress):
        for rows in _blocks(logits):
            scores = _log_softmax(logits[rows])
            nll[at + rows.start : at + rows.stop] = -scores[np.arange(len(scores)), targets[rows]]
    mean, stderr = mean_and_error(nll)
    return Perplexity(exp(mean), exp(mean) * stderr, mean, stderr, len(nll), perf_counter() - begun)


def kl(reference: Predictor, model: Predictor, tokens: Sequence[int], progress: Progress | None = None) -> Divergence:
    """Run both models side by side over `tokens` and compare what they predict. Raises as `perplexity` does."""
    if reference.hp.vocab != model.hp.vocab:
        raise UnsupportedError(f"vocabularies of {reference.hp.vocab} and {model.hp.vocab} tokens cannot be compared")
    found = np.empty(len(tokens) - 1) if len(tokens) else np.empty(0)
    same = 0
    for at, _, (wanted, got) in _run([reference, model], tokens, progress):
        same += int((wanted.argmax(axis=1) == got.argmax(axis=1)).sum())
        for rows in _blocks(wanted):
            p, q = _log_softmax(wanted[rows]), _log_softmax(got[rows])
            found[at + rows.start : at + rows.stop] = (np.exp(p) * (p - q)).sum(axis=1)
    mean, stderr = mean_and_error(found)
    median, maximum = float(np.median(found)), float(found.max())
    return Divergence(mean, stderr, median, maximum, same / len(found), len(found), found)


def _run(
    models: Sequence[Predictor], tokens: Sequence[int], progress: Progress | None
) -> Iterator[tuple[int, NDArray[np.int64], list[NDArray[np.float32]]]]:
    """Yield (index of the first prediction, the tokens that did follow, logits [T, V] of each model)."""
    total = len(tokens) - 1
    if total < 2:
        raise UnsupportedError(f"a text of {max(total, 0)} tokens is too short to measure; expected at least 2")
    states = [model.new_state() for model in models]
    step = max(1, min(_MOST_TOKENS, _LOGITS_BYTES // (4 * models[0].hp.vocab)))
    for start in range(0, total, step):
        stop = min(start + step, total)
        pairs = zip(models, states, strict=True)
        logits = [model.forward(tokens[start:stop], state, every=True) for model, state in pairs]
        if not all(np.isfinite(rows).all() for rows in logits):
            raise GriffinError(f"tokens {start} to {stop}: the model's logits hold NaN or infinity")
        yield start, np.asarray(tokens[start + 1 : stop + 1], np.int64), logits
        if progress:
            progress(stop, total)


def _blocks(logits: NDArray[np.float32]) -> Iterator[slice]:
    """Cut rows so that their float64 copies stay small."""
    count, vocab = logits.shape
    step = max(1, _ROWS_BYTES // (8 * vocab))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Normalise in float64: at perplexities near 1, float32 would round the very thing that is measured."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error, the values taken as independent."""
    return float(values.mean()), float(values.std(ddof=1)) / sqrt(len(values))

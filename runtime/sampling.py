"""From logits to the next token: pure functions, in llama.cpp's order.

    repeat penalty -> presence and frequency penalty -> top-k -> top-p -> min-p -> temperature -> draw

so top-p and min-p see the probabilities before the temperature. Temperature 0 takes the largest logit after
the penalties, of equals the lowest id. Logits are float32 [V]; -inf forbids a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import GriffinError, UnsupportedError

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; the defaults are Ollama's. Raises `UnsupportedError` for a value out of range."""

    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 40  # the k likeliest tokens; 0: all
    top_p: float = 0.9  # the fewest tokens that together have this probability; 1: all
    min_p: float = 0.0  # tokens at least this probable relative to the likeliest; 0: all
    repeat_penalty: float = 1.0  # divides positive logits of recent tokens, multiplies negative ones; 1: none
    repeat_last_n: int = 64  # how many tokens are recent; 0: none, -1: all
    seed: int | None = None  # None: another one each time
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer holds already
    frequency_penalty: float = 0.0  # the same for every time that it holds it

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, "from 0 to 1000", _number(self.temperature, 0, 1000))
        _expect("top_k", self.top_k, "a whole number of at least 0", _whole(self.top_k, 0))
        _expect("top_p", self.top_p, "above 0 and at most 1", _number(self.top_p, 0, 1) and self.top_p > 0)
        _expect("min_p", self.min_p, "from 0 to 1", _number(self.min_p, 0, 1))
        _expect("repeat_penalty", self.repeat_penalty, "from 0.01 to 100", _number(self.repeat_penalty, 0.01, 100))
        _expect("repeat_last_n", self.repeat_last_n, "a whole number of at least -1", _whole(self.repeat_last_n, -1))
        _expect("presence_penalty", self.presence_penalty, "from -2 to 2", _number(self.presence_penalty, -2, 2))
        _expect("frequency_penalty", self.frequency_penalty, "from -2 to 2", _number(self.frequency_penalty, -2, 2))
        seeded = self.seed is None or _whole(self.seed, 0)
        _expect("seed", self.seed, "a whole number of at least 0, or none", seeded)

    def generator(self) -> np.random.Generator:
        """A fresh random generator: with a seed the same draws on every machine."""
        return np.random.Generator(np.random.PCG64(self.seed))


@dataclass(frozen=True)
class Said:
    """What the penalties look at: `recent` tokens; those of the `answer`, each once, and how often it is there.

    Whoever samples a long text token by token keeps these, rather than go through all of it each time.
    """

    recent: Ids
    answer: Ids
    counts: NDArray[np.integer[Any]]


def pick(
    logits: Logits, recent: Sequence[int], sampling: Sampling, rng: np.random.Generator, answer: Sequence[int] = ()
) -> int:
    """The id of the next token.

    `logits` float32 [V], not changed; `recent` all tokens so far, latest last (`repeat_last_n` of them count); `answer`
    those of the answer alone. Raises `GriffinError` for logits no token can be chosen by: NaN, +inf, or -inf
    throughout.
    """
    last = np.asarray(_last(recent, sampling.repeat_last_n), np.intp)
    return choose(logits, Said(last, *counted(answer)), sampling, rng)


def choose(logits: Logits, said: Said, sampling: Sampling, rng: np.random.Generator) -> int:
    """`pick` by what is known already of the tokens so far."""
    _check(logits)
    logits = penalize(logits, said.recent, sampling.repeat_penalty)
    logits = discourage(logits, said.answer, said.counts, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    ids = top_k(logits, sampling.top_k)
    ids = top_p(logits, ids, sampling.top_p)
    ids = min_p(logits, ids, sampling.min_p)
    return draw(logits, ids, sampling.temperature, rng)


def penalize(logits: Logits, tokens: Sequence[int] | Ids, penalty: float) -> Logits:
    """Logits in which each of `tokens` is less likely, once however often it is there; a copy if any changes."""
    if penalty == 1.0 or not len(tokens):
        return logits
    ids = np.asarray(tokens, dtype=np.intp)
    changed = logits.copy()
    chosen = changed[ids]
    changed[ids] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))
    return changed


def discourage(logits: Logits, ids: Ids, counts: NDArray[np.integer[Any]], presence: float, frequency: float) -> Logits:
    """Logits less `presence` for each of `ids`, the tokens of the answer, and less `frequency` by their `counts`.

    OpenAI's definition: of the answer's tokens, not the prompt's. A copy if any changes.
    """
    if presence == frequency == 0 or not ids.size:
        return logits
    changed = logits.copy()
    changed[ids] -= (presence + frequency * counts).astype(np.float32)
    return changed


def top_k(logits: Logits, k: int) -> Ids:
    """The ids of the k largest logits, ascending; of equal logits the lowest ids. All of them for k = 0."""
    if k == 0 or k >= logits.size:
        return np.arange(logits.size)
    smallest = np.partition(logits, logits.size - k)[logits.size - k]
    above = np.flatnonzero(logits > smallest)
    equal = np.flatnonzero(logits == smallest)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))


def top_p(logits: Logits, ids: Ids, p: float) -> Ids:
    """The fewest of `ids`, likeliest first, whose probabilities among `ids` sum to at least p."""
    if p == 1.0:
        return ids
    chosen = logits[ids]
    probabilities = softmax(chosen)
    size = 256  # sorting 256,000 logits would cost more than all else here, and a few hundred mostly suffice
    while True:
        top = top_k(chosen, min(size, ids.size))
        top = top[np.argsort(-chosen[top], kind="stable")]
        mass = np.cumsum(probabilities[top])
        if mass[-1] >= p or top.size == ids.size:
            return ids[top[: int(np.searchsorted(mass, p)) + 1]]
        size *= 16


def min_p(logits: Logits, ids: Ids, p: float) -> Ids:
    """Those of `ids` at least p times as probable as the likeliest of them."""
    if p == 0.0:
        return ids
    chosen = logits[ids]
    return ids[chosen >= chosen.max() + math.log(p)]


def draw(logits: Logits, ids: Ids, temperature: float, rng: np.random.Generator) -> int:
    """One of `ids` by the probabilities softmax(logits / temperature)."""
    mass = np.cumsum(softmax(logits[ids], temperature))
    # side="right": an id of probability 0 is never drawn
    return int(ids[np.searchsorted(mass, rng.random() * mass[-1], side="right")])


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities in float64; no overflow at any temperature above 0."""
    distance = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, rightly
        weights = np.exp(distance / temperature)
    return weights / weights.sum()


def _check(logits: Logits) -> None:
    largest = logits.max()  # NaN if any is
    if not math.isfinite(largest):
        bad = int(np.count_nonzero(np.isnan(logits) | np.isposinf(logits)))
        found = f"{bad} of {logits.size} are NaN or infinite" if bad else "every token is forbidden"
        raise GriffinError(f"logits: no token can be chosen: {found}")


def counted(tokens: Sequence[int]) -> tuple[Ids, NDArray[np.intp]]:
    """The tokens, each once and ascending, and how often each is there."""
    return np.unique(np.asarray(tokens, dtype=np.intp), return_counts=True)


def _last(tokens: Sequence[int], n: int) -> Sequence[int]:
    return tokens if n < 0 else tokens[max(0, len(tokens) - n) :]


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _expect(field: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise UnsupportedError(f"{field}: expected {expected}, found {value!r}")

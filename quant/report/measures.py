"""The measurements themselves. Each function is called in a process of its own (`quant.process`)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np

from griffin_gguf.quant.evaluate import Comparison, Divergence, Scores, compare, score, stream, windows
from griffin_gguf.quant.memory import Watch
from griffin_gguf.quant.process import Progress
from griffin_gguf.quant.report.data import At, Cost, Quality, Spread, bins
from griffin_gguf.quant.runner import GriffinRunner, Runner, open_runner
from griffin_gguf.quant.speed import Test, run_test
from griffin_gguf.runtime import Model
from griffin_gguf.runtime.backends.rounded import Precision, RoundedBackend
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import compute_threads
from griffin_gguf.runtime.model import BackendName
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Tuning

#: How a text is read.
Way = Literal["windows", "stream"]

PROMPT = 512  # tokens that the speed of reading is measured on
ANSWERS = range(32, 257)  # tokens of an answer: as many as take `_SECONDS`, so that a mishap is not all of a run
_SECONDS = 0.25
LOADS = 3
_FIRST_BIN = 64  # tokens; each bin of a text is half again as long as the one before, or nearly


@dataclass(frozen=True)
class Cut:
    """The beginning of a text: so many `tokens`, and the bytes that they are."""

    tokens: int
    nbytes: int


def cut(path: str, text: str, tokens: int, progress: Progress | None = None) -> Cut:
    """At most so many tokens of the text, as the model at `path` has them, BOS among them; whole characters.

    Of a text that is cut inside a character the rest of it is taken too, which may be some tokens more.
    """
    raw = text.encode()
    with open_runner(Path(path), threads=1) as runner:
        stop = sum(len(runner.piece(token)) for token in runner.encode(text)[:tokens])
        while stop < len(raw) and raw[stop] & 0xC0 == 0x80:  # a character's second, third or fourth byte
            stop += 1
        return Cut(len(runner.encode(raw[:stop].decode())), min(stop, len(raw)))


def measure_cost(
    key: str,
    path: str,
    text: str,
    context: int,
    positions: Sequence[int],
    runs: int,
    backend: BackendName,
    threads: int | None,
    progress: Progress,
) -> Cost:
    """Load, memory, speeds: `runs` times a prompt and an answer, then answers at the rising `positions` of the text.

    Speeds are `quant.speed`'s. The text begins again where it ends. A model whose memory grows with the text has room
    up to the last position, or to `context`, what it was trained on, if that is less.
    """
    room = max(PROMPT, min(max([0, *positions]), context)) + 2 * ANSWERS[-1]
    opened = partial(open_runner, Path(path), backend=backend, threads=threads, context=room)
    with Watch() as watch:
        runner, first = _timed(opened)
        with runner:
            prefill = run_test(runner, Test(prompt=PROMPT, batch=PROMPT), runs)
            state = runner.new_state()
            rate = run_test(runner, Test(gen=ANSWERS[0]), 1, start=state).mean
            answer = min(max(int(rate * _SECONDS), ANSWERS[0]), ANSWERS[-1])
            by_position = [_decode(runner, state, answer, runs)]
            memory, state_nbytes, runs_on = watch.memory, runner.state_nbytes, (runner.name, runner.threads)
            tokens: list[int] = np.resize(runner.encode(text), max([PROMPT, *positions])).tolist()
            for position in positions:
                if runner.state_nbytes is None and position > context:
                    break
                runner.forward(tokens[state.position : position], state)
                by_position.append(_decode(runner, state, answer, runs))
                progress(position, positions[-1])
    loads, read = Spread.of([first, *_loads(opened)]), Spread.of(prefill.rates)
    return Cost(
        key, *runs_on, loads, memory, state_nbytes, PROMPT, answer, read, by_position[0].decode, by_position
    )  # fmt: skip


def _timed(opened: Callable[[], Runner]) -> tuple[Runner, float]:
    """A runner, and the seconds until it was ready."""
    begun = perf_counter()
    return opened(), perf_counter() - begun


def _loads(opened: Callable[[], Runner]) -> Iterator[float]:
    """The times of further loads."""
    for _ in range(LOADS - 1):
        runner, seconds = _timed(opened)
        runner.close()
        yield seconds


def _decode(runner: Runner, state: Any, answer: int, runs: int) -> At:
    """Answers of so many tokens from where `state` stands, which stays there."""
    found = run_test(runner, Test(gen=answer, depth=state.position), runs, start=state)
    return At(state.position, Spread.of(found.rates))


def measure_quality(
    key: str,
    path: str,
    reference: str | None,
    precision: Precision | None,
    text: str,
    context: int,
    way: Way,
    ctx: int,
    backend: BackendName,
    threads: int | None,
    progress: Progress,
) -> Quality:
    """Losses over the text, read in one of the two ways; with a `reference` beside it.

    With a `precision` the model's recurrence is of that. A model whose memory grows with the text reads, in one pass,
    only as far as it was trained to, `context` tokens. Raises `UnsupportedError` for a reference that cuts the text
    into other tokens.
    """
    room = ctx if way == "windows" else context
    with _open(path, precision, backend, threads, room) as runner:
        ids = runner.encode(text)
        if len(ids) < ctx:
            raise UnsupportedError(
                f"{path}: the text has {len(ids)} of its tokens; expected a window of {ctx} at least"
            )
        if way == "stream" and runner.state_nbytes is None:
            ids = ids[:context]
        readings = windows(ids, ctx, runner.bos) if way == "windows" else stream(ids)
        if reference is None:
            scores, found = score(runner, readings, progress), None
        else:
            with open_runner(Path(reference), backend=backend, threads=threads, context=room) as other:
                if other.encode(text)[: len(ids)] != ids:
                    problem = f"the text becomes other tokens than with {reference}: they cannot be compared"
                    raise UnsupportedError(f"{path}: tokenizer: {problem}")
                found = compare(other, runner, readings, progress)
            scores = found.scores
        nbytes = sum(len(runner.piece(ids[i])) for i in scores.at)
    return _summary(key, scores, found, nbytes, ctx, way, len(ids))


def _summary(
    key: str, scores: Scores, found: Comparison | None, nbytes: int, ctx: int, way: Way, count: int
) -> Quality:
    distance = Divergence.of(found) if found else None
    by_position = bins(scores.at, scores.nll, found.kl if found else None, edges(count)) if way == "stream" else []
    halves = halves_of(found, count, ctx) if found and count >= ctx else None
    return Quality.of(key, scores, nbytes, distance, by_position, halves)


def edges(count: int) -> list[int]:
    """Bounds of bins over a text of so many tokens: the first token, 64, and times 1.41 until the end."""
    found, bound = [1], float(_FIRST_BIN)
    while bound < count:
        found.append(round(bound))
        bound *= 2**0.5
    return [*found, count]


def halves_of(found: Comparison, count: int, ctx: int) -> list[float]:
    """Mean KL over what is scored of each whole window of the text, however it was read."""
    readings = windows(range(count), ctx, None)
    bounds = [(r.start + r.first + 1, r.start + len(r.tokens)) for r in readings]
    cuts = np.searchsorted(found.at, bounds)
    return [float(found.kl[first:last].mean()) for first, last in cuts]


def _open(path: str, precision: Precision | None, backend: BackendName, threads: int | None, room: int) -> Runner:
    if precision is None:
        return open_runner(Path(path), backend=backend, threads=threads, context=room)
    file = GgufFile.open(path)
    try:
        tokenizer = Tokenizer.from_gguf(file.path, file.metadata)
        model = Model(file, tokenizer, RoundedBackend(file, precision, Tuning(threads)))
        return GriffinRunner(model, threads or compute_threads())
    except BaseException:
        file.close()
        raise

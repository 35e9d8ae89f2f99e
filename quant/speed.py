"""How fast a model reads and writes, in llama-bench's terms: its tests, its names for them, its way of measuring.

`pp512` reads a prompt of 512 tokens, `tg128` writes 128 one at a time, `pp512+tg128` does both in one go, and
`@ d4096` does so after 4,096 tokens that are not timed. Tokens are random, and neither sampling nor the making of
tokens from text is part of the time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter_ns
from typing import Any

import numpy as np

from griffin_gguf.quant.process import in_fresh_process
from griffin_gguf.quant.runner import GriffinRunner, Runner, open_runner
from griffin_gguf.runtime.errors import UnsupportedError

#: (done, total) tokens.
Progress = Callable[[int, int], None]

#: Tokens given to the model at once, llama-bench's default.
BATCH = 2048

_SEED = 0
_NANO = 10**9


@dataclass(frozen=True)
class Test:
    """What one repetition times: `prompt` tokens in batches of `batch`, then `gen` one at a time, after `depth` others.

    Raises `UnsupportedError` for numbers that cannot be, and where there is nothing to time.
    """

    prompt: int = 0
    gen: int = 0
    depth: int = 0
    batch: int = BATCH

    def __post_init__(self) -> None:
        for field, least in (("prompt", 0), ("gen", 0), ("depth", 0), ("batch", 1)):
            if getattr(self, field) < least:
                raise UnsupportedError(f"{field}: expected {least} tokens or more, found {getattr(self, field)}")
        if not self.tokens:
            raise UnsupportedError("a test of no tokens: expected some in prompt or gen")

    @property
    def tokens(self) -> int:
        """Timed tokens of one repetition."""
        return self.prompt + self.gen

    @property
    def context(self) -> int:
        """Tokens that a model must have room for."""
        return self.depth + self.tokens

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        parts = [f"{kind}{count}" for kind, count in (("pp", self.prompt), ("tg", self.gen)) if count]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Samples:
    """The times of all repetitions of a test, in nanoseconds, and the speeds that follow, in tokens per second."""

    tokens: int
    ns: tuple[int, ...]

    @cached_property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.tokens * _NANO / ns for ns in self.ns]

    @property
    def mean(self) -> float:
        """Mean of the rates."""
        return fmean(self.rates)

    @property
    def sd(self) -> float:
        """Sample standard deviation of the rates, 0 for a single one."""
        return stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def median(self) -> float:
        """Median of the rates: a mishap of the machine moves it less than the mean."""
        return median(self.rates)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the rates."""
        low, high = np.quantile(self.rates, (0.25, 0.75)).tolist()
        return low, high

    @property
    def mean_ns(self) -> float:
        """Mean time."""
        return fmean(self.ns)

    @property
    def sd_ns(self) -> float:
        """Sample standard deviation of the times, 0 for a single one."""
        return stdev(self.ns) if len(self.ns) > 1 else 0.0


def plan(
    prompts: Iterable[int],
    gens: Iterable[int],
    pairs: Iterable[tuple[int, int]] = (),
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (BATCH,),
) -> list[Test]:
    """Every test that llama-bench makes of such lists, in its order; what has no tokens is left out."""
    shapes = [*((n, 0) for n in prompts), *((0, n) for n in gens), *pairs]
    return [
        Test(prompt, gen, depth, batch)
        for depth, batch in itertools.product(depths, batches)
        for prompt, gen in shapes
        if prompt or gen
    ]


def read_depth(runner: Runner, depth: int, batch: int = BATCH, progress: Progress | None = None) -> Any:
    """A state after `depth` random tokens, to start tests from."""
    state = runner.new_state()
    for piece in _pieces(_Tokens(runner).text(depth), batch):
        runner.forward(piece, state)
        if progress:
            progress(state.position, depth)
    return state


def run_test(
    runner: Runner, test: Test, repetitions: int = 5, progress: Progress | None = None, start: Any = None
) -> Samples:
    """Time `test` so many times, each from a copy of one state, after a run that is not timed.

    `start` is what `read_depth` gave for the test's depth; it is read anew where there is none. `progress` hears
    between repetitions only. Raises `UnsupportedError` where the tokens do not fit the runner's context.
    """
    if repetitions < 1:
        raise UnsupportedError(f"repetitions: expected 1 or more, found {repetitions}")
    if start is None:
        start = read_depth(runner, test.depth, test.batch)
    assert start.position == test.depth, (start.position, test.depth)
    tokens = _Tokens(runner)
    _time(runner, start.copy(), tokens.text(test.prompt), tokens.text(min(test.gen, 1)), test.batch)
    times = list[int]()
    for i in range(repetitions):
        state = start.copy()
        times.append(_time(runner, state, tokens.text(test.prompt), tokens.text(test.gen), test.batch))
        del state  # before there is the next
        if progress:
            progress((i + 1) * test.tokens, repetitions * test.tokens)
    return Samples(test.tokens, tuple(times))


@dataclass(frozen=True)
class Measured:
    """Tests of one depth and how they went, one of `samples` each; and what the runner said of itself, see `Runner`."""

    runner: str
    description: str
    weights_nbytes: int
    parameters: int
    threads: int
    chunk: int
    notice: str | None
    samples: list[Samples]


def measure(
    path: Path, tests: Sequence[Test], *, threads: int | None, repetitions: int, progress: Progress | None = None
) -> Measured:
    """Run `tests`, all of one depth and batch, on the GGUF at `path`, in a process of its own.

    `progress` counts the depth, then the tokens of all repetitions. Raises what opening and running the model raise
    as `GriffinError`, and `BackendError` where the process dies of it.
    """
    arguments = {"path": str(path), "tests": [asdict(test) for test in tests], "threads": threads,
                 "repetitions": repetitions}  # fmt: skip
    return in_fresh_process(measure_here, Measured, str(path), arguments, progress)


def measure_here(
    path: str, tests: list[dict[str, int]], threads: int | None, repetitions: int, progress: Progress
) -> Measured:
    """As `measure`, in this process."""
    wanted = [Test(**fields) for fields in tests]
    depth, batch = wanted[0].depth, wanted[0].batch
    total = depth + sum(test.tokens * repetitions for test in wanted)
    with open_runner(path, backend="ggml", threads=threads, context=max(test.context for test in wanted)) as runner:
        start = read_depth(runner, depth, batch, lambda done, _: progress(done, total))
        before, samples = depth, list[Samples]()
        for test in wanted:
            samples.append(
                run_test(runner, test, repetitions, lambda done, _, read=before: progress(read + done, total), start)
            )
            before += test.tokens * repetitions
        return Measured(
            runner.name,
            runner.description,
            runner.weights_nbytes,
            runner.parameters,
            runner.threads,
            runner.chunk,
            runner.model.notice if isinstance(runner, GriffinRunner) else None,
            samples,
        )


def _time(runner: Runner, state: Any, prompt: list[int], gen: list[int], batch: int) -> int:
    """Nanoseconds to read `prompt` in batches, then `gen` one at a time."""
    pieces = list(_pieces(prompt, batch)) + [[token] for token in gen]
    begun = perf_counter_ns()
    for piece in pieces:
        runner.forward(piece, state)
    return perf_counter_ns() - begun


def _pieces(tokens: list[int], batch: int) -> Iterator[list[int]]:
    for start in range(0, len(tokens), batch):
        yield tokens[start : start + batch]


class _Tokens:
    """Tokens drawn evenly from a vocabulary, the same in every run."""

    def __init__(self, runner: Runner) -> None:
        self._generator = np.random.default_rng(_SEED)
        self._vocab, self._bos = runner.vocab, runner.bos

    def text(self, count: int) -> list[int]:
        """So many of them, BOS first where the model has one, as llama-bench does."""
        drawn: list[int] = self._generator.integers(0, self._vocab, count).tolist()
        if drawn and self._bos is not None:
            drawn[0] = self._bos
        return drawn

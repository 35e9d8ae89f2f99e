from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from foreign import foreign
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.quant import speed
from griffin_gguf.quant.runner import open_runner
from griffin_gguf.quant.speed import BATCH, Samples, plan, read_depth, run_test
from griffin_gguf.runtime.errors import BackendError, UnsupportedError


class Recorder:
    """A model that does nothing but write down what it is given, by the state that reads it."""

    vocab = 50

    def __init__(self, bos: int | None = 2) -> None:
        self.bos = bos
        self.states = 0
        self.calls: list[tuple[int, int, list[int]]] = []

    def new_state(self) -> Any:
        return self._state(0)

    def _state(self, position: int) -> Any:
        self.states += 1
        state = SimpleNamespace(position=position, number=self.states)
        state.copy = lambda: self._state(state.position)
        return state

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        assert not every
        self.calls.append((state.number, state.position, list(tokens)))
        state.position += len(tokens)
        return np.zeros(self.vocab, np.float32)

    def shapes(self) -> list[tuple[int, int, int]]:
        """(state, its position, tokens) of each call."""
        return [(number, position, len(tokens)) for number, position, tokens in self.calls]


def recorded(test: speed.Test, repetitions: int = 1, bos: int | None = 2) -> Recorder:
    recorder = Recorder(bos)
    samples = run_test(recorder, test, repetitions)  # pyright: ignore[reportArgumentType]
    assert len(samples.ns) == repetitions
    assert samples.tokens == test.prompt + test.gen
    return recorder


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (speed.Test(512), "pp512"),
        (speed.Test(gen=128), "tg128"),
        (speed.Test(512, 128), "pp512+tg128"),
        (speed.Test(512, depth=4096), "pp512 @ d4096"),
        (speed.Test(gen=1, depth=1, batch=1), "tg1 @ d1"),
    ],
)
def test_names_are_those_of_llama_bench(test: speed.Test, name: str) -> None:
    assert test.name == name
    assert test.context == test.depth + test.prompt + test.gen


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "no tokens"),
        ({"depth": 5}, "no tokens"),
        ({"prompt": -1}, "prompt: expected 0 tokens or more, found -1"),
        ({"gen": 1, "batch": 0}, "batch: expected 1 tokens or more, found 0"),
    ],
)
def test_a_test_that_cannot_be_is_refused(fields: dict[str, int], problem: str) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        speed.Test(**fields)
    with pytest.raises(UnsupportedError, match="repetitions: expected 1 or more, found 0"):
        recorded(speed.Test(1), 0)


def test_lists_make_tests_in_llama_benchs_order() -> None:
    found = plan([512, 0], [0, 128], [(64, 16)], depths=[0, 4096], batches=[256])
    assert [test.name for test in found] == [
        "pp512", "tg128", "pp64+tg16", "pp512 @ d4096", "tg128 @ d4096", "pp64+tg16 @ d4096",
    ]  # fmt: skip
    assert {test.batch for test in found} == {256}
    assert plan([512], [])[0].batch == BATCH == 2048
    assert [(t.depth, t.batch) for t in plan([8], [], depths=[0, 1], batches=[2, 3])] == [
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
    assert plan([0], [0]) == []


def test_a_prompt_is_read_in_batches_after_a_run_that_is_not_timed() -> None:
    recorder = recorded(speed.Test(10, batch=4), repetitions=2)
    run = [(0, 4), (4, 4), (8, 2)]
    assert recorder.shapes() == [(state, *piece) for state in (2, 3, 4) for piece in run]


def test_tokens_are_written_one_at_a_time() -> None:
    recorder = recorded(speed.Test(3, 2), repetitions=2)
    assert recorder.shapes() == [
        (2, 0, 3), (2, 3, 1),  # one is enough to warm up
        *((state, *piece) for state in (3, 4) for piece in ((0, 3), (3, 1), (4, 1))),
    ]  # fmt: skip


def test_the_depth_is_read_once_and_every_run_starts_from_a_copy() -> None:
    recorder = recorded(speed.Test(gen=2, depth=5, batch=4), repetitions=2)
    assert recorder.shapes() == [(1, 0, 4), (1, 4, 1), (2, 5, 1), (3, 5, 1), (3, 6, 1), (4, 5, 1), (4, 6, 1)]


def test_a_depth_that_was_read_before_is_not_read_again() -> None:
    recorder: Any = Recorder()
    told: list[tuple[int, int]] = []
    start = read_depth(recorder, 6, 4, lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    del recorder.calls[:], told[:]
    run_test(recorder, speed.Test(3, depth=6), 2, lambda done, total: told.append((done, total)), start)
    assert [position for _, position, _ in recorder.calls] == [6] * 3
    assert told == [(3, 6), (6, 6)]


@pytest.mark.parametrize("bos", [None, 2])
def test_texts_begin_with_bos_where_the_model_has_one(bos: int | None) -> None:
    recorder = recorded(speed.Test(40, 20, depth=30), bos=bos)
    firsts = [tokens[0] for _, position, tokens in recorder.calls if len(tokens) > 1]
    assert len(firsts) == 3
    if bos is not None:
        assert firsts == [bos] * 3
        assert next(tokens for _, position, tokens in recorder.calls if position == 70) == [bos]
    drawn = [token for _, _, tokens in recorder.calls for token in tokens]
    assert len(set(drawn)) > 25, "not always the same token"
    assert set(drawn) <= set(range(Recorder.vocab))
    assert recorder.calls == recorded(speed.Test(40, 20, depth=30), bos=bos).calls, "the same in every run"


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), st.integers(1, 10**5))
def test_statistics_are_numpys(ns: list[int], tokens: int) -> None:
    samples = Samples(tokens, tuple(ns))
    rates = tokens / (np.array(ns) / 1e9)
    np.testing.assert_allclose(samples.rates, rates)
    np.testing.assert_allclose(samples.mean, rates.mean())
    np.testing.assert_allclose(samples.median, np.median(rates))
    np.testing.assert_allclose(samples.quartiles, np.quantile(rates, [0.25, 0.75]))
    np.testing.assert_allclose(samples.mean_ns, np.mean(ns))
    if len(ns) == 1:
        assert samples.sd == samples.sd_ns == 0
    else:
        np.testing.assert_allclose(samples.sd, rates.std(ddof=1), rtol=1e-6, atol=1e-9 * rates.max())
        np.testing.assert_allclose(samples.sd_ns, np.std(ns, ddof=1), rtol=1e-6, atol=1e-9 * max(ns))


@pytest.fixture(scope="module", params=["griffin", "llama", "mamba"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return random_model(folder) if request.param == "griffin" else foreign(folder / "model.gguf", request.param)


def test_real_models_are_measured_within_the_context_that_a_test_needs(path: Path) -> None:
    test = speed.Test(30, 5, depth=221, batch=16)
    with open_runner(path, threads=1, context=512) as runner:
        samples = run_test(runner, test, 3)
        assert len(samples.ns) == 3
        assert min(samples.ns) > 0
        assert samples.quartiles[0] <= samples.median <= samples.quartiles[1]
        start = read_depth(runner, 221)
        run_test(runner, test, 1, start=start)
        assert start.position == 221, "what was kept is as it was"


def test_a_process_of_its_own_says_what_was_measured(path: Path) -> None:
    told: list[tuple[int, int]] = []
    tests = plan([9], [2], depths=[20])
    found = speed.measure(
        path, tests, threads=1, repetitions=2, progress=lambda done, total: told.append((done, total))
    )
    assert [samples.tokens for samples in found.samples] == [9, 2]
    assert all(len(samples.ns) == 2 for samples in found.samples)
    assert told == [(20, 42), (29, 42), (38, 42), (40, 42), (42, 42)]
    with open_runner(path, threads=1) as runner:
        assert (found.runner, found.description, found.threads) == (runner.name, runner.description, 1)
        assert (found.weights_nbytes, found.parameters) == (runner.weights_nbytes, runner.parameters)
        assert found.chunk == runner.chunk == 512


def test_what_kills_the_process_is_an_error(tmp_path: Path) -> None:
    path = foreign(tmp_path / "hostile.gguf", block_count=600)  # llama.cpp ends the process, as an assertion
    with pytest.raises(BackendError, match=r"hostile\.gguf: measuring it ended with status -6"):
        speed.measure(path, plan([1], []), threads=1, repetitions=1)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.gguf")
    with (
        open_runner(path, threads=1, context=256) as runner,
        pytest.raises(UnsupportedError, match="a context of 256 tokens cannot hold"),
    ):
        run_test(runner, speed.Test(200, depth=100))

"""Mishaps: interruptions, threads that meet, memory that runs out, shapes that nobody would choose."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from models import random_model

from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends.ggml_memory import GgmlState
from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml.device import Allocator, Device
from griffin_gguf.runtime.state import State

TEXT = np.random.default_rng(0).integers(0, 384, 40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), attention_window_size=12)


def test_a_state_goes_back_although_the_pool_has_grown(path: Path) -> None:
    with load(path, backend="ggml", threads=1) as model:
        state = model.new_state()
        model.forward(TEXT[:20], state, trace=True)
        others = [model.new_state() for _ in range(3)]
        state.rollback(7)
        assert state.position == 7
        assert len(others) == 3


def test_many_taps_do_not_end_the_process(tmp_path: Path) -> None:
    """A file may ask for up to 64: the context must have room for a graph of several short chunks."""
    model = random_model(tmp_path, num_hidden_layers=1, block_types=["recurrent"], conv1d_width=64)
    program = (
        "import sys; from griffin_gguf.runtime import load\n"
        "with load(sys.argv[1], backend='ggml', threads=1) as model:\n"
        "    model.forward_batch([([5, 6], model.new_state()) for _ in range(2)])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_a_rollback_that_another_thread_overtakes_is_refused(path: Path) -> None:
    with load(path, backend="ggml", threads=1) as model:
        state, other = model.new_state(), model.new_state()
        model.forward(TEXT[:20], state, trace=True)
        assert isinstance(state, GgmlState)
        found: list[BaseException] = []

        def back() -> None:
            try:
                state.rollback(7)
            except BaseException as error:
                found.append(error)

        with state._pool.lock:  # pyright: ignore[reportPrivateUsage]
            thread = threading.Thread(target=back)
            thread.start()
            thread.join(0.2)  # it waits for the lock
            model.forward(TEXT[:20], other, trace=True)
        thread.join()
        assert [type(error) for error in found] == [UnsupportedError]


def test_a_rollback_that_is_interrupted_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path, backend="ggml", threads=1) as model:
        state = model.new_state()
        model.forward(TEXT[:20], state, trace=True)
        write, calls = Device.write, [0]

        def interrupted(self: Device, *arguments: object) -> None:
            calls[0] += 1
            if calls[0] == 2:
                raise KeyboardInterrupt
            write(self, *arguments)  # pyright: ignore[reportArgumentType]

        with monkeypatch.context() as patch:
            patch.setattr(Device, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                state.rollback(7)
        with pytest.raises(UnsupportedError, match="interrupted"):
            model.forward([5], state)


def test_a_graph_that_finds_no_memory_leaves_its_states_as_they_were(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(path, backend="ggml", threads=1) as model:
        state = model.new_state()
        model.forward(TEXT[:20], state)

        def full(self: Allocator, context: object) -> None:
            raise BackendError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(Allocator, "place", full)
            with pytest.raises(BackendError):
                model.forward(TEXT[20:29], state)
        model.forward(TEXT[20:29], state)  # nothing had been computed yet
        assert state.position == 29


def test_an_allocator_that_failed_fails_again() -> None:
    """It keeps the plan of the graph that it had no memory for; a second try must not use it."""
    program = (
        "from griffin_gguf.runtime.errors import BackendError\n"
        "from griffin_gguf.runtime.ggml.device import Device\n"
        "from griffin_gguf.runtime.ggml.graph import Context\n"
        "allocator = Device(1, 'CPU').allocator()\n"
        "for _ in range(2):\n"
        "    context = Context(8, nodes=8)\n"
        "    context.output(context.unary('sqr', context.input((1 << 20, 1 << 24))))\n"
        "    try:\n"
        "        allocator.place(context)\n"
        "    except BackendError:\n"
        "        pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_a_text_that_ends_before_the_last_pass_leaves_no_trace(path: Path) -> None:
    with load(path, backend="ggml", threads=1) as model:
        short, long = model.new_state(), model.new_state()
        model.forward_batch([(TEXT[:5], short), (np.resize(TEXT, 600), long)], trace=True)
        with pytest.raises(UnsupportedError, match="nothing of the last chunk is kept"):
            short.rollback(2)
        long.rollback(599)
        assert long.position == 599


def test_a_closed_model_ends_its_states_in_words(path: Path, tmp_path: Path) -> None:
    model = load(path, backend="ggml", threads=1)
    state = model.new_state()
    model.forward(TEXT[:20], state, trace=True)
    snapshot = state.snapshot()
    model.close()
    uses = (state.copy, state.read, state.snapshot, lambda: state.save(tmp_path / "s"), lambda: state.rollback(7))
    for use in (*uses, lambda: state.resume(snapshot), lambda: model.new_state(snapshot)):
        with pytest.raises(UnsupportedError, match="closed"):
            use()


def copy_until_it_fails(state: State, found: list[BaseException]) -> None:
    try:
        while True:
            state.copy().read()
    except BaseException as error:
        found.append(error)


def test_closing_meets_states_in_other_threads(path: Path) -> None:
    """ggml would end the process where memory is read that is gone."""
    for _ in range(5):
        model = load(path, backend="ggml", threads=1)
        state = model.new_state()
        model.forward(TEXT[:20], state)
        found: list[BaseException] = []

        threads = [threading.Thread(target=copy_until_it_fails, args=(state, found)) for _ in range(2)]
        for thread in threads:
            thread.start()
        model.close()
        for thread in threads:
            thread.join()
        assert [type(error) for error in found] == [UnsupportedError] * 2

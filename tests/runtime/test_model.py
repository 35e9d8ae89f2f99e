"""The public calls of a loaded model: state, chunks, refusals."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from checkpoints import random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime import model as model_module
from griffin_gguf.runtime.backends.ggml_weights import Weights
from griffin_gguf.runtime.errors import BackendError, FileFormatError, UnsupportedError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.tuning import Buffers, Tuning

TOKENS = np.random.default_rng(11).integers(0, 384, 160)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), attention_window_size=12)


@pytest.fixture(scope="module", params=["numpy", "ggml"])
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 159), max_size=12, unique=True))
def test_a_text_may_be_cut_anywhere(model: Model, cuts: list[int]) -> None:
    whole = model.forward(TOKENS, model.new_state(), every=True)
    state, parts = model.new_state(), []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(TOKENS)], strict=True):
        parts.append(model.forward(TOKENS[start:stop], state, every=True))
    assert state.position == len(TOKENS)
    assert np.abs(np.concatenate(parts) - whole).max() <= 1e-5 * np.abs(whole).max()


def test_the_last_row_of_every_is_what_forward_returns(model: Model) -> None:
    last = model.forward(TOKENS, model.new_state())
    every = model.forward(TOKENS, model.new_state(), every=True)
    assert last.shape == (384,)
    assert np.abs(last - every[-1]).max() <= 1e-5 * np.abs(last).max()


def test_the_same_text_gives_the_same_bits(model: Model) -> None:
    assert np.array_equal(model.forward(TOKENS, model.new_state()), model.forward(TOKENS, model.new_state()))


def test_a_copy_goes_its_own_way(model: Model) -> None:
    state = model.new_state()
    model.forward(TOKENS[:50], state)
    twin = state.copy()
    assert twin.position == 50
    ahead = model.forward(TOKENS[50:90], state)
    model.forward(TOKENS[90:140], state)
    assert np.array_equal(model.forward(TOKENS[50:90], twin), ahead)
    assert (state.position, twin.position) == (140, 90)


def test_two_texts_interleaved_do_not_meet(model: Model) -> None:
    alone = [model.forward(TOKENS[:40], model.new_state()), model.forward(TOKENS[40:80], model.new_state())]
    states = [model.new_state(), model.new_state()]
    found = alone
    for t in range(40):
        found = [model.forward(TOKENS[t : t + 1], states[0]), model.forward(TOKENS[40 + t : 41 + t], states[1])]
    for expected, logits in zip(alone, found, strict=True):
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_state_never_grows(model: Model) -> None:
    hp, state = model.hp, model.new_state()
    ring = (hp.window + 512) * hp.kv_heads * hp.head_width
    expected = sum(4 * hp.lru_width * hp.conv_taps if r else 2 * 4 * ring for r in hp.recurrent)
    assert state.nbytes == expected
    model.forward(np.tile(TOKENS, 10), state)
    assert state.nbytes == expected


@pytest.mark.parametrize("tokens", [[], [384], [-1], [[1, 2]], [1.7], [True], ["a"], [2**70], None])
def test_tokens_that_cannot_be_are_refused_and_the_state_stays(model: Model, tokens: Any) -> None:
    state = model.new_state()
    model.forward(TOKENS[:3], state)
    with pytest.raises(UnsupportedError, match="tokens: "):
        model.forward(tokens, state)
    assert state.position == 3
    after = model.forward(TOKENS[3:9], state)
    assert np.abs(after - model.forward(TOKENS[:9], model.new_state())).max() <= 1e-5 * np.abs(after).max()


def test_arguments_out_of_range_are_refused_by_name(path: Path) -> None:
    for threads in (0, -1, 513, 3_000_000_000):
        with pytest.raises(UnsupportedError, match="threads: "):
            load(path, threads=threads)
    with pytest.raises(UnsupportedError, match="backend: "):
        load(path, backend="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileFormatError, match="nowhere"):
        load(path.parent / "nowhere.gguf")


def test_auto_takes_ggml_and_says_nothing(path: Path) -> None:
    with load(path) as model:
        assert (model.backend, model.notice) == ("ggml", None)


def test_another_ggml_is_an_error_and_only_auto_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = abi.GGML_VERSION
    monkeypatch.setattr(abi, "GGML_VERSION", "0.1.2")
    abi.load.cache_clear()
    try:
        with pytest.raises(BackendError, match=rf"0\.1\.2.*{found}"):
            load(path, backend="ggml")
        with load(path) as model:
            assert model.backend == "numpy"
            assert model.notice is not None
            assert "0.1.2" in model.notice
            assert found in model.notice
    finally:
        abi.load.cache_clear()


def test_a_closed_model_is_refused_not_read(path: Path, model: Model) -> None:
    other = load(path, backend=model.backend, threads=1)  # pyright: ignore[reportArgumentType]
    state = other.new_state()
    other.forward([5], state)
    other.close()
    other.close()
    for use in (lambda: other.forward([5], state), other.new_state):
        with pytest.raises(UnsupportedError, match="closed"):
            use()


def test_a_state_of_another_model_is_refused(path: Path, model: Model) -> None:
    with load(path, backend=model.backend, threads=1) as other:  # pyright: ignore[reportArgumentType]
        state = other.new_state()
        other.forward([5], state)
        with pytest.raises(UnsupportedError, match="state: "):
            model.forward([6], state)
        with pytest.raises(UnsupportedError, match="state: "):
            model.forward([6], state.copy())
        assert state.position == 1


def test_threads_of_one_model_take_turns(model: Model) -> None:
    expected = [model.forward(TOKENS[i : i + 30], model.new_state()) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.forward(TOKENS[i : i + 30], model.new_state()), range(8)))
    for logits, alone in zip(found, expected, strict=True):
        assert np.array_equal(logits, alone)


def test_a_state_larger_than_memory_is_refused_by_name(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UnsupportedError, match=r"attention\.sliding_window.* 1,000 are free"):
        model.new_state()


@pytest.mark.parametrize("position", [30_000, 1_000_000, 2**31 + 5, 2**40])
def test_ggml_equals_numpy_however_long_the_text_has_been(path: Path, position: int) -> None:
    logits: list[NDArray[np.float32]] = []
    for backend in ("numpy", "ggml"):
        with load(path, backend=backend, threads=1) as model:  # pyright: ignore[reportArgumentType]
            state = model.new_state()
            state.position = position
            logits.append(model.forward(TOKENS, state, every=True))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


def test_a_copy_that_has_no_room_any_more_is_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned for in another hour: the model runs, from its mapped file, and says so."""
    monkeypatch.setattr(model_module, "stored", lambda *_: (Tuning(threads=1, buffers="both"), None))

    def refuse(*_: object, **__: object) -> None:
        raise BackendError("ggml: no memory for the repacked weights")

    monkeypatch.setattr(Weights, "_repack", refuse)
    with load(path) as model:
        assert model.backend == "ggml"
        assert model.notice == "weights stay as they are mapped: ggml: no memory for the repacked weights"
        assert model.forward([1, 2], model.new_state()).shape == (384,)


@pytest.mark.parametrize("buffers", ["repacked", "both"])
def test_repacked_weights_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: Buffers) -> None:
    """Types without such kernels among them, and one token as well as a chunk."""
    folder = random_checkpoint(tmp_path / "wide", dtype="f32", hidden_size=256, lru_width=256, intermediate_size=1024)
    convert(folder, [(tmp_path / f"{t}.gguf", t) for t in ("Q4_K_M", "Q2_K", "Q4_0", "Q8_0")])
    for type in ("Q4_K_M", "Q2_K", "Q4_0", "Q8_0"):
        found: list[NDArray[np.float32]] = []
        for tuning in (Tuning(1), Tuning(1, buffers)):
            monkeypatch.setattr(model_module, "stored", lambda *_, tuning=tuning: (tuning, None))
            with load(tmp_path / f"{type}.gguf", backend="ggml") as model:
                state = model.new_state()
                rows = [model.forward(TOKENS[:40], state), *(model.forward([t], state) for t in TOKENS[40:50])]
                found.append(np.stack(rows))
        assert np.abs(found[0] - found[1]).max() <= 2e-2 * np.abs(found[0]).max()

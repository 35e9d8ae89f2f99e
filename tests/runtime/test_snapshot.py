"""A state at rest: bit by bit the same text goes on from it, as often as one likes."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from models import random_model

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.errors import UnsupportedError

WINDOW = 12
RING = WINDOW + 512


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("snapshot"), attention_window_size=WINDOW)


@pytest.fixture(scope="module", params=["numpy", "ggml"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 384, count).tolist()


@pytest.mark.parametrize("count", [1, 7, WINDOW, 100, RING - 1, RING, RING + 1, 3 * RING + 5])
def test_a_text_goes_on_bit_by_bit(model: Model, count: int) -> None:
    state = model.new_state()
    model.forward(tokens(count), state)
    snapshot = state.snapshot()
    assert state.logits is not None
    assert snapshot.logits is not None
    assert snapshot.logits.tobytes() == state.logits.tobytes()
    expected = model.forward(tokens(9, 1), state)
    for _ in range(2):
        again = model.new_state(snapshot)
        assert again.position == count
        assert model.forward(tokens(9, 1), again).tobytes() == expected.tobytes()


def test_rings_are_as_long_as_what_they_hold(model: Model) -> None:
    state = model.new_state()
    empty = state.snapshot()
    sizes: list[int] = []
    for _ in range(3):
        model.forward(tokens(10), state)
        sizes.append(state.snapshot(logits=False).nbytes)
    ring = [name for name in empty.arrays if name.endswith((".k", ".v"))]
    row = sum(empty.arrays[name].nbytes for name in ring)  # one row is kept where none is in use
    assert [later - earlier for earlier, later in pairwise(sizes)] == [10 * row, 10 * row]
    model.forward(tokens(2 * RING), state)
    assert state.snapshot(logits=False).nbytes == state.nbytes
    assert {name: array.shape for name, array in empty.whole().items()} == {
        name: shape for name, (_, shape) in state.layout.items()
    }


def test_what_was_in_a_state_does_not_matter(model: Model) -> None:
    state, other = model.new_state(), model.new_state()
    model.forward(tokens(20), state)
    snapshot = state.snapshot()
    expected = model.forward(tokens(5, 1), state)
    model.forward(tokens(900, 2), other, trace=True)
    other.resume(snapshot)
    assert model.forward(tokens(5, 1), other).tobytes() == expected.tobytes()
    other.resume(snapshot)
    with pytest.raises(UnsupportedError, match="cannot go back to 10"):
        other.rollback(10)  # the trace was of another text


def test_a_snapshot_never_changes(model: Model) -> None:
    state = model.new_state()
    model.forward(tokens(20), state)
    snapshot = state.snapshot()
    before = {name: array.tobytes() for name, array in snapshot.arrays.items()}
    model.forward(tokens(20), state)
    model.forward(tokens(600), model.new_state(snapshot))
    assert {name: array.tobytes() for name, array in snapshot.arrays.items()} == before
    assert not any(array.flags.writeable for array in snapshot.arrays.values())


def test_its_file_is_that_of_the_state(model: Model, tmp_path: Path) -> None:
    state = model.new_state()
    model.forward(tokens(20), state)
    state.snapshot().save(tmp_path / "snapshot.state")
    loaded = model.load_snapshot(tmp_path / "snapshot.state")
    assert loaded.position == 20
    expected = model.forward(tokens(5, 1), state)
    assert model.forward(tokens(5, 1), model.new_state(loaded)).tobytes() == expected.tobytes()


def test_another_models_is_refused(model: Model, tmp_path: Path) -> None:
    with load(random_model(tmp_path, attention_window_size=WINDOW + 1), backend="numpy") as other:
        state = other.new_state()
        other.forward(tokens(3), state)
        with pytest.raises(UnsupportedError, match="of another model"):
            model.new_state(state.snapshot())


def test_a_torn_state_has_none(model: Model) -> None:
    state = model.new_state()
    state.torn = True
    with pytest.raises(UnsupportedError, match="interrupted"):
        state.snapshot()

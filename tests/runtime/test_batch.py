"""Several texts at once, going back inside a chunk, and states as values: on both backends, against single runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.backends.ggml import Graph
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.saved_state import LAST_POSITION
from griffin_gguf.runtime.state import CHUNK, State

TEXTS = [np.random.default_rng(seed).integers(0, 384, 120) for seed in range(6)]
TEXT = TEXTS[0]
LONG = np.random.default_rng(9).integers(0, 384, CHUNK + 40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"), attention_window_size=12)


@pytest.fixture(scope="module", params=["numpy", "ggml"])
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(model: Model) -> list[NDArray[np.float32]]:
    """Every token's logits of each text by itself."""
    return [model.forward(text, model.new_state(), every=True) for text in TEXTS]


def last_of(state: State) -> NDArray[np.float32]:
    assert state.logits is not None
    return state.logits


def close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


steps = st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any), min_size=1, max_size=6)


@settings(max_examples=30)
@given(counts=steps, every=st.booleans())
def test_texts_of_any_lengths_at_any_positions_read_as_if_alone(
    model: Model, alone: list[NDArray[np.float32]], counts: list[list[int]], every: bool
) -> None:
    states = [model.new_state() for _ in TEXTS]
    for step in counts:
        taking = [i for i, count in enumerate(step) if count]
        before = [states[i].position for i in taking]
        batch = [(TEXTS[i][p : p + step[i]], states[i]) for i, p in zip(taking, before, strict=True)]
        for i, p, found in zip(taking, before, model.forward_batch(batch, every), strict=True):
            rows = alone[i][p : p + step[i]]
            assert close(found, rows if every else rows[-1])
            assert states[i].position == p + step[i]
            assert close(last_of(states[i]), rows[-1])


def test_a_batch_longer_than_a_chunk_moves_every_text(model: Model) -> None:
    whole = model.forward(LONG, model.new_state(), every=True)
    states = [model.new_state() for _ in range(3)]
    found = model.forward_batch([(LONG, states[0]), (LONG[:1], states[1]), (LONG[: CHUNK + 7], states[2])])
    for logits, at in zip(found, (len(LONG), 1, CHUNK + 7), strict=True):
        assert close(logits, whole[at - 1])


def test_sixteen_texts_say_for_long_what_each_says_alone(model: Model) -> None:
    """Top-1 over 16 x 64 tokens, each text going its own way."""
    prompts = [np.random.default_rng(100 + i).integers(0, 384, 3 + i) for i in range(16)]
    together = [model.new_state() for _ in prompts]
    logits = model.forward_batch(list(zip(prompts, together, strict=True)))
    said = [[int(row.argmax())] for row in logits]
    for _ in range(63):
        logits = model.forward_batch([([tokens[-1]], state) for tokens, state in zip(said, together, strict=True)])
        for tokens, row in zip(said, logits, strict=True):
            tokens.append(int(row.argmax()))
    for prompt, tokens in zip(prompts, said, strict=True):
        assert greedy(model, prompt, 64) == tokens


def greedy(model: Model, prompt: NDArray[np.int64], count: int) -> list[int]:
    state, tokens = model.new_state(), list[int]()
    row = model.forward(prompt, state)
    while len(tokens) < count:
        tokens.append(int(row.argmax()))
        row = model.forward(tokens[-1:], state)
    return tokens


@settings(max_examples=30)
@given(start=st.integers(0, 40), count=st.integers(2, 60), back=st.integers(1, 59), every=st.booleans())
def test_a_state_goes_back_to_any_token_of_its_chunk(
    model: Model, alone: list[NDArray[np.float32]], start: int, count: int, back: int, every: bool
) -> None:
    state = model.new_state()
    if start:
        model.forward(TEXT[:start], state)
    model.forward(TEXTS[1][:count], state, every=every, trace=True)  # a draft that is thrown away but for its beginning
    wanted = start + max(1, count - back)
    reference = model.new_state()
    expected = model.forward(np.concatenate([TEXT[:start], TEXTS[1][: wanted - start]]), reference)
    state.rollback(wanted)
    assert state.position == wanted
    if every or wanted == start + count:
        assert state.logits is not None
        assert close(state.logits, expected)
    else:
        assert state.logits is None
    tail = TEXTS[2][:30]  # longer than the window, so that rows left by the draft would be seen
    assert close(model.forward(tail, state, every=True), model.forward(tail, reference, every=True))


def test_several_states_go_back_after_one_batch(model: Model, alone: list[NDArray[np.float32]]) -> None:
    states = [model.new_state() for _ in range(3)]
    batch = [(TEXTS[0][:1], states[0]), (TEXTS[1][:9], states[1]), (TEXTS[2][:5], states[2])]
    model.forward_batch(batch, every=True, trace=True)
    states[1].rollback(4)
    states[2].rollback(1)
    for i, p in ((0, 1), (1, 4), (2, 1)):
        assert close(model.forward(TEXTS[i][p : p + 3], states[i]), alone[i][p + 2])


def test_other_texts_may_be_read_before_a_state_goes_back(model: Model, alone: list[NDArray[np.float32]]) -> None:
    state, other = model.new_state(), model.new_state()
    model.forward(TEXT[:20], state, every=True, trace=True)
    model.forward(TEXTS[1], other)
    states = [model.new_state() for _ in range(9)]  # the slots of all states move
    state.rollback(7)
    assert state.logits is not None
    assert close(state.logits, alone[0][6])
    assert close(model.forward(TEXT[7:9], state), alone[0][8])
    assert len(states) == 9


def test_what_is_not_in_the_last_chunk_cannot_be_gone_back_to(model: Model) -> None:
    state = model.new_state()
    model.forward(TEXT[:10], state)
    with pytest.raises(UnsupportedError, match="cannot go back to 5: nothing"):
        state.rollback(5)
    model.forward(TEXT[10:20], state, trace=True)
    for position in (10, 3, 0, -1, 21, 1 << 40):
        with pytest.raises(UnsupportedError, match="11 to 20"):
            state.rollback(position)
    state.rollback(20)
    assert state.position == 20
    model.forward(TEXT[20:22], state)
    with pytest.raises(UnsupportedError, match="nothing"):
        state.rollback(21)


def test_one_state_twice_in_a_batch_is_refused(model: Model) -> None:
    state = model.new_state()
    with pytest.raises(UnsupportedError, match="two texts at once"):
        model.forward_batch([([1], state), ([2], state)])
    assert state.position == 0


def test_an_empty_batch_is_nothing(model: Model) -> None:
    assert model.forward_batch([]) == []


def test_a_saved_state_goes_on_bit_by_bit(model: Model, tmp_path: Path) -> None:
    state = model.new_state()
    model.forward(TEXT[:50], state)
    state.save(tmp_path / "text.state")
    loaded = model.load_state(tmp_path / "text.state")
    assert loaded.position == 50
    assert np.array_equal(bits(loaded.logits), bits(state.logits))
    assert np.array_equal(model.forward(TEXT[50:70], loaded), model.forward(TEXT[50:70], state))


def test_a_saved_state_is_for_its_model_and_its_backend(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    state = model.new_state()
    state.save(tmp_path / "text.state")
    with (
        load(random_model(folder, attention_window_size=11), threads=1) as other,
        pytest.raises(FileFormatError, match=r"text\.state"),
    ):
        other.load_state(tmp_path / "text.state")


def test_slots_come_back(path: Path) -> None:
    """Thousands of states, few at a time, take no more memory than few."""
    with load(path, backend="ggml", threads=1) as model:
        states: list[State] = []
        for i in range(200):
            states = [*states[-2:], model.new_state()]
            assert not any(array.any() for array in states[-1].read().values())
            model.forward(TEXT[i % 100 :][:3], states[-1])
        assert model._backend.memory.slots == 4  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def bits(x: NDArray[np.float32] | None) -> NDArray[np.uint32]:
    assert x is not None
    return x.view(np.uint32)


def test_after_an_interrupted_step_a_state_says_so(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the middle of a step some layers have read the token and others not: going on would be wrong text."""
    with load(path, backend="ggml", threads=1) as model:
        state = model.new_state()
        model.forward(TEXT[:20], state)
        kept = state.copy()
        expected = model.forward(TEXT[20:23], kept.copy())
        graph_run = Graph.run

        def interrupted(graph: Graph, *arguments: Any) -> None:
            graph_run(graph, *arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Graph, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.forward(TEXT[20:23], state)
        for use in (lambda: model.forward([5], state), state.copy, lambda: state.save(tmp_path / "s"),
                    lambda: state.rollback(19)):  # fmt: skip
            with pytest.raises(UnsupportedError, match="state: a step on it was interrupted"):
                use()
        assert np.array_equal(model.forward(TEXT[20:23], kept), expected)


@pytest.mark.parametrize("position", [(1 << 31) - 4, (1 << 32) - 4, (1 << 53) - 20])
def test_far_positions_are_the_same_on_both_backends(path: Path, position: int) -> None:
    """ggml's own positions end at 2^31; these are ours."""
    found: list[NDArray[np.float32]] = []
    for backend in ("numpy", "ggml"):
        with load(path, backend=backend, threads=1) as model:
            state = model.new_state()
            model.forward(TEXT[:30], state)
            state.position = position
            found.append(model.forward(TEXT[30:46], state, every=True))
            assert state.position == position + 16
    assert close(found[1], found[0])


def test_no_text_goes_beyond_what_f64_counts(model: Model) -> None:
    state = model.new_state()
    state.position = LAST_POSITION - 2
    model.forward([5, 6], state)
    with pytest.raises(UnsupportedError, match="beyond 9007199254740992"):
        model.forward([5], state)

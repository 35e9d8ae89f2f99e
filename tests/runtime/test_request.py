"""What an engine tells of a request on its way: snapshots at marks, changes, times; and what an answer is held to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.errors import BackendError, GriffinError, UnsupportedError
from griffin_gguf.runtime.generate import Finish, Terms, generate
from griffin_gguf.runtime.logprobs import token_logprobs
from griffin_gguf.runtime.request import Request, Watch
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.snapshot import Snapshot

GREEDY = Sampling(temperature=0)
VOCAB = 384


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = random_model(tmp_path_factory.mktemp("request"), attention_window_size=12)
    with load(path, threads=1) as loaded:
        yield loaded


class Told:
    """What came of a watch."""

    def __init__(self, marks: Sequence[int] = ()) -> None:
        self.snapshots: dict[int, Snapshot] = {}
        self.changes = 0
        self.watch = Watch(marks, self._snapshot, self._change)

    def _snapshot(self, request: Request, count: int, snapshot: Snapshot) -> None:
        self.snapshots[count] = snapshot

    def _change(self) -> None:
        self.changes += 1


def run(engine: Engine) -> None:
    while engine.step():
        pass


@settings(max_examples=15)
@given(st.integers(1, 700), st.lists(st.integers(-1, 800), max_size=5), st.integers(0, 3))
def test_snapshots_are_the_states_at_the_marks(model: Model, length: int, marks: list[int], others: int) -> None:
    engine, told = Engine(model, slots=4, beside=40), Told(marks)
    for n in range(others):
        engine.submit(prompt(3 + n, n), GREEDY, 30)
    tokens = prompt(length)
    request = engine.ask(tokens, Terms(GREEDY, 4), watch=told.watch)
    run(engine)
    held = length + 3  # the last token is not fed
    assert set(told.snapshots) == {mark for mark in marks if 0 < mark <= length} | {held}
    for count, snapshot in told.snapshots.items():
        assert snapshot.position == count
        assert (snapshot.logits is not None) == (count == length)
        read = [*tokens, *request.tokens]
        alone = model.new_state()
        model.forward(read[:count], alone)
        probe = model.forward(prompt(5, 9), alone)
        assert np.abs(model.forward(prompt(5, 9), model.new_state(snapshot)) - probe).max() < 1e-4


def test_many_answers_start_from_one_snapshot(model: Model) -> None:
    tokens, state = prompt(50), model.new_state()
    model.forward(tokens, state)
    start = state.snapshot()
    engine = Engine(model, slots=3)
    requests = [engine.ask((), Terms(GREEDY, 12), start=start) for _ in range(5)]
    run(engine)
    expected = generate(model, model.new_state(), tokens, GREEDY, 12)
    text = "".join(expected)
    assert [request.tokens for request in requests] == [expected.tokens] * 5
    assert ["".join(request) for request in requests] == [text] * 5
    with pytest.raises(UnsupportedError, match="at least one token"):
        engine.ask((), Terms(GREEDY, 12), start=state.snapshot(logits=False))


def test_a_snapshot_of_another_model_ends_that_request_alone(model: Model, tmp_path: Path) -> None:
    with load(random_model(tmp_path, attention_window_size=13), threads=1) as other:
        state = other.new_state()
        other.forward(prompt(4), state)
        engine = Engine(model, slots=2)
        wrong = engine.ask(prompt(3), Terms(GREEDY, 5), start=state.snapshot())
        right = engine.submit(prompt(3), GREEDY, 5)
        run(engine)
        with pytest.raises(UnsupportedError, match="another model"):
            list(wrong)
        assert len(right.tokens) == 5


def test_changes_and_times_are_told(model: Model) -> None:
    engine, told = Engine(model, slots=1), Told()
    first = engine.ask(prompt(30), Terms(GREEDY, 6), watch=told.watch)
    second = engine.ask(prompt(30), Terms(GREEDY, 6), watch=Watch())
    assert (first.started_ns, first.first_ns, first.ended_ns, told.changes) == (None, None, None, 0)
    engine.step()
    assert first.started_ns is not None
    assert first.first_ns is not None
    assert second.started_ns is None
    assert (engine.running, engine.queued) == (1, 1)
    run(engine)
    assert first.ended_ns is not None
    assert first.submitted_ns < first.started_ns < first.first_ns < first.ended_ns
    assert second.started_ns is not None
    assert first.ended_ns <= second.started_ns
    assert told.changes >= 1
    assert (engine.running, engine.queued) == (0, 0)


def test_those_that_wait_can_be_refused_and_all_others_cancelled(model: Model) -> None:
    engine = Engine(model, slots=1)
    running, waiting = engine.submit(prompt(3), GREEDY, 100), engine.submit(prompt(3), GREEDY, 100)
    engine.step()
    engine.refuse_waiting(GriffinError("not today"))
    with pytest.raises(GriffinError, match="not today"):
        list(waiting)
    with pytest.raises(GriffinError, match="not today"):
        engine.submit(prompt(3), GREEDY, 5)
    assert running.finish is None
    engine.cancel_all()
    run(engine)
    assert running.finish is Finish.CANCELLED


class Only:
    """Allows a few tokens, in this order, then a stop token."""

    def __init__(self, tokens: Sequence[int], stop: int) -> None:
        self._next = [*tokens, stop]
        self.accepted: list[int] = []

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        allowed = np.full_like(logits, -np.inf)
        allowed[self._next[len(self.accepted)]] = logits[self._next[len(self.accepted)]]
        return allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=2, seed=1)])
def test_a_constraint_decides_what_may_be_said(model: Model, sampling: Sampling) -> None:
    engine, wanted = Engine(model, slots=2), Only([5, 9, 5, 300], 1)
    free = engine.submit(prompt(8), GREEDY, 9)
    held = engine.ask(prompt(8), Terms(sampling, None, frozenset({1}), constraint=wanted))
    run(engine)
    assert held.tokens == [5, 9, 5, 300]
    assert wanted.accepted == [5, 9, 5, 300, 1]
    assert held.finish is Finish.STOP
    assert held.stop_token == 1
    alone = generate(model, model.new_state(), prompt(8), GREEDY, 9)
    list(alone)
    assert free.tokens == alone.tokens


class Failing(Only):
    """Fails at the third token, in a way that nobody expects."""

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(self.accepted) == 2:
            raise MemoryError
        return super().allow(logits)


def divide(request: Request, count: int, snapshot: Snapshot) -> None:
    """What nobody expects of a watch."""
    _ = count / 0


def test_what_fails_in_one_answer_ends_that_one(model: Model) -> None:
    engine = Engine(model, slots=3)
    failing = engine.ask(prompt(8), Terms(GREEDY, 9, constraint=Failing([5, 6, 7, 8], 1)))
    told = Told()
    broken = engine.ask(prompt(3), Terms(GREEDY, 9), watch=Watch((3,), divide))
    right = engine.ask(prompt(8), Terms(GREEDY, 9), watch=told.watch)
    run(engine)
    with pytest.raises(BackendError, match="MemoryError"):
        list(failing)
    with pytest.raises(BackendError, match="division"):
        list(broken)
    assert failing.tokens == [5, 6]
    assert len(right.tokens) == 9
    assert not engine.broken


def test_whatever_ends_a_step_is_told_to_all_who_wait(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("a bug")

    with Engine(model, slots=1) as engine:
        monkeypatch.setattr(Engine, "_plan", failing)
        request = engine.submit(prompt(3), GREEDY, 9)
        with pytest.raises(BackendError, match="a bug"):
            list(request)
        assert engine.broken
        with pytest.raises(BackendError, match="a bug"):
            engine.submit(prompt(3), GREEDY, 9)


def test_log_probabilities_are_of_the_model_and_not_of_the_sampling(model: Model) -> None:
    sampling = Sampling(temperature=3, top_k=2, repeat_penalty=2, seed=3)
    generation = generate(
        model, model.new_state(), prompt(8), sampling, 6, constraint=Only([5, 6, 7, 8, 9, 10], 1), top_logprobs=3
    )
    list(generation)
    state, tokens = model.new_state(), prompt(8)
    for said, noted in zip(generation.tokens, generation.logprobs, strict=True):
        expected = token_logprobs(model.forward(tokens, state), said, 3)
        assert noted.token == said
        assert noted.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [i for i, _ in noted.top] == [i for i, _ in expected.top]
        tokens = [said]


def test_the_repeat_penalty_sees_what_was_read_before(model: Model) -> None:
    tokens, sampling = prompt(40), Sampling(temperature=0, repeat_penalty=5, repeat_last_n=-1)
    whole = generate(model, model.new_state(), tokens, sampling, 20)
    list(whole)
    state = model.new_state()
    model.forward(tokens[:30], state)
    parts = generate(model, state, tokens[30:], sampling, 20, before=tokens[:30])
    list(parts)
    assert parts.tokens == whole.tokens


@pytest.mark.parametrize("field", ["max_tokens", "top_logprobs"])
def test_terms_out_of_range_are_refused(field: str) -> None:
    wrong: Any = {field: -1}
    with pytest.raises(UnsupportedError, match=f"{field}: expected at least 0, found -1"):
        Terms(GREEDY, **wrong)

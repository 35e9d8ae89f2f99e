"""Many answers at once against each alone, on a random model; what the engine feeds is counted at the model's door."""

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.engine import Engine, Request, fair_shares
from griffin_gguf.runtime.errors import BackendError, BusyError, UnsupportedError
from griffin_gguf.runtime.generate import Finish, generate
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import State

GREEDY = Sampling(temperature=0)
VOCAB = 384
LONGEST = 30  # answers of the random runs


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


PROMPTS = [prompt(length, length) for length in (1, 2, 5, 13, 40, 90)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("engine"), attention_window_size=12)


@pytest.fixture(scope="module", params=["numpy", "ggml"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    return [solo(model, tokens, LONGEST) for tokens in PROMPTS]


def solo(model: Model, tokens: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    generation = generate(model, model.new_state(), tokens, sampling, count)
    for _ in generation:
        pass
    return generation.tokens


@dataclass
class Door:
    """What passed through `forward_batch`: for each call the numbers of tokens, and which state took them."""

    calls: list[dict[int, int]] = field(default_factory=list[dict[int, int]])
    fail_at: int | None = None
    error: BaseException = field(default_factory=lambda: BackendError("the device is gone"))
    live: list[weakref.ref[State]] = field(default_factory=list[weakref.ref[State]])
    most_live: int = 0


@pytest.fixture
def door(model: Model, monkeypatch: pytest.MonkeyPatch) -> Door:
    seen, forward_batch, new_state = Door(), model.forward_batch, model.new_state

    def forwarding(batch: Sequence[tuple[Any, State]], *args: Any, **keys: Any) -> Any:
        seen.calls.append({id(state): len(tokens) for tokens, state in batch})
        if len(seen.calls) == seen.fail_at:
            raise seen.error
        return forward_batch(batch, *args, **keys)

    def making(snapshot: Snapshot | None = None) -> State:
        state = new_state(snapshot)
        seen.live = [ref for ref in seen.live if ref() is not None] + [weakref.ref(state)]
        seen.most_live = max(seen.most_live, len(seen.live))
        return state

    monkeypatch.setattr(model, "forward_batch", forwarding)
    monkeypatch.setattr(model, "new_state", making)
    return seen


def drain(engine: Engine) -> int:
    steps = 0
    while engine.step():
        steps += 1
    return steps


def texts(requests: Sequence[Request]) -> list[str]:
    return ["".join(request) for request in requests]


def test_a_thousand_tokens_are_those_of_solo_runs(model: Model) -> None:
    prompts = [prompt(1 + 5 * i, i) for i in range(16)]
    engine = Engine(model, slots=16)
    requests = [engine.submit(tokens, GREEDY, 64) for tokens in prompts]
    drain(engine)
    assert [r.tokens for r in requests] == [solo(model, tokens, 64) for tokens in prompts]
    assert sum(len(r.tokens) for r in requests) == 1024
    assert all(r.finish is Finish.LENGTH and r.unfed == r.tokens[-1:] for r in requests)
    assert texts(requests) == [r.text for r in requests] == [model.tokenizer.decode(r.tokens) for r in requests]


@pytest.mark.parametrize("sampling", [Sampling(seed=7), Sampling(temperature=1.5, repeat_penalty=1.3, seed=8)])
def test_a_seed_says_the_same_in_company(model: Model, sampling: Sampling) -> None:
    engine = Engine(model, slots=3)
    requests = [engine.submit(tokens, sampling, 20) for tokens in PROMPTS]
    drain(engine)
    assert [r.tokens for r in requests] == [solo(model, tokens, 20, sampling) for tokens in PROMPTS]


@dataclass
class Plan:
    prompt: int
    count: int
    at: int
    cancel_after: int | None


plans = st.lists(
    st.builds(
        Plan,
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, LONGEST),
        st.integers(0, 20),
        st.none() | st.integers(0, 20),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=20)
@given(plans=plans, slots=st.integers(1, 5), beside=st.integers(1, 40))
def test_joining_and_leaving_in_any_order(
    model: Model, alone: list[list[int]], plans: list[Plan], slots: int, beside: int
) -> None:
    engine = Engine(model, slots, beside)
    requests: dict[int, Request] = {}
    step = 0
    while len(requests) < len(plans) or any(not r.done for r in requests.values()):
        for i, plan in enumerate(plans):
            if plan.at == step:
                requests[i] = engine.submit(PROMPTS[plan.prompt], GREEDY, plan.count)
            if plan.cancel_after is not None and plan.at + plan.cancel_after == step and i in requests:
                requests[i].cancel()
        engine.step()
        step += 1
        assert step < 1000, "somebody starves"
    for i, plan in enumerate(plans):
        request, expected = requests[i], alone[plan.prompt][: plan.count]
        if request.finish is Finish.CANCELLED:
            assert plan.cancel_after is not None
            assert request.tokens == expected[: len(request.tokens)]
        else:
            assert (request.finish, request.tokens) == (Finish.LENGTH, expected)
        assert "".join(request) == model.tokenizer.decode(request.tokens)


@given(needs=st.lists(st.integers(0, 50), max_size=8), room=st.integers(0, 100))
def test_shares_are_fair(needs: list[int], room: int) -> None:
    shares = fair_shares(needs, room)
    assert sum(shares) == min(room, sum(needs))
    for i, (share, need) in enumerate(zip(shares, needs, strict=True)):
        assert share <= need
        if share < need:  # nobody has more than the hungry, but for a remainder that goes to those before them
            assert all(other <= share + (j < i) for j, other in enumerate(shares))


def test_running_answers_get_a_token_in_every_step_beside_long_prompts(model: Model, door: Door) -> None:
    engine = Engine(model, slots=6, beside=64)
    running = [engine.submit(tokens, GREEDY, 200) for tokens in PROMPTS[:2]]
    engine.step()
    assert sum(door.calls[-1].values()) == 3
    long, short = engine.submit(prompt(600), GREEDY, 5), engine.submit(prompt(20), GREEDY, 5)
    while not long.tokens:
        said = [len(r.tokens) for r in running]
        talking = len(running) + (len(short.tokens) > 0 and not short.done)
        engine.step()
        assert [len(r.tokens) for r in running] == [n + 1 for n in said]
        assert sum(door.calls[-1].values()) <= talking + 64
        assert len(short.tokens) >= 1  # did not wait for the long one
    assert len(door.calls) == 1 + 1 + -(-(600 - 44) // 64)  # 20 of the first 64 went to the short one


def test_without_answers_a_step_takes_a_whole_chunk(model: Model, door: Door) -> None:
    engine = Engine(model, slots=2, beside=10)
    engine.submit(prompt(model.chunk + 100), GREEDY, 1)
    engine.submit(prompt(40), GREEDY, 1)
    drain(engine)
    assert [sorted(call.values()) for call in door.calls] == [[40, model.chunk - 40], [140]]


def test_who_comes_first_is_served_first(model: Model) -> None:
    engine = Engine(model, slots=1)
    requests = [engine.submit(tokens, GREEDY, 2) for tokens in PROMPTS]
    for i in range(len(requests)):
        assert [r.done for r in requests] == [True] * i + [False] * (len(requests) - i)
        engine.step()
        engine.step()
    assert all(r.done for r in requests)


def test_cancelled_in_the_prompt(model: Model, door: Door, alone: list[list[int]]) -> None:
    engine = Engine(model, slots=1)
    long, next_one = engine.submit(prompt(1200), GREEDY, 5), engine.submit(PROMPTS[0], GREEDY, 5)
    engine.step()
    long.cancel()
    assert not long.done
    engine.step()
    assert (long.finish, long.text, long.tokens, len(long.unfed)) == (Finish.CANCELLED, "", [], 1200 - model.chunk)
    assert len(door.calls[-1]) == 1
    assert next_one.tokens == alone[0][:1]  # the slot was free in the very next step
    assert list(long) == []


def test_cancelled_while_it_answers_and_while_it_waits(model: Model) -> None:
    engine = Engine(model, slots=1)
    first, second = (engine.submit(PROMPTS[3], GREEDY, None) for _ in range(2))
    for _ in range(5):
        engine.step()
    second.cancel()
    assert (second.finish, second.done, list(second)) == (Finish.CANCELLED, True, [])
    first.cancel()
    assert not engine.step()
    assert (first.finish, len(first.tokens)) == (Finish.CANCELLED, 5)
    assert "".join(first) == model.tokenizer.decode(first.tokens)


def test_stops_are_those_of_generate(model: Model) -> None:
    text = model.tokenizer.decode(solo(model, PROMPTS[4], 40))
    stop_token, stop_string = solo(model, PROMPTS[3], 10)[-1], text[9:12]
    engine = Engine(model)
    for tokens, stop_tokens, strings in ((PROMPTS[3], {stop_token}, ()), (PROMPTS[4], (), (stop_string, "zzz"))):
        request = engine.submit(tokens, GREEDY, 40, frozenset(stop_tokens), strings)
        expected = generate(model, model.new_state(), tokens, GREEDY, 40, frozenset(stop_tokens), strings)
        assert "".join(request) == "".join(expected)
        assert request.finish is expected.finish is Finish.STOP
        assert (request.tokens, request.unfed, request.stop_token) == (
            expected.tokens,
            expected.unfed,
            expected.stop_token,
        )


def test_a_given_state_moves_on_and_stays_its_owners(model: Model) -> None:
    begun = model.new_state()
    model.forward(PROMPTS[4], begun)
    states = [begun.copy(), begun.copy()]
    engine = Engine(model)
    restored = engine.submit([], GREEDY, 12, state=states[0])  # has its last logits
    more = engine.submit(PROMPTS[2], GREEDY, 12, state=states[1])
    with pytest.raises(UnsupportedError, match=r"^state: is in use by another request$"):
        engine.submit(PROMPTS[2], GREEDY, 12, state=states[1])
    drain(engine)
    assert restored.tokens == solo(model, PROMPTS[4], 12)
    assert more.tokens == solo(model, PROMPTS[4] + PROMPTS[2], 12)
    assert restored.state is states[0]
    assert [s.position for s in states] == [len(PROMPTS[4]) + 11, len(PROMPTS[4]) + len(PROMPTS[2]) + 11]
    again = engine.submit(restored.unfed, GREEDY, 5, state=states[0])
    drain(engine)
    assert restored.tokens + again.tokens == solo(model, PROMPTS[4], 17)


def test_what_is_wrong_with_one_does_not_hurt_the_others(model: Model, path: Path, alone: list[list[int]]) -> None:
    engine = Engine(model)
    good = [engine.submit(tokens, GREEDY, 10) for tokens in PROMPTS[:3]]
    for bad in ([5, VOCAB], [-1], [2**70], ["a"], [[1, 2], [3]], [1.5]):
        with pytest.raises(UnsupportedError, match=r"^tokens: .* is outside the vocabulary of 384$"):
            engine.submit(bad)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"^tokens: expected at least one"):
        engine.submit([])
    with load(path, backend="numpy", threads=1) as other:
        foreign = engine.submit(PROMPTS[0], GREEDY, 10, state=other.new_state())
        drain(engine)
    with pytest.raises(UnsupportedError, match=r"^state: was not made by this model"):
        next(foreign)
    assert foreign.finish is Finish.CANCELLED
    assert [r.tokens for r in good] == [tokens[:10] for tokens in alone[:3]]


def test_logits_that_are_no_numbers_end_one_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_batch = model.forward_batch

    def spoiling(batch: Any) -> Any:
        logits = forward_batch(batch)
        for row, (tokens, _) in zip(logits, batch, strict=True):
            if len(tokens) == len(PROMPTS[4]):
                row[7] = np.nan
        return logits

    monkeypatch.setattr(model, "forward_batch", spoiling)
    engine = Engine(model)
    requests = [engine.submit(tokens, GREEDY, 5) for tokens in PROMPTS]
    drain(engine)
    assert [r.finish for r in requests].count(Finish.LENGTH) == len(PROMPTS) - 1
    assert str(requests[4].error) == "logits: no token can be chosen: 1 of 384 are NaN or infinite"


@pytest.mark.parametrize("threaded", [False, True])
def test_a_failing_device_ends_all_of_them(model: Model, door: Door, threaded: bool) -> None:
    door.fail_at = 4
    engine = Engine(model, slots=2)
    requests = [engine.submit(tokens, GREEDY, 50) for tokens in PROMPTS]
    if threaded:
        engine.start()
    else:
        with pytest.raises(BackendError, match=r"^the device is gone$"):
            drain(engine)
    for request in requests:
        with pytest.raises(BackendError, match=r"^engine: stopped, since the device failed: the device is gone$"):
            "".join(request)
    assert len(requests[0].tokens) == 3
    with pytest.raises(BackendError, match="the device is gone"):
        engine.submit(PROMPTS[0])
    assert not engine.step()
    engine.close()


def test_an_interrupt_in_a_step_ends_all_of_them(model: Model, door: Door) -> None:
    door.fail_at, door.error = 1, KeyboardInterrupt()
    engine = Engine(model)
    request = engine.submit(PROMPTS[0])
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(BackendError, match="KeyboardInterrupt"):
        next(request)


def test_only_so_many_wait(model: Model) -> None:
    engine = Engine(model, slots=2, waiting=3)
    requests = [engine.submit(PROMPTS[0], GREEDY, 3) for _ in range(5)]
    for _ in range(2):
        with pytest.raises(BusyError, match=r"^engine: \d requests have slots, \d wait already$"):
            engine.submit(PROMPTS[0])
        engine.step()
    requests[4].cancel()
    requests[4] = engine.submit(PROMPTS[0], GREEDY, 3)
    drain(engine)
    assert len({r.text for r in requests}) == 1


def test_slots_are_used_again_and_nothing_stays(model: Model, door: Door) -> None:
    engine = Engine(model, slots=3, waiting=100)
    requests = [engine.submit(PROMPTS[i % 4], GREEDY, i % 5) for i in range(40)]
    requests[6].cancel()
    drain(engine)
    gc.collect()
    assert all(r.done for r in requests)
    assert door.most_live == 3
    assert [ref() for ref in door.live] == [None] * len(door.live)
    assert engine.submit(PROMPTS[0], GREEDY, 0).finish is None
    assert not engine.step()  # nothing to say takes no pass


def test_the_bound_on_memory_holds(model: Model) -> None:
    engine = Engine(model, slots=4, beside=model.chunk)
    if model.backend == "ggml":
        return  # its memory is not Python's; benchmarks/engine.py looks at the process
    tracemalloc.start()
    try:
        for i in range(4):
            engine.submit(prompt(130, i), GREEDY, 2)
        drain(engine)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 * model.state_nbytes < peak <= engine.memory.total
    assert engine.memory.states == 4 * model.state_nbytes
    assert engine.memory.total == engine.memory.states + engine.memory.logits + engine.memory.buffers


def test_too_little_memory_is_refused_before_it_is_taken(
    model: Model, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Engine(model, slots=4).memory
    assert str(memory).startswith("4 answers at once: at most ")
    for free, fits in ((memory.total, True), (memory.total - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        if fits:
            Engine(model, slots=4)
        else:
            with pytest.raises(UnsupportedError, match=r"no room: 4 answers at once: at most \d+ MiB beside"):
                Engine(model, slots=4)
    assert door.most_live == 0


def test_values_out_of_range_are_named(model: Model) -> None:
    for name, value, expected in (
        ("slots", 0, "at least 1 and at most 512"),
        ("slots", 513, "at least 1 and at most 512"),
        ("beside", 0, "at least 1 and at most 512"),
        ("waiting", -1, "at least 0"),
    ):
        with pytest.raises(UnsupportedError, match=f"^{name}: expected {expected}, found {value}$"):
            Engine(model, **{"slots": 2, name: value})
    with pytest.raises(UnsupportedError, match=r"^max_tokens: expected at least 0, found -1$"):
        Engine(model).submit(PROMPTS[0], max_tokens=-1)


def test_threads_ask_and_cancel_as_they_like(model: Model, alone: list[list[int]]) -> None:
    answers: dict[int, list[int]] = {}
    with Engine(model, slots=3) as engine:

        def ask(i: int) -> None:
            request = engine.submit(PROMPTS[i % 6], GREEDY, LONGEST)
            text = ""
            for pieces, piece in enumerate(request):
                text += piece
                if i >= 12 and pieces == 3:
                    request.cancel()
            assert text == request.text
            answers[i] = request.tokens

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(18)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(answers) == list(range(18))
    for i, tokens in answers.items():
        expected = alone[i % 6]
        assert tokens == (expected if i < 12 else expected[: len(tokens)])


def test_closing_ends_everything(model: Model) -> None:
    engine = Engine(model, slots=1)
    engine.start()
    endless, waiting = (engine.submit(PROMPTS[0], GREEDY, None) for _ in range(2))
    next(endless)
    seen = list[str]()
    reader = threading.Thread(target=lambda: seen.extend(waiting))
    reader.start()
    engine.close()
    reader.join(60)
    assert not reader.is_alive()
    assert (endless.finish, waiting.finish, seen) == (Finish.CANCELLED, Finish.CANCELLED, [])
    assert not engine.step()
    with pytest.raises(UnsupportedError, match=r"^engine: is closed$"):
        engine.submit(PROMPTS[0])
    engine.close()
    assert model.forward(PROMPTS[0], model.new_state()).shape == (VOCAB,)

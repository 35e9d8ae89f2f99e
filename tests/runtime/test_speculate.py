"""Speculation says what plain decoding says, whatever the drafts; and it knows when to stop drafting."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.generate import Finish, Generation, generate
from griffin_gguf.runtime.sampling import Sampling, softmax, top_k
from griffin_gguf.runtime.speculate import GRADES, ROWS, Draft, Drafter, DraftModel, Pace, PromptLookup, Speculation
from griffin_gguf.runtime.state import State

GREEDY = Sampling(temperature=0)
VOCAB = 384
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 30).tolist()
COUNT = 60


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("speculate"), attention_window_size=12)


@pytest.fixture(scope="module", params=["numpy", "ggml"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is verified, in the greatest length that a pass may have."""
    monkeypatch.setattr(Pace, "ask", lambda self, most: most)
    monkeypatch.setattr(
        Pace, "choose", lambda self, grades, drafting: max(rows for rows in ROWS if rows <= len(grades) + 1) - 1
    )


class Oracle:
    """Knows what comes, and is wrong where it is told to be."""

    def __init__(self, answer: Sequence[int], wrong: Sequence[bool] = ()) -> None:
        self.answer, self.wrong = answer, [*wrong]
        self.seen: list[int] = []
        self.drafts = 0

    def read(self, tokens: Sequence[int]) -> None:
        self.seen += tokens

    def draft(self, last: int, most: int) -> Draft:
        assert most >= 1
        at = len(self.seen) + 1 - len(PROMPT)
        tokens = list(self.answer[at : at + most])
        for i, token in enumerate(tokens):
            if self.wrong and self.wrong[(self.drafts + i) % len(self.wrong)]:
                tokens[i] = (token + 1) % VOCAB
        self.drafts += 1
        return Draft(tokens, [GRADES - 1] * len(tokens))

    def forget(self) -> None:
        self.seen = []


def start(model: Model, drafter: Drafter | None, sampling: Sampling, *rest: Any) -> tuple[Generation, State]:
    state = model.new_state()
    speculation = None if drafter is None else Speculation(model, drafter)
    return generate(model, state, PROMPT, sampling, *rest, speculation=speculation), state


def check_same(model: Model, drafter: Drafter, sampling: Sampling, *rest: Any) -> Generation:
    """Run both to the end: all that a caller can see is equal, and the state goes on alike."""
    (plain, plain_state), (quick, quick_state) = (start(model, d, sampling, *rest) for d in (None, drafter))
    assert "".join(plain) == "".join(quick) == quick.text
    for name in ("tokens", "unfed", "stop_token", "finish", "prompt_tokens"):
        assert getattr(quick, name) == getattr(plain, name), name
    check_state(model, quick_state, quick)
    assert quick_state.position == plain_state.position
    return quick


def check_state(model: Model, state: State, generation: Generation) -> None:
    """The state holds the prompt and the answer but for what is unfed: it goes on as one that was fed these."""
    held = PROMPT + generation.tokens[: len(generation.tokens) - len(generation.unfed)]
    fresh = model.new_state()
    logits = model.forward(held, fresh)
    assert state.position == len(held)
    assert state.logits is not None
    np.testing.assert_allclose(state.logits, logits, atol=2e-4)
    following = generation.unfed or [7]
    expected = model.forward(following, fresh)
    np.testing.assert_allclose(model.forward(following, state.copy()), expected, atol=2e-4)


SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=20),
    Sampling(seed=1),
    Sampling(temperature=1.2, top_k=0, top_p=1.0, repeat_penalty=1.2, repeat_last_n=-1, seed=2),
]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_any_draft_gives_the_plain_text(model: Model, sampling: Sampling) -> None:
    answer = start(model, None, sampling, COUNT)[0]
    list(answer)
    right = check_same(model, Oracle(answer.tokens), sampling, COUNT)
    assert right.accepted == right.drafted >= COUNT - COUNT // 16 - 6
    some = check_same(model, Oracle(answer.tokens, [False, False, False, True, False]), sampling, COUNT)
    assert 0 < some.accepted < some.drafted
    wrong = check_same(model, Oracle(answer.tokens, [True]), sampling, COUNT)
    assert (wrong.accepted, wrong.drafted > COUNT) == (0, True)
    lookup = check_same(model, PromptLookup(), sampling, COUNT)
    assert lookup.drafted >= lookup.accepted


@pytest.mark.usefixtures("always")
@settings(max_examples=40)
@given(wrong=st.lists(st.booleans(), max_size=12), count=st.integers(0, 40), stop=st.integers(0, 39) | st.none())
def test_ends_inside_a_draft_are_the_plain_ones(model: Model, wrong: list[bool], count: int, stop: int | None) -> None:
    answer = start(model, None, SAMPLINGS[3], 40)[0]
    list(answer)
    stops = frozenset() if stop is None else frozenset({answer.tokens[stop]})
    drafter = Oracle(answer.tokens, wrong)
    (plain, _), (quick, state) = (start(model, d, SAMPLINGS[3], count, stops) for d in (None, drafter))
    assert "".join(plain) == "".join(quick)
    for name in ("tokens", "unfed", "stop_token", "finish"):
        assert getattr(quick, name) == getattr(plain, name), name
    if count:
        check_state(model, state, quick)
        assert drafter.seen == PROMPT + quick.tokens[: len(quick.tokens) - len(quick.unfed)]


@pytest.mark.usefixtures("always")
def test_stop_strings_inside_a_draft(model: Model) -> None:
    answer = start(model, None, GREEDY, COUNT)[0]
    text = "".join(answer)
    quick = check_same(model, Oracle(answer.tokens), GREEDY, COUNT, frozenset(), [text[11:15], "never"])
    assert quick.finish is Finish.STOP
    assert quick.text == text[: text.index(text[11:15])]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_cancelled_between_pieces_the_state_can_go_on(model: Model, how: str, pieces: int) -> None:
    answer = start(model, None, GREEDY, COUNT)[0]
    text = "".join(answer)
    quick, state = start(model, Oracle(answer.tokens, [False] * 6 + [True]), GREEDY, COUNT)
    seen = "".join(next(quick) for _ in range(pieces))
    getattr(quick, how)()
    seen += "".join(quick)
    assert quick.finish is Finish.CANCELLED
    assert text.startswith(seen)
    check_state(model, state, quick)
    rest = generate(model, state, quick.unfed, GREEDY, COUNT - len(quick.tokens))
    assert quick.tokens + [t for _ in [list(rest)] for t in rest.tokens] == answer.tokens


@pytest.mark.usefixtures("always")
def test_cancelled_in_a_pass_one_token_more_is_said(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = start(model, None, GREEDY, COUNT)[0]
    list(answer)
    quick, state = start(model, Oracle(answer.tokens), GREEDY, COUNT)
    forward = model.forward

    def cancelling(tokens: Sequence[int], *rest: Any, **keys: Any) -> Any:
        if len(tokens) == 16:
            quick.cancel()
        return forward(tokens, *rest, **keys)

    monkeypatch.setattr(model, "forward", cancelling)
    list(quick)
    assert (quick.finish, quick.tokens) == (Finish.CANCELLED, answer.tokens[:2])
    check_state(model, state, quick)


@pytest.mark.usefixtures("always")
def test_the_distribution_is_the_models_own(model: Model) -> None:
    # Three tokens of two likely ones each: eight cells of known probabilities, two tokens of them from one pass.
    begun = model.new_state()
    model.forward(PROMPT[:-1], begun)
    cells = continuations(model, begun.copy(), PROMPT[-1:], 3)
    guess = {cell[0]: cell for cell in sorted(cells, key=lambda cell: cells[cell])}  # the likeliest after each first

    class Likeliest(Oracle):
        def draft(self, last: int, most: int) -> Draft:
            return Draft([*guess[last][1:], 9], [0, 0, 0]) if most == 2 else Draft()

    counts, accepted, samples = Counter[tuple[int, ...]](), 0, 1200
    for seed in range(samples):
        sampling, speculation = Sampling(1.0, 2, 1.0, seed=seed), Speculation(model, Likeliest(()))
        generation = generate(model, begun.copy(), PROMPT[-1:], sampling, 4, speculation=speculation)
        list(generation)
        counts[tuple(generation.tokens[:3])] += 1
        accepted += generation.accepted
    assert counts.keys() <= cells.keys()
    assert accepted > samples / 2
    # Seven degrees of freedom: 29.9 is passed by one of 10,000 sound runs; the seeds make it the same each time.
    assert chi_square(counts, cells) < 29.9
    # And it can fail: if one in five of the others had followed the draft, it would show.
    biased = Counter[tuple[int, ...]]()
    for cell, count in counts.items():
        biased[guess[cell[0]]] += count // 5
        biased[cell] += count - count // 5
    assert chi_square(biased, cells) > 29.9


def continuations(model: Model, state: State, tokens: Sequence[int], count: int) -> dict[tuple[int, ...], float]:
    """Every continuation of so many tokens of the two likeliest each, and its probability."""
    logits = model.forward(tokens, state)
    ids = top_k(logits, 2)
    found: dict[tuple[int, ...], float] = {}
    for token, probability in zip(ids.tolist(), softmax(logits[ids]).tolist(), strict=True):
        rest = continuations(model, state.copy(), [token], count - 1) if count > 1 else {(): 1.0}
        found |= {(token, *cell): probability * p for cell, p in rest.items()}
    return found


def chi_square(counts: Counter[tuple[int, ...]], cells: dict[tuple[int, ...], float]) -> float:
    total = counts.total()
    return sum((counts[cell] - total * p) ** 2 / (total * p) for cell, p in cells.items())


def test_a_text_without_speculation_needs_nothing_of_it(model: Model) -> None:
    state = model.new_state()
    model.forward(PROMPT, state)
    generation = generate(model, state.copy(), [], GREEDY, COUNT)  # a restored state has its last logits
    list(generation)
    expected = start(model, None, GREEDY, COUNT)[0]
    list(expected)
    assert generation.tokens == expected.tokens
    with pytest.raises(UnsupportedError, match=r"^tokens: expected at least one token to begin with, found none$"):
        generate(model, model.new_state(), [], GREEDY)


# Pace: on costs as measured for a 2B model on two cores, in plain tokens, and on those of a device that has room.
CPU = {1: 1.0, 2: 1.75, 4: 3.1, 8: 4.4, 16: 5.5}
GPU = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2, 16: 1.4}


class Run:
    """A text in which guesses are right with some chance, and the time that it takes."""

    def __init__(self, costs: dict[int, float], drafting: float = 0.0, seed: int = 0) -> None:
        self.pace, self.costs, self.drafting = Pace(), costs, drafting
        self.random = np.random.default_rng(seed)
        self.verified = 0

    def seconds(self, tokens: int, chance: float, grade: int = 3, noise: float = 0.0) -> float:
        """Of so many tokens, where plain decoding takes 1 s each."""
        taken, said = 0.0, 0
        while said < tokens:
            asked = self.pace.ask(15)
            drafting = asked * self.drafting
            self.pace.drafted(asked, drafting)
            rows = self.pace.choose([grade] * asked, drafting) + 1
            assert rows in ROWS
            right = 0
            while right < asked and self.random.random() < chance:
                right += 1
            for hit in range(min(right + 1, asked, rows)):
                self.pace.outcome(grade, hit < right)
            gained = min(right, rows - 1) + 1
            spent = self.costs[rows] * (1 + noise * self.random.random())
            self.pace.passed(rows, gained, spent, drafting)
            self.verified += rows > 1
            taken += spent + drafting
            said += gained
        return taken


@pytest.mark.parametrize("costs", [CPU, GPU])
@pytest.mark.parametrize("drafting", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_on_text_that_does_not_repeat_little_is_lost(costs: dict[int, float], drafting: float, seed: int) -> None:
    for chance in (0.0, 0.1, 0.3):
        for tokens in (100, 300, 1000):
            assert Run(costs, drafting, seed).seconds(tokens, chance) <= tokens / 0.95


@pytest.mark.parametrize("seed", range(5))
def test_on_text_that_repeats_much_is_won(seed: int) -> None:
    assert Run(CPU, seed=seed).seconds(100, 0.97) < 100 / 1.4
    assert Run(CPU, seed=seed).seconds(300, 0.97) < 300 / 1.8
    assert Run(GPU, seed=seed).seconds(300, 0.8) < 300 / 2.5
    assert Run(GPU, 0.1, seed=seed).seconds(300, 0.8) < 300 / 1.6


def test_text_that_begins_to_repeat_is_noticed_and_so_is_its_end() -> None:
    run = Run(CPU)
    for _ in range(3):
        assert run.seconds(300, 0.02) <= 300 / 0.94  # what was saved before may be spent
        assert run.seconds(300, 0.97) < 300 / 1.5
    costly = Run(GPU, 0.3)
    costly.seconds(300, 0.02)
    assert costly.seconds(600, 0.9) < 600 / 1.2


def test_a_draft_model_that_is_never_right_is_hardly_asked() -> None:
    run = Run(CPU, 0.3)
    run.seconds(1000, 0.0)
    assert 1 <= run.verified <= 40


def test_noise_and_one_bad_first_measure_do_not_end_it() -> None:
    run = Run(dict(CPU))
    run.seconds(5, 0.0)
    run.pace.passed(4, 1, 30.0, 0.0)  # the first pass of a length may build and allocate
    run.seconds(100, 0.0)
    assert run.seconds(300, 0.97, noise=0.5) < 300
    for rows in ROWS[1:]:
        run.pace.passed(rows, 1, 50.0, 0.0)  # the machine stood still
    run.seconds(1500, 0.0)
    assert run.seconds(300, 0.97) < 300 / 1.5


@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_a_busy_moment_does_not_make_drafts_look_cheap(chance: float) -> None:
    run = Run({rows: 8 * cost for rows, cost in CPU.items()})
    run.seconds(2, 0.9)  # plain passes are measured, eight times as slow as they are from now on
    run.costs = CPU
    assert run.seconds(300, chance) <= 300 / 0.9


def test_guesses_are_learned_from_unverified() -> None:
    run = Run(CPU)
    run.seconds(20, 0.0)
    assert run.pace.choose([3] * 15, 0.0) == 0
    before = run.verified
    for _ in range(60):
        run.pace.outcome(3, True)
        run.pace.passed(1, 1, 1.0, 0.0)
    assert run.verified == before
    assert run.pace.choose([3] * 15, 0.0) > 0


def test_nothing_is_asked_before_plain_passes_were_measured() -> None:
    pace = Pace()
    for seconds in (9.0, 1.0):  # the first may build and allocate
        assert pace.ask(15) == 0
        pace.passed(1, 1, seconds, 0.0)
    assert pace.ask(15) == 3  # what a draft costs is not known yet
    pace.drafted(3, 0.0)
    assert (pace.ask(15), pace.ask(2), pace.ask(0)) == (15, 2, 0)


def test_drafts_that_do_not_pay_end_by_measured_time(model: Model) -> None:
    class Slow(Oracle):
        """The clock goes on by what a pass costs, and each token is wrong."""

    now = 0.0
    speculation = Speculation(model, Slow([9] * 1000), clock=lambda: now)
    forward = speculation.verify

    def timed(tokens: Sequence[int], state: State) -> Any:
        nonlocal now
        started = now
        logits = forward(tokens, state)
        now = started + CPU[len(tokens)]
        speculation._verifying = now - started
        return logits

    speculation.verify = timed
    generation = generate(model, model.new_state(), PROMPT, GREEDY, 300, speculation=speculation)
    list(generation)
    assert now <= 300 / 0.95


# The drafters.
def longest_match(text: Sequence[int], most: int) -> tuple[list[int], int]:
    """The plain way: what follows the one that shares most of the latest 16 places that end with the same pair."""
    places = [end for end in range(len(text) - 2, 0, -1) if list(text[end - 1 : end + 1]) == list(text[-2:])][:16]
    best, shared = -1, 0
    for end in places:
        common = 0
        while common <= end and common < 9 and text[end - common] == text[len(text) - 1 - common]:
            common += 1
        if common > shared:
            best, shared = end, common
    grown = list(text)
    for i in range(most if places else 0):
        grown.append(grown[best + 1 + i])
    return grown[len(text) :], shared


@settings(max_examples=200)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=80), data=st.data(), most=st.integers(1, 15))
def test_lookup_finds_the_longest_match(text: list[int], data: st.DataObject, most: int) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4)))
    drafter = PromptLookup()
    for begin, end in pairwise([0, *cuts, len(text) - 1]):
        drafter.read(text[begin:end])
    tokens, shared = longest_match(text, most)
    for _ in range(2):  # asking changes nothing
        draft = drafter.draft(text[-1], most)
        assert list(draft.tokens) == tokens
        assert list(draft.grades) == [min(shared - 2 + i, GRADES - 1) for i in range(len(tokens))]


def test_lookup_keeps_the_end_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "KEPT", 50)
    drafter = PromptLookup()
    text = np.random.default_rng(0).integers(0, 4, 1000).tolist()
    for token in text:
        drafter.read([token])
        assert len(drafter._tokens) == len(drafter._before) <= 100
        assert len(drafter._latest) <= 16
    drafter.read(text[:400])
    assert drafter.draft(text[400], 5).tokens == longest_match(text[350:401], 5)[0]
    drafter.forget()
    assert drafter.draft(1, 5) == Draft()


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never sure of anything; let it draft all the same."""
    monkeypatch.setattr(DraftModel, "SURE", 0.0)


@pytest.mark.usefixtures("always", "unsure")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_model_stays_in_step(model: Model, path: Path, sampling: Sampling) -> None:
    with load(path, backend="numpy", threads=1) as small:
        generation = check_same(model, DraftModel(small, model), sampling, COUNT)
    if sampling == GREEDY:  # its own twin is always right
        assert generation.accepted == generation.drafted >= COUNT - 10


@pytest.mark.usefixtures("unsure")
@settings(max_examples=15)
@given(data=st.data())
def test_a_draft_model_drafts_what_it_would_say(model: Model, data: st.DataObject) -> None:
    drafter, text = DraftModel(model, model), list(PROMPT)
    drafter.read(text)
    for _ in range(5):
        last = data.draw(st.integers(3, VOCAB - 1))
        most = data.draw(st.integers(1, 6))
        draft = drafter.draft(last, most)
        alone = generate(model, model.new_state(), [*text, last], GREEDY, most)
        list(alone)
        assert draft.tokens == alone.tokens
        taken = data.draw(st.integers(0, most))
        fed = [last, *draft.tokens[:taken]]
        drafter.read(fed)
        text += fed


@pytest.mark.usefixtures("unsure")
def test_a_draft_model_that_was_not_asked_for_long_skips(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, fed = DraftModel(model, model), list[int]()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, state: (fed.append(len(tokens)), forward(tokens, state))[1])
    drafter.read(PROMPT)
    assert fed == [len(PROMPT)]
    for token in range(3, 203):
        drafter.read([token])
    assert len(drafter.draft(7, 2).tokens) == 2
    assert fed == [len(PROMPT), DraftModel.MISSED, 1]


def test_a_draft_model_says_nothing_where_it_is_not_sure(model: Model) -> None:
    drafter = DraftModel(model, model)
    drafter.read(PROMPT)
    assert drafter.draft(5, 4) == Draft([], [])


def test_another_vocabulary_is_refused(model: Model, tmp_path: Path) -> None:
    with (
        load(random_model(tmp_path, vocab_size=400), backend="numpy", threads=1) as other,
        pytest.raises(UnsupportedError, match=r"model\.gguf: tokenizer\.ggml\.tokens: expected the vocabulary of "),
    ):
        DraftModel(other, model)

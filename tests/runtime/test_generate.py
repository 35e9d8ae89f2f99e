"""The loop on a model that says a given text, whatever it is fed, and records what that was."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vocabularies import metadata_of, train

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.generate import Finish, HeldText, History, generate
from griffin_gguf.runtime.logprobs import TokenLogprobs
from griffin_gguf.runtime.sampling import (
    Logits,
    Sampling,
    choose,
    counted,
    discourage,
    draw,
    min_p,
    penalize,
    pick,
    top_k,
    top_p,
)
from griffin_gguf.runtime.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(Path("model.gguf"), metadata_of(train()))


class Parrot:
    """Says the tokens of `script` one after another, then only `<eos>`; its state is the list of what it was fed."""

    def __init__(self, script: Sequence[int], prompt: int) -> None:
        self.tokenizer = tokenizer()
        self.script = [*script]
        self.prompt = prompt
        self.chunks: list[int] = []
        self.before: Callable[[list[int]], None] = lambda state: None

    def forward(self, tokens: Sequence[int], state: list[int]) -> Logits:
        assert tokens
        self.before(state)
        state.extend(tokens)
        self.chunks.append(len(tokens))
        at = len(state) - self.prompt
        logits = np.zeros(self.tokenizer.vocab_size, dtype=np.float32)
        logits[self.script[at] if 0 <= at < len(self.script) else self.tokenizer.eos] = 1
        return logits


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, bos=False)


PROMPT = [2, 300, 301]
STOP = frozenset({1})


def parrot(text: str) -> Parrot:
    return Parrot(ids_of(text), len(PROMPT))


def test_it_streams_the_answer_until_the_stop_token() -> None:
    text = "The fox said: größer 👍🏽\n\nand no more."
    model, state = parrot(text), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, 100, STOP)
    assert generation.finish is None
    pieces = list(generation)
    assert "".join(pieces) == generation.text == text
    assert all(pieces)
    assert len(pieces) > 10
    assert generation.finish is Finish.STOP
    assert generation.stop_token == 1
    assert generation.tokens == ids_of(text)
    assert (generation.prompt_tokens, generation.unfed) == (3, [])
    assert state == PROMPT + generation.tokens  # all but the stop token
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds > 0
    assert generation.prefill_rate == pytest.approx(3 / generation.prefill_seconds)
    assert generation.decode_rate == pytest.approx(len(generation.tokens) / generation.decode_seconds)
    assert list(generation) == []


@pytest.mark.parametrize("n", [1, 2, 5])
def test_max_tokens_leaves_the_last_token_unfed(n: int) -> None:
    model, state = parrot("the river " * 10), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, n, STOP)
    text = "".join(generation)
    assert generation.finish is Finish.LENGTH
    assert generation.tokens == model.script[:n]
    assert generation.unfed == model.script[n - 1 : n]
    assert state + generation.unfed == PROMPT + generation.tokens
    assert text == tokenizer().decode(generation.tokens)
    assert generation.decode_rate == pytest.approx((n - 1) / max(generation.decode_seconds, 1e-9))


def test_no_token_asked_for_is_none_fed() -> None:
    model, state = parrot("abc"), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, 0, STOP)
    assert list(generation) == []
    assert (generation.finish, generation.unfed, state) == (Finish.LENGTH, PROMPT, [])
    assert generation.prefill_rate == generation.decode_rate == 0


def test_nothing_happens_before_the_first_piece_is_asked_for() -> None:
    model = parrot("abc")
    generate(model, [], PROMPT, GREEDY)
    assert model.chunks == []


def test_a_second_turn_continues_the_state() -> None:
    first, second = ids_of("the fox"), ids_of("a river")
    turn = [98, 99]
    model, state = Parrot([*first, 1, *turn[1:], *second, 1], len(PROMPT)), list[int]()
    one = generate(model, state, PROMPT, GREEDY, None, STOP)
    assert "".join(one) == "the fox"
    assert one.stop_token is not None
    following = [*one.unfed, one.stop_token, *turn]
    model.prompt = len(state) + len(following)
    model.script = [*second, 1]
    two = generate(model, state, following, GREEDY, None, STOP)
    assert "".join(two) == "a river"
    assert state == [*PROMPT, *first, 1, *turn, *second]


def test_a_long_prompt_is_fed_in_chunks() -> None:
    prompt = [300] * 1200
    model, state = Parrot(ids_of("x"), len(prompt)), list[int]()
    generation = generate(model, state, prompt, GREEDY, None, STOP)
    assert "".join(generation) == "x"
    assert model.chunks == [512, 512, 176, 1]
    assert state[:1200] == prompt


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["x", "three", "wo"], "one t"),
        ("aaab", ["aab"], "a"),
        ("User: hi\nUser: ho", ["\nUser:"], "User: hi"),
        ("abcde", ["abcd", "bc"], "a"),  # the stop that is complete first
        ("abc", ["bc", "abc"], ""),  # of two complete at once, the longer
        ("size size", ["size"], ""),
        ("größer 👍🏽!", ["👍🏽"], "größer "),
        ("one two", ["twofold", "o two thr"], "one two"),  # never complete: all of it comes out at the end
    ],
)
def test_stop_strings_end_the_text_before_them(text: str, stops: list[str], expected: str) -> None:
    model, state = parrot(text), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, None, STOP, stops)
    assert "".join(generation) == generation.text == expected
    assert generation.finish is Finish.STOP
    if expected != text:
        assert generation.stop_token is None
        assert len(generation.unfed) == 1
    assert state + generation.unfed == PROMPT + generation.tokens
    assert tokenizer().decode(generation.tokens).startswith(expected)


texts = st.text(alphabet="ab\n ", max_size=30)


@settings(max_examples=300)
@given(text=texts, stops=st.lists(st.text(alphabet="ab\n ", min_size=1, max_size=4), max_size=3), data=st.data())
def test_held_text_leaks_no_stop_string_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    # The plain way: one character at a time, until the text ends with a stop string.
    expected, stopped = text, False
    for n in range(len(text) + 1):
        ended = [stop for stop in stops if text[:n].endswith(stop)]
        if ended:
            expected, stopped = text[: n - max(map(len, ended))], True
            break
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    held, out, done = HeldText(stops), "", False
    for start, end in pairwise(cuts):
        piece, done = held.push(text[start:end])
        out += piece
        assert expected.startswith(out)
        if done:
            break
        # Nothing is held back without need: it could still become a stop string.
        assert not text[len(out) : end] or any(stop.startswith(text[len(out) : end]) for stop in stops)
    assert (out + ("" if done else held.flush()), done) == (expected, stopped)


def test_an_incomplete_character_at_the_end_comes_out_as_a_replacement() -> None:
    thumb = ids_of("👍")
    assert len(thumb) == 4
    model, state = Parrot([*ids_of("ok"), *thumb], len(PROMPT)), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, len(ids_of("ok")) + 2, STOP)
    assert "".join(generation) == "ok\ufffd"
    assert generation.finish is Finish.LENGTH


@settings(max_examples=50)
@given(after=st.integers(0, 8))
def test_closing_early_leaves_a_state_that_can_go_on(after: int) -> None:
    text = "the river said nothing under the moon"
    model, state = parrot(text), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, None, STOP)
    seen = "".join(next(generation) for _ in range(after))
    generation.close()
    assert generation.finish is Finish.CANCELLED
    assert generation.text == seen == tokenizer().decode(generation.tokens)
    assert state + generation.unfed == PROMPT + generation.tokens
    rest = generate(model, state, generation.unfed, GREEDY, None, STOP)
    assert seen + "".join(rest) == text


def test_breaking_out_of_the_loop_counts_as_closing() -> None:
    model, state = parrot("the river said nothing"), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, None, STOP)
    for _ in generation:
        break
    generation.close()
    assert generation.finish is Finish.CANCELLED
    assert state + generation.unfed == PROMPT + generation.tokens
    assert list(generation) == []


def test_cancel_ends_after_the_token_in_work_and_gives_out_what_was_held() -> None:
    model, state = parrot("a size that nobody knew"), list[int]()
    generation = generate(model, state, PROMPT, GREEDY, None, STOP, ["a size that no man"])
    model.before = lambda state: generation.cancel() if len(state) == len(PROMPT) + 4 else None
    pieces = list(generation)
    assert generation.finish is Finish.CANCELLED
    assert generation.tokens == model.script[:6]
    assert pieces == [tokenizer().decode(generation.tokens)]
    assert state + generation.unfed == PROMPT + generation.tokens


def test_cancel_during_the_prompt_leaves_the_rest_unfed() -> None:
    prompt = [300] * 1200
    model, state = Parrot([], len(prompt)), list[int]()
    generation = generate(model, state, prompt, GREEDY, None, STOP)
    model.before = lambda state: generation.cancel()
    assert list(generation) == []
    assert generation.finish is Finish.CANCELLED
    assert (len(state), generation.unfed) == (512, [300] * 688)
    assert generation.prefill_rate == pytest.approx(512 / generation.prefill_seconds)


def test_an_error_out_of_the_model_is_not_an_answer() -> None:
    class Broken(Parrot):
        def forward(self, tokens: Sequence[int], state: list[int]) -> Logits:
            raise KeyboardInterrupt

    generation = generate(Broken([], 3), [], PROMPT, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert generation.finish is Finish.CANCELLED
    assert list(generation) == []


def test_the_penalty_sees_the_prompt_and_the_answer() -> None:
    class Stubborn(Parrot):
        """Likes 300, then 301, then 302, ..."""

        def forward(self, tokens: Sequence[int], state: list[int]) -> Logits:
            state.extend(tokens)
            logits = np.full(600, -1, dtype=np.float32)
            logits[300:310] = np.linspace(1, 0.9, 10)
            return logits

    sampling = Sampling(temperature=0, repeat_penalty=2.0)
    generation = generate(Stubborn([], 2), [], [300, 302], sampling, 3)
    list(generation)
    assert generation.tokens == [301, 303, 304]


some_logits = arrays(np.float32, 12, elements=st.floats(-20, 20, width=32))


def chosen(x: Logits, recent: Sequence[int], answer: Sequence[int], s: Sampling, rng: np.random.Generator) -> int:
    """By the pure functions, over all of the text."""
    last = recent if s.repeat_last_n < 0 else recent[max(0, len(recent) - s.repeat_last_n) :]
    x = discourage(penalize(x, last, s.repeat_penalty), *counted(answer), s.presence_penalty, s.frequency_penalty)
    return draw(x, min_p(x, top_p(x, top_k(x, s.top_k), s.top_p), s.min_p), s.temperature, rng)


@settings(max_examples=200)
@given(
    rows=st.lists(some_logits, min_size=1, max_size=12),
    before=st.lists(st.integers(0, 11), max_size=20),
    last=st.sampled_from([-1, 0, 1, 3, 8, 64, 2**70]),
    repeat=st.sampled_from([1.0, 0.5, 1.3]),
    presence=st.sampled_from([0.0, -1.0, 0.7]),
    frequency=st.sampled_from([0.0, -0.3, 1.1]),
)
def test_what_is_kept_for_the_penalties_is_what_all_of_the_text_says(
    rows: list[Logits], before: list[int], last: int, repeat: float, presence: float, frequency: float
) -> None:
    sampling = Sampling(1.0, 0, 1.0, 0.0, repeat, last, 5, presence, frequency)
    history, answer = History(sampling, iter(before), 12), list[int]()
    first, second, third = (sampling.generator() for _ in range(3))
    for x in rows:
        recent = before + answer
        token = choose(x, history.said(), sampling, first)
        assert token == chosen(x, recent, answer, sampling, second) == pick(x, recent, sampling, third, answer)
        history.add(token)
        answer.append(token)
    said = history.said()
    if repeat != 1:
        recent = before + answer
        assert said.recent.tolist() == sorted(set(recent if last < 0 else recent[max(0, len(recent) - last) :]))
    if presence or frequency:
        assert dict(zip(said.answer.tolist(), said.counts.tolist(), strict=True)) == Counter(answer)


def test_without_penalties_nothing_is_kept() -> None:
    history = History(Sampling(repeat_penalty=1, repeat_last_n=-1), iter([1, 2]), 12)
    history.add(3)
    assert not any(part.size for part in (history.said().recent, history.said().answer, history.said().counts))


def test_log_probabilities_that_are_taken_are_not_kept() -> None:
    text = "The fox said nothing."
    whole = generate(parrot(text), [], PROMPT, GREEDY, None, STOP, top_logprobs=2)
    list(whole)
    taken = generate(parrot(text), [], PROMPT, GREEDY, None, STOP, top_logprobs=2)
    assert taken.take_logprobs() == []
    found: list[TokenLogprobs] = []
    for i, _ in enumerate(taken):
        if i % 3 == 0:
            found += taken.take_logprobs()
            assert taken.logprobs == []
    found += taken.take_logprobs()
    assert found == whole.logprobs
    assert [one.token for one in found] == taken.tokens
    assert (taken.logprobs, taken.take_logprobs()) == ([], [])


def test_the_same_seed_gives_the_same_answer() -> None:
    class Random(Parrot):
        def forward(self, tokens: Sequence[int], state: list[int]) -> Logits:
            state.extend(tokens)
            return np.random.default_rng(len(state)).normal(size=600).astype(np.float32)

    def answer(seed: int) -> list[int]:
        generation = generate(Random([], 1), [], PROMPT, Sampling(seed=seed), 20)
        list(generation)
        return generation.tokens

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_values_out_of_range_are_named() -> None:
    model = parrot("a")
    with pytest.raises(UnsupportedError, match=r"^tokens: expected at least one"):
        generate(model, [], [], GREEDY)
    with pytest.raises(UnsupportedError, match=r"^max_tokens: expected at least 0, found -1"):
        generate(model, [], PROMPT, GREEDY, -1)
    with pytest.raises(UnsupportedError, match=r"^stop_strings: expected no empty string"):
        generate(model, [], PROMPT, GREEDY, None, STOP, ["a", ""])

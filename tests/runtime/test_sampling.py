"""Each step on small logits by hand and by a plain reference; draws by their frequencies."""

import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.sampling import (
    Logits,
    Sampling,
    counted,
    discourage,
    draw,
    min_p,
    penalize,
    pick,
    softmax,
    top_k,
    top_p,
)

INF = math.inf
finite_or_forbidden = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -INF]))
some_logits = arrays(np.float32, st.integers(1, 40), elements=finite_or_forbidden).filter(
    lambda x: bool((x > -INF).any())
)


def logits(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def every(x: Logits) -> Any:
    return np.arange(x.size)


def ranked(x: Logits) -> list[int]:
    """The ids from the likeliest down, of equals the lowest first."""
    return sorted(range(x.size), key=lambda i: (-x[i], i))


def test_the_defaults_are_ollamas() -> None:
    assert Sampling() == Sampling(0.8, 40, 0.9, 0.0, 1.0, 64, None)


def test_top_k_keeps_the_lowest_ids_of_equal_logits() -> None:
    x = logits(1, 3, 2, 3, 2, 2)
    assert top_k(x, 1).tolist() == [1]
    assert top_k(x, 3).tolist() == [1, 2, 3]
    assert top_k(x, 4).tolist() == [1, 2, 3, 4]
    assert top_k(x, 0).tolist() == top_k(x, 6).tolist() == top_k(x, 99).tolist() == [0, 1, 2, 3, 4, 5]


@given(x=some_logits, k=st.integers(1, 50))
def test_top_k_is_the_head_of_a_full_sort(x: Logits, k: int) -> None:
    assert top_k(x, k).tolist() == sorted(ranked(x)[:k])


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    x = np.log(logits(0.2, 0.5, 0.3))
    assert top_p(x, every(x), 0.4).tolist() == [1]
    assert top_p(x, every(x), 0.6).tolist() == [1, 2]
    assert top_p(x, every(x), 0.9).tolist() == [1, 2, 0]
    assert top_p(x, every(x), 1.0).tolist() == [0, 1, 2]
    assert top_p(x, np.array([0, 2]), 0.5).tolist() == [2]  # 0.3 / (0.2 + 0.3) = 0.6 among these two


@settings(max_examples=200)
@given(x=some_logits, p=st.floats(0.01, 0.99))
def test_top_p_is_the_shortest_sufficient_head_of_a_full_sort(x: Logits, p: float) -> None:
    probabilities = softmax(x)
    kept = top_p(x, every(x), p).tolist()
    assert kept == ranked(x)[: len(kept)]
    assert sum(probabilities[kept]) >= p - 1e-9
    assert sum(probabilities[kept[:-1]]) < p + 1e-9


def test_top_p_of_a_flat_distribution_looks_past_its_first_guess() -> None:
    x = np.zeros(10_000, dtype=np.float32)
    kept = top_p(x, every(x), 0.75)
    assert abs(kept.size - 7_500) <= 1
    assert kept.tolist() == list(range(kept.size))


def test_min_p_is_relative_to_the_likeliest() -> None:
    x = np.log(logits(0.1, 0.6, 0.3))
    assert min_p(x, every(x), 0.49).tolist() == [1, 2]
    assert min_p(x, every(x), 0.51).tolist() == [1]
    assert min_p(x, every(x), 1.0).tolist() == [1]
    assert min_p(x, every(x), 0.0).tolist() == [0, 1, 2]


def test_the_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    x = logits(2, -2, 4, -INF, 0)
    assert penalize(x, [0, 1, 0, 3, 4], 2.0).tolist() == [1, -4, 4, -INF, 0]
    assert x.tolist() == [2, -2, 4, -INF, 0]
    assert penalize(x, [], 2.0) is x
    assert penalize(x, [0], 1.0) is x


def test_presence_counts_once_and_frequency_every_time() -> None:
    x = logits(2, -2, 4, -INF, 0)
    answer = [0, 1, 0, 3, 0]
    assert discourage(x, *counted(answer), 0.5, 0).tolist() == [1.5, -2.5, 4, -INF, 0]
    assert discourage(x, *counted(answer), 0, 0.25).tolist() == [1.25, -2.25, 4, -INF, 0]
    assert discourage(x, *counted(answer), -1, 0.25).tolist() == [2.25, -1.25, 4, -INF, 0]
    assert x.tolist() == [2, -2, 4, -INF, 0]
    assert discourage(x, *counted([]), 1, 1) is x
    assert discourage(x, *counted(answer), 0, 0) is x


@given(
    x=arrays(np.float32, 8, elements=st.floats(-30, 30, width=32)),
    answer=st.lists(st.integers(0, 7), max_size=30),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_the_penalties_are_openais_formula(x: Logits, answer: list[int], presence: float, frequency: float) -> None:
    """As its reference has it: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    found = discourage(x, *counted(answer), presence, frequency)
    for j, mu in enumerate(x.tolist()):
        count = answer.count(j)
        assert found[j] == pytest.approx(mu - count * frequency - float(count > 0) * presence, abs=1e-4)


def test_they_look_at_the_answer_alone_and_come_after_the_repeat_penalty() -> None:
    sampling = Sampling(temperature=0, presence_penalty=1)
    assert pick(logits(5, 4.5, 4), [0, 0, 2], sampling, sampling.generator()) == 0
    assert pick(logits(5, 4.5, 4), [2, 0], sampling, sampling.generator(), answer=[0]) == 1
    both = Sampling(temperature=0, repeat_penalty=2, presence_penalty=1)
    # (4 / 2) - 1 = 1 stays above 0.75; the other order, (4 - 1) / 2 = 1.5, would stay above 1.25 too.
    assert pick(logits(4, 0.75), [0], both, both.generator(), answer=[0]) == 0
    assert pick(logits(4, 1.25), [0], both, both.generator(), answer=[0]) == 1


@pytest.mark.parametrize(("last_n", "expected"), [(0, 0), (1, 0), (2, 1), (3, 0), (64, 0), (-1, 0)])
def test_only_recent_tokens_are_penalized(last_n: int, expected: int) -> None:
    sampling = Sampling(temperature=0, repeat_penalty=2, repeat_last_n=last_n)
    assert pick(logits(5, 4.5, 4), [1, 0, 2], sampling, sampling.generator()) == expected


@pytest.mark.parametrize(("last_n", "expected"), [(100, 0), (101, 1), (-1, 1)])
def test_minus_one_makes_all_tokens_recent(last_n: int, expected: int) -> None:
    sampling = Sampling(temperature=0, repeat_penalty=2, repeat_last_n=last_n)
    assert pick(logits(5, 4.5, 4), [0] + [2] * 100, sampling, sampling.generator()) == expected


def test_greedy_takes_the_lowest_of_equal_ids_and_needs_no_other_setting() -> None:
    sampling = Sampling(temperature=0, top_k=1, top_p=0.01, min_p=1)
    rng = sampling.generator()
    assert pick(logits(1, 7, 7, -INF), [], sampling, rng) == 1
    assert pick(logits(-INF, -INF, -3), [], sampling, rng) == 2


def test_top_p_looks_at_the_probabilities_before_the_temperature() -> None:
    x = np.log(logits(0.6, 0.3, 0.1))
    # At temperature 100 all three are about equally likely; top-p has cut to one before.
    sampling = Sampling(temperature=100, top_k=0, top_p=0.5, seed=1)
    rng = sampling.generator()
    assert {pick(x, [], sampling, rng) for _ in range(100)} == {0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_frequencies_of_the_softmax(temperature: float) -> None:
    x = logits(1.0, 2.0, -INF, 0.0, 2.5)
    rng = np.random.Generator(np.random.PCG64(3))
    n = 20_000
    counts = np.bincount([draw(x, every(x), temperature, rng) for _ in range(n)], minlength=5)
    expected = np.exp(x.astype(float) / temperature)
    expected /= expected.sum()
    assert counts[2] == 0
    assert np.abs(counts / n - expected).max() < 5 * math.sqrt(0.25 / n)


def test_a_forbidden_token_is_not_even_drawn_by_zero() -> None:
    assert draw(logits(-INF, 1, 2), np.arange(3), 1.0, Mock(random=lambda: 0.0)) == 1


def test_the_seed_decides_everything() -> None:
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def run(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.5, top_k=0, top_p=1, seed=seed)
        rng = sampling.generator()
        return [pick(x, [], sampling, rng) for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1, seed=0)
    rng = sampling.generator()
    assert {pick(logits(1, 30, 29.9, -30), [], sampling, rng) for _ in range(50)} == {1}


@settings(max_examples=200)
@given(
    x=some_logits,
    temperature=st.floats(0, 5),
    k=st.integers(0, 50),
    p=st.floats(0.01, 1),
    m=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_pick_gives_an_allowed_id_and_leaves_the_logits(
    x: Logits, temperature: float, k: int, p: float, m: float, penalty: float, seed: int, data: st.DataObject
) -> None:
    recent = data.draw(st.lists(st.integers(0, x.size - 1), max_size=100))
    sampling = Sampling(temperature, k, p, m, penalty, 64, seed)
    before = x.copy()
    token = pick(x, recent, sampling, sampling.generator())
    assert x[token] > -INF
    assert (x == before).all()
    if k:
        assert token in top_k(penalize(x, recent[-64:], penalty), k)


def test_a_vocabulary_of_gemmas_size() -> None:
    x = np.random.default_rng(5).normal(0, 3, 256_000).astype(np.float32)
    for sampling in (Sampling(seed=1), Sampling(top_k=0, seed=1), Sampling(top_k=0, top_p=1, min_p=0.05, seed=1)):
        token = pick(x, list(range(200)), sampling, sampling.generator())
        probability = softmax(x)
        assert probability[token] >= 0.04 * probability.max() or sampling.top_k == 0


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (logits(math.nan, math.nan), "2 of 2 are NaN or infinite"),
        (logits(0, math.nan, 1), "1 of 3 are NaN or infinite"),
        (logits(0, INF), "1 of 2 are NaN or infinite"),
        (logits(-INF, -INF), "every token is forbidden"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_nothing_can_be_chosen_by_are_refused(x: Logits, found: str, temperature: float) -> None:
    sampling = Sampling(temperature)
    with pytest.raises(GriffinError, match=f"logits: no token can be chosen: {found}"):
        pick(x, [], sampling, sampling.generator())


NAN = math.nan


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, NAN, INF, "1", None, True]),
        ("top_k", [-1, 1.5, True, NAN]),
        ("top_p", [0, 0.0, -1, 1.1, NAN, None]),
        ("min_p", [-0.1, 1.1, NAN, "0"]),
        ("repeat_penalty", [0, -1, 0.001, 101, NAN, INF]),
        ("presence_penalty", [-2.1, 2.1, NAN, "1"]),
        ("frequency_penalty", [-2.1, 2.1, NAN, True]),
        ("repeat_last_n", [-2, 0.5, NAN]),
        ("seed", [-1, 1.0, "1", True]),
    ],
)
def test_a_value_out_of_range_is_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UnsupportedError, match=f"^{field}: expected .*, found "):
            Sampling(**{field: value})


def test_the_ends_of_each_range_are_in_it() -> None:
    Sampling(0, 0, 1, 0, 0.01, -1, 0)
    Sampling(1000, 2**40, 1e-9, 1, 100, 2**40, 2**100)

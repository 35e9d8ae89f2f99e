from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.quant.mix import Mix, Option, choose, smallest
from griffin_gguf.runtime.errors import UnsupportedError

TYPES = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q8_0)

Alternatives = dict[str, list[Option]]


def options(*pairs: tuple[int, float]) -> list[Option]:
    return [Option(type, nbytes, cost) for type, (nbytes, cost) in zip(TYPES, pairs, strict=False)]


def brute_force(tensors: Alternatives, budget: int) -> float:
    """The least cost of all combinations within the budget."""
    combinations = product(*tensors.values())
    return min(sum(o.cost for o in each) for each in combinations if sum(o.nbytes for o in each) <= budget)


def totals(tensors: Alternatives, mix: Mix) -> tuple[int, float]:
    """Bytes and cost of the types that a mix names."""
    chosen: Sequence[Option] = [next(o for o in tensors[name] if o.type is type) for name, type in mix.types.items()]
    return sum(o.nbytes for o in chosen), sum(o.cost for o in chosen)


@st.composite
def alternatives(draw: st.DrawFn) -> Alternatives:
    """Up to six tensors; sizes and costs in any order, so that some options are dominated and hulls have holes."""
    size, cost = st.integers(1, 40), st.one_of(st.integers(0, 30).map(float), st.floats(0, 100))
    pairs = st.lists(st.tuples(size, cost), min_size=1, max_size=len(TYPES))
    return {f"t{i}": options(*draw(pairs)) for i in range(draw(st.integers(1, 6)))}


@given(alternatives(), st.integers(0, 200))
def test_it_is_the_best_of_all_combinations_and_within_the_budget(tensors: Alternatives, spare: int) -> None:
    budget = smallest(tensors) + spare
    mix = choose(tensors, budget)
    assert list(mix.types) == list(tensors)
    nbytes, cost = totals(tensors, mix)
    assert (mix.nbytes, mix.cost) == (nbytes, pytest.approx(cost))
    assert nbytes <= budget
    assert cost == pytest.approx(brute_force(tensors, budget), rel=1e-8, abs=1e-12)


@given(alternatives(), st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_more_budget_never_costs_more(tensors: Alternatives, spares: list[int]) -> None:
    costs = [choose(tensors, smallest(tensors) + spare).cost for spare in sorted(spares)]
    assert all(later <= earlier * (1 + 1e-8) for earlier, later in pairwise(costs))


def test_what_climbing_along_the_hulls_leaves_is_found() -> None:
    """The step that buys most per byte would leave 4 bytes that nothing fits into."""
    tensors = {"a": options((0, 10), (6, 0)), "b": options((0, 8), (5, 0)), "c": options((0, 8), (5, 0))}
    assert choose(tensors, 10).types == {"a": T.Q2_K, "b": T.Q3_K, "c": T.Q3_K}


def test_an_option_inside_the_hull_is_taken_where_it_fits_best() -> None:
    tensors = {"a": options((1, 10), (2, 9), (4, 0))}
    assert [choose(tensors, budget).types["a"] for budget in (1, 2, 3, 4)] == [T.Q2_K, T.Q3_K, T.Q3_K, T.Q4_K]


def test_bytes_that_buy_nothing_are_not_spent() -> None:
    tensors = {"a": options((1, 5), (2, 0), (9, 0))}
    assert choose(tensors, 100).nbytes == 2


def test_many_equal_tensors_do_not_explode() -> None:
    """300 tensors of 5 types: 10²⁰⁹ combinations, most of them of equal bytes."""
    tensors = {f"t{i}": options((20, 9 + i / 7), (26, 4), (34, 2), (42, 1), (66, 0.2)) for i in range(300)}
    mix = choose(tensors, 300 * 33 + 1)
    assert 300 * 33 - 6 <= mix.nbytes <= 300 * 33 + 1


def test_a_budget_below_the_smallest_mix_is_refused_and_the_smallest_named() -> None:
    tensors = {"a": options((1000, 5), (2000, 0)), "b": options((500, 5))}
    with pytest.raises(UnsupportedError, match=r"only 1,499 bytes of tensors; the smallest takes 1,500"):
        choose(tensors, 1499)

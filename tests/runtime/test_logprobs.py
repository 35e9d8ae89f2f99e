"""Log probabilities against a plain computation of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from griffin_gguf.runtime.logprobs import token_logprobs

LOGITS = arrays(np.float32, st.integers(2, 40), elements=st.floats(-60, 60, width=32))


@given(LOGITS, st.data())
def test_they_are_the_softmax_of_the_logits(logits: np.ndarray, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, logits.size - 1))
    count = data.draw(st.integers(0, logits.size))
    found = token_logprobs(logits, token, count)
    exact = logits.astype(np.float64)
    expected = exact - np.logaddexp.reduce(exact)
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-9)
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:count]
    assert [i for i, _ in found.top] == order
    assert [value for _, value in found.top] == pytest.approx(expected[order].tolist(), abs=1e-9)


def test_a_forbidden_token_has_none_of_the_probability() -> None:
    logits = np.array([0, -np.inf, 0], np.float32)
    assert token_logprobs(logits, 1, 0).logprob == -np.inf
    assert token_logprobs(logits, 0, 1).top == ((0, pytest.approx(np.log(0.5))),)

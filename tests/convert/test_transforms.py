import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.convert.transforms import decay, transformed
from griffin_gguf.runtime.arch import TENSORS, Hyperparameters, Tensor, Transform

HP = Hyperparameters(
    layers=2, context=8, hidden=6, mlp_width=5, vocab=9, heads=3, kv_heads=1, head_width=4, window=4, norm_eps=1e-6,
    rope_width=2, rope_base=1e4, logit_cap=30.0, embedding_scale=2.0, conv_taps=4, lru_width=12, gate_blocks=3,
    recurrent=(True, False), attention_bias=True, untied=True,
)  # fmt: skip
ONE_OF_EACH = {tensor.spec.transform: tensor for tensor in HP.tensors()}


def source(tensor: Tensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).standard_normal(tensor.source_shape, np.float32)


def expected(tensor: Tensor) -> np.ndarray:
    """The whole tensor in GGUF's shape, each transform said once more in the plainest way."""
    w = source(tensor)
    match tensor.spec.transform:
        case Transform.ADD_ONE:
            w = w + np.float32(1)
        case Transform.DECAY:
            w = (-8 * torch.nn.functional.softplus(torch.tensor(w, dtype=torch.float64))).float().numpy()
        case Transform.TRANSPOSE_BLOCKS:
            w = np.stack([block.T for block in w])
        case Transform.FLATTEN:
            w = np.concatenate(list(w))
        case Transform.SQUEEZE_TAPS:
            w = w[:, 0, :]
        case Transform.NONE:
            pass
    return w


def read(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    w = source(tensor)
    return transformed(tensor, lambda a, b: w.reshape(-1, w.shape[-1])[a:b], start, stop)


@pytest.mark.parametrize("transform", Transform)
@given(one=st.integers(0, 12), other=st.integers(0, 12))
def test_any_rows_are_those_of_the_whole(transform, one, other):
    tensor = ONE_OF_EACH[transform]
    whole = expected(tensor)
    assert whole.shape == tensor.shape
    rows = whole.reshape(-1, whole.shape[-1])
    start, stop = sorted((min(one, len(rows)), min(other, len(rows))))
    if whole.ndim == 1:
        start, stop = 0, 1
    found = read(tensor, start, stop)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, rows[start:stop], rtol=1e-7, atol=0)


def test_every_tensor_of_the_table_comes_out_in_its_shape():
    for tensor in HP.tensors():
        rows = math.prod(tensor.shape[:-1])
        assert read(tensor, 0, rows).shape == (rows, tensor.shape[-1]), tensor.name
    assert {tensor.spec for tensor in HP.tensors()} == set(TENSORS)


def test_a_gate_reads_only_the_blocks_it_needs():
    tensor = ONE_OF_EACH[Transform.TRANSPOSE_BLOCKS]
    w = source(tensor).reshape(-1, tensor.shape[-1])
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return w[start:stop]

    transformed(tensor, rows, 5, 7)  # rows of the second of three blocks of 4
    assert asked == [(4, 8)]


def test_decay_overflows_nowhere():
    parameter = np.array([-1e4, -80, -30, 0, 30, 1e4, 3e38], np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = decay(parameter)
    expected = [0, -8 * math.exp(-80), -8 * math.log1p(math.exp(-30)), -8 * math.log(2), -240, -8e4, -math.inf]
    np.testing.assert_allclose(found, expected, rtol=1e-6)

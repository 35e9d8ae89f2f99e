from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant import encode as encoding
from griffin_gguf.quant.encode import ENCODABLE, NEEDS_IMPORTANCE, EncodingError
from griffin_gguf.quant.file_types import FALLBACKS, FILE_TYPES
from griffin_gguf.quant.recipes import row_bytes

ALL = sorted(ENCODABLE)

#: Root-mean-square error of N(0, 1) after a round trip: above what each type gives, well below the next coarser.
ERRORS = {
    T.F32: 0.0, T.F16: 3e-4, T.BF16: 2e-3, T.Q8_0: 7e-3, T.Q6_K: 2e-2, T.Q5_K: 4e-2, T.Q5_1: 4.5e-2, T.Q5_0: 5e-2,
    T.Q4_1: 9e-2, T.Q4_K: 8e-2, T.Q4_0: 0.1, T.IQ4_NL: 9e-2, T.IQ4_XS: 9e-2, T.MXFP4: 0.14, T.Q3_K: 0.18,
    T.IQ3_S: 0.18, T.IQ3_XXS: 0.24, T.Q2_K: 0.32, T.IQ2_S: 0.3, T.IQ2_XS: 0.33, T.IQ2_XXS: 0.38, T.IQ1_M: 0.65,
    T.IQ1_S: 0.65,
}  # fmt: skip


def encode(type: T, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode, every column as important as the next where the type wants to know."""
    return encoding.encode(type, rows, np.ones(rows.shape[1], np.float32) if type in NEEDS_IMPORTANCE else None)


def normal(n: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32)


def test_every_type_that_recipes_name_can_be_encoded() -> None:
    named = {recipe.default for recipe in FILE_TYPES.values()} | {*FALLBACKS.values(), T.F16}
    named |= {rule.type for recipe in FILE_TYPES.values() for rules in recipe.rules.values() for rule in rules}
    assert named <= ENCODABLE


@pytest.mark.parametrize("type", ALL, ids=lambda type: type.name)
def test_gguf_py_reads_back_what_was_encoded(type: T) -> None:
    rows = normal(64, 512)
    encoded = encode(type, rows)
    assert encoded.shape == (64, row_bytes(type, 512))
    error = float(np.sqrt(np.mean((dequantize(encoded, type) - rows) ** 2)))
    assert 0.4 * ERRORS[type] <= error <= ERRORS[type]


def test_plain_types_round_as_numpy_does() -> None:
    rows = normal(8, 256) * np.float32(100)
    assert (encode(T.F32, rows).view(np.float32) == rows).all()
    assert (encode(T.F16, rows).view(np.float16) == rows.astype(np.float16)).all()
    bits = rows.view(np.uint32).astype(np.uint64)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert (encode(T.BF16, rows).view(np.uint16) == nearest_even).all()


def test_a_block_of_q8_0_by_hand() -> None:
    rows = np.zeros((1, 32), np.float32)
    rows[0, :3] = 127, -64, 1  # the largest becomes 127, so the scale is 1.0: F16 0x3C00, little-endian
    assert encode(T.Q8_0, rows).tolist() == [[0x00, 0x3C, 127, 256 - 64, 1, *[0] * 29]]


@settings(max_examples=30, deadline=None)
@given(type=st.sampled_from(ALL), cuts=st.sets(st.integers(1, 22)), seed=st.integers(0, 99))
def test_pieces_give_the_bytes_of_the_whole(type: T, cuts: set[int], seed: int) -> None:
    rows = normal(23, 256, seed)
    bounds = [0, *sorted(cuts), 23]
    pieces = [encode(type, rows[a:b]) for a, b in pairwise(bounds)]
    assert (np.concatenate(pieces) == encode(type, rows)).all()


def test_no_rows() -> None:
    assert encode(T.Q4_K, np.empty((0, 256), np.float32)).shape == (0, 144)


@pytest.mark.parametrize("type", ALL, ids=lambda type: type.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(type: T, value: float) -> None:
    rows = normal(3, 256)
    rows[2, 255] = value
    with pytest.raises(EncodingError, match="NaN or infinity"):
        encode(type, rows)


@pytest.mark.parametrize(
    "type", [type for type in ALL if type not in (T.F32, T.BF16, T.MXFP4)], ids=lambda type: type.name
)
def test_what_would_become_infinite_is_refused(type: T) -> None:
    rows = normal(1, 256)
    rows[0, 0] = -65504
    assert np.isfinite(dequantize(encode(type, rows), type)).all()
    rows[0, 0] = -70000
    with pytest.raises(EncodingError, match=f"holds 70000, and {type.name} ends at 65504"):
        encode(type, rows)


def test_bf16_has_the_range_of_float32_but_for_its_last_step() -> None:
    rows = np.full((1, 32), 1e38, np.float32)
    assert np.isfinite(dequantize(encode(T.BF16, rows), T.BF16)).all()
    rows[0, 0] = np.finfo(np.float32).max
    with pytest.raises(EncodingError, match="BF16 ends at"):
        encode(T.BF16, rows)


@pytest.mark.parametrize(
    ("type", "rows"),
    [
        (T.IQ2_XXS, normal(1, 256)),  # needs an importance matrix: ggml would end the process
        (T.Q4_K, normal(1, 128)),
        (T.Q8_0, normal(1, 256)[0]),
        (T.Q8_0, normal(64, 64).T),
        (T.Q8_0, normal(1, 256).astype(np.float64)),
    ],
)
def test_our_own_mistakes_stop_before_ggml(type: T, rows: NDArray[np.float32]) -> None:
    with pytest.raises(AssertionError):
        encoding.encode(type, rows)


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    rows, importance = normal(64, 512), np.ones(512, np.float32)
    importance[::2] = 1000
    for type in sorted(ENCODABLE - {T.F32, T.F16, T.BF16, T.Q8_0, T.MXFP4, T.IQ1_S, T.IQ1_M}):
        errors = (dequantize(encoding.encode(type, rows, importance), type) - rows) ** 2
        assert errors[:, ::2].mean() < 0.9 * errors[:, 1::2].mean(), type.name


@pytest.mark.parametrize("type", sorted(ENCODABLE), ids=lambda type: type.name)
def test_an_importance_of_nothing_gives_numbers_or_an_error(type: T) -> None:
    with suppress(EncodingError):
        found = encoding.encode(type, normal(4, 512), np.zeros(512, np.float32))
        assert np.isfinite(dequantize(found, type)).all()

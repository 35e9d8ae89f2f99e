"""Damaged blocks of every type, found as ggml's own validation finds them."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from numpy.typing import NDArray

from griffin_gguf.quant.blocks import NUMBERS, damage
from griffin_gguf.runtime.ggml import abi

Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def sound() -> Callable[[T, Bytes], bool]:
    """ggml's verdict. It writes to stderr what it found, which is why only this test calls it.

    NumPy's of doubles: ggml calls those infinite that a float cannot hold.
    """
    abi.load()
    name = "libggml-base.0.dylib" if (abi.library_folder() / "libggml-base.0.dylib").exists() else "libggml-base.so.0"
    validate = ctypes.CDLL(str(abi.library_folder() / name)).ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]

    def verdict(type: T, data: Bytes) -> bool:
        if type is T.F64:
            return bool(np.isfinite(data.view("<f8")).all())
        return validate(int(type), data.ctypes.data, data.nbytes)

    return verdict


def test_every_type_but_q8_1_is_known() -> None:
    assert set(NUMBERS) == set(T) - {T.Q8_1}


@pytest.mark.parametrize("type", NUMBERS, ids=lambda type: type.name)
def test_numbers_lie_within_their_blocks(type: T) -> None:
    for number in NUMBERS[type]:
        assert 0 <= number.offset < GGML_QUANT_SIZES[type][1]


def check(sound: Callable[[T, Bytes], bool], type: T, data: Bytes) -> None:
    """Compare with ggml, block by block."""
    size = GGML_QUANT_SIZES[type][1]
    bad = [i for i in range(len(data) // size) if not sound(type, data[i * size : (i + 1) * size])]
    assert sound(type, data) == (not bad)
    found = damage(type, data)
    assert (found is None) == (not bad)
    if found:
        assert (found.count, found.first) == (len(bad), bad[0])


@pytest.mark.parametrize("type", NUMBERS, ids=lambda type: type.name)
def test_random_bytes_are_judged_as_ggml_judges_them(sound: Callable[[T, Bytes], bool], type: T) -> None:
    rng = np.random.default_rng(int(type))
    for count in (1, 7, 200):
        check(sound, type, rng.integers(0, 256, count * GGML_QUANT_SIZES[type][1], np.uint8))


@pytest.mark.parametrize("type", NUMBERS, ids=lambda type: type.name)
def test_every_byte_of_a_block_counts_as_for_ggml(sound: Callable[[T, Bytes], bool], type: T) -> None:
    size = GGML_QUANT_SIZES[type][1]
    hits = 0
    for at in range(size - 1):
        for low, high in ((0x00, 0x7C), (0xFF, 0xFF), (0x01, 0xFC), (0x80, 0x7F), (0xF0, 0x7F), (0xFF, 0x7B)):
            data = np.zeros(3 * size, np.uint8)
            data[size + at], data[size + at + 1] = low, high
            check(sound, type, data)
            hits += damage(type, data) is not None
    assert bool(hits) == bool(NUMBERS[type] and type is not T.IQ1_M)  # whose number takes more than two bytes
    full = np.full(2 * size, 0xFF, np.uint8)
    check(sound, type, full)
    assert (damage(type, full) is None) == (not NUMBERS[type])


@given(
    type=st.sampled_from(list(NUMBERS)),
    blocks=st.integers(0, 4),
    noise=nps.arrays(np.uint8, 400, elements=st.sampled_from([0, 1, 0x3C, 0x7B, 0x7C, 0x7F, 0x80, 0xF0, 0xFC, 0xFF])),
)
def test_nasty_bytes_are_judged_as_ggml_judges_them(
    sound: Callable[[T, Bytes], bool], type: T, blocks: int, noise: Bytes
) -> None:
    check(sound, type, np.resize(noise, blocks * GGML_QUANT_SIZES[type][1]))


@pytest.mark.parametrize(
    ("type", "offset", "raw", "problem"),
    [
        (T.F32, 0, np.float32(np.nan).tobytes(), "the number is NaN"),
        (T.F32, 0, np.float32(-np.inf).tobytes(), "the number is infinite"),
        (T.F64, 0, np.float64(np.nan).tobytes(), "the number is NaN"),
        (T.BF16, 0, b"\x80\x7f", "the number is infinite"),
        (T.BF16, 0, b"\x81\x7f", "the number is NaN"),
        (T.Q4_K, 2, np.float16(np.inf).tobytes(), "dmin is infinite"),
        (T.Q2_K, 80, np.float16(np.nan).tobytes(), "d is NaN"),
        (T.Q5_1, 2, np.float16(-np.inf).tobytes(), "m is infinite"),
        (T.MXFP4, 0, b"\xff", "e is NaN"),
        (T.IQ1_M, 48, b"\x00\x00\x00\x00\x00\xc0\x00\x70", "d is infinite"),
        (T.IQ1_M, 48, b"\x00\x10\x00\x00\x00\xc0\x00\x70", "d is NaN"),
    ],
)
def test_what_is_wrong_is_said(type: T, offset: int, raw: bytes, problem: str) -> None:
    size = GGML_QUANT_SIZES[type][1]
    data = np.zeros(5 * size, np.uint8)
    assert damage(type, data) is None
    for block in (2, 4):
        data[block * size + offset :][: len(raw)] = np.frombuffer(raw, np.uint8)
    found = damage(type, data)
    assert found
    assert (found.count, found.first, found.problem) == (2, 2, problem)


def test_largest_finite_numbers_are_sound() -> None:
    for type, dtype in ((T.F32, np.float32), (T.F16, np.float16), (T.F64, np.float64)):
        info = np.finfo(dtype)
        assert (
            damage(type, np.array([info.max, info.min, 0, -0.0, info.smallest_subnormal], dtype).view(np.uint8)) is None
        )

"""Where in a block of each tensor type its numbers lie, and whether they are finite.

A block of a quantized type is a few numbers, its scales, and many small integers that they scale. Whatever bytes
come, the integers mean something; a scale that is NaN or infinite makes nothing of the whole block. Of the plain
types every element is a block. Names and offsets are those of the structs in ggml-common.h, which are packed and
little endian.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """Bits of a number: it is not finite where all of `exponent` are set, and then NaN where one of `fraction` is."""

    dtype: str
    exponent: int
    fraction: int


F16 = Format("<u2", 0x7C00, 0x03FF)
BF16 = Format("<u2", 0x7F80, 0x007F)
F32 = Format("<u4", 0x7F80_0000, 0x007F_FFFF)
F64 = Format("<u8", 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF)
E8M0 = Format("<u1", 0xFF, 0xFF)  # 2^(e - 127), and 255 is NaN

#: Four u16 whose top 4 bits together are one F16, the lowest first: IQ1_M's.
SCATTERED_F16 = Format("<u2", F16.exponent, F16.fraction)


@dataclass(frozen=True)
class Number:
    """A number of a block, and the byte of the block where it begins."""

    name: str
    offset: int
    format: Format


_VALUE = "the number"
_D, _D_M = (Number("d", 0, F16),), (Number("d", 0, F16), Number("m", 2, F16))
_D_DMIN = (Number("d", 0, F16), Number("dmin", 2, F16))

#: The numbers in a block. Q8_1 is not here: it has no place in files.
NUMBERS: dict[T, tuple[Number, ...]] = {
    T.F32: (Number(_VALUE, 0, F32),),
    T.F16: (Number(_VALUE, 0, F16),),
    T.BF16: (Number(_VALUE, 0, BF16),),
    T.F64: (Number(_VALUE, 0, F64),),
    T.I8: (),
    T.I16: (),
    T.I32: (),
    T.I64: (),
    T.Q1_0: _D,
    T.Q4_0: _D,
    T.Q4_1: _D_M,
    T.Q5_0: _D,
    T.Q5_1: _D_M,
    T.Q8_0: _D,
    T.Q2_K: (Number("d", 80, F16), Number("dmin", 82, F16)),  # after scales[16], qs[64]
    T.Q3_K: (Number("d", 108, F16),),  # after hmask[32], qs[64], scales[12]
    T.Q4_K: _D_DMIN,
    T.Q5_K: _D_DMIN,
    T.Q6_K: (Number("d", 208, F16),),  # after ql[128], qh[64], scales[16]
    T.Q8_K: (Number("d", 0, F32),),
    T.TQ1_0: (Number("d", 52, F16),),  # after qs[48], qh[4]
    T.TQ2_0: (Number("d", 64, F16),),  # after qs[64]
    T.IQ1_S: _D,
    T.IQ1_M: (Number("d", 48, SCATTERED_F16),),  # in scales[8], after qs[32], qh[16]
    T.IQ2_XXS: _D,
    T.IQ2_XS: _D,
    T.IQ2_S: _D,
    T.IQ3_XXS: _D,
    T.IQ3_S: _D,
    T.IQ4_NL: _D,
    T.IQ4_XS: _D,
    T.MXFP4: (Number("e", 0, E8M0),),
    T.NVFP4: (),  # d[4] are UE4M3, and ggml gives every byte a finite value
}


@dataclass(frozen=True)
class Damage:
    """`count` blocks have a number that is not finite; of the one with index `first`, `problem` says which."""

    count: int
    first: int
    problem: str


def damage(type: T, data: NDArray[np.uint8]) -> Damage | None:
    """Find the blocks of `data`, uint8 [n · bytes of a block], that hold NaN or infinity; None where all are sound.

    Runs without Python's lock for the most part, so threads add up.
    """
    assert data.nbytes % GGML_QUANT_SIZES[type][1] == 0, (type.name, data.nbytes)
    numbers = {number.name: (number.format, _bits(type, number, data)) for number in NUMBERS[type]}
    wrong = [bits & format.exponent == format.exponent for format, bits in numbers.values()]
    if not any(mask.any() for mask in wrong):
        return None
    mask: NDArray[np.bool_] = reduce(or_, wrong)
    first = int(mask.argmax())
    name, (format, bits) = next(row for row, hit in zip(numbers.items(), wrong, strict=True) if hit[first])
    kind = "NaN" if int(bits[first]) & format.fraction else "infinite"
    return Damage(int(mask.sum()), first, f"{name} is {kind}")


def _bits(type: T, number: Number, data: NDArray[np.uint8]) -> NDArray[Any]:
    """View that number of every block as an unsigned integer, [blocks]."""
    size = GGML_QUANT_SIZES[type][1]
    if number.format is not SCATTERED_F16:
        return _field(data, number.format.dtype, number.offset, size)
    low, second, third, high = (_field(data, "<u2", number.offset + 2 * i, size) >> 12 << 4 * i for i in range(4))
    return low | second | third | high


def _field(data: NDArray[np.uint8], dtype: str, offset: int, size: int) -> NDArray[Any]:
    """View what lies at `offset` of every `size` bytes, [blocks]."""
    block = np.dtype({"names": ["x"], "formats": [dtype], "offsets": [offset], "itemsize": size})
    return data.view(block)["x"]

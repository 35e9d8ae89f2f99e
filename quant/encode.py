"""Rows of float32 to rows of a GGUF tensor type, by ggml's own quantizers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant import blocks
from griffin_gguf.quant.recipes import row_bytes
from griffin_gguf.runtime.arch import Tensor
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.ggml import abi

#: (tensor, start, stop) -> float32 [stop - start, columns]: rows of the tensor in GGUF's layout, seen as 2-D.
Reader = Callable[[Tensor, int, int], NDArray[np.float32]]

#: (tensor, start, stop, types) -> those rows in each of the types, uint8 [stop - start, bytes of a row]. Called from
#: several threads at once.
Encoder = Callable[[Tensor, int, int, Sequence[T]], list[NDArray[np.uint8]]]

#: A weight's name -> mean squares of its inputs, float32 [matrices, columns], or None where they are not known.
Importance = Callable[[str], NDArray[np.float32] | None]

#: The types that a tensor may be written in.
ENCODABLE = frozenset({
    T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ1_S,
    T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_NL, T.IQ4_XS, T.MXFP4,
})  # fmt: skip

#: Those that ggml encodes with an importance vector only (`ggml_quantize_requires_imatrix`).
NEEDS_IMPORTANCE = frozenset({T.IQ1_S, T.IQ2_XXS, T.IQ2_XS})

#: Largest magnitude that stays finite. The rest hold F16 values: numbers in F16, scales of blocks elsewhere.
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST = {T.F32: _FLOAT32_MAX, T.BF16: 3.3895e38, T.MXFP4: _FLOAT32_MAX}  # MXFP4's scale is an exponent of 8 bits
_LARGEST_F16 = 65504.0


class EncodingError(GriffinError):
    """Values that the type cannot hold: NaN, infinity, or beyond its range. `tensor` is "" where unknown."""

    def __init__(self, problem: str, tensor: str = "") -> None:
        super().__init__(f"{tensor}: {problem}" if tensor else problem)
        self.problem, self.tensor = problem, tensor


def encode(type: T, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Encode float32 [n, columns], C-contiguous, as uint8 [n, bytes of a row].

    `importance`, float32 [columns], weighs the error of each column: the mean square of what it is multiplied
    with (ggml's quant_weights). Rows are independent: encoding them in pieces gives the same bytes. Runs without
    Python's lock, so threads add up. Raises `EncodingError` for values that `type` cannot hold.
    """
    # ggml ends the process where these do not hold.
    assert type in ENCODABLE, type.name
    assert rows.dtype == np.float32, rows.dtype
    assert rows.ndim == 2, rows.shape
    assert rows.flags.c_contiguous, rows.strides
    n, columns = rows.shape
    assert columns % GGML_QUANT_SIZES[type][0] == 0, (type.name, columns)
    assert importance is not None or type not in NEEDS_IMPORTANCE, type.name
    weights = None
    if importance is not None:
        assert importance.shape == (columns,), (importance.shape, columns)
        assert importance.dtype == np.float32, importance.dtype
        assert importance.flags.c_contiguous, importance.strides
        weights = importance.ctypes.data
    out = np.empty((n, row_bytes(type, columns)), np.uint8)
    if rows.size == 0:
        return out
    _check_range(type, rows)
    source, target = rows.ctypes.data, out.ctypes.data
    written = abi.load().ggml_quantize_chunk(int(type), source, target, 0, n, columns, weights)
    assert written == out.nbytes, (written, out.nbytes)
    if found := blocks.damage(type, out.reshape(-1)):  # an importance of 0 all over a block can do that
        raise EncodingError(f"cannot be encoded as {type.name}: {found.problem}")
    return out


def _check_range(type: T, rows: NDArray[np.float32]) -> None:
    """Refuse what `type` would turn into infinity or nonsense. Two reductions, no copy."""
    low, high = float(rows.min()), float(rows.max())  # NaN comes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise EncodingError("holds NaN or infinity")
    largest = _LARGEST.get(type, _LARGEST_F16)
    if max(-low, high) > largest:
        raise EncodingError(f"holds {max(-low, high):g}, and {type.name} ends at {largest:g}")


def encoder(read: Reader, importance: Importance | None = None) -> Encoder:
    """Read rows and encode them in each type. Raises `EncodingError` naming the tensor, and what `read` raises."""

    def encode_rows(tensor: Tensor, start: int, stop: int, types: Sequence[T]) -> list[NDArray[np.uint8]]:
        rows = read(tensor, start, stop)
        assert rows.shape == (stop - start, tensor.shape[-1]), (tensor.name, rows.shape)
        return [encode_tensor(tensor, type, rows, start, importance) for type in types]

    return encode_rows


def encode_tensor(
    tensor: Tensor, type: T, rows: NDArray[np.float32], start: int, importance: Importance | None
) -> NDArray[np.uint8]:
    """Encode rows of a tensor from row `start` on, each matrix of it with its own importance."""
    weights = importance(tensor.name) if importance else None
    try:
        if weights is None:
            return encode(type, rows)
        stop, height = start + len(rows), tensor.shape[-2]  # a 3-D tensor is a stack of matrices of that many rows
        bounds = [start, *range((start // height + 1) * height, stop, height), stop]
        pieces = [encode(type, rows[a - start : b - start], weights[a // height]) for a, b in pairwise(bounds)]
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    except EncodingError as error:
        raise EncodingError(error.problem, tensor.name) from None

"""Rows of float32 to rows of a GGUF tensor type, by ggml's own quantizers."""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant.recipes import row_bytes
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.ggml import abi

#: The types that ggml encodes from float32 without an importance matrix and that recipes name.
ENCODABLE = frozenset({
    T.F32, T.F16, T.BF16, T.Q4_0, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K,
})  # fmt: skip

#: Largest magnitude that stays finite. The rest hold F16 values: numbers in F16, scales of blocks elsewhere.
_LARGEST = {T.F32: float(np.finfo(np.float32).max), T.BF16: 3.3895e38}
_LARGEST_F16 = 65504.0


class EncodingError(GriffinError):
    """Values that the type cannot hold: NaN, infinity, or beyond its range. `tensor` is "" where unknown."""

    def __init__(self, problem: str, tensor: str = "") -> None:
        super().__init__(f"{tensor}: {problem}" if tensor else problem)
        self.problem, self.tensor = problem, tensor


def encode(type: T, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode float32 [n, columns], C-contiguous, as uint8 [n, bytes of a row].

    Rows are independent: encoding them in pieces gives the same bytes. Runs without Python's lock, so threads
    add up. Raises `EncodingError` for values that `type` cannot hold.
    """
    # ggml ends the process where these do not hold.
    assert type in ENCODABLE, type.name
    assert rows.dtype == np.float32, rows.dtype
    assert rows.ndim == 2, rows.shape
    assert rows.flags.c_contiguous, rows.strides
    n, columns = rows.shape
    assert columns % GGML_QUANT_SIZES[type][0] == 0, (type.name, columns)
    out = np.empty((n, row_bytes(type, columns)), np.uint8)
    if rows.size == 0:
        return out
    _check_range(type, rows)
    written = abi.load().ggml_quantize_chunk(int(type), rows.ctypes.data, out.ctypes.data, 0, n, columns, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out


def _check_range(type: T, rows: NDArray[np.float32]) -> None:
    """Refuse what `type` would turn into infinity or nonsense. Two reductions, no copy."""
    low, high = float(rows.min()), float(rows.max())  # NaN comes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise EncodingError("holds NaN or infinity")
    largest = _LARGEST.get(type, _LARGEST_F16)
    if max(-low, high) > largest:
        raise EncodingError(f"holds {max(-low, high):g}, and {type.name} ends at {largest:g}")

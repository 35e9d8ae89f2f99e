"""Rows of a checkpoint's tensor -> the same rows of the GGUF's: the functions behind `arch.Transform`.

Each takes a tensor apart only as far as the rows asked for need it, so a model of any size streams through.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.convert.checkpoint import Rows
from griffin_gguf.runtime.arch import Tensor, Transform

F32 = NDArray[np.float32]


def decay(parameter: F32) -> F32:
    """-8·softplus(Λ), elementwise, through float64: log a of a fully open recurrence gate.

    softplus(Λ) = log(1 + e^Λ) as logaddexp(0, Λ), which overflows nowhere and loses nothing where e^Λ is tiny.
    """
    with np.errstate(over="ignore"):  # past 4e37 it is -inf, which no file can hold: the encoder says so
        return (-8 * np.logaddexp(0, parameter.astype(np.float64))).astype(np.float32)


def transformed(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    """Rows [start, stop) of the GGUF's tensor, seen as 2-D, from `rows` of the checkpoint's, C-contiguous."""
    return _FUNCTIONS[tensor.spec.transform](tensor, rows, start, stop)


def _same(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    return rows(start, stop)  # also [W, 1, C] -> [W, C], whose rows are the same


def _add_one(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    return rows(start, stop) + np.float32(1)


def _decay(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    return decay(rows(start, stop))


def _flatten(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    """[G, B] -> [W], one row."""
    assert (start, stop) == (0, 1)
    return rows(0, tensor.source_shape[0]).reshape(1, -1)


def _transpose_blocks(tensor: Tensor, rows: Rows, start: int, stop: int) -> F32:
    """[G, in, out] -> [G, out, in]: reads the whole blocks that the rows lie in."""
    B = tensor.shape[-1]
    first, last = start // B, -(-stop // B)
    blocks = rows(first * B, last * B).reshape(-1, B, B).transpose(0, 2, 1).reshape(-1, B)
    return np.ascontiguousarray(blocks[start - first * B : stop - first * B])


_FUNCTIONS: Mapping[Transform, Callable[[Tensor, Rows, int, int], F32]] = {
    Transform.NONE: _same,
    Transform.SQUEEZE_TAPS: _same,
    Transform.ADD_ONE: _add_one,
    Transform.DECAY: _decay,
    Transform.FLATTEN: _flatten,
    Transform.TRANSPOSE_BLOCKS: _transpose_blocks,
}

"""A millisecond's check, at load, that ggml computes what its declarations promise.

The version check in abi.py catches a foreign release; this catches a build that was patched, or a device
whose kernels are wrong, before it costs a user wrong text instead of an error.
"""

from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor

_T, _D, _R = 3, 64, 256  # tokens, head width, ring rows
_TOLERANCE = 1e-3  # of the largest value; a GPU may multiply in f16

Arrays = dict[str, NDArray[np.float32]]


def selftest(device: Device) -> None:
    """Set a graph of the operations whose signatures have changed before against NumPy; raises `BackendError`."""
    random = np.random.default_rng(0)
    arrays = {"x": random.standard_normal((_T, _D)), "taps": random.standard_normal((_D, 4)) / 2,
              "weight": random.standard_normal((_D, _D)) / 8, "tail": np.zeros((_D, 3))}  # fmt: skip
    data: Arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    found, expected = _by_ggml(device, data), _by_numpy(data)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:  # also a NaN
        raise BackendError(
            f"ggml: version {device.lib.ggml_version().decode()} on {device.name} fails the self-test "
            f"(declared for {abi.GGML_VERSION}): off by {error:.1e} of the largest value"
        )


def _by_ggml(device: Device, data: Arrays) -> NDArray[np.float32]:
    g = Context(64, nodes=64)
    filled: list[tuple[Tensor, NDArray[np.generic]]] = []

    def given(array: NDArray[np.generic], type: int = abi.F32) -> Tensor:
        filled.append((g.input(array.shape, type), array))
        return filled[-1][0]

    x, taps, weight, tail = (given(data[name]) for name in ("x", "taps", "weight", "tail"))
    slots = given(np.arange(_T, dtype=np.int64), abi.I64)
    ring = given(np.zeros((_R, _D), np.float32))
    seen = np.arange(_R) <= np.arange(_T)[:, None]
    mask = given(np.where(seen, 0, -np.inf).astype(np.float16), abi.F16)

    padded = g.concat(tail, g.dense(g.transpose(x)))
    c = g.reshape(g.conv(g.reshape(padded, (1, *padded.shape)), taps), x.shape)
    keys = g.reshape(g.set_rows(ring, c, slots), (1, _R, _D))
    mixed = g.reshape(g.attention(g.swap(g.reshape(c, (_T, 1, _D))), keys, keys, mask, _D**-0.5), (_T, _D))
    result = g.output(g.scale(g.gelu_gate(g.matmul(weight, mixed), mixed), 2.0, 1.0))

    allocator = device.allocator()
    allocator.place(g)
    for tensor, array in filled:
        device.write(tensor, array)
    device.run(g)
    return device.read(result)


def _by_numpy(data: Arrays) -> NDArray[np.float32]:
    padded = np.concatenate([data["tail"].T, data["x"]])
    c = np.asarray(sum(padded[k : k + _T] * data["taps"][:, k] for k in range(4)))
    scores = np.where(np.tri(_T, dtype=bool), c @ c.T / sqrt(_D), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    mixed = weights / weights.sum(1, keepdims=True) @ c
    gate = mixed @ data["weight"].T
    gelu = 0.5 * gate * (1 + np.tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3)))
    return (2 * gelu * mixed + 1).astype(np.float32)

"""The reference backend: NumPy, f32, eager, written for clarity.

Weights are dequantized when a layer needs them and dropped after, so that any model runs that fits into
memory as quantized; the embedding is dequantized in slices of rows.
"""

from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.griffin import Inputs, Rows, chunk_inputs, forward
from griffin_gguf.runtime.state import AttentionState, LayerState

Array = NDArray[np.float32]

#: Elements of the embedding that are dequantized at once for the head (64 MiB as f32).
_HEAD_SLICE = 1 << 24


@dataclass
class NumpyState:
    """The memory of one text, as arrays (keys and values in f32)."""

    owner: object  # the backend that made it
    layers: list[LayerState[Array]]
    position: int = 0

    def copy(self) -> "NumpyState":
        """An independent state that continues from the same point."""
        layers: list[LayerState[Array]] = []
        for layer in self.layers:
            layers.append(type(layer)(*(array.copy() for array in states.arrays([layer]))))
        return NumpyState(self.owner, layers, self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in states.arrays(self.layers))


class NumpyBackend:
    """See the module's head."""

    name = "numpy"

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._hp = file.hyperparameters()

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return states.nbytes(self._hp, GGMLQuantizationType.F32)

    def new_state(self) -> NumpyState:
        """A state at position 0."""
        return NumpyState(self, states.build(self._hp, _zeros, _zeros))

    def run(self, tokens: NDArray[np.int32], state: NumpyState, rows: Rows) -> Array | None:
        """Feed one chunk; `state` changes only once the whole chunk is computed."""
        inputs = chunk_inputs(self._hp, tokens, state.position, states.ring_rows(self._hp))
        ops = NumpyOps(self._file, self._hp)
        logits = forward(ops, self._hp, state.layers, inputs, rows)
        for target, value in ops.stores:
            target[...] = value
        state.position += len(tokens)
        return logits

    def close(self) -> None:
        """Nothing is held beyond the mapped file."""


class NumpyOps:
    """The operations of griffin.py on f32 arrays. `stores` are the writes to make once all is computed."""

    def __init__(self, file: GgufFile, hp: Hyperparameters) -> None:
        self._file, self._hp = file, hp
        self.stores: list[tuple[Array, Array]] = []

    def _weight(self, name: str) -> Array:
        info = self._file.tensors[name]
        return dequantize(info, self._file.data(name)).reshape(info.shape)

    def _biased(self, name: str, y: Array) -> Array:
        return y + self._weight(f"{name}.bias") if f"{name}.bias" in self._file.tensors else y

    def embed(self, tokens: NDArray[Any]) -> Array:
        info = self._file.tensors["token_embd.weight"]
        data = self._file.data(info.name)
        rows = [dequantize(info, data, int(t), int(t) + 1) for t in tokens]
        return np.concatenate(rows) * np.float32(self._hp.embedding_scale)

    def norm(self, name: str, x: Array) -> Array:
        mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float64)
        return (x / np.sqrt(mean + self._hp.norm_eps)).astype(np.float32) * self._weight(f"{name}.weight")

    def linear(self, name: str, x: Array) -> Array:
        return self._biased(name, x @ self._weight(f"{name}.weight").T)

    def block_linear(self, name: str, x: Array) -> Array:
        weight = self._weight(f"{name}.weight")  # [G, out, in]
        blocks = x.reshape(len(x), weight.shape[0], -1).swapaxes(0, 1)  # [G, T, B]
        return self._biased(name, (blocks @ weight.swapaxes(1, 2)).swapaxes(0, 1).reshape(x.shape))

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def mul(self, x: Array, y: Array) -> Array:
        return x * y

    def sigmoid(self, x: Array) -> Array:
        return (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32)

    def gelu_gate(self, x: Array, y: Array) -> Array:
        inner = np.float32(sqrt(2 / pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (1 + np.tanh(inner)) * y

    def conv(self, name: str, z: Array, tail: Array) -> Array:
        taps = self._weight(f"{name}.weight")  # [W, C]; the last meets the current token
        padded = np.concatenate([tail.T, z])  # [C-1+T, W]
        self.stores.append((tail, padded[len(z) :].T))
        shifted = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1], axis=0)  # [T, W, C]
        return self._biased(name, np.einsum("twc,wc->tw", shifted, taps))

    def decay(self, name: str, r: Array, keep: NDArray[Any]) -> tuple[Array, Array]:
        log_a = r * self._weight(name)
        # expm1: 1 - exp(x) loses its digits where a is near 1.
        m = np.where(keep != 0, np.sqrt(-np.expm1(2 * log_a)), np.float32(1))
        return np.exp(log_a) * keep, m

    def scan(self, a: Array, b: Array, h: Array) -> Array:
        out = np.empty_like(b)
        last = h
        for t in range(len(b)):
            last = out[t] = a[t] * last + b[t]
        self.stores.append((h, last))
        return out

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        half = cos.shape[-1]
        out = x.reshape(len(x), -1, self._hp.head_width).copy()
        first, second = out[:, :, :half].copy(), out[:, :, half : 2 * half].copy()
        out[:, :, :half] = first * cos - second * sin
        out[:, :, half : 2 * half] = second * cos + first * sin
        return out.reshape(x.shape)

    def attend(self, q: Array, k: Array, v: Array, ring: AttentionState[Array], inputs: Inputs[NDArray[Any]]) -> Array:
        # Rows that a chunk overwrites lie outside the window of the state as it was: no harm if it fails later.
        ring.k[inputs.slots], ring.v[inputs.slots] = k, v
        hp, count = self._hp, len(q)
        queries = q.reshape(count, hp.kv_heads, -1, hp.head_width).transpose(1, 2, 0, 3)  # [K, N/K, T, D]
        keys = ring.k.reshape(-1, hp.kv_heads, hp.head_width).transpose(1, 2, 0)[:, None]  # [K, 1, D, R]
        values = ring.v.reshape(-1, hp.kv_heads, hp.head_width).transpose(1, 0, 2)[:, None]  # [K, 1, R, D]
        scores = queries @ keys * np.float32(hp.head_width**-0.5)
        scores = np.where(inputs.mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ values).transpose(2, 0, 1, 3).reshape(count, -1)

    def last(self, x: Array) -> Array:
        return x[-1:]

    def head(self, x: Array) -> Array:
        info = self._file.tensors["output.weight" if self._hp.untied else "token_embd.weight"]
        data, step = self._file.data(info.name), max(1, _HEAD_SLICE // self._hp.hidden)
        out = np.empty((len(x), self._hp.vocab), np.float32)
        for start in range(0, self._hp.vocab, step):
            stop = min(start + step, self._hp.vocab)
            out[:, start:stop] = x @ dequantize(info, data, start, stop).T
        cap = np.float32(self._hp.logit_cap)
        return cap * np.tanh(out / cap)


def _zeros(shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, np.float32)

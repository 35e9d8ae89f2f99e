"""The reference backend: NumPy, f32, eager, written for clarity.

Weights are dequantized when a layer needs them and dropped after, so that any model runs that fits into
memory as quantized; the embedding is dequantized in slices of rows.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import pi, sqrt
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.griffin import Rows, Span, angles, finished, forward, ring_slots, spans, visible
from griffin_gguf.runtime.saved_state import Layout, fingerprint
from griffin_gguf.runtime.state import AttentionState, LayerState, RecurrentState, State

Array = NDArray[np.float32]

#: Elements of the embedding that are dequantized at once for the head (64 MiB as f32).
_HEAD_SLICE = 1 << 24


class NumpyState(State):
    """The memory of one text, as arrays (keys and values in f32)."""

    def __init__(self, owner: "NumpyBackend", hp: Hyperparameters) -> None:
        super().__init__(owner)
        self._backend, self._hp = owner, hp
        self.layers: list[LayerState[Array]] = states.build(hp, _zeros, _zeros)
        #: Of a last chunk that was to leave a trace, by layer: what was convolved [C-1+T, W], and every h [T, W].
        self.padded: dict[int, Array] = {}
        self.every_h: dict[int, Array] = {}

    @property
    def layout(self) -> Layout:
        return {name: (array.dtype, array.shape) for name, array in states.named(self.layers)}

    def copy(self) -> "NumpyState":
        self.check()
        other = NumpyState(self._backend, self._hp)
        other.write(dict(states.named(self.layers)))
        other.position, other.logits = self.position, self.logits
        return other

    def read(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        ring = states.ring_rows(self._hp)
        return {name: array[:stop].copy() for name, array, stop in states.parts(self.layers, rows, ring)}

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in states.named(self.layers):
            array[...] = arrays[name]

    def rewind(self, count: int) -> None:
        for i, layer in enumerate(self.layers):
            if isinstance(layer, RecurrentState):
                layer.tail[...] = self.padded[i][count : count + layer.tail.shape[1]].T
                layer.h[...] = self.every_h[i][count - 1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in states.arrays(self.layers))


class NumpyBackend:
    """See the module's head."""

    name = "numpy"
    chunk = states.CHUNK

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._hp = file.hyperparameters()

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return states.nbytes(self._hp, GGMLQuantizationType.F32)

    @property
    def fingerprint(self) -> str:
        """Of the model, for saved states."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._file)

    def new_state(self) -> NumpyState:
        """A state at position 0."""
        return NumpyState(self, self._hp)

    def buffers_nbytes(self, texts: int) -> int:
        """Bytes at most of a pass over a chunk: the values of a layer and its weights, or a slice of the head."""
        hp, rows = self._hp, states.ring_rows(self._hp)
        widths = 10 * (hp.hidden + hp.lru_width) + 6 * hp.mlp_width + 4 * hp.heads * rows
        return 4 * (self.chunk * widths + 3 * max(hp.mlp_width * hp.hidden, _HEAD_SLICE))

    def reserve(self, count: int) -> None:
        """States lie each for itself: nothing is to be done."""

    def run(
        self, batch: Sequence[tuple[NDArray[np.int32], NumpyState]], rows: Rows, trace: bool = False
    ) -> Array | None:
        """Feed a chunk of each text; no state changes before the whole batch is computed."""
        tokens = np.concatenate([chunk for chunk, _ in batch])
        parts = spans([len(chunk) for chunk, _ in batch], [state.position for _, state in batch])
        ops = NumpyOps(self._file, self._hp, list(zip(parts, [state for _, state in batch], strict=True)), trace)
        z = forward(ops, self._hp, tokens, rows)
        for _, state in batch:
            state.torn = True  # until `move`
        for target, value in ops.stores:
            target[...] = value
        return finished(self._hp, z, rows)

    def close(self) -> None:
        """Nothing is held beyond the mapped file."""


class NumpyOps:
    """The operations of griffin.py on f32 arrays. `stores` are the writes to make once all is computed."""

    def __init__(
        self, file: GgufFile, hp: Hyperparameters, batch: Sequence[tuple[Span, NumpyState]], trace: bool
    ) -> None:
        self._file, self._hp, self._batch, self._trace = file, hp, batch, trace
        self._cos, self._sin = angles(hp, [span for span, _ in batch])
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

    def conv(self, layer: int, name: str, z: Array) -> Array:
        taps = self._weight(f"{name}.weight")  # [W, C]; the last meets the current token
        out = np.empty_like(z)
        for span, state in self._batch:
            tail = _recurrent(state, layer).tail
            padded = np.concatenate([tail.T, z[span.start : span.stop]])  # [C-1+T, W]
            self.stores.append((tail, padded[span.count :].T))
            shifted = np.lib.stride_tricks.sliding_window_view(padded, taps.shape[1], axis=0)  # [T, W, C]
            out[span.start : span.stop] = np.einsum("twc,wc->tw", shifted, taps)
            if self._trace:
                state.padded[layer] = padded
        return self._biased(name, out)

    def decay(self, name: str, r: Array) -> tuple[Array, Array]:
        log_a = r * self._weight(name)
        # expm1: 1 - exp(x) loses its digits where a is near 1.
        m = np.sqrt(-np.expm1(2 * log_a))
        m[[span.start for span, _ in self._batch if span.position == 0]] = 1
        return np.exp(log_a), m

    def scan(self, layer: int, a: Array, b: Array) -> Array:
        out = np.empty_like(b)
        for span, state in self._batch:
            h = last = _recurrent(state, layer).h
            for t in range(span.start, span.stop):
                last = out[t] = a[t] * last + b[t]
            self.stores.append((h, last))
            if self._trace:
                state.every_h[layer] = out[span.start : span.stop]
        return out

    def rope(self, x: Array) -> Array:
        cos, sin, half = self._cos, self._sin, self._cos.shape[-1]
        out = x.reshape(len(x), -1, self._hp.head_width).copy()
        first, second = out[:, :, :half].copy(), out[:, :, half : 2 * half].copy()
        out[:, :, :half] = first * cos - second * sin
        out[:, :, half : 2 * half] = second * cos + first * sin
        return out.reshape(x.shape)

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        out = np.empty_like(q)
        for span, state in self._batch:
            ring, rows = state.layers[layer], slice(span.start, span.stop)
            assert isinstance(ring, AttentionState)
            # Rows that a chunk overwrites lie outside the window of the state as it was: no harm if it fails later.
            slots = ring_slots(span, len(ring.k))
            ring.k[slots], ring.v[slots] = k[rows], v[rows]
            out[rows] = self._attend(q[rows], ring, visible(self._hp, span, len(ring.k), len(ring.k)))
        return out

    def _attend(self, q: Array, ring: AttentionState[Array], seen: NDArray[np.bool_]) -> Array:
        """Softmax(q kᵀ / sqrt(D)) v of one sequence: q [T, Q], seen [T, R]."""
        hp, count = self._hp, len(q)
        queries = q.reshape(count, hp.kv_heads, -1, hp.head_width).transpose(1, 2, 0, 3)  # [K, N/K, T, D]
        keys = ring.k.reshape(-1, hp.kv_heads, hp.head_width).transpose(1, 2, 0)[:, None]  # [K, 1, D, R]
        values = ring.v.reshape(-1, hp.kv_heads, hp.head_width).transpose(1, 0, 2)[:, None]  # [K, 1, R, D]
        scores = np.where(seen, queries @ keys * np.float32(hp.head_width**-0.5), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ values).transpose(2, 0, 1, 3).reshape(count, -1)

    def last(self, x: Array) -> Array:
        return x[[span.stop - 1 for span, _ in self._batch]]

    def head(self, x: Array) -> Array:
        info = self._file.tensors["output.weight" if self._hp.untied else "token_embd.weight"]
        data, step = self._file.data(info.name), max(1, _HEAD_SLICE // self._hp.hidden)
        out = np.empty((len(x), self._hp.vocab), np.float32)
        for start in range(0, self._hp.vocab, step):
            stop = min(start + step, self._hp.vocab)
            out[:, start:stop] = x @ dequantize(info, data, start, stop).T
        return out


def _recurrent(state: NumpyState, layer: int) -> RecurrentState[Array]:
    found = state.layers[layer]
    assert isinstance(found, RecurrentState)
    return found


def _zeros(shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, np.float32)

"""What a model takes in memory, from its shapes and types alone: its graphs, built over weights that lie nowhere.

The graphs are those that `GgmlBackend` builds on the CPU, and ggml's allocator plans them as it would there. It gives
a place to whatever has none, so the weights have one: all of them the same, in pages that nobody ever touches.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml import bound_nbytes, measure
from griffin_gguf.runtime.backends.ggml_memory import Pool
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.tuning import Tuning

T = GGMLQuantizationType
Types = Mapping[str, T]

#: In which type ggml's CPU encodes what a product is fed, by the block of the weight's type: see `Buffers.encoded`.
_ENCODED = {1: T.F16, 32: T.Q8_1, 256: T.Q8_K}


@dataclass(frozen=True)
class Buffers:
    """Bytes beside weights, states and logits.

    `values` are those of the largest pass, `graphs` the headers of one for a chunk and one for a token, `encoded` the
    place where ggml encodes what the widest product is fed. `most` is `GgmlBackend.buffers_nbytes`: what the first two
    may come to where chunks are uneven and as many graphs are kept as ever are.
    """

    values: int
    graphs: int
    encoded: int
    most: int


class Outline:
    """A model of these numbers, its tensors of these types by name, on the CPU. A context manager.

    Raises `BackendError` where ggml cannot be loaded or has no memory for a state.
    """

    def __init__(self, hp: Hyperparameters, types: Types) -> None:
        self.hp, self.tuning = hp, Tuning(threads=1)  # nothing is computed
        self.device = Device(self.tuning.threads, "CPU")
        self.memory = Pool(self.device, hp, states.kv_type(types["token_embd.weight"]), _keep)
        self.weights = _Outlines(self.device, {t.name: (t.shape, types[t.name]) for t in hp.tensors()})

    def buffers(self, texts: int) -> Buffers:
        """What passes take over a chunk of so many texts, and then over a token of each."""
        values, graph = measure(self, texts, self.tuning.chunk)
        values_of_token, graph_of_token = measure(self, texts, texts)
        return Buffers(max(values, values_of_token), graph + graph_of_token, self._encoded(), bound_nbytes(values))

    def _encoded(self) -> int:
        """Of a chunk; what meets F32 stays as it is."""
        matrices = [t for t in self.weights.tensors.values() if len(t.shape) > 1 and t.type != T.F32]
        inputs = ((self.tuning.chunk, prod(t.shape[:-2]) * t.shape[-1], _ENCODED[_block(t.type)]) for t in matrices)
        return max((_nbytes((count, width), type) for count, width, type in inputs), default=0)

    def repacked(self) -> int:
        """Bytes of the copies that weights have beside them where buffers are tuned to "both"."""
        found = 0
        for name, tensor in self.weights.tensors.items():
            if (
                len(tensor.shape) == 2
                and name != "token_embd.weight"
                and self.device.repacks(tensor.shape, tensor.type)
            ):
                found += _nbytes(tensor.shape, T(tensor.type))
        return found

    def close(self) -> None:
        """Give everything back."""
        self.memory.close()
        self.weights.close()
        self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Outlines:
    """Tensors without data, in the stead of `Weights`: by name, shape and type."""

    def __init__(self, device: Device, shaped: Mapping[str, tuple[tuple[int, ...], T]]) -> None:
        self._context = Context(len(shaped))
        self.tensors = {name: self._context.new(shape, int(type)) for name, (shape, type) in shaped.items()}
        largest = max(_nbytes(*row) for row in shaped.values())
        pages = _untouched(largest)
        buffer = device.map(pages, largest)
        assert buffer is not None, "the CPU maps whatever there is"
        self._pages, self._buffer = pages, buffer
        for tensor in self.tensors.values():
            device.place(buffer, tensor, pages)

    def of(self, count: int) -> dict[str, Tensor]:
        """By name, the tensors for a graph of `count` tokens."""
        return self.tensors

    def close(self) -> None:
        self._buffer.close()
        self._context.close()


def _untouched(count: int) -> NDArray[np.uint8]:
    """So many bytes of addresses: pages that may only be read take no memory, and no promise of any, until they are."""
    return np.frombuffer(
        mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ), np.uint8
    )


def _block(type: int) -> int:
    return GGML_QUANT_SIZES[T(type)][0]


def _nbytes(shape: tuple[int, ...], type: T) -> int:
    block, size = GGML_QUANT_SIZES[type]
    return prod(shape) // block * size


def _keep() -> None:
    """Nothing to do where slots have moved: no graph is kept."""

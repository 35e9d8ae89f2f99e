"""What a Griffin remembers: arrays of fixed size, whatever the length of the text.

    RG-LRU layer     h [W] f32, the recurrence; tail [W, C-1] f32, the convolution's last inputs
    attention layer  k, v [R, J], a ring of R = window + CHUNK rows: position p lies in row p % R

A chunk's keys are written before they are read, hence the CHUNK rows beyond the window.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import saved_state
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.saved_state import Layout, Saved
from griffin_gguf.runtime.snapshot import Snapshot, is_ring

#: Tokens that one pass over the weights may take: longer texts are fed in chunks of this.
CHUNK = 512

A = TypeVar("A")


@dataclass(frozen=True)
class RecurrentState(Generic[A]):
    """The memory of an RG-LRU layer."""

    h: A  # [W]
    tail: A  # [W, C-1], oldest first


@dataclass(frozen=True)
class AttentionState(Generic[A]):
    """The memory of a local-attention layer."""

    k: A  # [R, J], after RoPE
    v: A  # [R, J]


LayerState = RecurrentState[A] | AttentionState[A]


class State(ABC):
    """The memory of one text on one backend; made by `Model.new_state` and `Model.load_state`.

    `position` counts the tokens read; `logits` are those after the last of them, f32 [V], where they were asked
    for, else None; `owner` is the backend, the only one that can go on from here.
    """

    def __init__(self, owner: "Owner") -> None:
        self.owner = owner
        self.position = 0
        self.torn = False  # a step on it did not come to its end: some layers have moved on, others not
        self.logits: NDArray[np.float32] | None = None
        self._chunk_logits: NDArray[np.float32] | None = None  # [T, V]: of each token of a chunk that left a trace
        self._chunk_start: int | None = None  # where the chunk began that left a trace

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all arrays; the same at every position."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Type and shape of every array by its name, `blk.N.h`, `.tail`, `.k`, `.v`: what `read` gives."""

    @abstractmethod
    def copy(self) -> Self:
        """An independent state that continues from the same point; without the trace of the last chunk."""

    @abstractmethod
    def read(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        """Copies of all arrays by name; of rings only the first `rows` rows, at least one, where that is given."""

    @abstractmethod
    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over such arrays."""

    @abstractmethod
    def rewind(self, count: int) -> None:
        """Go back to the first `count` tokens of the chunk that left a trace; `rollback` has checked them."""

    def move(
        self, count: int, every: NDArray[np.float32] | None, last: NDArray[np.float32] | None, traced: bool
    ) -> None:
        """Note that a chunk of `count` tokens was read: the logits that it gave, and whether it left a trace."""
        self._chunk_start, self._chunk_logits = (self.position, every) if traced else (None, None)
        self.position += count
        self.logits, self.torn = last, False

    def check(self, count: int = 0) -> None:
        """Raise `UnsupportedError` where the state cannot go on by `count` tokens."""
        if self.torn:
            problem = "a step on it was interrupted; go on from a copy made before it, or from a new state"
            raise UnsupportedError(f"state: {problem}")
        if self.position + count > saved_state.LAST_POSITION:
            raise UnsupportedError(f"state: position {self.position} + {count} is beyond {saved_state.LAST_POSITION}")

    def rollback(self, position: int) -> None:
        """Go back to an earlier `position` inside the last chunk, computing nothing.

        The chunk, at most `CHUNK` tokens, must have been read with `trace`, and this be the last thing read with a
        trace on this model. `logits` are those at `position` where every token's were asked for, else None. Raises
        `UnsupportedError` for any other position; the state is as before then.
        """
        self.check()
        if position == self.position:
            return
        start = self._chunk_start
        if start is None or not start < position < self.position:
            known = "nothing" if start is None else f"{start + 1} to {self.position}"
            raise UnsupportedError(f"state: cannot go back to {position}: {known} of the last chunk is kept")
        self.torn = True
        try:
            self.rewind(position - start)
        except UnsupportedError:
            self.torn = False  # nothing was done
            raise
        self.torn = False
        every = self._chunk_logits
        self.position = position
        self.logits = None if every is None else every[position - start - 1]

    def snapshot(self, logits: bool = True) -> Snapshot:
        """What the state is now, apart from it, with its last logits or without.

        Raises `UnsupportedError` after an interrupted step.
        """
        self.check()
        arrays = self.read(self.position)  # first: refuses where the model is closed
        kept = self.logits.copy() if logits and self.logits is not None else None
        return Snapshot(self.owner.fingerprint, self.position, self.layout, arrays, kept)

    def resume(self, snapshot: Snapshot) -> None:
        """Take over what `snapshot` returned, bit by bit. Raises `UnsupportedError` for another model's."""
        if snapshot.fingerprint != self.owner.fingerprint or snapshot.layout != self.layout:
            raise UnsupportedError("state: the snapshot is of another model, or of another backend")
        self._take_over(snapshot.position, snapshot.whole(), snapshot.logits)

    def save(self, path: Path | str) -> None:
        """Write everything to a file that `Model.load_state` reads; whole, or not at all.

        Raises `GriffinError` naming `path` where it cannot be written, `UnsupportedError` after an interrupted step.
        """
        self.check()
        arrays = self.read()  # first: refuses where the model is closed
        saved_state.save(path, Saved(self.owner.fingerprint, self.position, arrays, self.logits))

    def restore(self, path: Path | str, vocab: int) -> None:
        """Take over what `save` wrote; raises `FileFormatError` for anything that does not fit this model."""
        logits = (np.dtype(np.float32), (vocab,))
        saved = saved_state.load(path, self.owner.fingerprint, {**self.layout, saved_state.LOGITS: logits})
        self._take_over(saved.position, saved.arrays, saved.logits)

    def _take_over(self, position: int, arrays: Mapping[str, NDArray[Any]], logits: NDArray[np.float32] | None) -> None:
        self.torn = True  # until all of it is there
        self.write(arrays)
        self.position, self.logits = position, logits
        self._chunk_start, self._chunk_logits, self.torn = None, None, False


class Owner(Protocol):
    """What a state asks of its backend."""

    @property
    def fingerprint(self) -> str:
        """Of the model: `saved_state.fingerprint`."""
        ...


def ring_rows(hp: Hyperparameters) -> int:
    """Rows R of an attention layer's ring."""
    return hp.window + CHUNK


def build(
    hp: Hyperparameters, vector: Callable[[tuple[int, ...]], A], kv: Callable[[tuple[int, ...]], A]
) -> list[LayerState[A]]:
    """One entry a layer, its arrays made by `vector(shape)` (f32) and `kv(shape)` (the cache's type)."""
    ring = (ring_rows(hp), hp.kv_heads * hp.head_width)
    return [
        RecurrentState(vector((hp.lru_width,)), vector((hp.lru_width, hp.conv_taps - 1)))
        if recurrent
        else AttentionState(kv(ring), kv(ring))
        for recurrent in hp.recurrent
    ]


def arrays(layers: list[LayerState[A]]) -> Iterator[A]:
    """Every array, layer by layer."""
    for layer in layers:
        for field in fields(layer):
            yield getattr(layer, field.name)


def named(layers: list[LayerState[A]]) -> Iterator[tuple[str, A]]:
    """Every array with its name in a saved state, `blk.N.h` and so on."""
    for i, layer in enumerate(layers):
        for field in fields(layer):
            yield f"blk.{i}.{field.name}", getattr(layer, field.name)


def parts(layers: list[LayerState[A]], rows: int | None, ring: int) -> Iterator[tuple[str, A, int | None]]:
    """Every array with its name and, of a ring of `ring` rows, how many of them `State.read` copies; None: all."""
    stop = None if rows is None or rows >= ring else max(rows, 1)
    for name, array in named(layers):
        yield name, array, stop if is_ring(name) else None


def kv_type(embedding: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type of the rings' keys and values in ggml, for a file whose embedding is of that type.

    F16 costs up to 2e-3 of the largest logit: nothing beside quantized weights. An F32 file is there to be
    exact (1e-6), so its rings are F32 too.
    """
    exact = embedding is GGMLQuantizationType.F32
    return GGMLQuantizationType.F32 if exact else GGMLQuantizationType.F16


def nbytes(hp: Hyperparameters, kv: GGMLQuantizationType) -> int:
    """Bytes of one state whose rings are of type `kv`, F32 or F16."""
    item = GGML_QUANT_SIZES[kv][1]
    sizes: list[LayerState[int]] = build(hp, lambda s: 4 * prod(s), lambda s: item * prod(s))
    return sum(arrays(sizes))

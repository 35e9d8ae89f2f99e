"""States on a device: one pool of slots, so that a graph can take several of them at once.

Of each layer the pool has one tensor an array, all slots behind one another; a state is a slot, and its arrays are
views of the pool's. The pool doubles when it is full: what lies in it moves then, and graphs must be built anew.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.ggml.device import DTYPES
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.split import Devices
from griffin_gguf.runtime.saved_state import Layout
from griffin_gguf.runtime.state import AttentionState, LayerState, RecurrentState, State


class Pool:
    """Slots for states whose rings are of type `kv`. `moved` is called when all slots have got other addresses."""

    def __init__(
        self, device: Devices, hp: Hyperparameters, kv: GGMLQuantizationType, moved: Callable[[], None]
    ) -> None:
        self._device, self._hp, self._kv, self._moved = device, hp, kv, moved
        self.lock = threading.RLock()  # held while a graph runs: until then no slot may move
        self.ring = states.ring_rows(hp)  # rows of one state's ring
        self.slots = 0
        self._closed = False
        self.layers: list[LayerState[Tensor]] = []  # h [slots, W], tail [slots, W · (C-1)], k and v [slots · R, J]
        self._views: list[list[LayerState[Tensor]]] = []
        self._free: list[int] = []
        self._used: set[int] = set()  # slots that have been taken before, and hold what was left in them

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return states.nbytes(self._hp, self._kv)

    def of(self, slot: int) -> list[LayerState[Tensor]]:
        """A slot's arrays, shaped as at the head of state.py."""
        if self._closed:
            raise UnsupportedError("state: its model is closed")
        return self._views[slot]

    def take(self) -> int:
        """A slot filled with zeros, as no other state has it. Raises `BackendError` where there is no memory."""
        with self.lock:
            if self._closed:
                raise UnsupportedError("state: its model is closed")
            if not self._free:
                self._double()
            slot = self._free.pop()
            if slot in self._used:
                self.clear(slot)
            self._used.add(slot)
            return slot

    def _double(self) -> None:
        """More slots: twice as many, so that moving them stays rare, or one more where that is too much."""
        try:
            self.reserve(max(1, 2 * self.slots))
        except BackendError:
            if not self.slots:
                raise
            self.reserve(self.slots + 1)

    def give_back(self, slot: int) -> None:
        """The slot may be taken again; from any thread."""
        self._free.append(slot)

    def clear(self, slot: int) -> None:
        """Fill a slot with zeros."""
        for tensor in states.arrays(self.of(slot)):
            self._device.write(tensor, np.zeros(tensor.shape, DTYPES[tensor.type]))

    def copy(self, source: int, target: int) -> None:
        """Copy a slot, on the device."""
        with self.lock:
            for one, other in zip(states.arrays(self.of(source)), states.arrays(self.of(target)), strict=True):
                self._device.copy(one, other)

    @property
    def taken(self) -> int:
        """Slots that are states now."""
        return self.slots - len(self._free)

    def reserve(self, slots: int) -> None:
        """Have at least so many slots. Raises `BackendError` where there is no memory; all is as before then."""
        with self.lock:
            if slots > self.slots:
                self._grow(slots)

    def _grow(self, slots: int) -> None:
        places = [self._device.of_layer(i) for i in range(self._hp.layers)]
        contexts = {device: Context(2 * places.count(device) * (slots + 1)) for device in dict.fromkeys(places)}
        shaped = [(contexts[device], shape) for device, shape in zip(places, self._shapes(), strict=True)]
        layers = [self._tensors(context, shape, slots) for context, shape in shaped]
        views = [[_view(context, shape, layer, slot) for (context, shape), layer in zip(shaped, layers, strict=True)]
                 for slot in range(slots)]  # fmt: skip
        what = f"{slots} states of {self.nbytes:,} bytes"
        buffers = [device.allocate(context, what) for device, context in contexts.items()]
        for buffer in buffers:
            buffer.clear()
        old, before = self._views, self.slots
        self.layers, self._views, self.slots = layers, views, slots
        for slot in range(before):
            for one, other in zip(states.arrays(old[slot]), states.arrays(views[slot]), strict=True):
                self._device.copy(one, other)
        self._free += reversed(range(before, slots))
        self._kept = list(contexts.values()), buffers  # the older ones go with their last name
        self._moved()

    def _shapes(self) -> list[LayerState[tuple[int, ...]]]:
        return states.build(self._hp, _shape, _shape)

    def _tensors(self, context: Context, layer: LayerState[tuple[int, ...]], slots: int) -> LayerState[Tensor]:
        """One layer's arrays for all slots."""
        if isinstance(layer, RecurrentState):
            (width,), (_, kept) = layer.h, layer.tail
            return RecurrentState(context.new((slots, width)), context.new((slots, width * kept)))
        rows, width = layer.k
        ring = (slots * rows, width)
        return AttentionState(context.new(ring, int(self._kv)), context.new(ring, int(self._kv)))

    def close(self) -> None:
        """Give the memory back; all states are dead after it."""
        self._closed = True
        if self.slots:
            contexts, buffers = self._kept
            for kept in (*buffers, *contexts):
                kept.close()
        self.layers, self._views, self._free, self.slots = [], [], [], 0


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _view(
    context: Context, shapes: LayerState[tuple[int, ...]], pooled: LayerState[Tensor], slot: int
) -> LayerState[Tensor]:
    """One slot's part of a layer."""
    views: list[Tensor] = []
    for field in fields(shapes):
        shape: tuple[int, ...] = getattr(shapes, field.name)
        strides = shape[1:]  # of a matrix, its rows; of a vector, none
        views.append(context.view(getattr(pooled, field.name), shape, strides, slot * int(np.prod(shape))))
    return type(shapes)(*views)  # pyright: ignore[reportArgumentType, reportReturnType]


class GgmlState(State):
    """The memory of one text in a slot of a pool, which comes free with this object."""

    def __init__(self, owner: "states.Owner", pool: Pool, device: Devices) -> None:
        super().__init__(owner)
        self._pool, self._device = pool, device
        self.slot = pool.take()
        weakref.finalize(self, pool.give_back, self.slot)
        #: What puts the arrays back to an earlier token of the last chunk; set by whoever ran it.
        self.rewinder: Callable[[list[LayerState[Tensor]], int], None] | None = None

    @property
    def layers(self) -> list[LayerState[Tensor]]:
        """The arrays, on the device."""
        return self._pool.of(self.slot)

    @property
    def layout(self) -> Layout:
        return {name: (DTYPES[tensor.type], tensor.shape) for name, tensor in states.named(self.layers)}

    def copy(self) -> "GgmlState":
        self.check()
        other = GgmlState(self.owner, self._pool, self._device)
        self._pool.copy(self.slot, other.slot)
        other.position, other.logits = self.position, self.logits
        return other

    def read(self, rows: int | None = None) -> dict[str, NDArray[Any]]:
        with self._pool.lock:
            return {
                name: self._device.read(tensor) if stop is None else self._device.read_rows(tensor, 0, stop)
                for name, tensor, stop in states.parts(self.layers, rows, self._pool.ring)
            }

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        with self._pool.lock:
            for name, tensor in states.named(self.layers):
                self._device.write(tensor, np.ascontiguousarray(arrays[name]))

    def reset(self) -> None:
        """Forget everything: position 0."""
        with self._pool.lock:
            self._pool.clear(self.slot)
        self.move(-self.position, None, None, traced=False)

    def rewind(self, count: int) -> None:
        with self._pool.lock:
            layers = self.layers  # refuses where the model is closed
            if self.rewinder is None:
                raise UnsupportedError("state: another chunk was read with a trace since; this one's is gone")
            self.rewinder(layers, count)

    @property
    def nbytes(self) -> int:
        return self._pool.nbytes

"""The fast backend: Griffin as ggml graphs, weights mapped from the file.

A graph is built for a plan: how many tokens of which states. It is kept and replayed as long as its plan comes back,
only its inputs change. Graphs read and write the states' tensors where they lie.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml_memory import GgmlState, Pool
from griffin_gguf.runtime.backends.ggml_ops import GgmlOps, Part, Plan
from griffin_gguf.runtime.backends.ggml_weights import Weights
from griffin_gguf.runtime.backends.rowwise import TILE
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.selftest import selftest
from griffin_gguf.runtime.ggml.split import Devices, open_devices
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.griffin import Rows, Span, angles, finished, forward, ring_slots, spans, visible
from griffin_gguf.runtime.saved_state import fingerprint
from griffin_gguf.runtime.state import LayerState, RecurrentState
from griffin_gguf.runtime.tuning import Tuning

#: Graphs kept for a plan that comes back: on one device, where all share the memory for their values, and on several,
#: where each has its own. What one of a long chunk takes beside that.
_GRAPHS, _SPLIT_GRAPHS = 16, 4
_GRAPH_NBYTES = 5 << 20

#: How much more values may take where a chunk's texts are not of one length.
_UNEVEN = 1.1

#: Until its window is full, a graph sees as much of a ring as is in use, in steps of this.
_WINDOW_STEP = 256

Chunk = NDArray[np.int32]
Batch = Sequence[tuple[Chunk, GgmlState]]


class _Weights(Protocol):
    def of(self, count: int) -> Mapping[str, Tensor]:
        """By name, the tensors for a graph of `count` tokens."""
        ...


class Ground(Protocol):
    """What graphs are built on: a model's numbers, its weights and states, and where they lie.

    `GgmlBackend` is one, and `ggml_outline.Outline`, whose weights lie nowhere.
    """

    @property
    def hp(self) -> Hyperparameters: ...
    @property
    def tuning(self) -> Tuning: ...
    @property
    def device(self) -> Devices: ...
    @property
    def memory(self) -> Pool: ...
    @property
    def weights(self) -> _Weights: ...


class GgmlBackend:
    """See the module's head."""

    name = "ggml"

    def __init__(
        self, file: GgufFile, tuning: Tuning | None = None, devices: Mapping[str, int | None] | None = None
    ) -> None:
        self._file, self.hp, self.tuning = file, file.hyperparameters(), tuning or Tuning()
        self.chunk = self.tuning.chunk
        self.device = open_devices(devices or {}, self.hp.layers, self.tuning.threads)
        self._most_graphs = _GRAPHS if isinstance(self.device, Device) else _SPLIT_GRAPHS
        for one in self.device.devices:
            selftest(one)
        self.weights = Weights(file, self.device, self.tuning.buffers)
        kv = states.kv_type(file.tensors["token_embd.weight"].type)
        self.memory = Pool(self.device, self.hp, kv, self.forget_graphs)
        # What a traced graph leaves must outlive the next graph: it has a place of its own.
        self.allocators = {False: self.device.allocator(), True: self.device.allocator()}
        self._graphs: OrderedDict[tuple[Plan, type[GgmlOps]], Graph] = OrderedDict()
        self._traced: list[weakref.ref[GgmlState]] = []
        if not self.device.is_cpu:  # the CPU has every operation
            self.graph([(np.zeros(1, np.int32), self.new_state())], "last")

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return self.memory.nbytes

    @property
    def fingerprint(self) -> str:
        """Of the model, for saved states."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._file)

    def new_state(self) -> GgmlState:
        """A state at position 0."""
        return GgmlState(self, self.memory, self.device)

    def buffers_nbytes(self, texts: int) -> int:
        """Bytes at most of a pass over a chunk of so many texts that leaves no trace, and of the graphs that are kept.

        No memory is taken but for one state, where there is none yet.
        """
        places = 1 if isinstance(self.device, Device) else self._most_graphs
        values, _ = measure(self, texts, self.chunk)
        return bound_nbytes(values, places, self._most_graphs)

    def reserve(self, count: int) -> None:
        """Make room for so many more states at once. Raises `BackendError` where there is no memory."""
        with self.memory.lock:
            self.memory.reserve(self.memory.taken + count)

    def forget_graphs(self) -> None:
        """Build all graphs anew: tensors that they hold have moved. What states may go back to lies elsewhere."""
        self._graphs.clear()

    def run(self, batch: Batch, rows: Rows, trace: bool = False) -> NDArray[np.float32] | None:
        """Feed a chunk of each text: logits [T, V], [texts, V], hidden vectors [texts, H] or None."""
        order = sorted(range(len(batch)), key=lambda i: len(batch[i][0]) > 1)  # single tokens first
        ordered = [batch[i] for i in order]
        with self.memory.lock:
            if trace:
                self._drop_trace()  # a graph that leaves a trace takes its place
            graph = self.graph(ordered, rows, trace=trace)
            for _, state in ordered:
                state.torn = True  # until `move`
            z = graph.run([chunk for chunk, _ in ordered], [state.position for _, state in ordered])
            if trace:
                self._keep_trace(graph, [state for _, state in ordered])
        return finished(self.hp, _in_order(z, [len(chunk) for chunk, _ in ordered], order, rows), rows)

    def _plan(self, batch: Batch, rows: Rows, trace: bool) -> Plan:
        ring, parts = self.memory.ring, list[Part]()
        for chunk, state in batch:
            used = state.position + len(chunk)
            window = ring if used > ring else min(ring, used + -used % _WINDOW_STEP)
            parts.append(Part(state.slot, len(chunk), state.position == 0, window))
        return Plan(tuple(parts), rows, trace)

    def graph(self, batch: Batch, rows: Rows, *, trace: bool = False, kind: type[GgmlOps] = GgmlOps) -> "Graph":
        """The graph for such a batch, built where it is not kept. Where its allocator grows, all others there are lost.

        Texts with one token must come first.
        """
        plan = self._plan(batch, rows, trace)
        graph = self._graphs.pop((plan, kind), None)
        if graph is None:
            allocator = self.allocators[trace]
            before = allocator.nbytes
            try:
                graph = Graph(self, plan, allocator.place, kind)
            finally:  # an allocator that could not grow has given back what it held
                if allocator.nbytes != before:
                    for lost in [key for key in self._graphs if key[0].trace == trace]:
                        del self._graphs[lost]
            if len(self._graphs) == self._most_graphs:
                self._graphs.popitem(last=False)
        self._graphs[plan, kind] = graph
        return graph

    def _keep_trace(self, graph: "Graph", batch: Sequence[GgmlState]) -> None:
        """Let the states go back inside this chunk, until another graph is run that leaves a trace."""
        self._traced = [weakref.ref(state) for state in batch]
        singles = graph.plan.singles
        for index, state in enumerate(batch[singles:]):
            state.rewinder = Rewinder(graph, self.device, graph.plan.starts[singles + index], index)

    def _drop_trace(self) -> None:
        for known in self._traced:
            if (state := known()) is not None:
                state.rewinder = None
        self._traced = []

    def close(self) -> None:
        """Release weights and memory; states made here are dead after it."""
        with self.memory.lock:
            self.forget_graphs()
            self._drop_trace()
            for allocator in self.allocators.values():
                allocator.close()
            self.memory.close()
            self.weights.close()
            self.device.close()


def measure(ground: Ground, texts: int, tokens: int) -> tuple[int, int]:
    """Bytes of the values of a pass over `tokens` tokens of so many texts, in equal parts, and of its graph.

    No memory is taken but for one state, where there is none yet.
    """
    allocator, found = ground.device.allocator(), list[tuple[int, int]]()
    with ground.memory.lock:
        slot = ground.memory.take()
        ground.memory.give_back(slot)
        part = Part(slot, max(1, tokens // texts), False, ground.memory.ring)
        Graph(ground, Plan((part,) * texts, "last", False), lambda c: found.append((allocator.measure(c), c.nbytes)))
    return found[0]


def bound_nbytes(values: int, places: int = 1, graphs: int = _GRAPHS) -> int:
    """Bytes at most of passes whose values take so many, in as many places, and of the graphs that are kept."""
    return int(_UNEVEN * values) * places + graphs * _GRAPH_NBYTES


def _in_order(
    z: NDArray[np.float32] | None, counts: list[int], order: list[int], rows: Rows
) -> NDArray[np.float32] | None:
    """Rows as the caller's batch has its texts."""
    if z is None or order == sorted(order):
        return z
    if rows != "every":
        return z[np.argsort(order)]
    pieces = np.split(z, np.cumsum(counts)[:-1])
    return np.concatenate([pieces[order.index(i)] for i in range(len(order))])


class Graph:
    """The forward pass of a plan; `ops` are its operations, which may do more than compute.

    `place` gives its values their addresses.
    """

    def __init__(
        self, ground: Ground, plan: Plan, place: Callable[[Context], object], kind: type[GgmlOps] = GgmlOps
    ) -> None:
        hp, device = ground.hp, ground.device
        self.plan, self._hp, self._ring, self._device = plan, hp, ground.memory.ring, device
        tile = TILE if device.is_cpu else plan.count
        size = kind.tensors(hp, plan, tile)
        self._context = context = Context(size, nodes=size)
        weights = ground.weights.of(plan.count)
        self.ops = kind(context, weights, hp, ground.memory, plan, tile=tile, attention=ground.tuning.attention)
        self._inputs = self.ops.inputs
        rows = forward(self.ops, hp, self._inputs.tokens, plan.rows)
        self._rows = context.output(rows) if isinstance(rows, Tensor) else None
        lacking = device.unsupported(context)
        if lacking:
            raise BackendError(f"ggml: {device.name} has no operation {lacking} for this model's types")
        place(context)

    def run(self, chunks: Sequence[Chunk], positions: Sequence[int]) -> NDArray[np.float32] | None:
        """Compute on these tokens of the plan's texts, from these positions on: the rows that it asks for, uncapped."""
        batch = spans([len(chunk) for chunk in chunks], positions)
        cos, sin = angles(self._hp, batch)
        self._write(self._inputs.tokens, np.concatenate(chunks))
        self._write(self._inputs.cos, cos)
        self._write(self._inputs.sin, sin)
        self._write(self._inputs.slots, self._slots(batch))
        for mask, span, part in zip(self._inputs.masks, batch, self.plan.parts, strict=True):
            seen = visible(self._hp, span, self._ring, part.window)
            self._write(mask, np.where(seen, np.float16(0), np.float16(-np.inf)))
        self._write_constants()
        self._device.run(self._context)
        return self._device.read(self._rows) if self._rows is not None else None

    def _slots(self, batch: Sequence[Span]) -> NDArray[np.int64]:
        """Rows of all rings behind one another."""
        parts = zip(self.plan.parts, batch, strict=True)
        return np.concatenate([part.slot * self._ring + ring_slots(span, self._ring) for part, span in parts])

    def _write_constants(self) -> None:
        """Written each time: intermediate values take the place of an input once it is read."""
        constants, plan = self.ops.constants, self.plan
        singles = [part.slot for part in plan.parts[: plan.singles]] or [0]
        self._write(constants.last, np.array(plan.starts[1:], np.int32) - 1)
        self._write(constants.ids, np.array(singles, np.int32))
        self._write(constants.targets, np.array(singles, np.int64))

    def _write(self, target: Tensor, data: NDArray[Any]) -> None:
        # A model may lack one kind of layer, and a chunk without logits may end before the last attention.
        if self._context.is_used(target):
            self._device.write(target, data)


class Rewinder:
    """Puts a state's recurrences back to where they were after some tokens of a traced chunk; rings need nothing.

    The chunk begins in row `start` of the graph's batch, and is the `chunk`-th of more than one token.
    """

    def __init__(self, graph: Graph, device: Devices, start: int, chunk: int) -> None:
        self._graph, self._device, self._start, self._chunk = graph, device, start, chunk

    def __call__(self, layers: Sequence[LayerState[Tensor]], count: int) -> None:
        """To after `count` tokens."""
        trace = self._graph.ops.trace
        for i, layer in enumerate(layers):
            if isinstance(layer, RecurrentState):
                row, kept = self._start + count - 1, layer.tail.shape[1]
                self._device.write(layer.h, self._device.read_rows(trace.every_h[i], row, row + 1)[0])
                tail = self._device.read(trace.tails[i][self._chunk])
                recent = self._device.read_rows(trace.inputs[i][self._chunk], max(0, count - kept), count)
                padded = np.concatenate([tail, recent])[-kept:]
                self._device.write(layer.tail, np.ascontiguousarray(padded.T))

"""The fast backend: Griffin as ggml graphs, weights mapped from the file.

A graph is built for a number of tokens and a state; the one-token graph is built once and replayed, only
its inputs change. Graphs read and write the state's tensors where they lie.
"""

import itertools
import weakref
from dataclasses import fields
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Allocator, Buffer, Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.selftest import selftest
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.griffin import Inputs, Rows, chunk_inputs, forward
from griffin_gguf.runtime.state import AttentionState, LayerState

#: The longest block of the blocked scan: beyond it, running products cost more than carries save.
_LONGEST_BLOCK = 32


class GgmlBackend:
    """See the module's head."""

    name = "ggml"

    def __init__(self, file: GgufFile, threads: int | None = None) -> None:
        self.hp = file.hyperparameters()
        self.device = Device(threads)
        selftest(self.device)
        self.weights = Weights(file, self.device)
        self._kv_type = states.kv_type(file.tensors["token_embd.weight"].type)
        self._token_allocator, self._chunk_allocator = self.device.allocator(), self.device.allocator()
        self._chunk_graph: tuple[weakref.ref[GgmlState], int, Rows, Graph] | None = None
        if not self.device.is_cpu:  # the CPU has every operation
            self._token_graph(self.new_state())

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return states.nbytes(self.hp, self._kv_type)

    def new_state(self) -> "GgmlState":
        """A state at position 0."""
        return GgmlState(self, self._kv_type)

    def run(self, tokens: NDArray[np.int32], state: "GgmlState", rows: Rows) -> NDArray[np.float32] | None:
        """Feed one chunk: logits [T, V], [1, V] or None."""
        graph = self._token_graph(state) if len(tokens) == 1 else self._graph_of_chunk(state, len(tokens), rows)
        inputs = chunk_inputs(self.hp, tokens, state.position, states.ring_rows(self.hp))
        logits = graph.run(self.device, inputs)
        state.position += len(tokens)
        return logits

    def _token_graph(self, state: "GgmlState") -> "Graph":
        """The state's graph for one token, built once; those of all states have one shape and share memory."""
        if state.token_graph is None:
            state.token_graph = Graph(self, state, 1, "last", self._token_allocator)
        return state.token_graph

    def _graph_of_chunk(self, state: "GgmlState", count: int, rows: Rows) -> "Graph":
        """A graph for `count` tokens; the latest is kept, since a long text takes it again and again."""
        if self._chunk_graph is not None:
            owner, *shape, graph = self._chunk_graph
            if owner() is state and shape == [count, rows]:
                return graph
            self._chunk_graph = None
        graph = Graph(self, state, count, rows, self._chunk_allocator)
        self._chunk_graph = (weakref.ref(state), count, rows, graph)
        return graph

    def close(self) -> None:
        """Release weights and memory; states made here are dead after it."""
        self._chunk_graph = None
        self._token_allocator.close()
        self._chunk_allocator.close()
        self.weights.close()


class Weights:
    """Every tensor of the file on the device: mapped where it can, else copied."""

    def __init__(self, file: GgufFile, device: Device) -> None:
        self._context = Context(len(file.tensors))
        self._mappings = file.mappings()  # keep the pages alive for as long as the tensors
        self.tensors = {name: self._context.new(t.shape, int(t.type)) for name, t in file.tensors.items()}
        self._buffers = self._map(file, device)
        if not self._buffers:
            self._buffers = {0: device.allocate(self._context, "the weights")}
            for name, tensor in self.tensors.items():
                device.write(tensor, file.data(name))

    def _map(self, file: GgufFile, device: Device) -> dict[int, Buffer]:
        """Place every tensor where it lies, in a buffer over its file; no buffers where the device cannot."""
        largest: dict[int, int] = {}
        for info in file.tensors.values():
            largest[info.part] = max(info.nbytes, largest.get(info.part, 0))
        buffers: dict[int, Buffer] = {}
        for part, nbytes in largest.items():
            buffer = device.map(self._mappings[part], nbytes)
            if buffer is None or file.alignment % device.alignment(buffer):
                return {}
            buffers[part] = buffer
        for name, tensor in self.tensors.items():
            device.place(buffers[file.tensors[name].part], tensor, file.data(name))
        return buffers

    def close(self) -> None:
        """Give the buffers and the mappings back."""
        self.tensors = {}
        for buffer in self._buffers.values():
            buffer.close()
        self._context.close()
        self._mappings = []


class GgmlState:
    """The memory of one text on a device, its keys and values of type `kv`, and its graph for one token."""

    def __init__(self, owner: GgmlBackend, kv: GGMLQuantizationType) -> None:
        self.owner = owner
        self.position = 0
        self.token_graph: Graph | None = None
        self._kv_type = kv
        self._context = Context(2 * owner.hp.layers)
        self.layers: list[LayerState[Tensor]] = states.build(owner.hp, self._context.new, self._kv)
        self._buffer = owner.device.allocate(self._context, f"a state of {self.nbytes} bytes")
        self._buffer.clear()

    def _kv(self, shape: tuple[int, ...]) -> Tensor:
        return self._context.new(shape, int(self._kv_type))

    def reset(self) -> None:
        """Forget everything: position 0."""
        self._buffer.clear()
        self.position = 0

    def copy(self) -> "GgmlState":
        """An independent state that continues from the same point."""
        other = GgmlState(self.owner, self._kv_type)
        for source, target in zip(states.arrays(self.layers), states.arrays(other.layers), strict=True):
            self.owner.device.lib.ggml_backend_tensor_copy(source.handle, target.handle)
        other.position = self.position
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return states.nbytes(self.owner.hp, self._kv_type)


class Graph:
    """The forward pass of `count` tokens on one state; `ops` are its operations, which may do more than compute."""

    def __init__(
        self,
        backend: GgmlBackend,
        state: GgmlState,
        count: int,
        rows: Rows,
        allocator: Allocator,
        ops: "type[GgmlOps] | None" = None,
    ) -> None:
        hp, kind = backend.hp, ops or GgmlOps
        size = kind.tensors(hp, count)
        self._context = context = Context(size, nodes=size)
        self._allocator = allocator  # owns the addresses of this graph's tensors
        self._inputs = Inputs(
            tokens=context.input((count,), abi.I32),
            cos=context.input((count, 1, hp.rope_width // 2)),
            sin=context.input((count, 1, hp.rope_width // 2)),
            keep=context.input((count, 1)),
            slots=context.input((count,), abi.I64),
            mask=context.input((count, states.ring_rows(hp)), abi.F16),
        )
        self.ops = kind(context, backend.weights.tensors, hp)
        logits = forward(self.ops, hp, state.layers, self._inputs, rows)
        self._logits = context.output(logits) if logits is not None else None
        lacking = backend.device.unsupported(context)
        if lacking:
            raise BackendError(f"ggml: {backend.device.name} has no operation {lacking} for this model's types")
        allocator.place(context)

    def run(self, device: Device, inputs: Inputs[NDArray[Any]]) -> NDArray[np.float32] | None:
        """Compute on these inputs; the logits, where the graph has them."""
        mask = np.where(inputs.mask, np.float16(0), np.float16(-np.inf))
        for field in fields(inputs):
            target: Tensor = getattr(self._inputs, field.name)
            # A model may lack one kind of layer, and a chunk without logits may end before the last attention.
            if self._context.is_used(target):
                device.write(target, mask if field.name == "mask" else getattr(inputs, field.name))
        device.run(self._context)
        return device.read(self._logits) if self._logits is not None else None


class GgmlOps:
    """The operations of griffin.py as nodes of a graph."""

    def __init__(self, context: Context, weights: dict[str, Tensor], hp: Hyperparameters) -> None:
        self._graph, self._weights, self._hp = context, weights, hp

    @staticmethod
    def tensors(hp: Hyperparameters, count: int) -> int:
        """At most so many tensors, views among them, are in a graph of `count` tokens."""
        return 64 + hp.layers * (64 + 8 * scan_nodes(count))

    def _biased(self, name: str, y: Tensor) -> Tensor:
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else self._graph.add(y, bias)

    def embed(self, tokens: Tensor) -> Tensor:
        rows = self._graph.get_rows(self._weights["token_embd.weight"], tokens)
        return self._graph.scale(rows, self._hp.embedding_scale)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self._graph.mul(self._graph.rms_norm(x, self._hp.norm_eps), self._weights[f"{name}.weight"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self._biased(name, self._graph.matmul(self._weights[f"{name}.weight"], x))

    def block_linear(self, name: str, x: Tensor) -> Tensor:
        g, weight = self._graph, self._weights[f"{name}.weight"]
        blocks, width = weight.shape[:2]
        y = g.matmul(weight, g.swap(g.reshape(x, (x.shape[0], blocks, width))))  # [G, T, B]
        if x.shape[0] > 1:  # of one token, [G, 1, B] already lies as [1, W]
            y = g.dense(g.swap(y))
        return self._biased(name, g.reshape(y, x.shape))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._graph.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self._graph.mul(x, y)

    def sigmoid(self, x: Tensor) -> Tensor:
        return self._graph.unary("sigmoid", x)

    def gelu_gate(self, x: Tensor, y: Tensor) -> Tensor:
        return self._graph.gelu_gate(x, y)

    def conv(self, name: str, z: Tensor, tail: Tensor) -> Tensor:
        g, (count, width) = self._graph, z.shape
        columns = g.dense(g.transpose(z)) if count > 1 else g.reshape(z, (width, 1))
        padded = g.concat(tail, columns)  # [W, C-1+T]
        kept = tail.shape[1]
        g.store(g.view(padded, (width, kept), (kept + count,), count), tail)
        return self._biased(name, g.conv(padded, self._weights[f"{name}.weight"]))

    def decay(self, name: str, r: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        g = self._graph
        a = g.mul(g.unary("exp", g.mul(r, self._weights[name])), keep)
        return a, g.unary("sqrt", g.scale(g.unary("sqr", a), -1.0, 1.0))

    def scan(self, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        """In place on `b`, in blocks of tokens, so that few nodes do it.

        First a chain inside all blocks at once, with the running product of `a`; then, block by block, what
        the blocks before carry over: h_t = b'_t + (a_t ⋯ a_first) ⊙ h_last of the block before.
        """
        g, (count, width) = self._graph, b.shape
        length = block_length(count)
        blocks = count // length

        def column(x: Tensor, j: int) -> Tensor:
            """Token j of every block: [blocks, W]."""
            return g.view(x, (blocks, width), (length * width,), j * width)

        local, product = column(b, 0), column(a, 0)
        for j in range(1, length):
            step = column(a, j)
            local = g.expand(g.add_into(column(b, j), g.mul(step, local)))
            product = g.expand(g.mul_into(step, product))
        bounds = [m * length for m in range(blocks)] + list(range(blocks * length, count + 1))
        carry = g.reshape(h, (1, width))
        for start, stop in itertools.pairwise(bounds):
            g.expand(g.add_into(g.rows(b, start, stop), g.mul(g.rows(a, start, stop), carry)))
            carry = g.rows(b, stop - 1, stop)
        g.store(carry, h)
        return b

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """In place on `x`: ggml_rope computes its angles in f32, these come in f64 from chunk_inputs."""
        g, hp, half = self._graph, self._hp, cos.shape[-1]
        count, heads = x.shape[0], x.shape[1] // hp.head_width

        def part(start: int) -> Tensor:
            """Dimensions [start, start + half) of every head."""
            return g.view(x, (count, heads, half), (x.shape[1], hp.head_width), start)

        across = g.expand(g.mul(part(0), sin)), g.expand(g.mul(part(half), sin))
        g.expand(g.sub_into(g.mul_into(part(0), cos), across[1]))
        g.expand(g.add_into(g.mul_into(part(half), cos), across[0]))
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ring: AttentionState[Tensor], inputs: Inputs[Tensor]) -> Tensor:
        g, hp = self._graph, self._hp
        # Expanded here: a chunk without logits needs what is written even where nothing after it reads it.
        keys = self._heads(g.expand(g.set_rows(ring.k, k, inputs.slots)))
        values = self._heads(g.expand(g.set_rows(ring.v, v, inputs.slots)))
        queries = g.swap(g.reshape(q, (q.shape[0], hp.heads, hp.head_width)))  # [N, T, D]
        return g.reshape(g.attention(queries, keys, values, inputs.mask, hp.head_width**-0.5), q.shape)

    def _heads(self, ring: Tensor) -> Tensor:
        """[R, J] -> [K, R, D], as a view."""
        rows, width = ring.shape
        return self._graph.view(ring, (self._hp.kv_heads, rows, self._hp.head_width), (self._hp.head_width, width), 0)

    def last(self, x: Tensor) -> Tensor:
        return self._graph.rows(x, x.shape[0] - 1, x.shape[0])

    def head(self, x: Tensor) -> Tensor:
        g, cap = self._graph, self._hp.logit_cap
        z = g.matmul(self._weights["output.weight" if self._hp.untied else "token_embd.weight"], x)
        return g.scale(g.unary("tanh", g.scale(z, 1 / cap)), cap)


def scan_nodes(count: int, length: int | None = None) -> int:
    """Computing nodes of a scan over `count` tokens in blocks of `length` (the best one if None)."""
    length = length or block_length(count)
    return 3 * (length - 1) + 2 * (count // length) + 2 * (count % length) + 1


def block_length(count: int) -> int:
    """Tokens a block of the scan so that it has the fewest nodes: 1 for one token, 16 for 512."""
    return min(range(1, min(count, _LONGEST_BLOCK) + 1), key=lambda length: scan_nodes(count, length))

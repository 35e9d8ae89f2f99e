"""The fast backend with an eye on its matrix products: sums of what they are fed, squared.

Squares and sums are nodes of the same graph, so that no input leaves the device. A sum over tokens is taken in
place by adding the later half of the rows to the earlier one until a row is left: elementwise operations only,
which every device has, in some 1.5 passes over the squares, and rounding grows with the logarithm of the tokens.
"""

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml import GgmlBackend, GgmlOps, Graph
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.griffin import chunk_inputs
from griffin_gguf.runtime.state import ring_rows

_INPUTS = 5  # different ones a layer at most: attn_norm, conv, ssm_out, ffn_norm, ffn_down


class Observer:
    """Runs one text after another on `backend`, each from an empty state on."""

    def __init__(self, backend: GgmlBackend) -> None:
        self._backend = backend
        self._state = backend.new_state()
        self._graphs: dict[tuple[int, bool], Graph] = {}

    def begin(self) -> None:
        """Forget the text so far."""
        self._state.reset()

    def run(
        self, tokens: NDArray[np.int32], *, logits: bool = False
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32] | None]:
        """Go on by at most `state.CHUNK` tokens (i32 [T]): by weight the sums f32 [inputs], and every token's logits.

        The logits f32 [T, V] are left out unless asked for, and with them the product of the head.
        """
        graph = self._graph(len(tokens), logits)
        backend, ops = self._backend, graph.ops
        assert isinstance(ops, ObservingOps)
        inputs = chunk_inputs(backend.hp, tokens, self._state.position, ring_rows(backend.hp))
        found = graph.run(backend.device, inputs)
        self._state.position += len(tokens)
        # Weights that share an input share the array.
        read = {sums.handle: backend.device.read(sums).reshape(-1) for sums in set(ops.sums.values())}
        return {name: read[sums.handle] for name, sums in ops.sums.items()}, found if logits else None

    def _graph(self, count: int, logits: bool) -> Graph:
        """The graph for that many tokens; a text cut into windows needs very few."""
        key = (count, logits)
        if key not in self._graphs:
            ops = ScoringOps if logits else ObservingOps
            allocator = self._backend.device.allocator()
            self._graphs[key] = Graph(self._backend, self._state, count, "every", allocator, ops)
        return self._graphs[key]


class ObservingOps(GgmlOps):
    """The operations, with sums beside the products; the head's product is left out."""

    def __init__(self, context: Context, weights: dict[str, Tensor], hp: Hyperparameters) -> None:
        super().__init__(context, weights, hp)
        self.sums: dict[str, Tensor] = {}  # by the weight's name, [1, inputs]
        self._known: dict[int, Tensor] = {}  # by the input's handle

    @staticmethod
    def tensors(hp: Hyperparameters, count: int) -> int:
        return GgmlOps.tensors(hp, count) + (1 + _INPUTS * hp.layers) * (3 + 3 * count.bit_length())

    def _observe(self, weight: str, x: Tensor) -> Tensor:
        """Sum the squares of `x` [T, inputs] over T: [1, inputs]."""
        if x.handle not in self._known:
            self._known[x.handle] = self._sum_of_squares(x)
        self.sums[weight] = self._known[x.handle]
        return self.sums[weight]

    def _sum_of_squares(self, x: Tensor) -> Tensor:
        g, count = self._graph, x.shape[0]
        squares = g.expand(g.unary("sqr", x))
        while count > 1:
            half = count // 2  # of an odd count, the row in the middle waits for the next turn
            g.expand(g.add_into(g.rows(squares, 0, half), g.rows(squares, count - half, count)))
            count -= half
        return g.output(g.dense(g.rows(squares, 0, 1)))  # a copy, so that the squares need not outlive it

    def linear(self, name: str, x: Tensor) -> Tensor:
        self._observe(f"{name}.weight", x)
        return super().linear(name, x)

    def block_linear(self, name: str, x: Tensor) -> Tensor:
        self._observe(f"{name}.weight", x)
        return super().block_linear(name, x)

    def head(self, x: Tensor) -> Tensor:
        """Its sums, in the logits' place: the graph ends here."""
        return self._observe("output.weight" if self._hp.untied else "token_embd.weight", x)


class ScoringOps(ObservingOps):
    """The same with the head's product."""

    def head(self, x: Tensor) -> Tensor:
        super().head(x)
        return GgmlOps.head(self, x)

"""The fast backend with an eye on its matrix products: sums of what they are fed, squared.

Squares and sums are nodes of the same graph, so that no input leaves the device. A sum over tokens is taken in
place by adding the later half of the rows to the earlier one until a row is left: elementwise operations only,
which every device has, in some 1.5 passes over the squares, and rounding grows with the logarithm of the tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.ggml_ops import GgmlOps, Plan
from griffin_gguf.runtime.backends.rowwise import TILE, Deferred, Value
from griffin_gguf.runtime.ggml.graph import Tensor
from griffin_gguf.runtime.griffin import soft_cap

_INPUTS = 5  # different ones a layer at most: attn_norm, conv, ssm_out, ffn_norm, ffn_down


class Observer:
    """Runs one text after another on `backend`, each from an empty state on."""

    def __init__(self, backend: GgmlBackend) -> None:
        self._backend = backend
        self._state = backend.new_state()

    def begin(self) -> None:
        """Forget the text so far."""
        self._state.reset()

    def run(
        self, tokens: NDArray[np.int32], *, logits: bool = False
    ) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32] | None]:
        """Go on by at most `state.CHUNK` tokens (i32 [T]): by weight the sums f32 [inputs], and every token's logits.

        The logits f32 [T, V] are left out unless asked for, and with them the product of the head.
        """
        backend, state = self._backend, self._state
        graph = backend.graph([(tokens, state)], "every", kind=ScoringOps if logits else ObservingOps)
        ops = graph.ops
        assert isinstance(ops, ObservingOps)
        found = graph.run([tokens], [state.position])
        assert found is not None
        state.move(len(tokens), None, None, traced=False)
        # Weights that share an input share the array.
        read = {sums.handle: backend.device.read(sums).reshape(-1) for sums in set(ops.sums.values())}
        return {name: read[sums.handle] for name, sums in ops.sums.items()}, soft_cap(
            backend.hp, found
        ) if logits else None


class ObservingOps(GgmlOps):
    """The operations, with sums beside the products; the head's product is left out."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sums: dict[str, Tensor] = {}  # by the weight's name, [1, inputs]
        self._known: dict[int, Tensor] = {}  # by the input's handle

    @staticmethod
    def tensors(hp: Hyperparameters, plan: Plan, tile: int = TILE) -> int:
        sums = (1 + _INPUTS * hp.layers) * (3 + 3 * plan.count.bit_length())
        return GgmlOps.tensors(hp, plan, tile) + sums

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

    def linear(self, name: str, x: Value) -> Deferred:
        (x,) = self._whole(x)
        self._observe(f"{name}.weight", x)
        return super().linear(name, x)

    def block_linear(self, name: str, x: Value) -> Deferred:
        (x,) = self._whole(x)
        self._observe(f"{name}.weight", x)
        return super().block_linear(name, x)

    def head(self, x: Value) -> Tensor:
        """Its sums, in the logits' place: the graph ends here."""
        return self._observe("output.weight" if self._hp.untied else "token_embd.weight", self._whole(x)[0])


class ScoringOps(ObservingOps):
    """The same with the head's product."""

    def head(self, x: Value) -> Tensor:
        (x,) = self._whole(x)
        super().head(x)
        return GgmlOps.head(self, x)

"""The fast backend with a recurrence of lower precision: what f32 is good for, measured.

RG-LRU's h is f32 everywhere in this project, as in the reference implementation. Programs that run all of a model in
its own type keep h in bf16 or f16, and round it after every token; some round a and the gated input too. Here
that is done on purpose, by casts in the graph, and all else is as before. The scan is a chain over tokens, since a
blocked one would round at other places.
"""

from dataclasses import replace
from typing import Any, Literal

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml import GgmlBackend, Graph
from griffin_gguf.runtime.backends.ggml_ops import GgmlOps, Plan
from griffin_gguf.runtime.backends.rowwise import TILE, Value
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.graph import Tensor
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.tuning import Tuning

#: What is rounded: h alone, to f16 or bf16, or all that the recurrence computes with, to bf16.
Precision = Literal["h in F16", "h in BF16", "recurrence in BF16"]

_CHUNK = 64  # a chain is long: a chunk of 512 would be some 80,000 nodes of a 2B
_NODES = 12  # tensors a token and layer that a rounded chain adds at most


class RoundedBackend(GgmlBackend):
    """See the module's head. One text at a time."""

    def __init__(self, file: GgufFile, precision: Precision, tuning: Tuning | None = None) -> None:
        super().__init__(file, replace(tuning or Tuning(), chunk=_CHUNK))
        self._kind = _KINDS[precision]

    def graph(self, *arguments: Any, **options: Any) -> Graph:
        """As `GgmlBackend.graph`, with rounding operations."""
        return super().graph(*arguments, **(options | {"kind": self._kind}))


class _RoundedOps(GgmlOps):
    """The operations, with h of `type` after every token."""

    type = abi.F16
    inputs_too = False

    @staticmethod
    def tensors(hp: Hyperparameters, plan: Plan, tile: int = TILE) -> int:
        return GgmlOps.tensors(hp, plan, tile) + hp.layers * (_NODES * plan.count + 8)

    def scan(self, layer: int, a: Value, b: Value) -> Tensor:
        """h_t = round(a_t ⊙ h_{t-1} + b_t), in place on `b`."""
        (a, b), g = self._whole(a, b), self._graph
        (part,) = self._plan.parts
        if self.inputs_too:
            a, b = g.round_into(a, self.type), g.round_into(b, self.type)
        h = self._state(layer, part.slot).h
        carry = g.reshape(h, (1, b.shape[1]))
        for t in range(part.count):
            step = g.add_into(g.rows(b, t, t + 1), g.mul(g.rows(a, t, t + 1), carry))
            carry = g.expand(g.round_into(step, self.type))
        g.store(carry, h)
        return g.latest(b)


class _HalfOps(_RoundedOps):
    pass


class _BrainOps(_RoundedOps):
    type = abi.BF16


class _AllBrainOps(_BrainOps):
    inputs_too = True


_KINDS: dict[Precision, type[_RoundedOps]] = {
    "h in F16": _HalfOps,
    "h in BF16": _BrainOps,
    "recurrence in BF16": _AllBrainOps,
}

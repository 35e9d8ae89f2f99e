"""The fast backend with other encodings in the place of some weights: what a type costs, without writing a file.

The rest stays mapped from the file. The logits of the file's own model can be had again from what goes into its
head: a text's states fit into memory where its logits, at 256,000 tokens, do not.
"""

from collections.abc import Callable, Mapping

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.ggml_memory import GgmlState
from griffin_gguf.runtime.backends.ggml_ops import GgmlOps
from griffin_gguf.runtime.backends.rowwise import Value
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml.device import Buffer
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.griffin import soft_cap
from griffin_gguf.runtime.tuning import Tuning

Encoded = NDArray[np.uint8]


class PatchedBackend(GgmlBackend):
    """See the module's head. Keys and values are of the type that the file's own embedding asks for."""

    def __init__(self, file: GgufFile, tuning: Tuning | None = None) -> None:
        super().__init__(file, tuning)
        self._own = dict(self.weights.tensors)
        self._patch: tuple[Context, Buffer] | None = None

    def patch(
        self, types: Mapping[str, GGMLQuantizationType], encoded: Callable[[str, GGMLQuantizationType], Encoded]
    ) -> None:
        """Put the weights named in `types` in these types in the place of the file's; take back all earlier ones.

        `encoded` is called for each in turn: its bytes (uint8, of any shape), which are copied. A state lives on, and
        continues with the new weights. After any exception, `BackendError` for a lack of memory or one of `encoded`,
        the file's own weights are in place.
        """
        self._restore()
        if not types:
            return
        context = Context(len(types))
        tensors = {name: context.new(self._own[name].shape, int(type)) for name, type in types.items()}
        buffer = self.device.of_head.allocate(context, "the replaced weights")
        try:
            for name, tensor in tensors.items():
                self.device.write(tensor, encoded(name, types[name]))
        except BaseException:
            buffer.close()
            raise
        self._patch = context, buffer
        self.weights.tensors.update(tensors)

    def hidden(self, tokens: NDArray[np.int32], state: GgmlState) -> NDArray[np.float32]:
        """Feed one chunk up to the head's product: what goes into it, f32 [T, H]."""
        found = self.graph([(tokens, state)], "every", kind=_HeadlessOps).run([tokens], [state.position])
        assert found is not None
        state.move(len(tokens), None, None, traced=False)
        return found

    def own_logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits f32 [T, V] of the file's own head for what `hidden` returned, whatever is replaced."""
        context = Context(8, nodes=8)
        x = context.input(hidden.shape)
        z = context.output(context.matmul(self._own["output.weight" if self.hp.untied else "token_embd.weight"], x))
        lacking = self.device.unsupported(context)
        if lacking:
            raise BackendError(f"ggml: {self.device.name} has no operation {lacking} for this model's types")
        allocator = self.device.allocator()
        try:
            allocator.place(context)
            self.device.write(x, hidden)
            self.device.run(context)
            return soft_cap(self.hp, self.device.read(z))
        finally:
            allocator.close()
            context.close()

    def close(self) -> None:
        """Release weights and memory; states made here are dead after it."""
        self._restore()
        self._own = {}
        super().close()

    def _restore(self) -> None:
        """Put the file's own weights back. Graphs hold the addresses of weights: all are to be built anew."""
        self.forget_graphs()
        self.weights.tensors.update(self._own)
        if self._patch is not None:
            context, buffer = self._patch
            self._patch = None
            buffer.close()
            context.close()


class _HeadlessOps(GgmlOps):
    """The operations without the head's product."""

    def head(self, x: Value) -> Tensor:
        return self._whole(x)[0]

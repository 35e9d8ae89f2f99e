"""The two backends: NumPy, the reference; ggml, the fast one. Both give the operations of griffin.py."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.griffin import Rows


class Backend(Protocol):
    """What `Model` asks of a backend."""

    name: str
    chunk: int  # tokens that one batch may have

    @property
    def fingerprint(self) -> str:
        """Of the model, for saved states."""
        ...

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        ...

    def new_state(self) -> Any:
        """A state at position 0."""
        ...

    def buffers_nbytes(self, texts: int) -> int:
        """Bytes at most, beside states and logits, of a pass over a chunk of so many texts."""
        ...

    def reserve(self, count: int) -> None:
        """Make room for so many more states at once."""
        ...

    def run(
        self, batch: Sequence[tuple[NDArray[np.int32], Any]], rows: Rows, trace: bool = False
    ) -> NDArray[np.float32] | None:
        """Feed a chunk of each text, 1 to CHUNK tokens in all: logits [T, V], [texts, V], hidden [texts, H] or None.

        The arrays of the states change, their `position` does not: they are `torn` until `State.move`. With `trace`
        each can go back. Where nothing could be computed, for want of memory, they are as before.
        """
        ...

    def close(self) -> None:
        """Release weights and memory; states made here are dead after it."""
        ...

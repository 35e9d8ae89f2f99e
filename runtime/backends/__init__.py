"""The two backends: NumPy, the reference; ggml, the fast one. Both give the operations of griffin.py."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.griffin import Rows


class Backend(Protocol):
    """What `Model` asks of a backend."""

    name: str

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        ...

    def new_state(self) -> Any:
        """A state at position 0."""
        ...

    def run(self, tokens: NDArray[np.int32], state: Any, rows: Rows) -> NDArray[np.float32] | None:
        """Feed one chunk of 1 to CHUNK tokens: logits [T, V], [1, V] or None."""
        ...

    def close(self) -> None:
        """Release weights and memory; states made here are dead after it."""
        ...

"""A state at rest: in ordinary memory, apart from any backend, never to change again.

What a text leaves behind before its window is full is small, since of the rings only those rows are kept that hold
anything: of the 2B's 21.7 MB, 0.7 MB are recurrences and convolutions, and a token adds 8 KB until the rings are full.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime import saved_state
from griffin_gguf.runtime.saved_state import Layout, Saved


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What `State.snapshot` returns and `State.resume` takes: any number of states go on from it, bit by bit alike.

    `fingerprint` is the model's, `position` the tokens read. `arrays` are those of `layout`, but of `blk.N.k` and
    `blk.N.v` [R, J] only the first min(position, R) rows. `logits` are those after the last token, f32 [V], or None
    where none were computed. All arrays are read-only.
    """

    fingerprint: str
    position: int
    layout: Layout
    arrays: Mapping[str, NDArray[Any]]
    logits: NDArray[np.float32] | None

    def __post_init__(self) -> None:
        for array in self.arrays.values():
            array.flags.writeable = False
        if self.logits is not None:
            self.logits.flags.writeable = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values()) + (0 if self.logits is None else self.logits.nbytes)

    def whole(self) -> dict[str, NDArray[Any]]:
        """The arrays as `layout` has them: rows that hold nothing are zeros."""
        return {name: _filled(array, self.layout[name][1]) for name, array in self.arrays.items()}

    def save(self, path: Path | str) -> None:
        """Write the file that `State.save` writes; whole, or not at all. Raises `GriffinError` naming `path`."""
        saved_state.save(path, Saved(self.fingerprint, self.position, self.whole(), self.logits))


def _filled(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape == shape:
        return array
    out = np.zeros(shape, array.dtype)
    out[: len(array)] = array
    return out

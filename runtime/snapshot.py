"""A state at rest: in ordinary memory, apart from any backend, never to change again.

What a text leaves behind before its window is full is small, since of the rings only those rows are kept that hold
anything: of the 2B's 21.7 MB, 0.7 MB are recurrences and convolutions, and a token adds 8 KB until the rings are full.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

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

    @property
    def file_nbytes(self) -> int:
        """Bytes of the arrays in its file, where rings are whole."""
        sizes = [dtype.itemsize * prod(shape) for dtype, shape in self.layout.values()]
        return sum(sizes) + (0 if self.logits is None else self.logits.nbytes)

    def whole(self) -> dict[str, NDArray[Any]]:
        """The arrays as `layout` has them: rows that hold nothing are zeros."""
        return {name: _filled(array, self.layout[name][1]) for name, array in self.arrays.items()}

    @classmethod
    def of(cls, saved: Saved, layout: Layout) -> Self:
        """What a file holds, as small as it can be."""
        rows = max(1, saved.position)
        arrays = {
            name: a[:rows].copy() if name.endswith((".k", ".v")) else a.copy() for name, a in saved.arrays.items()
        }
        return cls(saved.fingerprint, saved.position, layout, arrays, saved.logits)

    def save(self, path: Path | str, *, private: bool = False, lasting: bool = True) -> None:
        """Write the file that `State.save` writes, as `saved_state.save` does."""
        saved = Saved(self.fingerprint, self.position, self.whole(), self.logits)
        saved_state.save(path, saved, private=private, lasting=lasting)


def is_ring(name: str) -> bool:
    """Whether the array of that name, `blk.N.k` or such, is a ring of keys or values."""
    return name.endswith((".k", ".v"))


def _filled(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape == shape:
        return array
    out = np.zeros(shape, array.dtype)
    out[: len(array)] = array
    return out

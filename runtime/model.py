"""A loaded model: a GGUF, its tokenizer, and a backend that runs it."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from griffin_gguf.runtime import arch
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends import Backend
from griffin_gguf.runtime.errors import BackendError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.griffin import Rows
from griffin_gguf.runtime.machine import checked_threads
from griffin_gguf.runtime.state import CHUNK, State
from griffin_gguf.runtime.tokenizer import Tokenizer

BackendName = Literal["auto", "numpy", "ggml"]

#: Logits that one pass may compute when every token's are asked for (64 MiB as f32).
_EVERY_LOGITS = 1 << 24


def load(path: Path | str, backend: BackendName = "auto", threads: int | None = None) -> "Model":
    """Open the GGUF at `path` and make it ready to run.

    `backend` "auto" takes ggml where it loads, else NumPy, and says why in `Model.notice`. `threads` are
    ggml's (all cores if None); NumPy's matrix products follow its own BLAS settings. Raises `FileFormatError`
    or `UnsupportedError` for the file, `BackendError` for a ggml that cannot be used.
    """
    checked_threads(threads)
    file = GgufFile.open(path)
    try:
        file.hyperparameters()
        tokenizer = Tokenizer.from_gguf(file.path, file.metadata)
        chosen, notice = _backend(file, backend, threads)
    except BaseException:
        file.close()
        raise
    return Model(file, tokenizer, chosen, notice)


def _backend(file: GgufFile, name: BackendName, threads: int | None) -> tuple[Backend, str | None]:
    """The backend of that name; for "auto" also why it is not ggml."""
    # Imported here: the reference must run where ggml cannot be loaded, and neither costs time unused.
    from griffin_gguf.runtime.backends.ggml import GgmlBackend
    from griffin_gguf.runtime.backends.numpy import NumpyBackend

    if name == "numpy":
        return NumpyBackend(file), None
    if name not in ("auto", "ggml"):
        raise UnsupportedError(f"backend: expected auto, ggml or numpy, found {name!r}")
    try:
        return GgmlBackend(file, threads), None
    except BackendError as error:
        if name == "ggml":
            raise
        return NumpyBackend(file), f"running on NumPy, which is slow: {error}"


class Model:
    """A model ready to run; made by `load`. A context manager.

    `hp` are its hyperparameters, `tokenizer` its text, `notice` what "auto" has to say. Threads that use one
    model wait for each other; a state belongs to one text, and so to one thread at a time.
    """

    def __init__(self, file: GgufFile, tokenizer: Tokenizer, backend: Backend, notice: str | None = None) -> None:
        self.file = file
        self.tokenizer = tokenizer
        self.notice = notice
        self.hp: Hyperparameters = file.hyperparameters()
        self._backend = backend
        self._lock = threading.Lock()
        self._closed = False

    @property
    def path(self) -> Path:
        """The GGUF."""
        return self.file.path

    @property
    def backend(self) -> str:
        """The backend's name: "ggml" or "numpy"."""
        return self._backend.name

    def new_state(self) -> State:
        """An empty memory, at position 0. Raises `UnsupportedError` where the machine has no room for it."""
        self._check_open()
        needed, available = self._backend.state_nbytes, psutil.virtual_memory().available
        if needed > available:
            raise UnsupportedError(
                f"{self.path}: {arch.key('attention.sliding_window')}: a state takes {needed:,} bytes, and "
                f"{available:,} are free"
            )
        return self._backend.new_state()

    def forward(
        self, tokens: Sequence[int] | NDArray[np.integer[Any]], state: State, every: bool = False
    ) -> NDArray[np.float32]:
        """Read `tokens` (at least one) on top of `state`, which moves on by as many.

        Logits after the last token, float32 [V], or with `every` after each, float32 [T, V]. The result does
        not depend on how a text is cut into calls, beyond rounding. Raises `UnsupportedError` for an empty
        sequence, a token that is no whole number or outside the vocabulary, a state of another model, a closed
        model; `state` is as before then.
        """
        ids = self._checked(tokens)
        with self._lock:
            self._check_open()
            if state.owner is not self._backend:
                raise UnsupportedError(f"state: was not made by this model, {self.path}")
            return self._feed(ids, state, every)

    def _feed(self, ids: NDArray[np.int32], state: State, every: bool) -> NDArray[np.float32]:
        if every:
            step = max(1, min(CHUNK, _EVERY_LOGITS // self.hp.vocab))
            return np.concatenate([self._run(chunk, state, "every") for chunk in _chunks(ids, step)])
        *first, last = _chunks(ids, CHUNK)
        for chunk in first:
            self._backend.run(chunk, state, "none")
        return self._run(last, state, "last")[0]

    def _run(self, chunk: NDArray[np.int32], state: State, rows: Rows) -> NDArray[np.float32]:
        logits = self._backend.run(chunk, state, rows)
        assert logits is not None
        return logits

    def _checked(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        wide = np.asarray(tokens)
        if wide.ndim != 1 or not wide.size:
            raise UnsupportedError(f"tokens: expected a sequence of at least one, found shape {wide.shape}")
        if wide.dtype.kind not in "iu":
            raise UnsupportedError(f"tokens: expected whole numbers, found {wide.dtype}")
        outside = wide[(wide < 0) | (wide >= self.hp.vocab)]
        if outside.size:
            raise UnsupportedError(f"tokens: {outside[0]} is outside the vocabulary of {self.hp.vocab}")
        return wide.astype(np.int32)

    def _check_open(self) -> None:
        if self._closed:
            raise UnsupportedError(f"{self.path}: the model is closed")

    def close(self) -> None:
        """Release the file and all memory; neither the model nor its states can be used after it."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._backend.close()
                self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _chunks(ids: NDArray[np.int32], step: int) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(ids), step):
        yield ids[start : start + step]

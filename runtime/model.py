"""A loaded model: a GGUF, its tokenizer, and a backend that runs it."""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import psutil
from numpy.typing import NDArray

from griffin_gguf.runtime import arch, saved_state
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends import Backend
from griffin_gguf.runtime.errors import BackendError, NoRoomError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.griffin import Rows
from griffin_gguf.runtime.machine import checked_threads
from griffin_gguf.runtime.saved_state import Layout
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import State
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import stored

BackendName = Literal["auto", "numpy", "ggml"]
Tokens = Sequence[int] | NDArray[np.integer[Any]]

#: Logits that one pass may compute when every token's are asked for (64 MiB as f32).
_EVERY_LOGITS = 1 << 24

#: Texts whose vectors are made at once: each takes a state meanwhile.
_EMBEDDED = 8


def load(
    path: Path | str,
    backend: BackendName = "auto",
    threads: int | None = None,
    devices: Mapping[str, int | None] | None = None,
) -> "Model":
    """Open the GGUF at `path` and make it ready to run.

    `backend` "auto" takes ggml where it loads, else NumPy, and says why in `Model.notice`. `threads` are
    ggml's (None: what `griffin bench --tune` found for such a file, else one a core); NumPy's matrix products follow
    its own BLAS settings. `devices` are ggml's by name ("CPU", "Metal", "rpc:HOST:PORT"), each with the number of
    layers that lie on it, None for its part of the rest; without any, the best one runs all. Raises `FileFormatError`
    or `UnsupportedError` for the file, `BackendError` for a ggml or a device that cannot be used.
    """
    checked_threads(threads)
    file = GgufFile.open(path)
    try:
        file.hyperparameters()
        file.warm()
        tokenizer = Tokenizer.from_gguf(file.path, file.metadata)
        chosen, notice = _backend(file, backend, threads, devices or {})
    except BaseException:
        file.close()
        raise
    return Model(file, tokenizer, chosen, notice)


def _backend(
    file: GgufFile, name: BackendName, threads: int | None, devices: Mapping[str, int | None]
) -> tuple[Backend, str | None]:
    """The backend of that name; for "auto" also why it is not ggml."""
    # Imported here: the reference must run where ggml cannot be loaded, and neither costs time unused.
    from griffin_gguf.runtime.backends.ggml import GgmlBackend
    from griffin_gguf.runtime.backends.numpy import NumpyBackend

    if name == "numpy":
        if devices:
            raise UnsupportedError("devices: NumPy has none to choose from; backend: expected ggml")
        return NumpyBackend(file), None
    if name not in ("auto", "ggml"):
        raise UnsupportedError(f"backend: expected auto, ggml or numpy, found {name!r}")
    try:
        tuning, notice = stored(file, ", ".join(devices))
        if threads:
            tuning = replace(tuning, threads=threads)
        try:
            return GgmlBackend(file, tuning, devices), notice
        except BackendError as error:
            if tuning.buffers == "mapped":
                raise
            notice = f"weights stay as they are mapped: {error}"  # a copy that was tuned for, and has no room now
            return GgmlBackend(file, replace(tuning, buffers="mapped"), devices), notice
    except BackendError as error:
        if name == "ggml" or devices:
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
        self._layout: Layout | None = None  # of a state, once one has been needed

    @property
    def path(self) -> Path:
        """The GGUF."""
        return self.file.path

    @property
    def backend(self) -> str:
        """The backend's name: "ggml" or "numpy"."""
        return self._backend.name

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.hp.vocab

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return self._backend.state_nbytes

    @property
    def chunk(self) -> int:
        """Tokens of all texts together that one pass over the weights may take; more are fed in several."""
        return self._backend.chunk

    def new_state(self, snapshot: Snapshot | None = None) -> State:
        """A memory at position 0, or one that goes on from `snapshot`.

        Raises `NoRoomError` where the machine has no room for it, `UnsupportedError` for another model's snapshot.
        """
        self._check_open()
        needed, available = self._backend.state_nbytes, psutil.virtual_memory().available
        if needed > available:
            raise NoRoomError(
                f"{self.path}: {arch.key('attention.sliding_window')}: a state takes {needed:,} bytes, and "
                f"{available:,} are free"
            )
        state = self._backend.new_state()
        if snapshot is not None:
            state.resume(snapshot)
        return state

    def buffers_nbytes(self, texts: int) -> int:
        """Bytes at most, beside weights, states and logits, that a pass over a chunk of so many texts takes."""
        self._check_open()
        return self._backend.buffers_nbytes(texts)

    def reserve(self, count: int) -> None:
        """Make room for so many more states at once, where a backend keeps them together and would have to move them.

        Raises `BackendError` where there is no memory; all is as before then.
        """
        self._check_open()
        self._backend.reserve(count)

    def load_state(self, path: Path | str) -> State:
        """The state that `State.save` wrote to `path`: it goes on bit by bit as the one that was saved.

        Raises `FileFormatError` for any other file, one of another model among them.
        """
        state = self.new_state()
        state.restore(path, self.hp.vocab)
        return state

    def load_snapshot(self, path: Path | str) -> Snapshot:
        """The same as a snapshot, from which any number of states can go on."""
        if self._layout is None:
            self._layout = self.new_state().layout
        logits = (np.dtype(np.float32), (self.hp.vocab,))
        saved = saved_state.load(path, self._backend.fingerprint, {**self._layout, saved_state.LOGITS: logits})
        return Snapshot.of(saved, self._layout)

    def forward(self, tokens: Tokens, state: State, every: bool = False, trace: bool = False) -> NDArray[np.float32]:
        """Read `tokens` (at least one) on top of `state`, which moves on by as many.

        Logits after the last token, float32 [V], or with `every` after each, float32 [T, V]. With `trace` the state
        can be rolled back to any token of the last pass, see `forward_batch`. The result does not depend on how a
        text is cut into calls, beyond rounding. Raises `UnsupportedError` for an empty sequence, a token that is no
        whole number or outside the vocabulary, a state of another model, a closed model; `state` is as before then.
        """
        return self.forward_batch([(tokens, state)], every, trace)[0]

    def forward_batch(
        self, batch: Sequence[tuple[Tokens, State]], every: bool = False, trace: bool = False
    ) -> list[NDArray[np.float32]]:
        """Read several texts at once, each on top of its own state: weights are read once for all of them.

        As `forward` for each of `batch`, beyond rounding: texts may be of any lengths, at any positions. They are read
        in passes of at most `chunk` tokens in all (with `every` of some 16 million logits, 65 tokens of a vocabulary of
        256,000); a trace is left by those that end in the last pass. Raises `UnsupportedError` as `forward` does, and
        for one state that stands twice; all states are as before then.
        """
        ids = [self._checked(tokens) for tokens, _ in batch]
        given = [state for _, state in batch]
        if len({id(state) for state in given}) < len(given):
            raise UnsupportedError("state: one state cannot read two texts at once")
        with self._lock:
            self._check_open()
            for state, tokens in zip(given, ids, strict=True):
                if state.owner is not self._backend:
                    raise UnsupportedError(f"state: was not made by this model, {self.path}")
                state.check(len(tokens))
            return self._feed([_Text(i, s) for i, s in zip(ids, given, strict=True)], every, trace)

    def embed(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """What the model makes of each text: the vector that its head is given after the last token, f32 [n, H].

        Each text, of any length, is read from an empty state, a few at a time; others who wait for the model have
        their turn meanwhile. Vectors are not of unit length. Raises `UnsupportedError` for an empty text, a token
        outside the vocabulary or a closed model.
        """
        found = np.empty((len(batch), self.hp.hidden), np.float32)
        for _ in self.embedding(batch, found, self.chunk):
            pass
        return found

    def embedding(self, batch: Sequence[Tokens], found: NDArray[np.float32], most: int) -> Generator[None]:
        """`embed` pass by pass, each of at most `most` tokens in all, for whoever may want to stop between two.

        Vectors are written to `found`, f32 [n, H]: all of them are there at the end.
        """
        ids = [self._checked(tokens) for tokens in batch]
        for start in range(0, len(ids), _EMBEDDED):
            texts = [_Text(one, self.new_state()) for one in ids[start : start + _EMBEDDED]]
            for chunks in _passes(texts, min(most, self.chunk)):
                with self._lock:
                    self._check_open()
                    self._run(chunks, "hidden", trace=False)
                yield
            for i, text in enumerate(texts, start):
                found[i] = text.rows[-1][0]

    def _feed(self, texts: list["_Text"], every: bool, trace: bool) -> list[NDArray[np.float32]]:
        most = self._backend.chunk
        if every:
            most = max(1, min(most, _EVERY_LOGITS // self.hp.vocab))
        for chunks in _passes(texts, most):
            self._run(chunks, "every" if every else "last", trace)
        return [np.concatenate(text.rows) if every else text.rows[-1][0] for text in texts]

    def _run(
        self,
        chunks: "list[tuple[_Text, NDArray[np.int32]]]",
        wanted: Literal["every", "last", "hidden"],
        trace: bool,
    ) -> None:
        """Feed one batch that fits and hand out its rows. Only the last batch of a call leaves a trace."""
        ends, every = [len(chunk) == text.left for text, chunk in chunks], wanted == "every"
        rows: Rows = wanted if every or any(ends) else "none"
        traced = trace and all(ends)
        found = self._backend.run([(chunk, text.state) for text, chunk in chunks], rows, traced)
        at = 0
        for (text, chunk), end in zip(chunks, ends, strict=True):
            size = len(chunk) if every else 1
            part = None if found is None else found[at : at + size]
            at += size
            last = None
            if part is not None and (every or end):
                text.rows.append(part)
                last = None if wanted == "hidden" else part[-1].copy()
            text.state.move(len(chunk), part if every else None, last, traced)
            text.read += len(chunk)

    def _checked(self, tokens: Tokens) -> NDArray[np.int32]:
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


@dataclass
class _Text:
    """What one text of a batch still has to read, and the rows it has given: logits or hidden vectors."""

    tokens: NDArray[np.int32]
    state: State
    read: int = 0
    rows: list[NDArray[np.float32]] = field(default_factory=list[NDArray[np.float32]])

    @property
    def left(self) -> int:
        """Tokens not read yet."""
        return len(self.tokens) - self.read


def _passes(texts: Sequence[_Text], most: int) -> Iterator[list[tuple[_Text, NDArray[np.int32]]]]:
    """What to feed next, at most `most` tokens in all, until all is read; each is read before the next is asked for."""
    waiting = [text for text in texts if text.left]
    while waiting:
        chunks, room = list[tuple[_Text, NDArray[np.int32]]](), most
        for text in waiting[:most]:
            # Room for one token of each text behind it, so that all of them move.
            ahead = min(len(waiting), most) - len(chunks) - 1
            chunk = text.tokens[text.read :][: room - ahead]
            chunks.append((text, chunk))
            room -= len(chunk)
        yield chunks
        waiting = [text for text in waiting if text.left]

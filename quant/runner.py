"""What runs a model that is to be measured, of whatever architecture: a Griffin by our runtime, others by llama.cpp.

Every file passes our own gate first (`GgufFile.open`), which checks its whole header: llama.cpp's reader, which comes
after it, trusts more than it should.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from gguf.utility import size_label
from numpy.typing import NDArray

from griffin_gguf.quant.file_types import type_name
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.arch import ARCHITECTURE
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import checked_threads, compute_threads, usable_cores
from griffin_gguf.runtime.model import BackendName
from griffin_gguf.runtime.tuning import stored

_ARCHITECTURE_KEY = "general.architecture"

#: Tokens that a model with keys and values of every token has room for, unless asked for more.
CONTEXT = 4096


class FileFacts:
    """What the header alone says of a model; sizes in bytes, of all files of a split one together."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.architecture = _architecture(file)
        self.type = type_name(file.metadata)
        self.file_size = file.size
        self.weights_nbytes = sum(info.nbytes for info in file.tensors.values())
        self.parameters = sum(prod(info.shape) for info in file.tensors.values())


class Runner(AbstractContextManager["Runner", None], Protocol):
    """A model ready to run. A context manager."""

    @property
    def path(self) -> Path:
        """The GGUF, the first of several files."""
        ...

    @property
    def architecture(self) -> str:
        """Its general.architecture."""
        ...

    @property
    def type(self) -> str:
        """Its file type by `type_name`."""
        ...

    @property
    def description(self) -> str:
        """Architecture, size and file type in llama.cpp's words: gemma 2B Q4_K - Medium."""
        ...

    @property
    def name(self) -> str:
        """What runs it: "ggml" or "numpy", which are our backends, or "llama.cpp"."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads that it runs on; NumPy has its own settings and uses as many at most as there are cores."""
        ...

    @property
    def chunk(self) -> int:
        """Tokens that go through the weights at once; longer texts are cut."""
        ...

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary, V."""
        ...

    @property
    def context(self) -> int:
        """Tokens that it was trained on at once."""
        ...

    @property
    def parameters(self) -> int:
        """Numbers in all its tensors."""
        ...

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all its tensors."""
        ...

    @property
    def file_size(self) -> int:
        """Bytes of all its files."""
        ...

    @property
    def bos(self) -> int | None:
        """The token that a text begins with, None where the model has none put before it."""
        ...

    @property
    def state_nbytes(self) -> int | None:
        """Bytes of a state, None where they grow with what it has read."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a whole text, `bos` first; names of special tokens in it are only text.

        Raises `GriffinError` for text that is no Unicode (lone surrogates).
        """
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text: nothing for a special token.

        Of a text's first token it may be a space more than the text has, where a vocabulary puts one before each text.
        """
        ...

    def new_state(self) -> Any:
        """Begin a text: an object with `position`, how many tokens it has read, and `copy()`, which goes its own way.

        Raises `UnsupportedError` where there is no room for one more.
        """
        ...

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        """Read at least one token on top of `state`: logits after the last, [V], or after each, [T, V].

        How a text is cut into calls changes nothing but rounding. Raises `UnsupportedError` for tokens that cannot be
        and where they do not fit; `state` is as before then.
        """
        ...

    def close(self) -> None:
        """Give all memory back; its states are dead then."""
        ...


class GriffinRunner:
    """Our runtime as a `Runner`; `model` is what it runs, on so many `threads`."""

    def __init__(self, model: Model, threads: int) -> None:
        facts = FileFacts(model.file)
        self.model, self.threads = model, threads
        self.path, self.architecture, self.type = facts.path, facts.architecture, facts.type
        self.weights_nbytes, self.file_size = facts.weights_nbytes, facts.file_size
        self.parameters = model.hp.parameters
        self.name = model.backend
        self.chunk, self.vocab, self.context = model.chunk, model.hp.vocab, model.hp.context
        self.bos = model.tokenizer.bos if model.tokenizer.add_bos else None

    @property
    def description(self) -> str:
        """Architecture, size and file type, see `Runner`."""
        from griffin_gguf.quant.llama import type_words

        return f"{self.architecture} {size_label(self.parameters, 0, 0, 0)} {type_words(self.type)}"

    @property
    def state_nbytes(self) -> int | None:
        """Bytes of a state, the same at every position."""
        return self.model.state_nbytes

    def encode(self, text: str) -> list[int]:
        """Tokens of a whole text, see `Runner`."""
        return self.model.tokenizer.encode(text)

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""
        return self.model.tokenizer.piece(token)

    def new_state(self) -> Any:
        """Begin a text."""
        return self.model.new_state()

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        """Logits, see `Runner`."""
        return self.model.forward(tokens, state, every)

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_runner(
    path: Path | str, *, backend: BackendName = "auto", threads: int | None = None, context: int = CONTEXT
) -> Runner:
    """Make the GGUF at `path` ready to run, by our runtime where it is a Griffin, else by llama.cpp.

    `backend` and `threads` are as in `runtime.load`. `context` is how many tokens of all states together shall have
    room; models of fixed memory read as many as they like. Raises `FileFormatError` for a broken file,
    `UnsupportedError` for one that neither runs and for NumPy with another architecture, and `BackendError` where ggml
    or llama.cpp fails.
    """
    checked_threads(threads)
    with GgufFile.open(path) as file:
        facts = FileFacts(file)
    if facts.architecture == ARCHITECTURE:
        return _griffin(load(path, backend, threads), threads)
    if backend == "numpy":
        raise UnsupportedError(
            f"{facts.path}: {_ARCHITECTURE_KEY}: numpy runs {ARCHITECTURE} alone, found {facts.architecture!r}"
        )
    abi.load()  # raises where llama-cpp-python is missing or of another version than we know
    from griffin_gguf.quant.llama import LlamaRunner  # here: the package takes a while to import

    return LlamaRunner(facts, threads=threads, context=context)


def _griffin(model: Model, threads: int | None) -> GriffinRunner:
    """With the threads that `load` chose where none were asked for."""
    if model.backend == "numpy":
        return GriffinRunner(model, usable_cores())
    return GriffinRunner(model, threads or stored(model.file)[0].threads or compute_threads())


def _architecture(file: GgufFile) -> str:
    found = file.metadata.get(_ARCHITECTURE_KEY)
    if not isinstance(found, str):
        problem = "is missing" if found is None else f"expected text, found {found!r}"
        raise FileFormatError(file.path, _ARCHITECTURE_KEY, problem)
    return found

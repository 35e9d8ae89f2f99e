"""A model beside itself with some tensors in other types: what they do to its predictions, without writing a file."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant.encode import EncodingError, Importance, encode_tensor
from griffin_gguf.quant.evaluate import Comparison, Divergence, compare, stream
from griffin_gguf.quant.evaluate import Progress as TokenProgress
from griffin_gguf.quant.file_types import ALWAYS_F32
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.recipes import row_bytes
from griffin_gguf.quant.weighting import importance_of
from griffin_gguf.runtime.arch import Hyperparameters, Tensor
from griffin_gguf.runtime.backends.patched import PatchedBackend
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.machine import checked_threads, usable_cores
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.state import CHUNK
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Tuning

_PIECE = 1 << 18  # weights encoded at a time by a thread


class Bench:
    """A Griffin GGUF, its importance matrix, and a text to compare on. A context manager.

    `hp` are the model's numbers, `tensors` those that can be quantized, by name in file order, `file` the GGUF,
    `importance` gives a weight's mean squared inputs, `text` the tokens in use (empty where there is no text).
    """

    def __init__(
        self,
        source: Path,
        text: str | None,
        imatrix: ImportanceMatrix | None = None,
        *,
        tokens: int,
        threads: int | None = None,
    ) -> None:
        """Open `source`; at most `tokens` tokens of `text` are predicted.

        Nothing is run before `divergence` asks. Raises `FileFormatError` and `UnsupportedError` for the file, for
        an `imatrix` of another model, and for a text of fewer than 3 tokens.
        """
        self._threads = checked_threads(threads)
        self.file = GgufFile.open(source)
        try:
            self.hp: Hyperparameters = self.file.hyperparameters()
            self.tensors = {t.name: t for t in self.hp.tensors() if t.role not in ALWAYS_F32}
            self.importance: Importance = importance_of(imatrix, self.hp)
            self._tokenizer = Tokenizer.from_gguf(self.file.path, self.file.metadata)
            self.text: list[int] = self._tokenizer.encode(text)[: tokens + 1] if text is not None else []
            if text is not None and len(self.text) < 3:
                raise UnsupportedError(f"a text of {len(self.text) - 1} tokens is too short; expected at least 2")
        except BaseException:
            self.file.close()
            raise
        self._pool = ThreadPoolExecutor(self._threads or usable_cores(), thread_name_prefix="encode")
        self._model: tuple[Model, PatchedBackend, _Recorded] | None = None

    def own_type(self, name: str) -> T:
        """The type that a tensor has in the file."""
        return self.file.tensors[name].type

    def rows(self, tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the tensor seen as 2-D, f32 [stop - start, columns]."""
        info = self.file.tensors[tensor.name]
        width = row_bytes(info.type, tensor.shape[-1])
        return dequantize(info, self.file.read(tensor.name, start * width, stop * width))

    def encoded(self, name: str, type: T) -> NDArray[np.uint8]:
        """Encode the whole tensor, uint8 [rows, bytes of a row], on all threads; as `quantize` does."""
        tensor = self.tensors[name]
        rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
        out = np.empty((rows, row_bytes(type, columns)), np.uint8)
        step = max(1, _PIECE // columns)

        def encode_piece(start: int) -> None:
            piece = self.rows(tensor, start, min(start + step, rows))
            out[start : start + step] = encode_tensor(tensor, type, piece, start, self.importance)

        self.each(encode_piece, range(0, rows, step))
        return out

    def each(self, work: Callable[[int], None], items: Sequence[int]) -> None:
        """Do `work` for all items, on all threads. Values that a type cannot hold raise `FileFormatError`."""
        futures = [self._pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except EncodingError as error:
            raise FileFormatError(self.file.path, error.tensor, error.problem) from None
        finally:
            for future in futures:
                future.cancel()

    def divergence(
        self, types: Mapping[str, T], progress: TokenProgress | None = None, *, tokens: int | None = None
    ) -> Divergence:
        """KL(the file's model ‖ the same with these tensors in these types) over the text, or its first `tokens`.

        Raises `GriffinError` where its logits are not finite, `BackendError` where ggml cannot be used or lacks memory.
        """
        return Divergence.of(self.comparison(types, progress, tokens=tokens))

    def comparison(
        self, types: Mapping[str, T], progress: TokenProgress | None = None, *, tokens: int | None = None
    ) -> Comparison:
        """The same token by token."""
        model, backend, reference = self._ready()
        backend.patch({name: type for name, type in types.items() if type is not self.own_type(name)}, self.encoded)
        return compare(reference, model, stream(self.text[: tokens + 1] if tokens else self.text), progress)

    def _ready(self) -> tuple[Model, PatchedBackend, "_Recorded"]:
        """The model, run over the text once."""
        assert self.text, "no text to compare on"
        if self._model is None:
            backend = PatchedBackend(self.file, Tuning(self._threads))
            self._model = Model(self.file, self._tokenizer, backend), backend, _Recorded(backend, self.text[:-1])
        return self._model

    def close(self) -> None:
        """Release the file, the model and the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._model is not None:
            self._model[0].close()
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Recorded:
    """The file's own model over one text, run once: a `Predictor` whose forward only does the head's product anew.

    What goes into that product, f32 [tokens, H], is kept: at 256,000 tokens it is a hundredth of the logits.
    """

    def __init__(self, backend: PatchedBackend, tokens: Sequence[int]) -> None:
        self.vocab = backend.hp.vocab
        self._backend = backend
        state = backend.new_state()
        pieces = [np.array(tokens[start : start + CHUNK], np.int32) for start in range(0, len(tokens), CHUNK)]
        self._hidden = np.concatenate([backend.hidden(piece, state) for piece in pieces])

    def new_state(self) -> list[int]:
        """Begin the text: a position."""
        return [0]

    def forward(self, tokens: Sequence[int], state: list[int], every: bool = False) -> NDArray[np.float32]:
        """Logits [T, V] after each of the next tokens, which must be those of the text."""
        assert every
        start = state[0]
        state[0] += len(tokens)
        return self._backend.own_logits(self._hidden[start : state[0]])

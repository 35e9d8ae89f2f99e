"""An importance matrix collected by running a model over a text, window by window, and resumed where it stopped.

The text is cut as llama-imatrix cuts it: windows of `ctx` tokens, each with BOS in the place of its first token
and an empty state. Sums over a window are f32, over windows f64. What is saved on the way holds the latter, so
that an interrupted collection ends in the same file as one in a single run.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.quant.imatrix import Collection, Entry, ImportanceMatrix, merge, products
from griffin_gguf.runtime.atomic import check_targets
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.observe import Observer
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import checked_threads
from griffin_gguf.runtime.state import CHUNK
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Tuning

#: (done, total) windows of this run.
Progress = Callable[[int, int], None]

_SAVE_EVERY = 32  # windows
_FEWEST_TOKENS = 4  # of a window: one is scored
_LOGITS = 1 << 24  # that one pass may compute (64 MiB)
_HEAD = 4096  # bytes of each tensor that tell models apart


@dataclass(frozen=True)
class Text:
    """What to collect over: its name, a path's last part of which the file lists, and the words."""

    name: str
    content: str


class Collector:
    """A collection into the file `target`: begun, or continued where that file is an unfinished one of the same.

    `done` of `total` windows are in `matrix`. `others` are joined to the result at the end. A context manager.
    """

    def __init__(
        self,
        model: Path,
        text: Text,
        target: Path,
        *,
        ctx: int = 512,
        chunks: int | None = None,
        score: bool = False,
        others: Sequence[ImportanceMatrix] = (),
        threads: int | None = None,
    ) -> None:
        """Find out what there is to do, without running anything.

        `ctx` tokens make a window; at most `chunks` windows are taken; with `score` the later half of each is
        also predicted, which takes the head's product (see `Collection`). Raises `FileFormatError` and
        `UnsupportedError` for the model, for a text of less than a window, for `others` that do not fit, and
        for a `target` that holds another collection unfinished; `BackendError` where ggml cannot be used.
        """
        check_targets([target], [model])
        checked_threads(threads)
        if ctx < _FEWEST_TOKENS:
            raise UnsupportedError(f"ctx: expected at least {_FEWEST_TOKENS} tokens, found {ctx}")
        self._target, self._score, self._others, self._threads = target, score, tuple(others), threads
        self._file = GgufFile.open(model)
        try:
            self._hp = self._file.hyperparameters()
            self._tokenizer = Tokenizer.from_gguf(self._file.path, self._file.metadata)
            self._windows = self._cut(text, ctx, chunks)
            self.total = len(self._windows)
            self.matrix = self._resumed(self._begun(text, ctx))
            self._check_others()
        except BaseException:
            self._file.close()
            raise

    @property
    def done(self) -> int:
        """Windows that are in `matrix`."""
        return self.matrix.chunk_count

    def run(self, progress: Progress | None = None) -> ImportanceMatrix:
        """Run the windows that are left and write the file, on the way too; returns what it holds in the end.

        After any exception, `KeyboardInterrupt` among them, the file holds every window that was finished, and
        the next run goes on from there. Raises `GriffinError` where an input is not finite.
        """
        start = saved = self.done
        left = self.total - start
        if left:
            backend = GgmlBackend(self._file, Tuning(self._threads))
            try:
                observer = Observer(backend)
                for window in self._windows[start:]:
                    self.matrix = self._with(observer, window)
                    if self.done - saved == _SAVE_EVERY and self.done < self.total:
                        self.matrix.save(self._target)
                        saved = self.done
                    if progress:
                        progress(self.done - start, left)
                self._joined().save(self._target)
                saved = self.done
            except BaseException:
                if self.done > saved:
                    self.matrix.save(self._target)
                raise
            finally:
                backend.close()
        elif self._others:
            self._joined().save(self._target)
        return self._joined()

    def _cut(self, text: Text, ctx: int, chunks: int | None) -> NDArray[np.int32]:
        """The windows, i32 [windows, ctx]."""
        ids = self._tokenizer.encode(text.content)
        count = len(ids) // ctx
        if not count:
            raise UnsupportedError(f"{text.name}: has {len(ids)} tokens; expected at least a window of {ctx}")
        windows = np.array(ids[: count * ctx], np.int32).reshape(count, ctx)[:chunks]
        if self._tokenizer.add_bos:
            windows[:, 0] = self._tokenizer.bos
        return windows

    def _begun(self, text: Text, ctx: int) -> ImportanceMatrix:
        """Nothing yet."""
        entries: dict[str, Entry] = {}
        for tensor in products(self._hp):
            shape = (tensor.shape[0] if len(tensor.shape) == 3 else 1, tensor.shape[-1])
            entries[tensor.name] = Entry(np.zeros(shape), np.zeros(1, np.int64))
        digest = hashlib.sha256(text.content.encode()).hexdigest()
        return ImportanceMatrix(
            self._target,
            entries,
            (Path(text.name).name,),
            0,
            ctx,
            Collection(fingerprint(self._file), digest, self.total),
        )

    def _resumed(self, begun: ImportanceMatrix) -> ImportanceMatrix:
        """What the target holds, where that is part of the same collection or all of it; else `begun`."""
        if not self._target.exists():
            return begun
        try:
            found = ImportanceMatrix.load(self._target)
        except FileFormatError:
            return begun  # another file, to be replaced
        old, new = found.collection, begun.collection
        if old is None or new is None:
            return begun
        differences = [
            word
            for word, a, b in (
                ("model", old.model, new.model),
                ("text", old.text_sha256, new.text_sha256),
                ("window", found.chunk_size, begun.chunk_size),
                ("list of weights", found.entries.keys(), begun.entries.keys()),
            )
            if a != b
        ]
        if found.complete:
            return begun if differences or old.chunks_total != self.total else found.fitted(self._hp)
        if differences:
            raise UnsupportedError(
                f"{self._target}: holds an unfinished matrix of another {' and '.join(differences)}; "
                "remove it or write to another file"
            )
        if found.chunk_count > self.total:
            raise UnsupportedError(
                f"{self._target}: holds {found.chunk_count} windows already, more than the {self.total} asked for"
            )
        return replace(found.fitted(self._hp), collection=replace(old, chunks_total=self.total))

    def _check_others(self) -> None:
        for other in self._others:
            other.fitted(self._hp)
        self._joined()

    def _joined(self) -> ImportanceMatrix:
        return merge([*self._others, self.matrix], self._target) if self._others else self.matrix

    def _with(self, observer: Observer, window: NDArray[np.int32]) -> ImportanceMatrix:
        """`matrix` and another window; computed aside, so that an interruption finds either or the other."""
        matrix = self.matrix
        assert matrix.collection
        sums: dict[str, NDArray[np.float64]] = {}
        nll = np.empty(0)
        observer.begin()
        for start, stop, scored in _pieces(len(window), self._score, self._hp.vocab):
            found, logits = observer.run(window[start:stop], logits=scored)
            for name, squares in found.items():
                sums[name] = sums[name] + squares if name in sums else squares.astype(np.float64)
            if logits is not None:
                targets = window[start + 1 : stop + 1]
                nll = np.concatenate([nll, _nll(logits[: len(targets)], targets)])
        entries = {name: self._plus(name, entry, sums[name], len(window)) for name, entry in matrix.entries.items()}
        collection = replace(
            matrix.collection,
            nll=matrix.collection.nll + float(nll.sum()),
            nll_squares=matrix.collection.nll_squares + float((nll * nll).sum()),
            scored=matrix.collection.scored + len(nll),
        )
        return replace(matrix, entries=entries, chunk_count=matrix.chunk_count + 1, collection=collection)

    def _plus(self, name: str, entry: Entry, sums: NDArray[np.float64], tokens: int) -> Entry:
        if not np.isfinite(sums).all():
            raise GriffinError(f"{self._file.path}: {name}: window {self.done}: its inputs hold NaN or infinity")
        return entry.plus(Entry(sums.reshape(entry.sums.shape), np.array([tokens])))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def fingerprint(file: GgufFile) -> str:
    """SHA-256 over the keys, and over each tensor's description and first bytes: cheap, and of one model's file."""
    digest = hashlib.sha256(repr(sorted(file.metadata.items())).encode())
    for name, info in file.tensors.items():
        digest.update(repr((name, info.type.name, info.shape)).encode())
        digest.update(file.data(name)[:_HEAD].tobytes())
    return digest.hexdigest()


def _pieces(ctx: int, score: bool, vocab: int) -> list[tuple[int, int, bool]]:
    """A window as (start, stop, whether it is scored): the later half is, in as many tokens as logits allow."""
    first = ctx // 2 if score else ctx
    pieces = [(start, min(start + CHUNK, first), False) for start in range(0, first, CHUNK)]
    step = max(1, min(CHUNK, _LOGITS // vocab))
    return pieces + [(start, min(start + step, ctx), True) for start in range(first, ctx, step)]


def _nll(logits: NDArray[np.float32], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Negative log-likelihoods of `targets` [T] under `logits` [T, V], in nats; row by row, since V may be large."""
    found = np.empty(len(targets))
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        wide = row.astype(np.float64)
        top = wide.max()
        found[i] = top + np.log(np.exp(wide - top).sum()) - wide[target]
    return found

"""Writing GGUF files: one pass over the source for all of them, on all cores, in bounded memory, all or nothing.

The calling thread reads chunks of rows and writes what was encoded; a pool of threads encodes. At most
`_CHUNKS_AHEAD` chunks are under way, so memory does not depend on the model. A file appears under its own name
only when it is complete and on the disk: until then it is `.NAME.RANDOM.partial` beside it.
"""

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState
from numpy.typing import NDArray

from griffin_gguf.quant.encode import EncodingError, encode
from griffin_gguf.quant.recipes import Metadata, Planned
from griffin_gguf.runtime.arch import Tensor
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.machine import checked_threads, usable_cores

#: (tensor, start, stop) -> float32 [stop - start, columns]: rows of the tensor in GGUF's layout, seen as 2-D.
Reader = Callable[[Tensor, int, int], NDArray[np.float32]]

#: (done, total) bytes of the source, counted as float32.
Progress = Callable[[int, int], None]

ALIGNMENT = 32  # of every tensor's offset: GGUF's default, so no key has to say so
_CHUNK_ELEMENTS = 4 << 20
_CHUNKS_AHEAD = 3


@dataclass
class Output:
    """A file to write: its keys with their types, in order, and its tensors in file order."""

    path: Path
    metadata: Metadata
    plan: list[Planned]


@dataclass
class _Chunk:
    """Rows on their way through the pool: per type the encoded pieces in order."""

    index: int  # of the tensor in the plans
    elements: int
    last: bool  # of its tensor
    pieces: dict[GGMLQuantizationType, list[Future[NDArray[np.uint8]]]]


def header(output: Output) -> bytes:
    """Everything before the tensor data: header, keys and tensor infos, padded."""
    assert "general.alignment" not in output.metadata
    keys = dict(output.metadata)
    architecture, _, _ = keys.pop("general.architecture")
    writer: Any = GGUFWriter(None, architecture)  # writes that key first; opens no file, we hand it a buffer
    for name, (value, kind, element) in keys.items():
        if kind is GGUFValueType.ARRAY and not value:
            raise UnsupportedError(f"{output.path}: {name}: an empty array cannot be written")
        writer.add_key_value(name, value, kind, element)
    for row in output.plan:
        writer.add_tensor_info(row.tensor.name, row.tensor.shape, np.dtype(np.float32), row.nbytes, row.type)
    buffer = BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return _pad(buffer.getvalue())


def file_size(output: Output) -> int:
    """Exact size in bytes of the file that `write` makes."""
    return len(header(output)) + _data_size(output.plan)


def write(
    outputs: Sequence[Output], read: Reader, *, threads: int | None = None, progress: Progress | None = None
) -> None:
    """Write all `outputs`, which hold the same tensors in the same order, reading each tensor once.

    `read` may return views; what it returned must not change afterwards. Raises `GriffinError` naming the file
    for a folder that is missing or cannot be written and for a full disk, `EncodingError` naming the tensor for
    values that its type cannot hold. After any exception, `KeyboardInterrupt` among them, no partial file is
    left, and nothing stands under a final name that is not complete.
    """
    names = [[row.tensor.name for row in output.plan] for output in outputs]
    assert all(other == names[0] for other in names), "outputs of one pass hold the same tensors"
    if threads is not None and threads < 1:
        raise UnsupportedError(f"threads: expected at least 1, found {threads}")
    check_targets([output.path for output in outputs])
    headers = [header(output) for output in outputs]
    with ExitStack() as stack:
        files = [stack.enter_context(atomic(output.path)) for output in outputs]
        for file, first in zip(files, headers, strict=True):
            file.write(first)
        count = checked_threads(threads) or usable_cores()
        pool = ThreadPoolExecutor(count, thread_name_prefix="encode")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        _stream(outputs, files, _encoded(outputs, read, pool, count), progress)
        for output, file, first in zip(outputs, files, headers, strict=True):
            assert file.position == len(first) + _data_size(output.plan)
            file.sync()


def check_targets(paths: Sequence[Path]) -> None:
    """Refuse, before anything is read, files that could not be put in place at the end."""
    for path in paths:
        if not path.parent.is_dir():
            raise GriffinError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise GriffinError(f"{path}: is a folder; expected the name of a file")
        if path.exists() and not path.is_file():  # a rename would put a file in the place of a device or a pipe
            raise GriffinError(f"{path}: is no regular file; expected the name of one, or a new name")
    if len({path.resolve() for path in paths}) < len(paths):
        raise GriffinError(f"{paths[0]}: two outputs have the same path")


def _encoded(outputs: Sequence[Output], read: Reader, pool: ThreadPoolExecutor, threads: int) -> Iterator[_Chunk]:
    """Read chunk after chunk and set the pool to encode each once for every type that an output wants."""
    for index, row in enumerate(outputs[0].plan):
        types = dict.fromkeys(output.plan[index].type for output in outputs)
        step = max(1, _CHUNK_ELEMENTS // row.columns)
        for start in range(0, row.rows, step):
            stop = min(start + step, row.rows)
            rows = read(row.tensor, start, stop)
            assert rows.shape == (stop - start, row.columns), (row.tensor.name, rows.shape)
            cuts = sorted({(stop - start) * i // threads for i in range(threads + 1)})
            pieces = {type: [pool.submit(encode, type, rows[a:b]) for a, b in pairwise(cuts)] for type in types}
            yield _Chunk(index, rows.size, stop == row.rows, pieces)


def _stream(
    outputs: Sequence[Output], files: Sequence["PartialFile"], chunks: Iterator[_Chunk], progress: Progress | None
) -> None:
    """Write chunks in order as they come out of the pool, staying `_CHUNKS_AHEAD` behind the reader."""
    total = 4 * sum(row.rows * row.columns for row in outputs[0].plan)
    done = 0
    ahead: deque[_Chunk] = deque()
    for chunk in chain(chunks, [None] * _CHUNKS_AHEAD):
        if chunk is not None:
            ahead.append(chunk)
        if ahead and (chunk is None or len(ahead) > _CHUNKS_AHEAD):
            oldest = ahead.popleft()
            for output, file in zip(outputs, files, strict=True):
                _write_chunk(output.plan[oldest.index], oldest, file)
            done += 4 * oldest.elements
            if progress:
                progress(done, total)


def _write_chunk(row: Planned, chunk: _Chunk, file: "PartialFile") -> None:
    for piece in chunk.pieces[row.type]:
        try:
            encoded = piece.result()
        except EncodingError as error:
            raise EncodingError(error.problem, row.tensor.name) from None
        file.write(encoded.data)
    if chunk.last:
        file.write(bytes(-file.position % ALIGNMENT))


def _data_size(plan: Sequence[Planned]) -> int:
    """Bytes of all tensors, each padded."""
    return sum(row.nbytes + -row.nbytes % ALIGNMENT for row in plan)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


class PartialFile:
    """An unbuffered file whose errors name `path`, the name it will have."""

    def __init__(self, path: Path, raw: RawIOBase) -> None:
        self._path, self._raw = path, raw
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        left = memoryview(data).cast("B")
        while left:
            with _naming(self._path):
                written = self._raw.write(left) or 0
            self.position += written
            left = left[written:]

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with _naming(self._path):
            os.fsync(self._raw.fileno())


@contextmanager
def atomic(path: Path) -> Iterator[PartialFile]:
    """Open a file that takes the name `path` when the block ends well, and vanishes otherwise.

    Whoever wants it to last calls its `sync` before the end. Raises `GriffinError` naming `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _naming(path):
            raw = temporary.open("xb", buffering=0)
        with raw:
            yield PartialFile(path, raw)
        with _naming(path):
            temporary.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # where there is none, or no way to have made it
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Make a renaming last. Windows has no such call, and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the system's errors into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise GriffinError(f"{path}: cannot be written: {error.strerror}") from error

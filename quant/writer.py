"""Writing GGUF files: one pass over the source for all of them, on all cores, in bounded memory, all or nothing.

The calling thread cuts tensors into pieces of rows and writes what comes back; a pool of threads reads, encodes
and returns them, so reading, encoding and writing overlap. Few pieces are under way at a time and each is small:
memory does not depend on the model, and the pool stops soon after Ctrl-C. A file appears under its own name only
when it is complete and on the disk (`runtime/atomic.py`).
"""

import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState
from numpy.typing import NDArray

from griffin_gguf.quant.encode import Encoder
from griffin_gguf.quant.file_types import Metadata
from griffin_gguf.quant.recipes import Planned
from griffin_gguf.runtime.arch import ARCHITECTURE, CHECKSUMS
from griffin_gguf.runtime.atomic import PartialFile, atomic, check_targets
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.gguf_shards import shard_name
from griffin_gguf.runtime.machine import checked_threads, usable_cores

#: (done, total) bytes of the source, counted as float32.
Progress = Callable[[int, int], None]

ALIGNMENT = 32  # of every tensor's offset: GGUF's default, so no key has to say so

_PIECE_ELEMENTS = 1 << 18  # 1 MiB as float32, which stays in a core's cache; 0.13 s in the slowest type
_PIECES_AHEAD = 3  # a thread


@dataclass
class Output:
    """A file to write: its keys with their types, in order, and its tensors in file order.

    With `max_bytes` it becomes several files of at most that many bytes of tensors (and at least one tensor)
    each, `NAME-00001-of-0000N.gguf`, unless one holds everything.
    """

    path: Path
    metadata: Metadata
    plan: list[Planned]
    max_bytes: int | None = None


def files(output: Output) -> list[Output]:
    """The files that `output` becomes, with all the keys that stand in each; checksums are zeros until they are known.

    Split files are llama.cpp's (gguf-split): the first has the model's keys, each has three of its own.
    """
    zeros = ["0" * 64] * len(output.plan)
    metadata = output.metadata | {CHECKSUMS: (zeros, GGUFValueType.ARRAY, GGUFValueType.STRING)}
    cuts = _cuts(output.plan, output.max_bytes)
    if len(cuts) == 2:
        return [replace(output, metadata=metadata)]
    count = len(cuts) - 1
    made: list[Output] = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        own: Metadata = {
            "split.no": (number, GGUFValueType.UINT16, None),
            "split.count": (count, GGUFValueType.UINT16, None),
            "split.tensors.count": (len(output.plan), GGUFValueType.INT32, None),
        }
        path = output.path.with_name(shard_name(output.path.stem, number, count))
        shared = metadata if number == 0 else {"general.architecture": (ARCHITECTURE, GGUFValueType.STRING, None)}
        made.append(Output(path, shared | own, output.plan[start:stop]))
    return made


def _cuts(plan: Sequence[Planned], most: int | None) -> list[int]:
    """Indices where files begin and, last, the end."""
    cuts, size = [0], 0
    for index, row in enumerate(plan):
        if most is not None and size and size + _padded(row.nbytes) > most:
            cuts.append(index)
            size = 0
        size += _padded(row.nbytes)
    return [*cuts, len(plan)]


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
    return _pad(header_bytes(writer))


def header_bytes(writer: GGUFWriter) -> bytes:
    """Everything that gguf's writer, made without a file, would write before the data."""
    opened: Any = writer
    buffer = BytesIO()
    opened.fout, opened.state = [buffer], WriterState.EMPTY
    opened.write_header_to_file()
    opened.write_kv_data_to_file()
    opened.write_ti_data_to_file()
    return buffer.getvalue()


def file_size(output: Output) -> int:
    """Exact size in bytes of the file, or of all the files, that `write` makes."""
    return sum(len(header(file)) + _data_size(file.plan) for file in files(output))


def write(
    outputs: Sequence[Output],
    encoder: Encoder,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Write all `outputs`, which hold the same tensors in the same order, reading each tensor once.

    `check` is called when all is written, before any file gets its name. Raises `GriffinError` naming the file
    for a folder that is missing or cannot be written and for a full disk, and whatever `encoder` and `check`
    raise. After any exception, `KeyboardInterrupt` among them, no partial file is left, and nothing stands under
    a final name that is not complete.
    """
    names = [[row.tensor.name for row in output.plan] for output in outputs]
    assert all(other == names[0] for other in names), "outputs of one pass hold the same tensors"
    if threads is not None and threads < 1:
        raise UnsupportedError(f"threads: expected at least 1, found {threads}")
    parts = [files(output) for output in outputs]
    check_targets([file.path for part in parts for file in part])
    headers = [[header(file) for file in part] for part in parts]
    with ExitStack() as stack:
        sinks: list[_Sink] = []
        for part, heads in zip(parts, headers, strict=True):
            opened = [stack.enter_context(atomic(file.path)) for file in part]
            for file, first in zip(opened, heads, strict=True):
                file.write(first)
            sinks.append(_Sink(part, heads, opened))
        with _pool(checked_threads(threads) or usable_cores()) as (pool, ahead):
            _stream(outputs, sinks, encoder, pool, ahead, progress)
        for sink in sinks:
            sink.finish()
        if check:
            check()
        check_targets([file.path for part in parts for file in part])  # the last moment to change nothing
        for first, *others in parts:
            if others:  # the first gets its name last, and until then no older one may stand before newer others
                first.path.unlink(missing_ok=True)


@contextmanager
def _pool(threads: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that encode, and how many pieces may be under way. Nobody waits for them where something went wrong."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
    try:
        yield pool, threads * _PIECES_AHEAD
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a tensor on their way through the pool: encoded in each of `types`."""

    index: int  # of the tensor in the plans
    start: int
    stop: int
    types: tuple[GGMLQuantizationType, ...]
    last: bool  # of its tensor


def _pieces(outputs: Sequence[Output]) -> Iterator[_Piece]:
    for index, row in enumerate(outputs[0].plan):
        types = tuple(dict.fromkeys(output.plan[index].type for output in outputs))
        step = max(1, _PIECE_ELEMENTS // row.columns)
        for start in range(0, row.rows, step):
            stop = min(start + step, row.rows)
            yield _Piece(index, start, stop, types, stop == row.rows)


def _stream(
    outputs: Sequence[Output],
    sinks: Sequence["_Sink"],
    encoder: Encoder,
    pool: ThreadPoolExecutor,
    ahead: int,
    progress: Progress | None,
) -> None:
    """Send pieces through the pool, `ahead` of them at most, and write them in order as they come out."""
    rows = outputs[0].plan
    total = 4 * sum(row.rows * row.columns for row in rows)
    done = 0
    under_way: deque[tuple[_Piece, Future[list[NDArray[np.uint8]]]]] = deque()

    def write_oldest() -> None:
        nonlocal done
        piece, future = under_way.popleft()
        encoded = dict(zip(piece.types, future.result(), strict=True))
        for output, sink in zip(outputs, sinks, strict=True):
            sink.write(encoded[output.plan[piece.index].type], last=piece.last)
        done += 4 * (piece.stop - piece.start) * rows[piece.index].columns
        if progress:
            progress(done, total)

    for piece in _pieces(outputs):
        tensor = rows[piece.index].tensor
        under_way.append((piece, pool.submit(encoder, tensor, piece.start, piece.stop, piece.types)))
        if len(under_way) == ahead:
            write_oldest()
    while under_way:
        write_oldest()


class _Sink:
    """Where the bytes of one output go: through its files one after another, and into its checksums."""

    def __init__(self, parts: Sequence[Output], headers: Sequence[bytes], opened: Sequence[PartialFile]) -> None:
        self._parts, self._headers, self._files = parts, headers, opened
        self._part = self._tensor = 0  # the file, and the tensor in it, that is being written
        self._digest = sha256()
        self._digests: list[str] = []

    def write(self, piece: NDArray[np.uint8], *, last: bool) -> None:
        """Append to the current tensor; its `last` piece ends it."""
        file = self._files[self._part]
        data = piece.data.cast("B")
        file.write(data)
        self._digest.update(data)
        if last:
            file.write(bytes(-file.position % ALIGNMENT))
            self._digests.append(self._digest.hexdigest())
            self._digest = sha256()
            self._tensor += 1
            if self._tensor == len(self._parts[self._part].plan):
                self._part, self._tensor = self._part + 1, 0

    def finish(self) -> None:
        """Write the checksums where their zeros stand, and wait until all is on the disk."""
        zeros = _strings(["0" * 64] * len(self._digests))
        first = self._headers[0]
        assert first.count(zeros) == 1
        self._files[0].rewrite(first.replace(zeros, _strings(self._digests)))
        for part, head, file in zip(self._parts, self._headers, self._files, strict=True):
            assert file.position == len(head) + _data_size(part.plan)
            file.sync()


def _strings(texts: Sequence[str]) -> bytes:
    """An array's strings as they lie in a GGUF: u64 bytes, then UTF-8, one after another."""
    return b"".join(struct.pack("<Q", len(text)) + text.encode() for text in texts)


def _data_size(plan: Sequence[Planned]) -> int:
    """Bytes of all tensors, each padded."""
    return sum(_padded(row.nbytes) for row in plan)


def _padded(count: int) -> int:
    return count + -count % ALIGNMENT


def _pad(data: bytes) -> bytes:
    return data.ljust(_padded(len(data)), b"\0")

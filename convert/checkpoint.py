"""A checkpoint's tensors: safetensors, in one file or in shards, read a few rows at a time.

A safetensors file is a u64 header length, a JSON header {name: {dtype, shape, data_offsets}} and the tensors'
bytes, back to back without a gap. The header is checked here before a byte of data is read. Rows come through
plain reads into a buffer of their size, never through a mapping: memory does not grow with the model.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from griffin_gguf.convert.files import LFS_PROBLEM, are_counts, parse_json, read_json
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import widened
from griffin_gguf.runtime.gguf_header import is_lfs_pointer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 * 10**6  # bytes, safetensors' own limit
MAX_DIMS = 8
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

#: dtypes that weights may have -> bytes of an element.
FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
_CHUNK_BYTES = 16 << 20

#: (start, stop) -> those rows of a checkpoint's tensor seen as 2-D, float32.
Rows = Callable[[int, int], NDArray[np.float32]]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: `offset` and `nbytes` in its file, `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as 2-D; a vector is one row."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1


class Checkpoint:
    """The safetensors files of a folder, open for reading. A context manager.

    `tensors` maps names to where each lies; nothing is said yet about which of them a model needs. Reading
    changes nothing here, so several threads may do it at once.
    """

    def __init__(self, folder: Path, only: str | None = None) -> None:
        """Open `folder`, or of it the file `only`, and check every header.

        Raises `FileFormatError` naming file and tensor, `UnsupportedError` for a folder of pickles.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        with ExitStack() as opened:
            weight_map = {} if only else _weight_map(folder)
            for name in sorted(set(weight_map.values())) if weight_map else [only or SINGLE]:
                path = folder / name
                self._files[path] = opened.enter_context(_open(path))
                self._stamps[path] = _stamp(self._files[path])
                self._add(_read_header(path, self._files[path]), weight_map)
            for name, shard in weight_map.items():
                if name not in self.tensors:
                    raise FileFormatError(folder / shard, name, f"{INDEX} places this tensor here, but it is not")
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor seen as 2-D, float32 [stop - start, columns].

        Raises `FileFormatError` where the file has become shorter, `UnsupportedError` for a dtype that is no
        float of 16 or 32 bits.
        """
        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise UnsupportedError(f"{stored.file}: {name}: expected dtype {', '.join(FLOATS)}, found {stored.dtype}")
        stop = stored.rows if stop is None else stop
        assert 0 <= start <= stop <= stored.rows, (name, start, stop, stored.shape)
        row_bytes = stored.columns * FLOATS[stored.dtype]
        raw = self._bytes(stored, start * row_bytes, (stop - start) * row_bytes)
        return _as_float32(raw, stored.dtype).reshape(stop - start, stored.columns)

    def read_columns(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Columns [start, stop) of a tensor seen as 2-D, float32 [rows, stop - start]; as `read`, one row a read."""
        stored = self.tensors[name]
        assert 0 <= start <= stop <= stored.columns, (name, start, stop, stored.shape)
        size = FLOATS[stored.dtype]
        begins = range(start * size, stored.rows * stored.columns * size, stored.columns * size)
        raw = b"".join(self._bytes(stored, begin, (stop - start) * size) for begin in begins)
        return _as_float32(raw, stored.dtype).reshape(stored.rows, stop - start)

    def check_unchanged(self) -> None:
        """Raise `FileFormatError` where a file's size or time of modification is not what it was at opening."""
        for path, file in self._files.items():
            if _stamp(file) != self._stamps[path]:
                raise FileFormatError(path, "file", "was changed while it was read")

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, compared in pieces."""
        a, b = self.tensors[one], self.tensors[other]
        return a.shape == b.shape and same_numbers(partial(self.read, one), partial(self.read, other), a)

    def _add(self, found: Iterator[Stored], weight_map: dict[str, str]) -> None:
        """Take in the tensors of one file, which must be where the index, if any, says."""
        for stored in found:
            if weight_map and stored.name not in weight_map:
                raise FileFormatError(stored.file, stored.name, f"is no tensor of {INDEX}")
            if weight_map and weight_map[stored.name] != stored.file.name:
                claimed = weight_map[stored.name]
                raise FileFormatError(stored.file, stored.name, f"is here, but {INDEX} places it in {claimed}")
            self.tensors[stored.name] = stored

    def _bytes(self, stored: Stored, start: int, count: int) -> bytes:
        descriptor = self._files[stored.file].fileno()
        raw = os.pread(descriptor, count, stored.offset + start)
        while len(raw) < count:
            more = os.pread(descriptor, count - len(raw), stored.offset + start + len(raw))
            if not more:
                raise FileFormatError(stored.file, stored.name, "the file has become shorter while it was read")
            raw += more
        return raw


def same_numbers(one: Rows, other: Rows, shape: Stored) -> bool:
    """Whether two readers of tensors of that shape give the same numbers, compared in pieces."""
    spans = pieces(shape)
    return all(np.array_equal(one(*span), other(*span)) for span in spans)


def pieces(stored: Stored) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of rows, each of `_CHUNK_BYTES` as float32 or a little less."""
    step = max(1, _CHUNK_BYTES // (4 * stored.columns))
    return ((at, min(at + step, stored.rows)) for at in range(0, stored.rows, step))


def refuse_pickle(path: Path) -> NoReturn:
    """Say what to do about a checkpoint that only loading code could read."""
    advice = "loading it can run any code; save the model as safetensors (transformers: save_pretrained) first"
    raise UnsupportedError(f"{path}: is a pickle: {advice}")


def _stamp(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _as_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return widened(np.frombuffer(raw, np.uint8))
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the index, nothing where the checkpoint is one file."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise FileFormatError(index, "file", f"{SINGLE} is there as well; remove the one that is not meant")
    if index.exists():
        return _read_index(index)
    if single.exists() or single.is_symlink():
        return {}
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if any(folder.glob("*.safetensors")):
        raise FileFormatError(index, "file", "is missing, and the folder holds shards")
    if pickles:
        refuse_pickle(folder / pickles[0])
    raise FileFormatError(single, "file", "is missing")


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: names of files beside it, and nothing else."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(path, "weight_map", "expected an object that maps tensors to files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise FileFormatError(path, tensor, f"{file!r} is no safetensors file of this folder")
        if not (path.parent / file).exists():
            raise FileFormatError(path.parent / file, tensor, f"{INDEX} places this tensor here; the file is missing")
    return weight_map


def _open(path: Path) -> BinaryIO:
    try:
        if not path.is_file():
            raise FileFormatError(path, "file", "is not a regular file" if path.exists() else "is missing")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error


def _read_header(path: Path, file: BinaryIO) -> Iterator[Stored]:
    """Yield the tensors of one safetensors file, once all of its header is known to be sound."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    if is_lfs_pointer(head):
        raise FileFormatError(path, "file", LFS_PROBLEM)
    if len(head) < 8:
        raise FileFormatError(path, "header", f"the file has {len(head)} bytes: it is cut short")
    (length,) = struct.unpack_from("<Q", head)
    if length > min(MAX_HEADER, size - 8):
        raise FileFormatError(path, "header", f"says {length} bytes, at most {min(MAX_HEADER, size - 8)} can follow")
    entries = parse_json(path, "header", os.pread(file.fileno(), length, 8))
    entries.pop("__metadata__", None)
    stored = [_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    running = 8 + length
    for tensor in sorted(stored, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != running:
            fault = "overlaps another tensor" if tensor.offset < running else "leaves a gap"
            raise FileFormatError(path, tensor.name, f"data_offsets: it {fault}")
        running += tensor.nbytes
    if running != size:
        problem = "cut short" if running > size else "followed by bytes that belong to no tensor"
        raise FileFormatError(path, "data", f"expected {running} bytes by the header, found {size}: it is {problem}")
    try:
        with safe_open(path, framework="np"):  # a second opinion, by the format's own parser
            pass
    except SafetensorError as error:
        raise FileFormatError(path, "header", f"the safetensors library refuses it: {error}") from None
    yield from stored


def _entry(path: Path, name: str, entry: Any, base: int) -> Stored:
    """One tensor of a header whose data start at byte `base`."""
    if not name.isprintable():
        raise FileFormatError(path, "header", f"{name!r} is no name for a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(path, name, "expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise FileFormatError(path, name, f"dtype: expected a name, found {dtype!r}")
    if not are_counts(shape) or len(shape) > MAX_DIMS:
        raise FileFormatError(path, name, f"shape: expected up to {MAX_DIMS} whole numbers, found {shape!r}")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileFormatError(path, name, f"data_offsets: expected a start and an end, found {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if dtype in FLOATS and nbytes != prod(shape) * FLOATS[dtype]:
        raise FileFormatError(path, name, f"data_offsets: {nbytes} bytes cannot hold {dtype} of shape {shape}")
    return Stored(name, dtype, tuple(shape), path, base + offsets[0], nbytes)

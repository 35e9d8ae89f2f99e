"""What a GGUF's header says, read as far as it goes, sound or not: for rules that are not this project's own.

`runtime.gguf_file` is the gate for files that are to be used, and ends at the first thing that is wrong. Here nothing
is judged: lengths are only compared with the bytes that are left, and values of scalars and of short strings kept.
"""

import os
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_header import DEFAULT_ALIGNMENT, MAGIC, MAX_HEADER, padded

_LONGEST_VALUE = 1 << 20  # bytes of a string that is kept


@dataclass
class Key:
    """One key's value: of an array only its `element` type and `count`; `longest` string, in bytes."""

    type: int
    element: int | None = None
    count: int = 1
    longest: int = 0
    value: Any = None


@dataclass(frozen=True)
class Tensor:
    """One tensor as described: `dims` fastest first, `offset` from the start of the data."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int


@dataclass
class Outline:
    """A header. `stopped` says where reading ended before the end and why; `data` is where tensors begin, if known."""

    path: Path
    size: int
    magic: bytes = b""
    version: int | None = None
    keys: dict[str, Key] = field(default_factory=dict[str, Key])
    tensors: list[Tensor] = field(default_factory=list[Tensor])
    longest_name: int = 0
    data: int | None = None
    stopped: str | None = None

    def value(self, name: str, type: GGUFValueType) -> Any:
        """The value of a scalar or short string; None where the key is missing or of another type."""
        key = self.keys.get(name)
        return key.value if key is not None and key.type == type else None


def read_outline(path: Path) -> Outline:
    """Read the header of `path`. Raises `FileFormatError` where it is no file or cannot be read."""
    try:
        with path.open("rb") as file:
            outline = Outline(path, os.fstat(file.fileno()).st_size)
            _read(_Reader(file, outline.size), outline)
            return outline
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror or error}") from error


class _StopError(Exception):
    """The header does not go on."""


class _Reader:
    """A place in the file that never passes its end, nor that of the longest header."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file, self.at, self._end = file, 0, min(size, MAX_HEADER)

    def skip(self, count: int, what: str) -> None:
        """Move on without looking."""
        if count > self._end - self.at:
            raise _StopError(f"{what} at byte {self.at} needs {count} bytes, {self._end - self.at} are left")
        self.at += count
        self._file.seek(self.at)

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        start = self.at
        self.skip(count, what)
        self._file.seek(start)
        return self._file.read(count)

    def u32(self, what: str) -> int:
        """A number of 4 bytes."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """A number of 8 bytes."""
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> tuple[str, int]:
        """A string, cut where it is long, with its length in bytes."""
        count = self.u64(what)
        kept = self.take(min(count, _LONGEST_VALUE), what)
        self.skip(count - len(kept), what)
        return kept.decode("utf-8", "replace"), count


def _read(reader: _Reader, outline: Outline) -> None:
    try:
        outline.magic = reader.take(4, "the magic")
        if outline.magic != MAGIC:
            raise _StopError("what follows another magic is no GGUF")
        outline.version = reader.u32("the version")
        tensors, keys = reader.u64("the number of tensors"), reader.u64("the number of keys")
        for i in range(keys):
            name, length = reader.string(f"the name of key {i}")
            outline.longest_name = max(outline.longest_name, length)
            outline.keys[name] = _read_value(reader, name)
        for i in range(tensors):
            name, length = reader.string(f"the name of tensor {i}")
            outline.longest_name = max(outline.longest_name, length)
            dims = reader.u32(name)
            sizes = reader.take(8 * dims, name)
            ne = tuple(int.from_bytes(sizes[at : at + 8], "little") for at in range(0, len(sizes), 8))
            outline.tensors.append(Tensor(name, ne, reader.u32(name), reader.u64(name)))
    except _StopError as error:
        outline.stopped = str(error)
        return
    alignment = outline.value("general.alignment", GGUFValueType.UINT32)
    outline.data = padded(reader.at, DEFAULT_ALIGNMENT if alignment is None else max(alignment, 1))


def _read_value(reader: _Reader, name: str) -> Key:
    kind = reader.u32(name)
    if kind != GGUFValueType.ARRAY:
        return _read_scalar(reader, name, kind)
    element, count = reader.u32(name), reader.u64(name)
    if element == GGUFValueType.STRING:
        longest = 0
        for _ in range(count):
            length = reader.u64(name)
            reader.skip(length, name)
            longest = max(longest, length)
        return Key(kind, element, count, longest)
    reader.skip(count * _scalar(name, element).itemsize, name)
    return Key(kind, element, count)


def _read_scalar(reader: _Reader, name: str, kind: int) -> Key:
    if kind == GGUFValueType.STRING:
        value, length = reader.string(name)
        return Key(kind, longest=length, value=value if length <= _LONGEST_VALUE else None)
    layout = _scalar(name, kind)
    return Key(kind, value=np.frombuffer(reader.take(layout.itemsize, name), layout)[0].item())


def _scalar(name: str, kind: int) -> "np.dtype[Any]":
    """How a scalar of the type with that number lies in the file."""
    known = {int(type): np.dtype(layout).newbyteorder("<") for type, layout in GGUFReader.gguf_scalar_to_np.items()}
    if kind not in known:
        raise _StopError(f"{name} has the unknown value type {kind}")
    return known[kind]

"""The header of a GGUF file: its keys and where its tensors lie, every byte of it checked.

A file is, in this order and little endian:

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys × { string name, u32 type, value }          string = u64 bytes, UTF-8;  array = u32 type, u64 count, values
    tensors × { string name, u32 dims, u64 × dims, u32 type, u64 offset }
    padding to the alignment (`general.alignment`, 32 where absent), then the tensors' bytes, each padded alike

Every count is compared with the bytes that are left, in Python's unbounded integers, before anything is
allocated or viewed; tensor offsets must be exactly the running padded sum.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from griffin_gguf.runtime.errors import FileFormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**16
MAX_HEADER = 100 * 2**20  # bytes of keys and tensor descriptions; a vocabulary of 256,000 takes 6 MiB
MAX_ARRAY = 2**24  # elements, as many as the largest vocabulary we accept
MAX_KEY = 2**16 - 1  # bytes
MAX_NAME = 63  # bytes of a tensor's name: ggml's GGML_MAX_NAME less its zero
MAX_DIMS = 4
_WINDOW = 1 << 18  # bytes in which many strings are looked for at once: they stay in the processor's cache
_FEW_STRINGS = 1 << 10  # so few in a window are not worth it
_INT64_MAX = 2**63 - 1
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_SCALARS: dict[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<B"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]

#: A key's value type and, of an array, its element type.
ValueType = tuple[GGUFValueType, GGUFValueType | None]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` in NumPy's order, `offset` in bytes from the start of file number `part`."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class Header:
    """One file's header: keys as plain Python values (int, float, bool, str and lists of them), tensors in file order.

    The header ends at byte `end`; at byte `data_offset`, after padding, the first tensor lies or would lie.
    """

    metadata: dict[str, Any]
    types: dict[str, ValueType]
    alignment: int
    end: int
    data_offset: int
    tensors: dict[str, TensorInfo]


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that starts with `head` is the text that Git LFS leaves in place of a file."""
    return head.startswith(_LFS_POINTER)


def read_header(path: Path, mapped: mmap.mmap) -> Header:
    """Read and check the header of the whole file `mapped`. Raises `FileFormatError` naming `path` and the field."""
    cursor = _Cursor(path, mapped)
    tensors, keys = _read_counts(cursor)
    metadata, types = _read_keys(cursor, keys)
    alignment = _alignment(path, metadata, types)
    found = _read_tensors(cursor, tensors)
    data_offset = padded(cursor.at, alignment)
    placed = _place_tensors(path, found, data_offset, alignment, len(mapped))
    return Header(metadata, types, alignment, cursor.at, data_offset, placed)


class _Cursor:
    """A place in the mapped header that never passes its end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.at = path, buffer, 0
        self.end = min(len(buffer), MAX_HEADER)

    def take(self, count: int, field: str) -> int:
        """Where the next `count` bytes start; the cursor moves past them."""
        if count > self.end - self.at:
            raise self.too_long(field, f"needs {count} bytes at byte {self.at}, the file has {self.end - self.at} left")
        start, self.at = self.at, self.at + count
        return start

    def too_long(self, field: str, problem: str) -> FileFormatError:
        if self.end < len(self.buffer):
            problem = f"the header is longer than {MAX_HEADER} bytes"
        return FileFormatError(self.path, field, problem)

    def u32(self, field: str) -> int:
        return _U32.unpack_from(self.buffer, self.take(4, field))[0]

    def u64(self, field: str) -> int:
        return _U64.unpack_from(self.buffer, self.take(8, field))[0]

    def count(self, field: str, item_bytes: int, limit: int) -> int:
        """Read how many items of at least `item_bytes` follow: at most `limit` and what the bytes left can hold."""
        n = self.u64(field)
        room = (self.end - self.at) // item_bytes
        if n > limit:
            raise FileFormatError(self.path, field, f"says {n} items, at most {limit} are read")
        if n > room:
            raise self.too_long(field, f"says {n} items, at most {room} can follow")
        return n

    def string(self, field: str, limit: int = MAX_HEADER) -> str:
        n = self.count(field, 1, limit)
        start = self.take(n, field)
        return self.decode(self.buffer[start : start + n], field)

    def name(self, field: str, limit: int) -> str:
        name = self.string(field, limit)
        if not name or not name.isprintable():
            raise FileFormatError(self.path, field, f"expected printable text, found {name!r}")
        return name

    def decode(self, raw: bytes, field: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise FileFormatError(self.path, field, f"is not UTF-8: {error.reason} at its byte {error.start}") from None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and keys."""
    path, head = cursor.path, cursor.buffer[:64]
    if is_lfs_pointer(head):
        raise FileFormatError(path, "magic", "this is a Git LFS pointer, not the file itself; fetch it with git lfs")
    if not head.startswith(MAGIC):
        raise FileFormatError(path, "magic", f"expected {MAGIC!r}, found {head[:4]!r}: this is no GGUF file")
    cursor.take(4, "magic")
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version:
        raise FileFormatError(path, "version", "this GGUF is big endian; only little endian is read")
    if version not in VERSIONS:
        raise FileFormatError(path, "version", f"expected {' or '.join(map(str, VERSIONS))}, found {version}")
    tensors = cursor.count("tensor count", 33, _INT64_MAX)  # a name, one dimension, type and offset
    return tensors, cursor.count("key count", 14, _INT64_MAX)


def _read_keys(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, ValueType]]:
    """All keys: their values, their types."""
    metadata: dict[str, Any] = {}
    types: dict[str, ValueType] = {}
    for i in range(count):
        name = cursor.name(f"name of key {i}", MAX_KEY)
        if name in metadata:
            raise FileFormatError(cursor.path, name, "this key is there twice")
        kind = _value_type(cursor, name)
        if kind is GGUFValueType.ARRAY:
            element = _value_type(cursor, name)
            metadata[name], types[name] = _read_array(cursor, name, element), (kind, element)
        else:
            metadata[name], types[name] = _read_scalar(cursor, name, kind), (kind, None)
    return metadata, types


def _value_type(cursor: _Cursor, name: str) -> GGUFValueType:
    raw = cursor.u32(name)
    if raw > max(GGUFValueType):
        raise FileFormatError(cursor.path, name, f"unknown value type {raw}")
    return GGUFValueType(raw)


def _read_scalar(cursor: _Cursor, name: str, kind: GGUFValueType) -> Any:
    if kind is GGUFValueType.STRING:
        return cursor.string(name)
    layout = _SCALARS[kind]
    (value,) = layout.unpack_from(cursor.buffer, cursor.take(layout.size, name))
    if kind is not GGUFValueType.BOOL:
        return value
    if value > 1:
        raise FileFormatError(cursor.path, name, f"expected a bool of 0 or 1, found {value}")
    return bool(value)


def _read_array(cursor: _Cursor, name: str, element: GGUFValueType) -> list[Any]:
    if element is GGUFValueType.ARRAY:
        raise FileFormatError(cursor.path, name, "arrays of arrays are not read")
    if element is GGUFValueType.STRING:
        return _read_strings(cursor, name, cursor.count(name, 8, MAX_ARRAY))
    layout = _SCALARS[element]
    n = cursor.count(name, layout.size, MAX_ARRAY)
    start = cursor.take(n * layout.size, name)
    values = np.frombuffer(cursor.buffer, layout.format, n, start)
    if element is not GGUFValueType.BOOL:
        return values.tolist()
    if (values > 1).any():
        raise FileFormatError(cursor.path, name, "expected bools of 0 or 1")
    return values.astype(bool).tolist()


def _read_strings(cursor: _Cursor, name: str, count: int) -> list[str]:
    """`count` strings: as many as are plain at once, the others one by one, which also says what is wrong with one."""
    found = _read_plain_strings(cursor, count)
    buffer, at, end, unpack = cursor.buffer, cursor.at, cursor.end, _U64.unpack_from
    for i in range(len(found), count):
        stop = at + 8 + unpack(buffer, at)[0] if end - at >= 8 else end + 1
        if stop > end:
            cursor.at = at
            cursor.string(f"{name}[{i}]")  # says what is wrong with it
        try:
            found.append(buffer[at + 8 : stop].decode())
        except UnicodeDecodeError:
            cursor.decode(buffer[at + 8 : stop], f"{name}[{i}]")
        at = stop
    cursor.at = at
    return found


def _read_plain_strings(cursor: _Cursor, count: int) -> list[str]:
    """Strings up to the first that is longer than 255 bytes, holds U+0000 or has a fault, or to a little before it.

    A vocabulary has 256,000 strings, and a loop over them takes longer than any other part of the header. Of a
    string shorter than 256 bytes the u64 is one byte and seven zeros, so that seven zeros tell where one may begin.
    Where each then ends where the next begins, these are the strings. With their u64 all zero, and no zero byte
    but those, they are one text that eight zeros split.
    """
    found: list[str] = []
    while count - len(found) >= _FEW_STRINGS:
        window = np.frombuffer(cursor.buffer, np.uint8, min(cursor.end - cursor.at, _WINDOW), cursor.at)
        zero = window == 0
        for step in (1, 2, 3):  # runs of 2, 4 and 7
            zero = zero[:-step] & zero[step:]
        starts = np.flatnonzero(zero) - 1
        sound = starts[:-1] + 8 + window[starts[:-1]] == starts[1:]
        plain = min(count - len(found), len(sound) if sound.all() else int(sound.argmin()))
        if plain < _FEW_STRINGS or starts[0] != 0:
            break
        text = window[: starts[plain]].copy()
        text[starts[:plain]] = 0
        if len(text) - np.count_nonzero(text) != 8 * plain:
            break
        try:
            found += text.tobytes().decode().split("\0" * 8)[1:]
        except UnicodeDecodeError:
            break
        cursor.at += len(text)
    return found


def _alignment(path: Path, metadata: dict[str, Any], types: dict[str, ValueType]) -> int:
    """Return the file's alignment: a multiple of 8 by GGUF's specification, a power of two by ggml's."""
    name = "general.alignment"
    value = metadata.get(name, DEFAULT_ALIGNMENT)
    if name in types and types[name][0] is not GGUFValueType.UINT32:
        raise FileFormatError(path, name, f"expected UINT32, found {types[name][0].name}")
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise FileFormatError(path, name, f"expected a power of 2 from 8 to {MAX_ALIGNMENT}, found {value}")
    return value


def _read_tensors(cursor: _Cursor, count: int) -> list[TensorInfo]:
    """All tensor descriptions, each sound in itself; offsets still as the file has them."""
    infos: dict[str, TensorInfo] = {}
    for i in range(count):
        name = cursor.name(f"name of tensor {i}", MAX_NAME)
        if name in infos:
            raise FileFormatError(cursor.path, name, "this tensor is there twice")
        n_dims = cursor.u32(name)
        if not 1 <= n_dims <= MAX_DIMS:
            raise FileFormatError(cursor.path, name, f"expected 1 to {MAX_DIMS} dimensions, found {n_dims}")
        ne = [cursor.u64(name) for _ in range(n_dims)]
        kind = _tensor_type(cursor.path, name, cursor.u32(name))
        nbytes = _tensor_bytes(cursor.path, name, ne, kind)
        infos[name] = TensorInfo(name, kind, tuple(reversed(ne)), cursor.u64(name), nbytes)
    return list(infos.values())


def _tensor_type(path: Path, name: str, raw: int) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(raw)
    except ValueError:
        raise FileFormatError(path, name, f"unknown tensor type {raw}") from None


def _tensor_bytes(path: Path, name: str, ne: list[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor with GGUF's dimensions `ne`, fastest first."""
    elements = 1
    for n in ne:
        if n == 0:
            raise FileFormatError(path, name, f"dimensions {ne} hold a zero")
        elements *= n
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if ne[0] % block:
        raise FileFormatError(path, name, f"rows of {ne[0]} are no multiple of {kind.name}'s block of {block}")
    nbytes = elements // block * block_bytes
    if max(elements, nbytes) > _INT64_MAX:
        raise FileFormatError(path, name, f"dimensions {ne} overflow 64 bits")
    return nbytes


def _place_tensors(path: Path, infos: list[TensorInfo], base: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """Absolute offsets, once they are known to be the running padded sum and to end within the file."""
    placed: dict[str, TensorInfo] = {}
    running = 0
    for info in infos:
        if info.offset != running:
            fault = "overlaps the tensor before it" if info.offset < running else "leaves a gap"
            raise FileFormatError(path, info.name, f"expected offset {running}, found {info.offset}: it {fault}")
        end = base + running + info.nbytes
        if end > size:
            raise FileFormatError(path, info.name, f"ends at byte {end}, the file has {size}: it is cut short")
        placed[info.name] = TensorInfo(info.name, info.type, info.shape, base + running, info.nbytes)
        running += padded(info.nbytes, alignment)
    return placed


def padded(n: int, alignment: int) -> int:
    """Return `n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment

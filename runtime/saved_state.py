"""A state in a file: all that a model needs to go on from where a text was left.

A safetensors file (u64 length of the header, a JSON header, arrays back to back; little endian) whose metadata says
what safetensors leaves open: which model, which position, and a checksum over the whole file, so also over the header.
docs/state.md has it byte by byte. Reading is one pass from the file into one buffer, summed on the way; the arrays
are views of that buffer.

The checksum is zlib's CRC-32: at 7 GB/s it costs a state of the 9B 5 ms where SHA-256 costs 17 with instructions for
it and 50 without. It is against accidents only; against a forger no sum helps that everyone can compute.
"""

import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import CHECKSUMS, to_metadata
from griffin_gguf.runtime.atomic import atomic, check_targets
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.gguf_header import TensorInfo

#: Name -> dtype and shape of every array that a state has; an entry `LOGITS` may be missing in a file.
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

LOGITS = "logits"
VERSION = "1"
#: Angles of positions are computed in f64, which counts no further.
LAST_POSITION = 2**53

_FORMAT, _MODEL, _POSITION, _CHECKSUM = "griffin.state", "griffin.model", "griffin.position", "griffin.checksum"
_METADATA = "__metadata__"  # safetensors' name for strings in the header
_NAMES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16"}
_BLANK = "crc32:00000000"  # stands in the checksum's place while it is computed
_CRC = re.compile(r"crc32:[0-9a-f]{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

#: The strings beside the version: what each is, and how it looks.
_FIELDS = {
    _MODEL: ("64 hex digits", _DIGEST),
    _POSITION: ("a whole number in a string", re.compile(r"0|[1-9][0-9]{0,18}")),
    _CHECKSUM: ("crc32: and 8 hex digits", _CRC),
}
_ALIGNMENT = 8  # of the data, as safetensors' own writer has it
_ENTRY_BYTES = 256  # that the header may take for each array; ours take under 100
_PIECE = 1 << 20  # bytes summed while they are in the cache

_SAMPLES = 4  # of each tensor's bytes in a fingerprint
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Saved:
    """A state's values, apart from any backend.

    `fingerprint` is the model's (see `fingerprint`), `position` the tokens read. `arrays` are `blk.N.h`,
    `blk.N.tail`, `blk.N.k`, `blk.N.v`, f32 or f16, with the shapes at the head of runtime/state.py; `logits` those
    after the last token, f32 [V], or None where none were computed.
    """

    fingerprint: str
    position: int
    arrays: dict[str, NDArray[Any]]
    logits: NDArray[np.float32] | None = None


def save(path: Path | str, saved: Saved, *, private: bool = False, lasting: bool = True) -> None:
    """Write `saved` to `path`: all of it, on the disk, or nothing, and then an older file there is as it was.

    A `private` file only its owner may read. One that is not `lasting` may be gone after a power cut.

    Raises `GriffinError` naming `path` where it cannot be written.
    """
    path = Path(path)
    arrays = _stored(saved)
    crc = zlib.crc32(_header(saved, arrays, _BLANK))
    for array in arrays.values():
        crc = zlib.crc32(_bytes(array), crc)
    check_targets([path])
    with atomic(path, private) as file:
        file.write(_header(saved, arrays, _checksum(crc)))
        for array in arrays.values():
            file.write(_bytes(array))
        if lasting:
            file.sync()


def load(path: Path | str, fingerprint: str, layout: Layout) -> Saved:
    """Read a state that was saved for the model of that `fingerprint`; `layout` are the arrays it must have.

    The arrays are writable views of one buffer that nobody else has. Raises `FileFormatError` naming file and field
    for whatever is not exactly such a file: nothing of it is returned then.
    """
    path = Path(path)
    with _opened(path) as file:
        head = _read_head(path, file, layout)
        table = _parsed(path, head[8:])
        position, checksum = _check_metadata(path, table.pop(_METADATA, None), fingerprint)
        spans = _check_arrays(path, table, layout)
        size = sum(stop - start for start, stop in spans.values())
        if (found := os.fstat(file.fileno()).st_size) != len(head) + size:
            raise FileFormatError(path, "file", f"expected {len(head) + size} bytes, found {found}")
        data = _read_data(path, file, head, size, checksum)
    arrays = {
        name: data[start:stop].view(layout[name][0]).reshape(layout[name][1]) for name, (start, stop) in spans.items()
    }
    logits = arrays.pop(LOGITS, None)
    return Saved(fingerprint, position, arrays, logits)


def fingerprint(file: GgufFile) -> str:
    """Identify the weights and hyperparameters of a model: the same for one file and for several that hold the same.

    64 hex digits, in some milliseconds: over hyperparameters and, of every tensor, name, type, shape, the checksum
    that the file records, if it does, and samples of the bytes. The tokenizer is no part of it. Raises as
    `GgufFile.hyperparameters` and `GgufFile.read` do, and `FileFormatError` for checksums that are none.
    """
    keys = {name: value for name, (value, _) in to_metadata(file.hyperparameters()).items()}
    lines = [json.dumps(keys, sort_keys=True)]
    for info, checksum in sorted(zip(file.tensors.values(), _checksums(file), strict=True), key=lambda p: p[0].name):
        lines.append(json.dumps([info.name, info.type.name, info.shape, checksum, _samples(file, info)]))
    return sha256("\n".join(lines).encode()).hexdigest()


def _checksums(file: GgufFile) -> list[str]:
    """What the file records of each tensor, in file order; empty strings where it does not."""
    if CHECKSUMS not in file.metadata:
        return [""] * len(file.tensors)
    recorded: list[Any] = file.metadata[CHECKSUMS]
    if file.types[CHECKSUMS] != (GGUFValueType.ARRAY, GGUFValueType.STRING) or len(recorded) != len(file.tensors):
        raise FileFormatError(file.path, CHECKSUMS, f"expected {len(file.tensors)} strings, one a tensor")
    for i, digest in enumerate(recorded):
        if not _DIGEST.fullmatch(digest):
            raise FileFormatError(file.path, f"{CHECKSUMS}[{i}]", "expected the 64 hex digits of a SHA-256")
    return recorded


def _samples(file: GgufFile, info: TensorInfo) -> str:
    """SHA-256 over evenly spread pieces of a tensor, the first and the last among them, or over all of a small one."""
    rest = info.nbytes - _SAMPLE_BYTES
    if info.nbytes <= _SAMPLES * _SAMPLE_BYTES:
        return sha256(file.read(info.name).data).hexdigest()
    digest = sha256()
    for i in range(_SAMPLES):
        start = rest * i // (_SAMPLES - 1)
        digest.update(file.read(info.name, start, start + _SAMPLE_BYTES).data)
    return digest.hexdigest()


def _stored(saved: Saved) -> dict[str, NDArray[Any]]:
    """The arrays as they lie in the file: contiguous, little endian, f32 before f16, so that all are aligned."""
    assert _DIGEST.fullmatch(saved.fingerprint), saved.fingerprint
    assert 0 <= saved.position <= LAST_POSITION, saved.position
    assert not {LOGITS, _METADATA} & saved.arrays.keys()
    found = saved.arrays if saved.logits is None else {**saved.arrays, LOGITS: saved.logits}
    arrays = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in found.items()}
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))


def _header(saved: Saved, arrays: Mapping[str, NDArray[Any]], checksum: str) -> bytes:
    """Everything before the data."""
    metadata = {
        _FORMAT: VERSION, _MODEL: saved.fingerprint, _POSITION: str(saved.position), _CHECKSUM: checksum,
    }  # fmt: skip
    table: dict[str, Any] = {_METADATA: metadata}
    at = 0
    for name, array in arrays.items():
        table[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _checksum(crc: int) -> str:
    return f"crc32:{crc:08x}"


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


@contextmanager
def _opened(path: Path) -> Generator[FileIO]:
    """A regular file, open for plain reads."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise FileFormatError(path, "file", "is not a regular file")
        file = path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FileFormatError(path, "file", f"cannot be read: {reason}") from error
    with file:
        yield file


def _fill(path: Path, file: FileIO, target: memoryview, field: str) -> None:
    """Read exactly as many bytes as `target` has."""
    while target:
        try:
            count = file.readinto(target)
        except OSError as error:
            raise FileFormatError(path, field, f"cannot be read: {error.strerror}") from error
        if not count:
            raise FileFormatError(path, field, f"the file ends {len(target)} bytes too early")
        target = target[count:]


def _read_head(path: Path, file: FileIO, layout: Layout) -> bytes:
    """The length and the header: never more than such a state could need."""
    first = bytearray(8)
    _fill(path, file, memoryview(first), "header length")
    (length,) = struct.unpack("<Q", first)
    most = _ENTRY_BYTES * (len(layout) + 4)
    if length > most:
        raise FileFormatError(path, "header length", f"expected at most {most}, found {length}: no state of this model")
    head = first + bytearray(length)
    _fill(path, file, memoryview(head)[8:], "header")
    return bytes(head)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON: one object without duplicate names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        table = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, "header", f"is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise FileFormatError(path, "header", f"expected a JSON object, found {type(table).__name__}")
    return cast(dict[str, Any], table)


def _check_metadata(path: Path, metadata: Any, fingerprint: str) -> tuple[int, str]:
    """The position and the checksum, once format and model are known to be these."""
    if not isinstance(metadata, dict) or _FORMAT not in metadata:
        raise FileFormatError(path, _FORMAT, "is missing: this is no saved state")
    found = cast(dict[str, Any], metadata)
    if found[_FORMAT] != VERSION:
        raise FileFormatError(path, _FORMAT, f"expected version {VERSION}, found {_shown(found[_FORMAT])}")
    for name in found:
        if name != _FORMAT and name not in _FIELDS:
            raise FileFormatError(path, "header", f"{_shown(name)} is a field that we do not know")
    for name, (wanted, pattern) in _FIELDS.items():
        if name not in found:
            raise FileFormatError(path, name, "is missing")
        if not isinstance(found[name], str) or not pattern.fullmatch(found[name]):
            raise FileFormatError(path, name, f"expected {wanted}, found {_shown(found[name])}")
    if found[_MODEL] != fingerprint:
        raise FileFormatError(
            path, _MODEL, f"was saved for another model, {found[_MODEL][:12]}; this is {fingerprint[:12]}"
        )
    position = int(found[_POSITION])
    if position > LAST_POSITION:
        raise FileFormatError(path, _POSITION, f"expected at most {LAST_POSITION}, found {position}")
    return position, found[_CHECKSUM]


def _check_arrays(path: Path, table: Mapping[str, Any], layout: Layout) -> dict[str, tuple[int, int]]:
    """Where each array lies in the data, once all of `layout` and nothing else is there, back to back."""
    for name in layout:
        if name not in table and name != LOGITS:
            raise FileFormatError(path, name, "the array is missing")
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for name, entry in table.items():
        if name not in layout:
            raise FileFormatError(path, "header", f"{_shown(name)} is no array of this model's state")
        dtype, shape = layout[name]
        spans[name] = at, at + dtype.itemsize * prod(shape)
        expected = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": list(spans[name])}
        if not isinstance(entry, dict) or entry.keys() != expected.keys():
            raise FileFormatError(path, name, f"expected dtype, shape and data_offsets, found {_shown(entry)}")
        for field, value in expected.items():
            if not _same(found := cast(dict[str, Any], entry)[field], value):
                raise FileFormatError(path, name, f"expected {field} {value}, found {_shown(found)}")
        at = spans[name][1]
    return spans


def _same(found: Any, expected: str | list[int]) -> bool:
    """Whether a JSON value is that text or those numbers: true and 1.0, which equal 1 in Python, are none."""
    return found == expected and all(type(item) is not bool and type(item) is not float for item in found)


def _read_data(path: Path, file: FileIO, head: bytes, size: int, checksum: str) -> NDArray[np.uint8]:
    """Everything after the header, uint8 [size], once the checksum is known to be that of the whole file."""
    quoted = f'"{checksum}"'.encode()
    if head.count(quoted) != 1:
        raise FileFormatError(path, _CHECKSUM, "expected to stand once in the header, in plain characters")
    crc = zlib.crc32(head.replace(quoted, f'"{_BLANK}"'.encode()))
    data = np.empty(size, np.uint8)
    for start in range(0, size, _PIECE):
        piece = data.data[start : start + _PIECE]
        _fill(path, file, piece, "data")
        crc = zlib.crc32(piece, crc)
    if (found := _checksum(crc)) != checksum:
        raise FileFormatError(path, _CHECKSUM, f"the file is damaged: this is {checksum}, its bytes have {found}")
    return data


def _shown(value: Any) -> str:
    """A value of the file in a few characters of one line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""The files of a GGUF: one, or several that llama.cpp's gguf-split made of one.

Those are called NAME-00001-of-0000N.gguf and so on. Each is a GGUF, with the keys `split.no` (u16, counted from
0), `split.count` (u16) and `split.tensors.count` (i32, of all files). The first holds all other keys; the tensors
go on from file to file. A `split.count` of 0 is what gguf-split leaves in a file that it has put together again.
"""

import mmap
import os
import stat
import weakref
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_header import Header, read_header

_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"

#: The keys that only say how files belong together, with their types.
SPLIT_KEYS = {_NO: GGUFValueType.UINT16, _COUNT: GGUFValueType.UINT16, _TENSORS: GGUFValueType.INT32}

#: What another file than the first may say for itself.
_OWN_KEYS = frozenset({*SPLIT_KEYS, "general.alignment"})

_LONGEST_READ = 1 << 30  # bytes of one call: systems end at 2³¹ or just below


class Shard:
    """One open file: its header, its map, and a descriptor for plain reads, which belongs to this object."""

    path: Path
    size: int
    header: Header

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
                raise FileFormatError(path, "file", "is not a regular file")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._finalizer = weakref.finalize(self, os.close, self._descriptor)
            self.size, self._changed = self._stamp()
            if self.size == 0:
                raise FileFormatError(path, "file", "is empty")
            self._map: mmap.mmap | None = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise FileFormatError(path, "file", f"cannot be read: {reason}") from error
        self.header = read_header(path, self._map)

    def close(self) -> None:
        """Give up the descriptor and the map, which goes when its last view is gone."""
        self._finalizer()
        self._map = None

    def mapping(self) -> NDArray[np.uint8]:
        """View the whole mapped file, uint8 [size]: read-only, starting on a page."""
        assert self._map is not None, "closed"
        return np.frombuffer(self._map, np.uint8)

    def read(self, start: int, stop: int, field: str) -> NDArray[np.uint8]:
        """Read the bytes [start, stop) of the file, never through the map; `field` is for errors.

        Raises `FileFormatError` where the file has become shorter since it was opened, or cannot be read.
        """
        assert self._map is not None, "closed"
        pieces: list[bytes] = []
        while start < stop:
            try:
                piece = os.pread(self._descriptor, min(stop - start, _LONGEST_READ), start)
            except OSError as error:
                raise FileFormatError(self.path, field, f"cannot be read: {error.strerror}") from error
            if not piece:
                raise FileFormatError(self.path, field, f"the file has become shorter while it was read: byte {start}")
            pieces.append(piece)
            start += len(piece)
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)

    def check_unchanged(self) -> None:
        """Raise `FileFormatError` unless size and time of modification are those at opening."""
        assert self._map is not None, "closed"
        if self._stamp() != (self.size, self._changed):
            raise FileFormatError(self.path, "file", "was changed while it was read")

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def shard_name(prefix: str, no: int, count: int) -> str:
    """Name file `no`, counted from 0, of `count`."""
    return f"{prefix}-{no + 1:05d}-of-{count:05d}.gguf"


def open_shards(path: Path) -> list[Shard]:
    """Open the GGUF at `path` and, where it is the first of several files, the others beside it, in order.

    Raises `FileFormatError` naming file and field where a file is no sound GGUF, is missing, or does not belong
    with the first; also where `path` is another than the first.
    """
    with ExitStack() as stack:

        def opened(path: Path) -> Shard:
            shard = Shard(path)
            stack.callback(shard.close)
            return shard

        first = opened(path)
        shards = [first]
        if _COUNT in first.header.metadata and (count := _number(first, _COUNT)) > 1:
            prefix = _check_first(first, count)
            for no in range(1, count):
                other = path.with_name(shard_name(prefix, no, count))
                if not other.exists():
                    raise FileFormatError(other, "file", f"is missing: {_COUNT} in {path.name} is {count}")
                shards.append(opened(other))
                _check_other(first, shards[-1], no)
            _check_tensors(shards)
        stack.pop_all()
        return shards


def _number(shard: Shard, name: str) -> int:
    """One of the split keys."""
    header = shard.header
    if name not in header.metadata:
        raise FileFormatError(shard.path, name, "is missing")
    if header.types[name][0] is not SPLIT_KEYS[name]:
        raise FileFormatError(shard.path, name, f"expected {SPLIT_KEYS[name].name}, found {header.types[name][0].name}")
    return header.metadata[name]


def _check_first(shard: Shard, count: int) -> str:
    """What all files' names begin with, once this one is known to be the first and to be called so."""
    no = _number(shard, _NO)
    if no >= count:
        raise FileFormatError(shard.path, _NO, f"expected less than {_COUNT}, which is {count}, found {no}")
    ending = shard_name("", no, count)
    if not shard.path.name.endswith(ending):
        raise FileFormatError(
            shard.path, _NO, f"is {no} and {_COUNT} {count}: expected a file name that ends in {ending}"
        )
    prefix = shard.path.name.removesuffix(ending)
    if no:
        raise FileFormatError(shard.path, _NO, f"is file {no + 1} of {count}; open {shard_name(prefix, 0, count)}")
    return prefix


def _check_other(first: Shard, shard: Shard, no: int) -> None:
    """Raise unless `shard` says that it is file `no` of those that `first` begins."""
    expected = {_NO: no, _COUNT: _number(first, _COUNT), _TENSORS: _number(first, _TENSORS)}
    for name, value in expected.items():
        if (found := _number(shard, name)) != value:
            raise FileFormatError(shard.path, name, f"expected {value}, found {found}: not of {first.path.name}")
    for name, value in shard.header.metadata.items():
        if name not in _OWN_KEYS and first.header.metadata.get(name) != value:
            raise FileFormatError(shard.path, name, f"is not what {first.path.name} says, which has all keys")


def _check_tensors(shards: list[Shard]) -> None:
    """Raise unless no tensor is there twice, and all are there."""
    first, homes = shards[0], dict[str, Shard]()
    for shard in shards:
        for name in shard.header.tensors:
            if name in homes:
                raise FileFormatError(shard.path, name, f"this tensor is in {homes[name].path.name} as well")
            homes[name] = shard
    if (expected := _number(first, _TENSORS)) != len(homes):
        raise FileFormatError(
            first.path, _TENSORS, f"says {expected} tensors, the {len(shards)} files have {len(homes)}"
        )

r"""Reads R's lazy-load database (`Rdata.rdx` + `Rdata.rdb`), as far as string vectors need it.

    Rdata.rdx   gzip of a serialized list; its `variables` maps a name to (offset, length) in Rdata.rdb
    Rdata.rdb   at each offset: u32 big-endian unpacked size, one letter ('2' bzip2, 'Z' xz) unless
                the packing is zlib, then the packed bytes of a serialized object

Serialization is R's XDR format, version 2 or 3 (R Internals, section 1.8): "X\n", then integers of
four bytes, big-endian; every object starts with a flags word whose low byte is its type.
"""

import bz2
import gzip
import io
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

NIL, REFERENCE = 254, 255  # the two pseudo-types that occur here
SYMBOL, PAIRLIST, CHARS, LOGICALS, INTEGERS, STRINGS, LIST = 1, 2, 9, 10, 13, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400


class _Stream:
    """One serialized object; `read` gives lists, strings, None, or a dict for a named list."""

    def __init__(self, data: bytes) -> None:
        self._bytes = io.BytesIO(data)
        self._symbols: list[Any] = []
        if self._bytes.read(2) != b"X\n":
            raise ValueError("not R's XDR serialization")
        version, _, _ = self._integer(), self._integer(), self._integer()
        if version == 3:
            self._bytes.read(self._integer())  # the name of the native encoding

    def _integer(self) -> int:
        return struct.unpack(">i", self._bytes.read(4))[0]

    def read(self) -> Any:
        flags = self._integer()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == SYMBOL:
            self._symbols.append(self.read())
            return self._symbols[-1]
        if kind == CHARS:
            size = self._integer()
            return None if size == -1 else self._bytes.read(size).decode("utf-8")
        if kind == PAIRLIST:
            return self._pairlist(flags)
        size = self._integer()
        if kind in (INTEGERS, LOGICALS):
            value: list[Any] = [self._integer() for _ in range(size)]
        elif kind in (STRINGS, LIST):
            value = [self.read() for _ in range(size)]
        else:
            raise ValueError(f"R type {kind} is not read here")
        attributes = self.read() if flags & HAS_ATTRIBUTES else {}
        names = attributes.get("names")
        return dict(zip(names, value, strict=True)) if names else value

    def _pairlist(self, flags: int) -> dict[str, Any]:
        if flags & HAS_ATTRIBUTES or not flags & HAS_TAG:
            raise ValueError("a pairlist other than an attribute list is not read here")
        tag, value = self.read(), self.read()
        return {tag: value} | (self.read() or {})


def _unpack(chunk: bytes) -> bytes:
    body, method = chunk[5:], chunk[4:5]
    if method == b"2":
        return bz2.decompress(body)
    if method == b"Z":
        return lzma.decompress(body)
    return zlib.decompress(chunk[4:])


def read_variables(stem: Path) -> dict[str, Any]:
    """All variables of the database at `stem` (the path without its .rdx / .rdb ending)."""
    index = _Stream(gzip.decompress(stem.with_suffix(".rdx").read_bytes())).read()
    data = stem.with_suffix(".rdb").read_bytes()
    return {
        name: _Stream(_unpack(data[offset : offset + length])).read()
        for name, (offset, length) in index["variables"].items()
    }

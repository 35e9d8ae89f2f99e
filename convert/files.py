"""Small files of a checkpoint folder: read whole, checked before they are believed."""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_header import is_lfs_pointer

MAX_BYTES = 100 * 2**20  # Gemma's tokenizer.json, the largest of them, has 17 MiB
LFS_PROBLEM = "this is a Git LFS pointer, not the file itself; fetch it with git lfs"
_LARGEST = 2**53  # of a number in JSON


def read_bytes(path: Path) -> bytes:
    """All of a regular file of at most `MAX_BYTES`. Raises `FileFormatError`, also for a Git LFS pointer."""
    try:
        if not path.is_file():
            raise FileFormatError(path, "file", "is not a regular file" if path.exists() else "is missing")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise FileFormatError(path, "file", f"is longer than {MAX_BYTES} bytes")
    if is_lfs_pointer(raw):
        raise FileFormatError(path, "file", LFS_PROBLEM)
    return raw


def read_text(path: Path) -> str:
    """All of a UTF-8 file."""
    return _decode(path, "file", read_bytes(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    return parse_json(path, "JSON", read_bytes(path))


def parse_json(path: Path, field: str, raw: bytes) -> dict[str, Any]:
    """One JSON object without duplicate names. `field` says in errors what part of `path` this is."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise FileFormatError(path, field, f"{twice!r} is there twice")
        return found

    try:
        value = json.loads(_decode(path, field, raw), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, field, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileFormatError(path, field, f"expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """The fields of one JSON object, each read as the type it must have. null is as good as absent.

    Every method raises `FileFormatError` naming the field.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        return cast(int, self._typed(name, "a whole number", (int,), default))

    def number(self, name: str, default: float | None = None) -> float:
        """A number, whole or not."""
        return float(self._typed(name, "a number", (int, float), default))

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        return cast(bool, self._typed(name, "true or false", (bool,), default))

    def check_known(self, allow_unknown: bool, *known: Container[str]) -> None:
        """Refuse, unless `allow_unknown`, a field that is in none of `known`."""
        for name in () if allow_unknown else self.values:
            if not any(name in table for table in known):
                field = name if name.isprintable() else repr(name)
                raise FileFormatError(self.path, field, "is a field that we do not know; --allow-unknown ignores it")

    def _typed(self, name: str, wanted: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise FileFormatError(self.path, name, "is missing")
        if type(value) not in kinds:
            raise FileFormatError(self.path, name, f"expected {wanted}, found {value!r}")
        if abs(value) > _LARGEST:  # beyond what a float holds, arithmetic on it would fail
            raise FileFormatError(self.path, name, f"expected {wanted} up to {_LARGEST:g}")
        return value


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 up; true and false are none."""
    return type(value) is int and value >= 0


def are_counts(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers from 0 up."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(is_count(n) for n in value)


def is_unicode(text: str) -> bool:
    """Whether a JSON text can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _decode(path: Path, field: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(path, field, f"is not UTF-8: {error.reason} at byte {error.start}") from None

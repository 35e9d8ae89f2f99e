"""How documents lie on the disk: a folder each, which only its owner may enter.

    NAME/document.json   what was read, and which state file holds it: a document is there once this file is
    NAME/reading.json    how far an unfinished reading is, and its state file
    NAME/HEX.state       states, as docs/state.md has them
    NAME/lock            held by whoever reads into the folder

State files are written under new names before the JSON file that names them is replaced, so that at every moment what
is there is whole.
"""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import BusyError, FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.places import data_folder
from griffin_gguf.runtime.saved_state import LAST_POSITION
from griffin_gguf.runtime.state import State

#: "turn": behind the opening of a user's turn in the file's chat template; "text": as it is.
Form = Literal["turn", "text"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST = 16 << 20  # bytes of a JSON file: some 100,000 sources
_PIECE = 1 << 16  # bytes read at once
_DOCUMENT, _READING, _LOCK = "document.json", "reading.json", "lock"

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Tokens = Annotated[int, Meta(ge=1, le=LAST_POSITION)]
StateFile = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\.state\Z")]  # no other file can be named


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text that was read: its file's name without folders, its bytes, and the SHA-256 of these."""

    name: str
    nbytes: Annotated[int, Meta(ge=0)]
    sha256: Digest


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """document.json: see `documents.Document`."""

    version: Literal[1]
    form: Form
    fingerprint: Digest
    model: str
    backend: str
    tokens: Tokens
    sources: tuple[Source, ...]
    created: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
    state: StateFile


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """reading.json: what is being read with what, and that `state` holds the first `tokens` of it.

    `vocabulary` is a digest of the tokenizer and the chat template, which `fingerprint` leaves out.
    """

    version: Literal[1]
    form: Form
    fingerprint: Digest
    backend: str
    vocabulary: Digest
    sources: tuple[Source, ...]
    tokens: Tokens
    state: StateFile


T = TypeVar("T", Record, Checkpoint)


def folder() -> Path:
    """Where all documents are."""
    return data_folder() / "documents"


def names() -> list[str]:
    """Of all folders that may hold a document, complete or not, in order."""
    with _naming(folder()):
        found = list(folder().iterdir()) if folder().is_dir() else []
    return sorted(path.name for path in found if _NAME.fullmatch(path.name))


class Place:
    """The folder of the document called `name`. Raises `UnsupportedError` for what is no name."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            wanted = "expected 1 to 64 letters, digits, dots, hyphens and underscores, a letter or a digit first"
            raise UnsupportedError(f"document: {wanted}, found {_shown(name)}")
        self.name = name
        self.path = folder() / name

    @property
    def complete(self) -> bool:
        """Whether there is a document, sound or not."""
        return (self.path / _DOCUMENT).exists()

    def record(self) -> Record | None:
        """What document.json says; None without one. Raises `FileFormatError` for anything else in it."""
        return _read(self.path / _DOCUMENT, Record)

    def checkpoint(self) -> Checkpoint | None:
        """What reading.json says, likewise."""
        return _read(self.path / _READING, Checkpoint)

    def save(self, state: State) -> str:
        """Write a state to a new file; its name, for what comes next."""
        name = f"{secrets.token_hex(8)}.state"
        state.snapshot().save(self.path / name, private=True)
        return name

    def keep(self, checkpoint: Checkpoint, before: str | None) -> None:
        """Make `checkpoint` the one that counts; the state file of the one `before` goes."""
        _write(self.path / _READING, checkpoint)
        if before:
            self._remove([before])

    def finish(self, record: Record) -> None:
        """Make `record` the document, in place of an older one; all else but the lock goes."""
        _write(self.path / _DOCUMENT, record)
        with _naming(self.path):
            others = {path.name for path in self.path.iterdir()} - {_DOCUMENT, _LOCK, record.state}
        self._remove(sorted(others, key=lambda name: name != _READING))  # first what names a state file

    def forget(self) -> None:
        """Give up an unfinished reading."""
        self._remove([_READING])

    def _remove(self, files: Sequence[str]) -> None:
        with _naming(self.path):
            for name in files:
                (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Be the only one to write here; makes the folder, and removes it where nothing has come into it.

        Raises `BusyError` where another process is at it.
        """
        handle = self._lock()
        try:
            yield
        finally:
            with suppress(OSError):  # something is in it
                if [path.name for path in self.path.iterdir()] == [_LOCK]:
                    (self.path / _LOCK).unlink()
                    self.path.rmdir()
            os.close(handle)

    def _lock(self) -> int:
        """The folder's lock file, open and held. Whoever held it before may have removed it: then it is no lock."""
        while True:
            with _naming(self.path):
                _make_private(self.path)
                try:
                    # Were it a link into nowhere, it would be missing for ever.
                    handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                except FileNotFoundError:  # the folder was removed in this very moment
                    continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise BusyError(f"document {self.name!r}: another process is reading into it") from None
            if os.fstat(handle).st_nlink:
                return handle
            os.close(handle)

    def expect(self) -> None:
        """Raise `UnsupportedError` where there is neither a document nor an unfinished reading, sound or not."""
        if not self.path.exists():
            raise UnsupportedError(f"document {self.name!r}: there is none")

    def delete(self) -> None:
        """Remove all of it. Raises `UnsupportedError` where there is none, `BusyError` while it is being read."""
        self.expect()
        with self.locked(), _naming(self.path):
            (self.path / _DOCUMENT).unlink(missing_ok=True)  # half of a document is none
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != _LOCK:  # the last to go, with the folder
                    path.unlink()


def _make_private(path: Path) -> None:
    """A folder for its owner alone, and with it those above it that are missing."""
    for above in reversed(path.parents):
        if not above.exists():
            above.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def _read(path: Path, kind: type[T]) -> T | None:
    """A JSON file as `kind`; None where there is none."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for a writer
            raise FileFormatError(path, "file", "is not a regular file")
        with path.open("rb", buffering=0) as file:
            raw = _bounded(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    if len(raw) > _LONGEST:
        raise FileFormatError(path, "file", f"expected at most {_LONGEST} bytes")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FileFormatError(path, "contents", f"{_one_line(error)}; griffin states delete removes it") from None


def _bounded(file: FileIO) -> bytes:
    """All of it, or a little more than is allowed."""
    raw = bytearray()
    while len(raw) <= _LONGEST and (more := file.read(_PIECE)):
        raw += more
    return bytes(raw)


def _write(path: Path, value: Record | Checkpoint) -> None:
    with atomic(path, private=True) as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
        file.sync()


def _one_line(error: Exception) -> str:
    """What msgspec says, which may quote the file."""
    text = " ".join(ascii(str(error))[1:-1].split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _shown(name: str) -> str:
    """A name that is none, in a few characters of one line."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:80]}…"


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Turn the system's errors into one line."""
    try:
        yield
    except OSError as error:
        raise GriffinError(f"{error.filename or path}: {error.strerror}") from error

"""The folders of sessions: their names, who has one open, and what lies in them.

A folder belongs to the process that holds the lock on its file `lock`; the file itself stays.
"""

import fcntl
import os
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.places import data_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RECORD, STATE, _PARTIAL, _LOCK = "session.json", ".state", ".partial", "lock"
_ABANDONED = 3600.0  # seconds after which a folder without a session.json is no beginning any more


def folder() -> Path:
    """Where sessions lie; asking does not make it."""
    return data_folder() / "sessions"


def names() -> list[str]:
    """The names of all sessions, in the order of the alphabet."""
    found = (path.parent.name for path in folder().glob(f"*/{RECORD}"))
    return sorted(name for name in found if NAME.fullmatch(name))


class Lock:
    """The right to a session's folder, which one process at a time has, until `release` or its end.

    Raises `GriffinError` where another has it, where the session has just been deleted, and on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise GriffinError(f"{folder / _LOCK}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 20).decode("ascii", "replace")
            os.close(self._file)
            raise GriffinError(f"session {folder.name}: is open already, in process {holder or '?'}") from error
        if not os.fstat(self._file).st_nlink:
            os.close(self._file)
            raise unknown(folder.name)
        try:
            with naming(folder / _LOCK):
                os.truncate(self._file, 0)
                os.write(self._file, str(os.getpid()).encode())
        except GriffinError:
            os.close(self._file)
            raise

    def release(self) -> None:
        """Give it up."""
        os.close(self._file)


def place(name: str) -> Path:
    """The folder of the session of that name. Raises `GriffinError` for a name that none can have."""
    if not NAME.fullmatch(name):
        raise GriffinError(f"session {name!r}: expected a name of letters, digits, '.', '_' and '-', at most 64")
    return folder() / name


def unknown(name: str) -> GriffinError:
    """The error for a session that is not there."""
    known = ", ".join(names())
    return GriffinError(f"session {name}: is not there; " + (f"there are {known}" if known else "there is none yet"))


def made(path: Path) -> Lock:
    """Make a session's folder and hold it. Raises `GriffinError` where it cannot be, or is a session's already."""
    try:
        data_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder().mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"{error.filename or path}: cannot be made: {error.strerror}") from error
    lock = Lock(path)
    if (path / RECORD).exists():
        lock.release()
        raise GriffinError(f"session {path.name}: is there already; expected another name")
    return lock


@contextmanager
def if_free(path: Path) -> Generator[bool]:
    """Hold a session's folder where no process does; whether it is held."""
    try:
        lock = Lock(path)
    except GriffinError:  # open in another process, which goes on with it, or just deleted
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def abandoned(path: Path) -> bool:
    """Whether a folder is all that a crash within a first turn has left: states of what nobody can go on with."""
    if not NAME.fullmatch(path.name) or not path.is_dir() or time.time() - path.stat().st_mtime < _ABANDONED:
        return False
    return all(file.name == _LOCK or file.suffix in (STATE, _PARTIAL) for file in path.iterdir())


def sweep(path: Path, kept: set[str]) -> None:
    """Delete states that nothing needs, and what an interrupted write has left. Raises `GriffinError`."""
    with naming(path):
        for file in path.iterdir():
            if file.suffix == _PARTIAL or (file.suffix == STATE and file.stem not in kept):
                file.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Turn the system's errors into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise GriffinError(f"{error.filename or path}: cannot be written: {error.strerror}") from error


def nbytes_of(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir())

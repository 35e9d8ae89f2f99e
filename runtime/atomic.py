"""Files that appear whole or not at all.

Until it is complete a file is `.NAME.RANDOM.partial` beside its place; then it is renamed. So whoever opens NAME
finds what was there before or all of the new, also after a crash; and where the file was synced, after a power cut.
"""

import os
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path

from griffin_gguf.runtime.errors import GriffinError


def check_targets(paths: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Refuse, before anything is read, files that could not be put in place at the end, and any of the `inputs`."""
    for path in paths:
        if any(_same(path, other) for other in inputs):
            raise GriffinError(f"{path}: is the input as well; expected another path")
        if not path.parent.is_dir():
            raise GriffinError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise GriffinError(f"{path}: is a folder; expected the name of a file")
        if path.exists() and not path.is_file():  # a rename would put a file in the place of a device or a pipe
            raise GriffinError(f"{path}: is no regular file; expected the name of one, or a new name")
    if len({path.resolve() for path in paths}) < len(paths):
        raise GriffinError(f"{paths[0]}: two outputs have the same path")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, also where it is still to be made."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


class PartialFile:
    """An unbuffered file whose errors name `path`, the name it will have."""

    def __init__(self, path: Path, raw: RawIOBase) -> None:
        self._path, self._raw = path, raw
        self.position = 0
        self.synced = False

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        left = memoryview(data).cast("B")
        while left:
            with _naming(self._path):
                written = self._raw.write(left) or 0
            self.position += written
            left = left[written:]

    def rewrite(self, data: bytes) -> None:
        """Put `data` in the place of as many bytes at the start; the position stays."""
        end = self.position
        with _naming(self._path):
            self._raw.seek(0)
        self.write(data)
        with _naming(self._path):
            self._raw.seek(end)
        self.position = end

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with _naming(self._path):
            os.fsync(self._raw.fileno())
        self.synced = True


@contextmanager
def atomic(path: Path, private: bool = False) -> Generator[PartialFile]:
    """Open a file that takes the name `path` when the block ends well, and vanishes otherwise.

    Whoever wants it to last calls its `sync` before the end. A `private` one only its owner may read, from its first
    byte on. Raises `GriffinError` naming `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _naming(path):
            raw = temporary.open("xb", buffering=0)
            if private:
                temporary.chmod(0o600)
        with raw:
            file = PartialFile(path, raw)
            yield file
        with _naming(path):
            temporary.replace(path)
            if file.synced:
                _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # where there is none, or no way to have made it
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Make a renaming last. Windows has no such call, and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:  # files may be made in it, but not listed: it cannot be synced, and the file is there
            return
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Turn the system's errors into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise GriffinError(f"{path}: cannot be written: {error.strerror}") from error

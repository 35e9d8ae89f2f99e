"""Snapshots in a folder: state files of docs/state.md, the last used ones, for a later run or for want of memory.

A file is MODEL-COUNT-DIGEST.state: what the model and its backend are called, the number of tokens read, the digest of
the text. Only its owner may read it. A thread of the folder's own writes, so that nobody waits for a disk; after a
power cut a file may be damaged, which its checksum tells.
"""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.snapshot import Snapshot

_log = logging.getLogger("griffin.cache")

DIGEST_BYTES = 16
_NAMED = re.compile(r"(0|[1-9][0-9]{0,15})-([0-9a-f]{32})\.state")
_PENDING = 4  # snapshots that wait to be written; what comes while so many do is lost

#: Reads a state file.
Load = Callable[[Path], Snapshot]


@dataclass(frozen=True)
class Key:
    """A text: how many tokens it has, and the BLAKE2b digest, in hex, of what it goes on from and of them."""

    count: int
    digest: str


class SnapshotFolder:
    """At most `nbytes` of state files in `path` (made where it is not there) for one `model`, as files call it.

    `load` reads one. Other models' files there are let alone. All methods may be called from any thread. Raises
    `OSError` for a folder that cannot be made or read.
    """

    def __init__(self, path: Path, nbytes: int, model: str, load: Load) -> None:
        self._path, self._most, self._load = path, nbytes, load
        self._prefix = f"{model}-"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sizes = self._found()
        self._lock = Lock()
        self._writer = ThreadPoolExecutor(1, "griffin-cache")
        self._pending = 0

    def keys(self) -> list[Key]:
        """Of all files."""
        with self._lock:
            return list(self._sizes)

    def get(self, key: Key) -> Snapshot | None:
        """Read one; None, and the file is gone, where it is damaged."""
        path = self._file(key)
        try:
            snapshot = self._load(path)
            self._use(key)
        except (GriffinError, OSError) as error:
            _log.warning("a snapshot of the cache cannot be used: %s", error)
            if isinstance(error, FileFormatError):
                path.unlink(missing_ok=True)
            with self._lock:
                self._sizes.pop(key, None)
            return None
        return snapshot

    def put(self, key: Key, snapshot: Snapshot) -> None:
        """Write one, soon."""
        with self._lock:
            if key in self._sizes or self._pending == _PENDING:
                return
            self._pending += 1
        self._writer.submit(self._write, key, snapshot)

    def fill(self, snapshots: Sequence[tuple[Key, Snapshot]]) -> None:
        """Write these now, then nothing more: as many as there is room for. The first is the last used.

        What is there from before makes room for them.
        """
        self._writer.shutdown()
        room, chosen = self._most, list[tuple[Key, Snapshot]]()
        for key, snapshot in snapshots:
            room -= snapshot.file_nbytes
            if room < 0:
                break
            chosen.append((key, snapshot))
        for key, snapshot in reversed(chosen):
            if key in self._sizes:
                self._use(key)
            else:
                self._save(key, snapshot)
        self._bound()

    def _use(self, key: Key) -> None:
        """Let it be the last used one, for later runs too."""
        os.utime(self._file(key))
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)

    def _write(self, key: Key, snapshot: Snapshot) -> None:
        self._save(key, snapshot)
        with self._lock:
            self._pending -= 1
        self._bound()

    def _save(self, key: Key, snapshot: Snapshot) -> int:
        """Write a file; its bytes, 0 where that fails."""
        path = self._file(key)
        try:
            snapshot.save(path, private=True, lasting=False)
            size = path.stat().st_size
        except (GriffinError, OSError) as error:
            _log.warning("a snapshot does not go to the cache's folder: %s", error)
            return 0
        with self._lock:
            self._sizes[key] = size
        return size

    def _bound(self) -> None:
        """Delete what there is no room for, the least used first."""
        with self._lock:
            gone: list[Key] = []
            while sum(self._sizes.values()) > self._most:
                gone.append(self._sizes.popitem(last=False)[0])
        for old in gone:
            self._file(old).unlink(missing_ok=True)

    def _file(self, key: Key) -> Path:
        return self._path / f"{self._prefix}{key.count}-{key.digest}.state"

    def _found(self) -> OrderedDict[Key, int]:
        """The files of this model and their bytes, the last used one last."""
        found: list[tuple[float, Key, int]] = []
        for path in self._path.glob(f"{self._prefix}*.state"):
            if named := _NAMED.fullmatch(path.name.removeprefix(self._prefix)):
                status = path.stat()
                found.append((status.st_mtime, Key(int(named[1]), named[2]), status.st_size))
        return OrderedDict((key, size) for _, key, size in sorted(found, key=lambda entry: entry[0]))

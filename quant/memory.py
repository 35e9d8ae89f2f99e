"""What a process has in memory, at most: its own, and pages of files.

On Linux from /proc; on macOS the footprint that Activity Monitor shows, which leaves out clean pages of mapped files.
"""

import ctypes
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.01  # seconds between two looks


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes, each the most that was seen.

    `anonymous` is what the process allocated: states, buffers, copies of weights, the vocabulary, Python. `mapped`
    are pages of files: weights, and the programs themselves. The system may drop those and read them again; a model
    whose weights are dropped reads them from the disk for every token.
    """

    peak: int
    anonymous: int
    mapped: int

    @property
    def needed(self) -> int:
        """What a machine must have free to run as measured."""
        return self.anonymous + self.mapped


class Watch:
    """A context manager that looks at this process every 10 ms; `memory` is what it has seen so far."""

    def __init__(self) -> None:
        self._anonymous = self._mapped = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    @property
    def memory(self) -> Memory:
        """Up to now."""
        self._look()
        return Memory(_peak(), self._anonymous, self._mapped)

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        anonymous, mapped = _split()
        self._anonymous, self._mapped = max(anonymous, self._anonymous), max(mapped, self._mapped)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def _split() -> tuple[int, int]:
    """What is resident now: allocated, and of files."""
    if _STATUS.exists():
        sizes = _status()
        return sizes["RssAnon"], sizes["RssFile"] + sizes["RssShmem"]
    resident, footprint = psutil.Process().memory_info().rss, _footprint()
    return footprint, max(0, resident - footprint)


def _peak() -> int:
    """Most that was resident at once, since the process began."""
    if _STATUS.exists():  # ru_maxrss would count the process that started this one
        return _status()["VmHWM"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


#: Of macOS' `struct rusage_info_v0` (sys/resource.h): 16 bytes of UUID, then u64 each, up to what is needed here.
_RUSAGE_V0 = (
    "user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins", "wired_size", "resident_size",
    "phys_footprint", "proc_start_abstime", "proc_exit_abstime",
)  # fmt: skip


class _Rusage(ctypes.Structure):
    _fields_ = (("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in _RUSAGE_V0))


def _footprint() -> int:
    """macOS: physical footprint of this process in bytes."""
    found = _Rusage()
    libproc = ctypes.CDLL(None, use_errno=True)
    if libproc.proc_pid_rusage(psutil.Process().pid, 0, ctypes.byref(found)):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return int(found.phys_footprint)

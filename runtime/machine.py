"""What the machine offers: how many threads are worth starting; and what we take of it."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from griffin_gguf.runtime.errors import UnsupportedError

#: Where Linux has the limit of a container, as that sees it: control groups of version 2, and of version 1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_MOST_THREADS = 512  # ggml's GGML_MAX_N_THREADS: one more ends the process


def checked_threads(threads: int | None) -> int | None:
    """Return `threads`, None for a default; raises `UnsupportedError` for a number that cannot be."""
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UnsupportedError(f"threads: expected 1 to {_MOST_THREADS}, found {threads}")
    return threads


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or fewer where a container has a limit (Linux)."""
    limits = [psutil.virtual_memory().total]
    for path in _CGROUP_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdecimal():  # else "max"
            limits.append(int(text))
    return min(limits)


def compute_threads() -> int:
    """Threads for matrix products: one a physical core, since two on one core share its multipliers."""
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())


def resident_bytes() -> tuple[int, int | None]:
    """Resident memory of this process, and of it what was allocated, not mapped from files (Linux; else None)."""
    info: Any = psutil.Process().memory_info()
    shared: int | None = getattr(info, "shared", None)
    return info.rss, None if shared is None else info.rss - shared


def give_back_large_blocks(nbytes: int = 1 << 20) -> bool:
    """Let freed blocks of at least so many bytes be the system's again at once; False where that cannot be said.

    By itself glibc raises this bound to the largest block that was freed so far. What comes and goes in such sizes for
    hours, graphs and states, then leaves holes in heaps that only grow.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, nbytes))

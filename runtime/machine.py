"""What the machine offers: how many threads are worth starting."""

import os

import psutil


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_threads() -> int:
    """Threads for matrix products: one a physical core, since two on one core share its multipliers."""
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())

"""Wall time of a call."""

import time
from collections.abc import Callable


def seconds(job: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start

"""Functions for a process of its own."""

import gc
import mmap
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from griffin_gguf.quant.memory import Watch
from griffin_gguf.quant.process import Progress
from griffin_gguf.quant.report.data import Quality
from griffin_gguf.runtime.errors import FileFormatError


@dataclass(frozen=True)
class Sum:
    value: float
    words: str
    process: int


@dataclass(frozen=True)
class Held:
    before: int
    peak: int
    anonymous: int
    mapped: int
    after: int


def add(a: float, b: float, words: str, progress: Progress) -> Sum:
    progress(1, 2)
    progress(2, 2)
    return Sum(a + b, words, os.getpid())


def shouting(progress: Progress) -> Sum:
    os.write(1, b'["result", "not mine"]\n')
    sys.stdout.write("nor this\n")
    return Sum(0, "quiet", 0)


def failing(progress: Progress) -> Sum:
    raise FileFormatError("some.gguf", "field", "is wrong")


def dying(how: str, progress: Progress) -> Sum:
    if how == "abort":
        os.write(2, b"ggml_abort: no such luck\n")
        os.abort()
    if how == "exit":
        os._exit(3)
    return Sum(1 / 0, "", 0)


def dying_quality(**arguments: Any) -> Quality:
    """In the place of a measurement."""
    os.write(2, b"ggml_abort: no such luck\n")
    os.abort()


def sleeping(progress: Progress) -> Sum:
    progress(0, 1)
    time.sleep(60)
    return Sum(0, "", 0)


def holding(mebibytes: int, progress: Progress) -> Held:
    """Take so much memory and give it back."""
    with Watch() as watch:
        before = watch.memory.anonymous
        held = np.ones(mebibytes << 17)
        found = watch.memory
        del held
        gc.collect()
        after = watch.memory.anonymous
    return Held(before, found.peak, found.anonymous, found.mapped, after)


def mapping(path: str, progress: Progress) -> Held:
    """Map a file and look at all of its pages."""
    with Watch() as watch, Path(path).open("rb") as file:
        before = watch.memory.mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
            found = watch.memory
    return Held(before, found.peak, found.anonymous, found.mapped, found.anonymous)

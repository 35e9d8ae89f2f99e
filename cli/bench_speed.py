"""`griffin bench`: speeds in llama-bench's terms."""

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from griffin_gguf.cli import __version__
from griffin_gguf.cli.bench_tune import note_load
from griffin_gguf.cli.console import clean, note
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.bench_table import Machine, Row
    from griffin_gguf.quant.speed import Test

#: One number, or several: FIRST-LAST, FIRST-LAST+STEP, FIRST-LAST*FACTOR.
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
_MOST_VALUES = 1000  # of one option
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Wanted:
    """What to measure of every model: see `speed.plan`; each of `threads` in turn, None for the model's own choice."""

    tests: "Sequence[Test]"
    threads: Sequence[int | None]
    repetitions: int
    output: str

    @property
    def batches(self) -> list[int]:
        """The different sizes of batches."""
        return list(dict.fromkeys(test.batch for test in self.tests))

    @property
    def groups(self) -> "list[list[Test]]":
        """The tests of one depth and batch at a time."""
        return [list(group) for _, group in itertools.groupby(self.tests, lambda test: (test.depth, test.batch))]


def measure_speeds(paths: Sequence[Path], wanted: Wanted) -> None:
    """Measure model after model, each depth in a process of its own, and print rows as soon as they are there."""
    from griffin_gguf.quant.bench_table import FORMATS, Machine
    from griffin_gguf.quant.runner import FileFacts
    from griffin_gguf.runtime.gguf_file import GgufFile

    for path in paths:  # what cannot be opened is said before anything is measured
        with GgufFile.open(path) as file:
            FileFacts(file)
    note_load("other programs make these speeds smaller, and less alike")
    machine = Machine.here(f"griffin {__version__}")
    table = FORMATS[wanted.output](machine, wanted.batches)
    before = table.head()
    for row in _rows(paths, wanted, machine):
        _write(before + table.row(row))
        before = ""
    _write(table.foot())


def _rows(paths: Sequence[Path], wanted: Wanted, machine: "Machine") -> "Iterator[Row]":
    from griffin_gguf.quant.bench_table import Row
    from griffin_gguf.quant.speed import measure

    told = set[str | None]({None})
    for path, threads, group in itertools.product(paths, wanted.threads, wanted.groups):
        begun = datetime.now(UTC)
        label = f"{clean(path.name)}, {', '.join(test.name for test in group)}"
        with progress(label, unit="tokens") as report:
            found = measure(path, group, threads=threads, repetitions=wanted.repetitions, progress=report)
        if found.notice not in told:
            told.add(found.notice)
            note(str(found.notice))
        for test, samples in zip(group, found.samples, strict=True):
            yield Row(machine, path, found, test, samples, begun)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_counts(option: str, given: Sequence[str] | None, *, least: int = 0) -> list[int]:
    """The numbers of a list option in llama-bench's way: "512", "128,256", "1-8*2", and the option more than once.

    A usage error for anything else.
    """
    found = [n for text in given or () for part in text.split(",") for n in _numbers(option, part.strip())]
    for n in found:
        if not least <= n <= _MOST:
            raise typer.BadParameter(f"{option}: expected numbers from {least} to {_MOST}, found {n}")
    if len(found) > _MOST_VALUES:
        raise typer.BadParameter(f"{option}: expected {_MOST_VALUES} numbers at most, found {len(found)}")
    return found


def _numbers(option: str, text: str) -> Sequence[int]:
    match = _RANGE.fullmatch(text)
    if not match:
        raise typer.BadParameter(f"{option}: expected a number or a range such as 1-8+1 or 1-8*2, found {text!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    step, multiplies = int(match[4] or 1), match[3] == "*"
    if first > last or step < 1 + multiplies or (multiplies and first < 1):
        raise typer.BadParameter(f"{option}: {text!r} is a range that leads nowhere")
    if not multiplies:
        return range(first, last + 1, step)[: _MOST_VALUES + 1]
    powers = list[int]()
    while first <= last:
        powers.append(first)
        first *= step
    return powers


def parse_pairs(option: str, given: Sequence[str] | None) -> list[tuple[int, int]]:
    """PROMPT,GEN, as often as given; a usage error for anything else."""
    found = list[tuple[int, int]]()
    for text in given or ():
        match = re.fullmatch(r"(\d+),(\d+)", text.strip())
        pair: Any = match and (int(match[1]), int(match[2]))
        if not pair or max(pair) > _MOST or not any(pair):
            raise typer.BadParameter(f"{option}: expected two numbers such as 512,128, found {text!r}")
        found.append(pair)
    return found

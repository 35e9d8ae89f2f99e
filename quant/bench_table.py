"""Measured speeds as llama-bench writes them: Markdown, JSON, JSON lines and CSV, with its columns and field names.

Each format is three pieces of text, so that a row can be shown as soon as it is measured: what comes before all rows,
a row, what comes after.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from griffin_gguf.quant.speed import BATCH, Measured, Samples, Test
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.catalog import handles, library, properties

_GPUS = (abi.DEVICE_GPU, abi.DEVICE_IGPU)


@dataclass(frozen=True)
class Machine:
    """What it was measured with, as ggml describes it."""

    build: str
    cpu: str
    gpu: str
    backends: str  # of ggml, but for the CPU's where there are others

    @classmethod
    def here(cls, program: str) -> "Machine":
        """The one we are on; `program` names what measures. Raises `BackendError` where ggml cannot be loaded."""
        found = [properties(device) for device in handles()]
        described = [(p.type in _GPUS, p.description.decode(errors="replace").strip()) for p in found]
        names = dict.fromkeys(_registry(device) for device in handles())
        return cls(
            f"{program}, ggml {abi.GGML_VERSION}",
            ", ".join(text for is_gpu, text in described if not is_gpu),
            ", ".join(text for is_gpu, text in described if is_gpu),
            ",".join(name for name in names if name != "CPU") or "CPU",
        )


def _registry(device: int) -> str:
    lib = library(device)
    return lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device)).decode()


@dataclass(frozen=True)
class Row:
    """A test of the model at `path`, and how it went."""

    machine: Machine
    path: Path
    model: Measured
    test: Test
    samples: Samples
    time: datetime


#: Fields of CSV and JSON: llama-bench's, as far as they mean something here, and `runner`, which is ours.
FIELDS: dict[str, Callable[[Row], Any]] = {
    "build_commit": lambda row: row.machine.build,
    "cpu_info": lambda row: row.machine.cpu,
    "gpu_info": lambda row: row.machine.gpu,
    "backends": lambda row: row.machine.backends,
    "runner": lambda row: row.model.runner,
    "model_filename": lambda row: str(row.path),
    "model_type": lambda row: row.model.description,
    "model_size": lambda row: row.model.weights_nbytes,
    "model_n_params": lambda row: row.model.parameters,
    "n_batch": lambda row: row.test.batch,
    "n_ubatch": lambda row: row.model.chunk,
    "n_threads": lambda row: row.model.threads,
    "n_prompt": lambda row: row.test.prompt,
    "n_gen": lambda row: row.test.gen,
    "n_depth": lambda row: row.test.depth,
    "test_time": lambda row: row.time.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "avg_ns": lambda row: round(row.samples.mean_ns),
    "stddev_ns": lambda row: round(row.samples.sd_ns),
    "avg_ts": lambda row: round(row.samples.mean, 6),
    "stddev_ts": lambda row: round(row.samples.sd, 6),
}

#: Fields of JSON alone.
_SAMPLES: dict[str, Callable[[Row], Any]] = {
    "samples_ns": lambda row: list(row.samples.ns),
    "samples_ts": lambda row: [round(rate, 6) for rate in row.samples.rates],
}


@dataclass(frozen=True)
class _Column:
    """Of the Markdown table. Numbers stand on the right."""

    heading: str
    width: int
    cell: Callable[[Row], str]
    right: bool = True

    def padded(self, text: str) -> str:
        return text.rjust(self.width) if self.right else text.ljust(self.width)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 10**9 else f"{count / 1e6:.2f} M"


_N_BATCH = _Column("n_batch", 7, lambda row: str(row.test.batch))
_COLUMNS = (
    _Column("model", 36, lambda row: row.model.description, right=False),
    _Column("size", 10, lambda row: _size(row.model.weights_nbytes)),
    _Column("params", 10, lambda row: _count(row.model.parameters)),
    _Column("backend", 10, lambda row: row.machine.backends, right=False),
    _Column("threads", 7, lambda row: str(row.model.threads)),
    _N_BATCH,
    _Column("test", 15, lambda row: row.test.name),
    _Column("t/s", 20, lambda row: f"{row.samples.mean:.2f} ± {row.samples.sd:.2f}"),
)


class Format(Protocol):
    """A way to write rows."""

    def head(self) -> str:
        """What comes before all rows."""
        ...

    def row(self, row: Row) -> str:
        """A row; its whole lines."""
        ...

    def foot(self) -> str:
        """What comes after all rows."""
        ...


class Markdown:
    """llama-bench's table, with a column for batches where they are not its default."""

    def __init__(self, machine: Machine, batches: Sequence[int]) -> None:
        self._build = machine.build
        usual = list(batches) == [BATCH]
        self._columns = [column for column in _COLUMNS if column is not _N_BATCH or not usual]

    def head(self) -> str:
        """Headings, and the line that says on which side a column stands."""
        rules = ["-" * (column.width - 1) + ("-:"[column.right]) for column in self._columns]
        return self._line([c.heading for c in self._columns]) + "| " + " | ".join(rules) + " |\n"

    def row(self, row: Row) -> str:
        """A line."""
        return self._line([column.cell(row) for column in self._columns])

    def foot(self) -> str:
        """What it was measured with."""
        return f"\nbuild: {self._build}\n"

    def _line(self, cells: Sequence[str]) -> str:
        padded = (column.padded(_plain(cell)) for column, cell in zip(self._columns, cells, strict=True))
        return "| " + " | ".join(padded) + " |\n"


def _plain(text: str) -> str:
    """What stays within a cell: a file may call its type anything."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")


class Json:
    """One array of objects."""

    def __init__(self) -> None:
        self._between = ""

    def head(self) -> str:
        """The array's beginning."""
        return "["

    def row(self, row: Row) -> str:
        """An object, after a comma where it is not the first."""
        before, self._between = self._between, ","
        return f"{before}\n{json.dumps(_object(row), indent=2)}"

    def foot(self) -> str:
        """The array's end."""
        return "\n]\n"


class JsonLines:
    """An object a line."""

    def head(self) -> str:
        """Nothing."""
        return ""

    def row(self, row: Row) -> str:
        """A line."""
        return json.dumps(_object(row)) + "\n"

    def foot(self) -> str:
        """Nothing."""
        return ""


class Csv:
    """A line of names, then a line a row, everything in quotes."""

    def head(self) -> str:
        """The names."""
        return ",".join(FIELDS) + "\n"

    def row(self, row: Row) -> str:
        """A line."""
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(value(row) for value in FIELDS.values())
        return line.getvalue()

    def foot(self) -> str:
        """Nothing."""
        return ""


def _object(row: Row) -> dict[str, Any]:
    return {name: value(row) for name, value in (FIELDS | _SAMPLES).items()}


#: Name -> how to begin one, for a machine and the batches that will be measured.
FORMATS: dict[str, Callable[[Machine, Sequence[int]], Format]] = {
    "md": Markdown,
    "json": lambda machine, batches: Json(),
    "jsonl": lambda machine, batches: JsonLines(),
    "csv": lambda machine, batches: Csv(),
}

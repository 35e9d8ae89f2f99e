"""A Griffin GGUF rewritten in another file type, streaming."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant.encode import EncodingError
from griffin_gguf.quant.recipes import FileType, Metadata, Planned, file_type, plan
from griffin_gguf.quant.writer import Output, Progress, check_targets, file_size, write
from griffin_gguf.runtime.arch import Tensor
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize

#: Types that hold what the model was trained to, or nearly: quantizing them loses precision only once.
_UNQUANTIZED = frozenset({T.F32, T.F16, T.BF16})


@dataclass(frozen=True)
class FilePlan:
    """What a quantized file will hold: its tensors, the type of each in the source, and its exact size in bytes."""

    tensors: list[Planned]
    source_types: dict[str, T]
    size: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(row.tensor.shape) for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight."""
        return 8 * sum(row.nbytes for row in self.tensors) / self.parameters

    @property
    def notes(self) -> list[str]:
        """One line for each tensor that could not have the type its recipe names."""
        return [f"{row.tensor.name}: {row.note}" for row in self.tensors if row.note]


def dry_run(source: Path, type: str | FileType, *, allow_requantize: bool = False) -> FilePlan:
    """Say what `quantize` would write, reading the header of `source` alone. Raises as `quantize` does."""
    with GgufFile.open(source) as file:
        output = _output(file, source, type, allow_requantize)
        return _file_plan(file, output, file_size(output))


def quantize(
    source: Path,
    target: Path,
    type: str | FileType,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_requantize: bool = False,
) -> FilePlan:
    """Write `source`, a Griffin GGUF, to `target` as a file of that type; every other key is copied as it is.

    Raises `FileFormatError` for a bad source, `UnsupportedError` for another architecture, an unknown file type
    or a source that is quantized already (unless `allow_requantize`), `GriffinError` for a target that is the
    source or cannot be written.
    """
    check_targets([target])
    with GgufFile.open(source) as file:
        if target.exists() and target.samefile(source):
            raise GriffinError(f"{target}: is the input as well; expected another path")
        output = _output(file, target, type, allow_requantize)
        try:
            write([output], _reader(file), threads=threads, progress=progress)
        except EncodingError as error:
            raise FileFormatError(source, error.tensor, error.problem) from None
        return _file_plan(file, output, target.stat().st_size)


def _output(file: GgufFile, target: Path, type: str | FileType, allow_requantize: bool) -> Output:
    recipe = file_type(type) if isinstance(type, str) else type
    planned = plan(file.hyperparameters(), recipe)
    quantized = next((info for info in file.tensors.values() if info.type not in _UNQUANTIZED), None)
    if quantized and not allow_requantize:
        raise UnsupportedError(
            f"{file.path}: {quantized.name}: is quantized already ({quantized.type.name}), and quantizing it again "
            "loses more; start from an F32, F16 or BF16 file (--allow-requantize does it all the same)"
        )
    metadata: Metadata = {name: (value, *file.types[name]) for name, value in file.metadata.items()}
    metadata.pop("general.alignment", None)  # it is of the source's layout
    return Output(target, metadata | recipe.metadata, planned)


def _file_plan(file: GgufFile, output: Output, size: int) -> FilePlan:
    return FilePlan(output.plan, {name: info.type for name, info in file.tensors.items()}, size)


def _reader(file: GgufFile) -> Callable[[Tensor, int, int], NDArray[np.float32]]:
    def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        return dequantize(file.tensors[tensor.name], file.data(tensor.name), start, stop)

    return read

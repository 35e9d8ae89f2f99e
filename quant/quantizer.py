"""A Griffin GGUF rewritten in another file type, streaming."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant import blocks, weighting
from griffin_gguf.quant.encode import Encoder, EncodingError, encode_tensor
from griffin_gguf.quant.file_types import PLAIN, RECIPE, FileType, Metadata, file_type
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.overrides import TensorTypes, override_keys
from griffin_gguf.quant.recipes import Choices, Planned, plan, row_bytes
from griffin_gguf.quant.writer import Output, Progress, file_size, files, write
from griffin_gguf.runtime.arch import CHECKSUMS, Tensor
from griffin_gguf.runtime.atomic import check_targets
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile, TensorInfo, dequantize

#: In place of a file type: every tensor stays as it is. For splitting, joining and changing keys.
COPY = "COPY"

#: Keys that tell how a file was quantized; they do not outlive another quantization.
_HISTORY = ("quantize.", RECIPE)


@dataclass(frozen=True)
class Settings:
    """What else there is to say than the file type.

    `types` gives single tensors their types, as an automatic mix does, and `recipe` says so in the file; `keys` are
    KEY=TYPE:VALUE; `max_bytes` splits the file (see `writer.Output`).
    """

    tensor_types: TensorTypes = field(default_factory=TensorTypes)
    types: Mapping[str, T] = field(default_factory=dict[str, T])
    recipe: str = ""
    imatrix: ImportanceMatrix | None = None
    keys: Sequence[str] = ()
    max_bytes: int | None = None
    allow_requantize: bool = False


@dataclass(frozen=True)
class FilePlan:
    """What a quantized file will hold: its tensors, the type of each in the source, its exact size in bytes.

    `paths` are the files it becomes, `notes` lines about tensors that could not be treated as was asked.
    """

    tensors: list[Planned]
    source_types: dict[str, T]
    size: int
    paths: list[Path]
    notes: list[str]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(row.tensor.shape) for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight."""
        return 8 * sum(row.nbytes for row in self.tensors) / self.parameters


def dry_run(source: Path, type: str | FileType, settings: Settings = Settings(), *, target: Path) -> FilePlan:
    """Say what `quantize` would write to `target`, reading the header of `source` alone.

    Raises as `quantize` does, but for an importance matrix that is missing: a note says that there must be one.
    """
    with GgufFile.open(source) as file:
        job = _Job(file, target, type, settings)
        job.check_targets()
        return job.described(job.lacking, file_size(job.output))


def quantize(
    source: Path,
    target: Path,
    type: str | FileType,
    settings: Settings = Settings(),
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> FilePlan:
    """Write `source`, a Griffin GGUF, to `target` as a file of that type; every other key is copied as it is.

    A tensor that has its type already is copied byte for byte; with `type` "COPY" all are. Raises `FileFormatError`
    for a bad source or one that changes while it is read, `UnsupportedError` for another architecture, an unknown
    type, a source that is quantized already (unless allowed), a type that needs an importance matrix where there is
    none, and `GriffinError` for a target that is the source or cannot be written.
    """
    with GgufFile.open(source) as file:
        job = _Job(file, target, type, settings)
        job.check_targets()
        if job.lacking:
            raise UnsupportedError(job.lacking[0])
        try:
            write([job.output], job.encoder, threads=threads, progress=progress, check=file.check_unchanged)
        except EncodingError as error:
            raise FileFormatError(source, error.tensor, error.problem) from None
        return job.described([], sum(part.path.stat().st_size for part in files(job.output)))


class _Job:
    """One source and what shall become of it."""

    def __init__(self, file: GgufFile, target: Path, type: str | FileType, settings: Settings) -> None:
        self._file, self._settings = file, settings
        self._hp = hp = file.hyperparameters()
        copied = isinstance(type, str) and type.upper() == COPY
        recipe = file_type("F32" if copied else type) if isinstance(type, str) else type
        choices = self._choices(settings, copied)
        self._importance = weighting.importance_of(settings.imatrix, hp)
        planned = plan(hp, recipe, choices, imatrix=settings.imatrix is not None)
        self._refuse_requantizing(planned)
        plain = plan(hp, recipe, imatrix=settings.imatrix is not None)
        chosen = sum(row.type is not other.type for row, other in zip(planned, plain, strict=True))
        metadata = self._metadata(None if copied else recipe, chosen)
        self.output = Output(target, metadata, planned, settings.max_bytes)
        self.lacking = [] if copied else weighting.lacking(planned, recipe, self._importance, settings.imatrix)

    def _choices(self, settings: Settings, copied: bool) -> Choices:
        chosen = settings.tensor_types.choices(self._hp)
        if not copied:
            return Choices({**settings.types, **chosen.types}, chosen.pure)
        if chosen != Choices() or settings.imatrix:
            raise UnsupportedError(f"{COPY} leaves every tensor as it is: neither types nor an imatrix go with it")
        return Choices({name: info.type for name, info in self._file.tensors.items()})

    def _refuse_requantizing(self, planned: Sequence[Planned]) -> None:
        for row in planned:
            old = self._file.tensors[row.tensor.name].type
            if old not in PLAIN and row.type is not old and not self._settings.allow_requantize:
                raise UnsupportedError(
                    f"{self._file.path}: {row.tensor.name}: is quantized already ({old.name}), and quantizing it again "
                    "loses more; start from an F32, F16 or BF16 file (--allow-requantize does it all the same)"
                )

    def _metadata(self, recipe: FileType | None, chosen: int) -> Metadata:
        """All keys of the target: the source's, what the recipe says with so many types `chosen`, and what was set."""
        file, settings = self._file, self._settings
        found: Metadata = {name: (value, *file.types[name]) for name, value in file.metadata.items()}
        for name in ("general.alignment", CHECKSUMS):  # they are of the source's layout and bytes
            found.pop(name, None)
        if recipe:
            found = {name: value for name, value in found.items() if not name.startswith(_HISTORY)} | recipe.metadata
            words = settings.recipe or (f"{recipe.name}, {chosen} tensors in other types" if chosen else "")
            found |= {RECIPE: (words, GGUFValueType.STRING, None)} if words else {}
            found |= weighting.keys(settings.imatrix, recipe)
        return override_keys(file.path, found, settings.keys, file.tensors)

    def check_targets(self) -> None:
        """Refuse targets that cannot be, or that are read."""
        imatrix = self._settings.imatrix
        inputs = [shard.path for shard in self._file.shards] + ([imatrix.path] if imatrix else [])
        check_targets([part.path for part in files(self.output)], inputs)

    @property
    def encoder(self) -> Encoder:
        """What the writer calls: rows as they are where the type stays, else decoded and encoded anew."""
        file, importance = self._file, self._importance

        def encode_rows(tensor: Tensor, start: int, stop: int, types: Sequence[T]) -> list[NDArray[np.uint8]]:
            info = file.tensors[tensor.name]
            width = row_bytes(info.type, tensor.shape[-1])
            raw = file.read(tensor.name, start * width, stop * width)
            (type,) = types
            if type is info.type or info.type not in PLAIN:  # what is encoded from plain rows is checked there
                _check_blocks(info, raw, start * width)
            if type is info.type:
                return [raw]
            return [encode_tensor(tensor, type, dequantize(info, raw), start, importance)]

        return encode_rows

    def described(self, notes: Sequence[str], size: int) -> FilePlan:
        """Tell of it, with `notes` after those about fallbacks and weights."""
        rows = self.output.plan
        lines = [f"{row.tensor.name}: {row.note}" for row in rows if row.note]
        lines += weighting.unweighted(rows, self._settings.imatrix, self._hp)
        parts = [part.path for part in files(self.output)]
        source_types = {name: info.type for name, info in self._file.tensors.items()}
        return FilePlan(rows, source_types, size, parts, [*lines, *notes])


def _check_blocks(info: TensorInfo, raw: NDArray[np.uint8], at: int) -> None:
    """Refuse bytes of a tensor, from byte `at` of it on, that hold NaN or infinity."""
    if found := blocks.damage(info.type, raw):
        size = GGML_QUANT_SIZES[info.type][1]
        raise EncodingError(f"holds NaN or infinity: {found.problem} in block {found.first + at // size}", info.name)
